"""The adapters that the benchmarks compare, at the settings that the tables name."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

import jaxpeft
from jaxpeft import models
from jaxpeft.methods import lora, mos, prolora, surm, vera
from jaxpeft.spec import Spec
from train.config import ConfigError

SPECS: dict[str, Spec] = {
    "lora r=16": lora.Spec(rank=16),
    "mos r=16 e=2": mos.Spec(rank=16, equivalent_rank=2, private_rank=1, shards_per_vector=4),
    "prolora r=8 e=2": prolora.Spec(rank=8, unshared_rank=1, sharing_in=7, sharing_out=7),
    "vera r=256": vera.Spec(rank=256),
    "surm circulant": surm.Spec(kind="circulant"),
    "dora r=16": lora.Spec(rank=16, dora=True),
}


def check(model: str, command: str, rows: Sequence[str] = tuple(SPECS)) -> None:
    """Raises ConfigError unless the model is there and the adapters fit it; no weights are loaded."""
    try:
        shapes = models.pretrained(model, weights=False).params
        sites = jaxpeft.find(shapes)
    except ValueError as error:
        raise ConfigError([f"--model: {error}"], command) from None
    problems = []
    for row in rows:
        try:
            jax.eval_shape(partial(jaxpeft.init, jax.random.key(0), SPECS[row], sites), shapes)
        except ValueError as error:
            problems.append(f"--model: {model} has no room for {row}: {error}")
    if problems:
        raise ConfigError(problems, command)


def random_values(tree: Any) -> Any:
    """The tree with normal values for its floats: zeros, as many are at the start, would vanish in compressed files."""
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    values = [
        jax.random.normal(key, leaf.shape, leaf.dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf
        for key, leaf in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, values)
