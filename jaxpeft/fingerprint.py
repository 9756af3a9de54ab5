"""Which base is it? A digest that tells one set of parameters from another."""

import hashlib
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxpeft import sharding as placing
from jaxpeft.blocks import is_quantized
from jaxpeft.sites import flatten


def fingerprint(base: Any) -> str:
    """A short digest of base parameters: their paths and shapes, and up to 64 values of each array.

    The values are compared as bfloat16, so the same weights in float32 and bfloat16 have one fingerprint. Of a weight
    in few bits they are its codes and scales, so a quantized base has another fingerprint than the floats it came from.
    """
    digest = hashlib.sha256()
    for path, leaf in sorted(_arrays(base).items()):
        digest.update(f"{path}{tuple(leaf.shape)}".encode())
        picks = np.unique(np.linspace(0, math.prod(leaf.shape) - 1, 64).astype(np.int64))
        values = _at(leaf, np.unravel_index(picks, leaf.shape)) if leaf.shape else leaf
        digest.update(placing.whole(values).astype(jnp.bfloat16).tobytes())
    return digest.hexdigest()[:32]


def _at(leaf: Any, index: tuple[np.ndarray, ...]) -> Any:
    """``leaf[index]``, on every device; of an array on explicit axes it has to be said where that lies."""
    mesh = jax.typeof(leaf).sharding.mesh
    if AxisType.Explicit not in mesh.axis_types:
        return leaf[index]
    return leaf.at[index].get(out_sharding=NamedSharding(mesh, PartitionSpec()))


def _arrays(base: Any) -> dict[str, Any]:
    """`flatten`, with every array of a weight in few bits under the name of its kind."""
    found: dict[str, Any] = {}
    for path, leaf in flatten(base).items():
        if not is_quantized(leaf):
            found[path] = leaf
            continue
        for name, array in vars(leaf).items():
            if isinstance(array, jax.Array | np.ndarray):
                found[f"{path}/{leaf.kind}/{name}"] = array
    return found
