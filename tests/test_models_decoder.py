import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpeft
from jaxpeft import models
from jaxpeft.methods import lora
from jaxpeft.models.decoder import rotary_table

TINY = models.Config(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    tie_word_embeddings=True,
)
VARIANTS = {
    "tied": TINY,
    "untied": dataclasses.replace(TINY, tie_word_embeddings=False),
    "qwen2": dataclasses.replace(TINY, attention_bias=True),
    "qwen3": dataclasses.replace(TINY, qk_norm=True, head_dim=16),
    "windowed": dataclasses.replace(TINY, sliding_window=3),
    "all biases": dataclasses.replace(TINY, attention_bias=True, attention_out_bias=True, mlp_bias=True),
}
LLAMA2_7B = models.Config(
    vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32
)
LLAMA2_13B = models.Config(
    vocab_size=32000, hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40
)
LLAMA3_8B = models.Config(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    rope_theta=500000.0,
)


@pytest.fixture(scope="module")
def lm():
    return models.random(TINY, jax.random.key(0))


@pytest.fixture(scope="module")
def tokens():
    return jax.random.randint(jax.random.key(1), (3, 11), 0, TINY.vocab_size)


def logits_of(lm, *args, **kwargs):
    return jax.jit(lm.logits)(lm.params, *args, **kwargs)


def leaves(tree):
    return {
        jax.tree_util.keystr(p, simple=True, separator="/"): x for p, x in jax.tree_util.tree_leaves_with_path(tree)
    }


def test_parameter_paths_and_shapes():
    shapes = {path: leaf.shape for path, leaf in leaves(models.abstract(VARIANTS["untied"])).items()}
    assert shapes == {
        "embed/embedding": (61, 32),
        "layers/self_attn/q_proj/kernel": (2, 32, 32),
        "layers/self_attn/k_proj/kernel": (2, 32, 16),
        "layers/self_attn/v_proj/kernel": (2, 32, 16),
        "layers/self_attn/o_proj/kernel": (2, 32, 32),
        "layers/mlp/gate_proj/kernel": (2, 32, 48),
        "layers/mlp/up_proj/kernel": (2, 32, 48),
        "layers/mlp/down_proj/kernel": (2, 48, 32),
        "layers/input_norm/scale": (2, 32),
        "layers/post_attention_norm/scale": (2, 32),
        "norm/scale": (32,),
        "lm_head/kernel": (32, 61),
    }
    assert "lm_head" not in models.abstract(TINY)
    qwen2 = leaves(models.abstract(VARIANTS["qwen2"]))
    assert [path for path in qwen2 if path.endswith("bias")] == [
        f"layers/self_attn/{name}_proj/bias" for name in ("k", "q", "v")
    ]
    assert leaves(models.abstract(VARIANTS["qwen3"]))["layers/self_attn/q_norm/scale"].shape == (2, 16)


@pytest.mark.parametrize(
    ("config", "count"),
    [(LLAMA2_7B, 6_738_415_616), (LLAMA2_13B, 13_015_864_320), (LLAMA3_8B, 8_030_261_248)],
    ids=["llama2-7b", "llama2-13b", "llama3-8b"],
)
def test_published_sizes_without_memory(config, count):
    tree = models.abstract(config)
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(tree))
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree)) == count


def test_layers_start_different(lm):
    kernel = lm.params["layers"]["mlp"]["up_proj"]["kernel"]
    assert not np.allclose(kernel[0], kernel[1])
    np.testing.assert_allclose(np.std(kernel), 0.02, rtol=0.1)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_token_does_not_see_the_future(variant, tokens):
    lm = models.random(VARIANTS[variant], jax.random.key(0))
    changed = tokens.at[:, 7:].set(0)
    before, after = logits_of(lm, tokens), logits_of(lm, changed)
    assert before.dtype == jnp.float32
    np.testing.assert_array_equal(before[:, :7], after[:, :7])
    assert not np.allclose(before[:, 7:], after[:, 7:])


def test_sliding_window_sees_the_last_tokens_only(tokens):
    # Two layers of window 3: a token sees itself and 4 before it.
    lm = models.random(VARIANTS["windowed"], jax.random.key(0))
    before, after = logits_of(lm, tokens), logits_of(lm, tokens.at[:, 0].set(60))
    np.testing.assert_array_equal(before[:, 5:], after[:, 5:])
    assert not np.allclose(before[:, 4], after[:, 4])


@pytest.mark.parametrize("variant", ["tied", "windowed"])
def test_packed_equals_unpacked(variant, tokens):
    lm = models.random(VARIANTS[variant], jax.random.key(0))
    first, second = tokens[:1, :6], tokens[1:2, :4]
    packed = jnp.concatenate([first, second, jnp.zeros((1, 2), jnp.int32)], axis=1)
    segment_ids = jnp.array([[1] * 6 + [2] * 4 + [0] * 2])
    logits = logits_of(lm, packed, segment_ids=segment_ids)
    np.testing.assert_allclose(logits[:, :6], logits_of(lm, first), atol=1e-5)
    np.testing.assert_allclose(logits[:, 6:10], logits_of(lm, second), atol=1e-5)
    positions = jnp.array([[*range(6), *range(4), 0, 1]])
    np.testing.assert_array_equal(logits, logits_of(lm, packed, segment_ids=segment_ids, positions=positions))


def test_only_distances_matter(lm, tokens):
    positions = jnp.arange(11)[None] + 5
    np.testing.assert_allclose(logits_of(lm, tokens), logits_of(lm, tokens, positions=positions), atol=1e-5)


@pytest.mark.parametrize(("variant", "chunk"), [("tied", 4), ("untied", 4), ("tied", 1), ("tied", "auto")])
def test_chunked_losses_equal_whole_ones(variant, chunk, tokens):
    lm = models.random(VARIANTS[variant], jax.random.key(0))
    targets = jnp.roll(tokens, -1, axis=1)
    logits = logits_of(lm, tokens)
    expected = -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]

    def loss(params, chunk):
        losses = lm.token_losses(params, tokens, targets, chunk=chunk)
        return jnp.sum(losses * jnp.arange(33.0).reshape(3, 11)), losses

    gradient = jax.jit(jax.grad(loss, has_aux=True), static_argnums=1)
    whole, _ = gradient(lm.params, None)
    pieces, losses = gradient(lm.params, chunk)
    np.testing.assert_allclose(losses, expected, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), whole, pieces)


def test_chunked_losses_never_hold_all_logits(tokens):
    config = dataclasses.replace(TINY, vocab_size=50_000)
    params = models.abstract(config)
    lm = models.LanguageModel(config, params)
    tokens = jax.ShapeDtypeStruct((2, 64), jnp.int32)

    def temporaries(chunk):
        def loss(embedding, params, tokens):
            params = params | {"embed": {"embedding": embedding}}
            return lm.token_losses(params, tokens, tokens, chunk=chunk).sum()

        step = jax.jit(jax.grad(loss, argnums=1)).lower(params["embed"]["embedding"], params, tokens).compile()
        return step.memory_analysis().temp_size_in_bytes

    all_logits = 2 * 64 * 50_000 * 4
    assert temporaries(None) > all_logits
    assert temporaries(4) < all_logits


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_remat_changes_no_value(remat, lm, tokens):
    def loss(params, lm):
        return lm.token_losses(params, tokens, tokens).sum()

    gradient = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    expected = gradient(lm.params, lm)
    found = gradient(lm.params, lm.with_config(remat=remat))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), expected, found)


@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
def test_bfloat16_is_finite_and_near(param_dtype, lm, tokens):
    low = lm.with_config(dtype="bfloat16", param_dtype=param_dtype)
    params = jax.tree.map(lambda x: x.astype(param_dtype), lm.params)
    logits = jax.jit(low.logits)(params, tokens)
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, logits_of(lm, tokens), atol=0.05)
    grads = jax.jit(jax.grad(lambda p: low.token_losses(p, tokens, tokens).mean()))(params)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(grads))


def test_pure_under_jit_and_vmap(lm, tokens):
    expected = logits_of(lm, tokens)
    np.testing.assert_allclose(lm.logits(lm.params, tokens), expected, atol=1e-5)
    stacked = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), lm.params)
    both = jax.jit(jax.vmap(lm.logits, in_axes=(0, None)))(stacked, tokens)
    np.testing.assert_allclose(both[0], expected, atol=1e-5)


def test_token_outside_the_vocabulary_is_not_silent(lm):
    assert bool(jnp.isnan(logits_of(lm, jnp.array([[0, 61]]))[0, 1]).all())


@pytest.mark.parametrize(("variant", "remat"), [("tied", "none"), ("untied", "dots"), ("qwen2", "full")])
def test_adapters_are_fused_everywhere(variant, remat, tokens):
    lm = models.random(dataclasses.replace(VARIANTS[variant], remat=remat), jax.random.key(0))
    adapter = jaxpeft.init(jax.random.key(1), lora.Spec(rank=2), jaxpeft.find(lm.params, "all-linear"))
    adapter = adapter.replace(params=jax.tree.map(lambda x: x + 0.1, adapter.params))
    report = jaxpeft.explain(lm.token_losses, lm.params, adapter, tokens, tokens)
    assert not report.materialized
    np.testing.assert_allclose(
        jax.jit(jaxpeft.adapt(lm.token_losses))(lm.params, adapter, tokens, tokens),
        jax.jit(lm.token_losses)(jaxpeft.merge(lm.params, adapter), tokens, tokens),
        atol=1e-4,
    )


def test_rope_scaling():
    positions = jnp.array([[1]])
    scaling = models.RopeScaling(kind="linear", factor=4.0)
    linear = rotary_table(dataclasses.replace(TINY, rope_scaling=scaling), 4 * positions)
    np.testing.assert_allclose(linear, rotary_table(TINY, positions), rtol=1e-6)

    # The published case distinction, frequency by frequency.
    scaling = models.RopeScaling(
        kind="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=128
    )
    config = dataclasses.replace(TINY, head_dim=32, rope_scaling=scaling)
    expected = []
    for i in range(0, 32, 2):
        frequency = 10000.0 ** (-i / 32)
        wavelength = 2 * math.pi / frequency
        if wavelength > 128 / 1.0:
            frequency /= 8.0
        elif wavelength > 128 / 4.0:
            smooth = (128 / wavelength - 1.0) / (4.0 - 1.0)
            frequency = (1 - smooth) * frequency / 8.0 + smooth * frequency
        expected.append(frequency)
    np.testing.assert_allclose(rotary_table(config, positions)[1][0, 0, 0], np.sin(expected), rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"remat": "some"}, "remat='some': expected one of none, dots, full"),
        ({"num_key_value_heads": 3}, "num_attention_heads=4 is no multiple of num_key_value_heads=3"),
        ({"head_dim": 5}, "head_dim=5 must be even"),
    ],
)
def test_impossible_configurations(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **changes)


def test_configurations_of_transformers():
    transformers = pytest.importorskip("transformers")
    llama = models.Config.from_hf(transformers.LlamaConfig(rope_theta=5e5, head_dim=64, tie_word_embeddings=True))
    assert (llama.rope_theta, llama.head_dim, llama.tie_word_embeddings) == (5e5, 64, True)
    qwen2 = models.Config.from_hf(transformers.Qwen2Config())
    assert qwen2.attention_bias
    assert not qwen2.attention_out_bias
    assert qwen2.sliding_window is None
    assert models.Config.from_hf(transformers.Qwen3Config()).qk_norm
    assert models.Config.from_hf(transformers.MistralConfig()).sliding_window == 4096


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        ("GPT2Config", {}, "model_type 'gpt2' is not supported; supported: llama, mistral, qwen2, qwen3"),
        ("LlamaConfig", {"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        ("LlamaConfig", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type 'dynamic'"),
        ("Qwen2Config", {"use_sliding_window": True, "sliding_window": 8}, "layers of differing attention"),
    ],
)
def test_unsupported_configurations(kind, fields, message):
    transformers = pytest.importorskip("transformers")
    with pytest.raises(ValueError, match=message):
        models.Config.from_hf(getattr(transformers, kind)(**fields))
