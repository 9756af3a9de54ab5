"""LoRA merges as Hugging Face PEFT merges it."""

import jax
import peft_oracle as oracle
import pytest

import jaxpeft
from jaxpeft.methods import lora

pytestmark = pytest.mark.parity
peft = pytest.importorskip("peft", reason="peft is not installed: pip install 'jaxpeft[parity]'")


@pytest.mark.parametrize("rslora", [False, True])
def test_lora(rslora) -> None:
    params = oracle.base(2, 12, 18)
    spec = lora.Spec(rank=4, alpha=8, rslora=rslora)
    adapter = oracle.trained(jaxpeft.init(jax.random.key(0), spec, jaxpeft.find(params)))
    ((_, ours),) = adapter.params.items()

    def fill(state):
        names = {"a": "lora_A", "b": "lora_B"}
        return {
            f"base_model.model.layers.{layer}.proj.{name}.default.weight": ours[leaf][layer].T
            if leaf == "b"
            else ours[leaf][layer]
            for layer in range(2)
            for leaf, name in names.items()
        }

    config = peft.LoraConfig(r=4, lora_alpha=8, use_rslora=rslora, target_modules=["proj"])
    oracle.assert_equal(oracle.merged_by_us(adapter, params), oracle.merged_by_peft(config, params, fill))
