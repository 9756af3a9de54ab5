"""Hugging Face PEFT as the oracle: a torch model of plain linear layers, adapted and merged by PEFT itself."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from moved import moved

import jaxpeft


def base(layers: int, in_dim: int, out_dim: int) -> dict[str, Any]:
    """Base parameters of `layers` linear layers named ``proj``; PEFT sees the same weights transposed."""
    keys = jax.random.split(jax.random.key(11), layers)
    return {"layers": [{"proj": {"kernel": jax.random.normal(key, (in_dim, out_dim))}} for key in keys]}


def merged_by_peft(config: Any, params: Any, fill: Callable[[dict[str, np.ndarray]], dict[str, Any]]) -> list[Any]:
    """The merged (in, out) weight of every layer.

    Args:
        config: a PEFT config with ``target_modules=["proj"]``.
        params: what `base` returned.
        fill: from PEFT's own state {name: array} to the entries to overwrite, under PEFT's names and in its shapes.
    """
    import peft
    import torch

    class Layer(torch.nn.Module):
        def __init__(self, kernel: Any) -> None:
            super().__init__()
            self.proj = torch.nn.Linear(*kernel.shape, bias=False)
            self.proj.weight.data = torch.tensor(np.asarray(kernel).T.copy())

        def forward(self, x: Any) -> Any:
            return self.proj(x)

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.ModuleList(Layer(layer["proj"]["kernel"]) for layer in params["layers"])

    torch.manual_seed(0)
    model = peft.get_peft_model(Model(), config)
    state = dict((*model.named_parameters(), *model.named_buffers()))
    wanted = fill({name: leaf.detach().numpy().copy() for name, leaf in state.items()})
    for name, array in wanted.items():
        assert tuple(state[name].shape) == tuple(np.shape(array)), (name, state[name].shape, np.shape(array))
        state[name].data.copy_(torch.tensor(np.asarray(array)))
    merged = model.merge_and_unload()
    return [layer.proj.weight.detach().numpy().T for layer in merged.layers]


def merged_by_us(adapter: jaxpeft.Adapter, params: Any) -> list[Any]:
    """The same from jaxpeft."""
    return [layer["proj"]["kernel"] for layer in jaxpeft.merge(params, adapter)["layers"]]


def trained(adapter: jaxpeft.Adapter) -> jaxpeft.Adapter:
    """No leaf is what it was at the start."""
    return moved(adapter, 0.1)


def assert_equal(ours: list[Any], theirs: list[Any], tolerance: float = 1e-6) -> None:
    """Merged weights agree to 1e-6 of their size."""
    for own, other in zip(ours, theirs, strict=True):
        size = max(1.0, float(np.abs(other).max()))
        np.testing.assert_allclose(jnp.asarray(own), other, atol=tolerance * size, rtol=0)
