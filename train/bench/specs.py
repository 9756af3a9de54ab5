"""The models and the adapters that the benchmarks compare, at the settings that the tables name."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

import jaxpeft
from jaxpeft import models
from jaxpeft.methods import lora, mos, prolora, surm, vera
from jaxpeft.spec import Spec
from train.config import ConfigError

LORA, MOS = "lora r=16", "mos r=16 e=2"

SPECS: dict[str, Spec] = {
    LORA: lora.Spec(rank=16),
    MOS: mos.Spec(rank=16, equivalent_rank=2, private_rank=1, shards_per_vector=4),
    "prolora r=8 e=2": prolora.Spec(rank=8, unshared_rank=1, sharing_in=7, sharing_out=7),
    "vera r=256": vera.Spec(rank=256),
    "surm circulant": surm.Spec(kind="circulant"),
    "dora r=16": lora.Spec(rank=16, dora=True),
}


def check(model: str, command: str, rows: Sequence[str] = tuple(SPECS)) -> None:
    """Raises ConfigError unless the decoder is there and the adapters fit it; no weights are loaded."""
    shapes = decoder(model, command)
    if problems := [f"--model: {problem}" for row in rows if (problem := misfit(row, shapes))]:
        raise ConfigError(problems, command)


def decoder(name: str, origin: str) -> models.LanguageModel:
    """A model's shapes.

    Raises:
      ConfigError: there is none of this name, or it is an encoder.
    """
    try:
        model = models.pretrained(name, weights=False)
    except ValueError as error:
        raise ConfigError([f"--model: {error}"], origin) from None
    if not isinstance(model, models.LanguageModel):
        raise ConfigError([f"--model: {name} is an encoder; the benchmarks take decoders"], origin)
    return model


def misfit(name: str, model: models.LanguageModel) -> str:
    """Why an adapter of `SPECS` cannot be had on a model; empty if it can."""

    def make(key: jax.Array, params: Any) -> jaxpeft.Adapter:
        return jaxpeft.init(key, SPECS[name], jaxpeft.find(params), weights=params)

    try:
        jax.eval_shape(make, jax.random.key(0), model.params)
    except ValueError as error:
        return f"{name}: {error}"
    return ""


def random_values(tree: Any, key: jax.Array | None = None) -> Any:
    """The tree with normal values for its floats: zeros, as many are at the start, would vanish in compressed files."""
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(1) if key is None else key, len(leaves))
    values = [
        jax.random.normal(key, leaf.shape, leaf.dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf
        for key, leaf in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, values)
