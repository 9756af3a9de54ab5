"""VeRA, VB-LoRA, Uni-LoRA and RandLoRA merge as Hugging Face PEFT merges them."""

import jax
import jax.numpy as jnp
import numpy as np
import peft_oracle as oracle
import pytest

import jaxpeft
from jaxpeft.methods import randlora, unilora, vblora, vera

pytestmark = pytest.mark.parity
peft = pytest.importorskip("peft", reason="peft is not installed: pip install 'jaxpeft[parity]'")

LAYERS = 2
shapes = pytest.mark.parametrize("dims", [(12, 18), (18, 12), (12, 12)])


def adapter_of(spec, params) -> tuple[jaxpeft.Adapter, dict, dict]:
    """A trained adapter, its own arrays and its frozen shared ones."""
    adapter = oracle.trained(jaxpeft.init(jax.random.key(0), spec, jaxpeft.find(params)))
    (group,) = adapter.sites
    return adapter, adapter.params[group.name], adapter.constants.get("shared", {})


def of_layers(name: str, arrays) -> dict:
    return {f"base_model.model.layers.{layer}.proj.{name}.default": arrays[layer] for layer in range(LAYERS)}


@shapes
def test_vera(dims) -> None:
    params = oracle.base(LAYERS, *dims)
    adapter, ours, shared = adapter_of(vera.Spec(rank=5, d_initial=0.3), params)

    def fill(state):
        assert (state["base_model.model.layers.0.proj.vera_lambda_d.default"] == np.float32(0.3)).all()
        return {
            "base_model.model.layers.0.proj.vera_A.default": shared["a"],
            "base_model.model.layers.0.proj.vera_B.default": shared["b"].T,
            **of_layers("vera_lambda_d", ours["lambda_d"]),
            **of_layers("vera_lambda_b", ours["lambda_b"]),
        }

    config = peft.VeraConfig(r=5, d_initial=0.3, target_modules=["proj"])
    oracle.assert_equal(oracle.merged_by_us(adapter, params), oracle.merged_by_peft(config, params, fill))


@shapes
@pytest.mark.parametrize("top_k", [2, 3])
def test_vblora(dims, top_k) -> None:
    params = oracle.base(LAYERS, *dims)
    spec = vblora.Spec(rank=4, num_vectors=7, vector_length=6, top_k=top_k)
    adapter, ours, _ = adapter_of(spec, params)

    def fill(_):
        return {
            "base_model.model.layers.0.proj.vblora_vector_bank.default": adapter.params["shared"]["bank"],
            **of_layers("vblora_logits_A", ours["logits_a"]),
            **of_layers("vblora_logits_B", ours["logits_b"].swapaxes(1, 2)),
        }

    config = peft.VBLoRAConfig(r=4, num_vectors=7, vector_length=6, topk=top_k, target_modules=["proj"])
    oracle.assert_equal(oracle.merged_by_us(adapter, params), oracle.merged_by_peft(config, params, fill))


@shapes
def test_unilora_with_the_tables_of_peft(dims) -> None:
    """The index tables are PEFT's and so are the scales it uses; ours follow from the tables."""
    params = oracle.base(LAYERS, *dims)
    adapter, _, _ = adapter_of(unilora.Spec(rank=4, theta_length=37), params)
    theta, tables = adapter.params["shared"]["theta"], {}

    def fill(state):
        for side in "AB":
            names = of_layers(f"unilora_indices_{side}", [None] * LAYERS)
            tables[side] = np.stack([state[name] for name in names]).astype("int32")
        return {"base_model.model.layers.0.proj.unilora_theta_d.default": theta}

    config = peft.UniLoraConfig(r=4, theta_d_length=37, target_modules=["proj"])
    theirs = oracle.merged_by_peft(config, params, fill)
    (group,) = adapter.sites
    frozen = adapter.constants[group.name]
    constants = {group.name: {**frozen, "a_index": tables["A"], "b_index": tables["B"].swapaxes(1, 2)}}
    constants["shared"] = {"norm": unilora.norm(constants, adapter.spec, adapter.sites)}
    unilora.check_constants(constants, adapter.spec, adapter.sites)
    oracle.assert_equal(oracle.merged_by_us(adapter.replace(constants=constants), params), theirs)


@shapes
@pytest.mark.parametrize("rank", [4, 5])
def test_randlora(dims, rank) -> None:
    params = oracle.base(LAYERS, *dims)
    spec = randlora.Spec(rank=rank, alpha=8, order="peft")
    adapter, ours, shared = adapter_of(spec, params)
    (start,) = (leaves["gam"] for leaves in jaxpeft.init(jax.random.key(0), spec, adapter.sites).params.values())

    def fill(state):
        np.testing.assert_array_equal(state["base_model.model.layers.0.proj.randlora_gamma.default"], start[0])
        return {
            "base_model.model.layers.0.proj.randlora_A.default": shared["a"][:, None],
            "base_model.model.layers.0.proj.randlora_B.default": jnp.transpose(shared["b"], (2, 0, 1)),
            **of_layers("randlora_lambda", ours["lam"].swapaxes(1, 2)),
            **of_layers("randlora_gamma", ours["gam"]),
        }

    config = peft.RandLoraConfig(r=rank, randlora_alpha=8, target_modules=["proj"])
    oracle.assert_equal(oracle.merged_by_us(adapter, params), oracle.merged_by_peft(config, params, fill))
