"""SURM's adapter form in models of every style: at kernels, at biases, through scans; and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from moved import moved

import jaxpeft
from jaxpeft import models
from jaxpeft.methods import lora, surm_block

KEY, WIDTH = jax.random.key(0), 8


def trained(adapter):
    return moved(adapter, 0.3)


def by_hand(h, leaves, layer):
    """h + gelu(C(b ⊙ a) h) + β, with the matrix written out."""
    c, n = leaves["a"][layer] * leaves["b"][layer], WIDTH
    matrix = jnp.array([[c[(i - j) % n] for j in range(n)] for i in range(n)])
    return h + jax.nn.gelu(h @ matrix.T) + leaves["bias"][layer]


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        return x + nn.Dense(WIDTH, name="output")(nn.tanh(nn.Dense(12, name="up")(x))), None


@pytest.mark.parametrize("scanned", [False, True])
def test_behind_the_bias_of_a_linen_layer(scanned) -> None:
    x = jax.random.normal(KEY, (2, 3, WIDTH))
    stack = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=1)
    model = stack(name="block") if scanned else Block(name="block")
    params = model.init(KEY, x, None)["params"]
    params = jax.tree.map(lambda leaf: leaf + 0.1, params)
    sites = jaxpeft.find(params, "output/bias", layouts={"output/bias": "lo"} if scanned else None)
    adapter = trained(jaxpeft.init(KEY, surm_block.Spec(), sites))

    def apply(params, x):
        return model.apply({"params": params}, x, None)[0]

    assert not jaxpeft.explain(apply, params, adapter, x).materialized
    p = jax.tree.map(lambda leaf: leaf[0], params) if scanned else params
    h = jnp.tanh(x @ p["up"]["kernel"] + p["up"]["bias"]) @ p["output"]["kernel"] + p["output"]["bias"]
    found = jaxpeft.adapt(apply)(params, adapter, x)
    np.testing.assert_allclose(found, x + by_hand(h, adapter.params["output/bias"], 0), atol=1e-5)


def test_behind_a_kernel_and_on_top_of_lora_in_an_nnx_module() -> None:
    module = nnx.Linear(6, WIDTH, use_bias=False, rngs=nnx.Rngs(0))
    graph, state = nnx.split(module)
    params, x = nnx.to_pure_dict(state), jax.random.normal(KEY, (4, 6))

    def apply(params, x):
        filled = jax.tree.map(lambda leaf: leaf, state)
        nnx.replace_by_pure_dict(filled, params)
        return nnx.merge(graph, filled)(x)

    sites = jaxpeft.find(params, "kernel")
    block = trained(jaxpeft.init(KEY, surm_block.Spec(), sites))
    low = trained(jaxpeft.init(KEY, lora.Spec(rank=2), sites))
    for adapters, h in (([block], x @ params["kernel"]), ([block, low], x @ jaxpeft.merge(params, low)["kernel"])):
        found = jaxpeft.adapt(apply)(params, adapters, x)
        np.testing.assert_allclose(found, by_hand(h, block.params["kernel"], 0), atol=1e-5)


def test_in_the_shipped_decoder() -> None:
    config = models.Config(
        vocab_size=16, hidden_size=WIDTH, intermediate_size=12, num_hidden_layers=3, num_attention_heads=2
    )
    model = models.random(config, KEY)
    sites = jaxpeft.find(model.params, r".*/(o_proj|down_proj)/kernel")
    adapter, ids = jaxpeft.init(KEY, surm_block.Spec(), sites), jnp.arange(6)[None]
    same = jaxpeft.adapt(model.logits)(model.params, adapter, ids)
    np.testing.assert_allclose(same, model.logits(model.params, ids), atol=1e-5)
    moved = jaxpeft.adapt(model.logits)(model.params, trained(adapter), ids)
    assert float(jnp.abs(moved - same).max()) > 1e-3
    assert not jaxpeft.explain(model.logits, model.params, adapter, ids).materialized


def test_count_of_the_paper() -> None:
    """BERT-base: 24 places of 3 · 768."""
    kernel = jax.ShapeDtypeStruct((12, 768, 768), "float32")
    sites = jaxpeft.find({"attention": {"w": kernel}, "output": {"w": kernel}}, ".*", layouts={".*": "lio"})
    adapter = jax.eval_shape(lambda: jaxpeft.init(KEY, surm_block.Spec(), sites))
    assert jaxpeft.count(adapter) == 24 * 2304 == 55_296


def test_what_it_refuses() -> None:
    params = {
        "up": {"kernel": jnp.ones((4, WIDTH)), "bias": jnp.zeros(WIDTH)},
        "embed": {"embedding": jnp.ones((5, 4))},
    }
    adapter = jaxpeft.init(KEY, surm_block.Spec(), jaxpeft.find(params, "up/kernel"))
    with pytest.raises(ValueError, match="adds up/bias after this weight; select up/bias instead"):
        jaxpeft.adapt(lambda p, x: x @ p["up"]["kernel"] + p["up"]["bias"])(params, adapter, jnp.ones((2, 4)))
    with pytest.raises(ValueError, match="no W' to form or to merge"):
        jaxpeft.merge(params, adapter)
    tied = jaxpeft.init(KEY, surm_block.Spec(), jaxpeft.find(params, "embed/embedding"))
    with pytest.raises(ValueError, match="here its transpose is multiplied"):
        jaxpeft.adapt(lambda p, x: x @ p["embed"]["embedding"].T)(params, tied, jnp.ones((2, 4)))


def test_dropout_is_on_the_adapters_input_alone() -> None:
    params = {"up": {"kernel": jnp.ones((4, WIDTH))}}
    adapter = trained(jaxpeft.init(KEY, surm_block.Spec(dropout=0.5), jaxpeft.find(params)))
    forward = jaxpeft.adapt(lambda p, x: x @ p["up"]["kernel"])
    x = jnp.ones((3, 4))
    dropped = forward(params, adapter, x, dropout_key=KEY)
    assert bool((dropped[0] != dropped[1]).any())
    np.testing.assert_array_equal(forward(params, adapter, x)[0], forward(params, adapter, x)[1])
