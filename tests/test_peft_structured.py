"""FourierFT, C3A and MiSS merge as Hugging Face PEFT merges them."""

import jax
import numpy as np
import peft_oracle as oracle
import pytest

import jaxpeft
from jaxpeft.methods import c3a, fourierft, miss

pytestmark = pytest.mark.parity
peft = pytest.importorskip("peft", reason="peft is not installed: pip install 'jaxpeft[parity]'")

LAYERS = 2
TARGET = {"target_modules": ["proj"]}


def assert_same(spec, config, dims, name, leaf, constants=None) -> None:
    """Our merged weights are PEFT's, once its parameter `name` holds our `leaf`."""
    params = oracle.base(LAYERS, *dims)
    adapter = oracle.trained(jaxpeft.init(jax.random.key(0), spec, jaxpeft.find(params)))
    if constants is not None:
        frozen = {group: {**arrays, **constants} for group, arrays in adapter.constants.items()}
        adapter = adapter.replace(constants=frozen)
    (leaves,) = adapter.params.values()

    def fill(state):
        del state
        return {f"base_model.model.layers.{i}.proj.{name}.default": leaves[leaf][i] for i in range(LAYERS)}

    ours, theirs = oracle.merged_by_us(adapter, params), oracle.merged_by_peft(config, params, fill)
    oracle.assert_equal(ours, theirs)
    assert (
        max(np.abs(w - layer["proj"]["kernel"]).max() for w, layer in zip(ours, params["layers"], strict=True)) > 1e-3
    )


@pytest.mark.parametrize("dims", [(12, 18), (12, 12)])
def test_fourierft(dims) -> None:
    """PEFT never saves its places: they are drawn again from a seed, and read here from its layer."""
    import torch

    config = peft.FourierFTConfig(n_frequency=30, scaling=40.0, **TARGET)
    layer = peft.tuners.fourierft.layer.FourierFTLinear(torch.nn.Linear(*dims), "default", config, n_frequency=30)
    entries = layer.indices["default"].numpy()[::-1].astype(np.int32)
    spec = fourierft.Spec(n_frequency=30, alpha=40.0)
    assert_same(spec, config, dims, "fourierft_spectrum", "c", {"entries": entries})


@pytest.mark.parametrize("dims", [(12, 18), (18, 12), (12, 12)])
@pytest.mark.parametrize("path", ["fft", "dense"])
def test_c3a(dims, path) -> None:
    assert_same(c3a.Spec(block_size=6, path=path), peft.C3AConfig(block_size=6, **TARGET), dims, "c3a_kernel", "w")


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"rank": 4}, {"r": 4}),
        ({"rank": 5}, {"r": 5}),
        ({"rank": 5, "variant": "mini", "mini_rank": 6}, {"r": 5, "init_weights": "mini", "mini_r": 6}),
        ({"rank": 3, "variant": "bat"}, {"r": 3, "init_weights": "bat"}),
    ],
    ids=["standard", "standard, uneven", "mini", "bat"],
)
def test_miss(ours, theirs) -> None:
    assert_same(miss.Spec(**ours), peft.MissConfig(**theirs, **TARGET), (12, 18), "miss_block", "d")
