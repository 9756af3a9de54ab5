"""LoRA and its switches merge as Hugging Face PEFT merges them."""

import jax
import numpy as np
import peft_oracle as oracle
import pytest

import jaxpeft
from jaxpeft.methods import lora

pytestmark = pytest.mark.parity
peft = pytest.importorskip("peft", reason="peft is not installed: pip install 'jaxpeft[parity]'")

LAYERS = 2
CASES = {
    "lora": ({}, {}),
    "rslora": ({"rslora": True}, {"use_rslora": True}),
    "dora": ({"dora": True}, {"use_dora": True}),
    "dora rslora": ({"dora": True, "rslora": True}, {"use_dora": True, "use_rslora": True}),
    "pissa": ({"start": "pissa"}, {"init_lora_weights": "pissa"}),
    "olora": ({"start": "olora"}, {"init_lora_weights": "olora"}),
}


@pytest.mark.parametrize(("ours", "theirs"), CASES.values(), ids=CASES.keys())
def test_lora(ours, theirs) -> None:
    params = oracle.base(LAYERS, 12, 18)
    spec = lora.Spec(rank=4, alpha=8, **ours)
    adapter = oracle.trained(jaxpeft.init(jax.random.key(0), spec, jaxpeft.find(params), params))
    (leaves,) = adapter.params.values()

    def fill(state):
        del state
        wanted = {}
        for layer in range(LAYERS):
            name = f"base_model.model.layers.{layer}.proj.lora_"
            wanted[f"{name}A.default.weight"] = leaves["a"][layer]
            wanted[f"{name}B.default.weight"] = leaves["b"][layer].T
            if "magnitude" in leaves:
                wanted[f"{name}magnitude_vector.default.weight"] = leaves["magnitude"][layer]
        return wanted

    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["proj"], **theirs)
    # Two SVDs in float32 agree to a few units in the last place only.
    tolerance = 5e-6 if spec.start == "pissa" else 1e-6
    oracle.assert_equal(oracle.merged_by_us(adapter, params), oracle.merged_by_peft(config, params, fill), tolerance)


def test_dora_starts_from_the_same_magnitudes() -> None:
    params = oracle.base(LAYERS, 12, 18)
    adapter = jaxpeft.init(jax.random.key(0), lora.Spec(rank=4, dora=True), jaxpeft.find(params), params)
    (leaves,) = adapter.params.values()

    def fill(state):
        for layer in range(LAYERS):
            theirs = state[f"base_model.model.layers.{layer}.proj.lora_magnitude_vector.default.weight"]
            np.testing.assert_allclose(leaves["magnitude"][layer], theirs, rtol=1e-6)
        return {}

    oracle.merged_by_peft(peft.LoraConfig(r=4, use_dora=True, target_modules=["proj"]), params, fill)
