"""TinyLoRA merges as Hugging Face PEFT merges it; Lily computes as PEFT's does where its router sees no data."""

import jax
import numpy as np
import peft_oracle as oracle
import pytest

import jaxpeft
from jaxpeft.methods import lily, tinylora

pytestmark = pytest.mark.parity
peft = pytest.importorskip("peft", reason="peft is not installed: pip install 'jaxpeft[parity]'")

LAYERS = 4


@pytest.mark.parametrize(("tied", "weight_tying"), [(1, 0.0), (2, 0.5), (None, 1.0)])
def test_tinylora(tied, weight_tying) -> None:
    params = oracle.base(LAYERS, 12, 18)
    spec = tinylora.Spec(rank=3, u=5, tied_layers=tied, singular_values="both")
    adapter = oracle.trained(jaxpeft.init(jax.random.key(0), spec, jaxpeft.find(params), params))
    (frozen,) = adapter.constants.values()
    vectors = adapter.params["shared"]["v"]

    def fill(state):
        first = "base_model.model.layers.0.proj.tinylora_v.default"
        assert sum(name.startswith(first) for name in state) == len(vectors)
        wanted = {f"{first}.{number}": vector for number, vector in enumerate(vectors)}
        for layer in range(LAYERS):
            proj = f"base_model.model.layers.{layer}.proj"
            ours = {"A": frozen["a"][layer], "B": frozen["b"][layer].T, "P": frozen["p"][layer]}
            for name in "AB":
                # A singular vector's sign is free, so the projections of PEFT's own would be of other signs. And these
                # are two SVDs in float32: where singular values lie 2 % apart, each is up to 2e-5 from that in float64.
                theirs = state[f"{proj}.tinylora_{name}.default"]
                np.testing.assert_allclose(np.abs(ours[name]), np.abs(theirs), atol=4e-5)
            wanted |= {f"{proj}.tinylora_{name}.default": leaf for name, leaf in ours.items()}
        return wanted

    config = peft.TinyLoraConfig(r=3, u=5, weight_tying=weight_tying, target_modules=["proj"])
    oracle.assert_equal(oracle.merged_by_us(adapter, params), oracle.merged_by_peft(config, params, fill))


def test_lily_where_the_router_sees_no_data() -> None:
    """PEFT has the paper's router alone, and does not merge it; a router of zeros mixes evenly whatever the data."""
    import torch

    params = oracle.base(LAYERS, 12, 18)
    spec = lily.Spec(rank=3, experts=3, stride=2, alpha=2.0)
    adapter = oracle.trained(jaxpeft.init(jax.random.key(0), spec, jaxpeft.find(params)))
    ((name, ours),) = adapter.params.items()
    adapter = adapter.replace(params={name: {**ours, "router": np.zeros_like(ours["router"])}})

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.ModuleList(
                torch.nn.ModuleDict({"proj": torch.nn.Linear(12, 18, bias=False)}) for _ in range(LAYERS)
            )

        def forward(self, x):
            return [layer["proj"](x) for layer in self.layers]

    config = peft.LilyConfig(r=3, stride_A=2, num_B=3, scaling=2.0, target_modules=["proj"])
    model = peft.get_peft_model(Model(), config)
    with torch.no_grad():
        for layer in range(LAYERS):
            theirs = model.base_model.model.layers[layer]["proj"]
            theirs.base_layer.weight.copy_(torch.tensor(np.array(params["layers"][layer]["proj"]["kernel"].T)))
            theirs.lily_A["default"].weight.copy_(torch.tensor(np.array(ours["a"][layer // 2])))
            theirs.lily_B["default"].weight.copy_(torch.tensor(np.array(ours["b"]).reshape(9, 18)))
            theirs.lily_router["default"].weight.zero_()
        found = [weight.numpy() for weight in model(torch.eye(12))]
    oracle.assert_equal(oracle.merged_by_us(adapter, params), found)
