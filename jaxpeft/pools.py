"""Shared pools of shards: drawing and checking index tables, and gathering with a deterministic backward."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array


def draw(key: Array, *, layers: int, slots: int, public: int, private: int) -> Array:
    """Index table of one pool: for each layer, `slots` different public rows, then the layer's own private rows.

    Rows [0, public) are public; layer k owns rows [public + k·private, public + (k+1)·private).

    Args:
        key: random key; every layer draws its own uniform permutation of the public rows.
        layers: number of layers L.
        slots: public rows a layer uses, at most `public`.
        public: number of public rows.
        private: private rows a layer owns, used in order.

    Returns:
        (layers, slots + private) int32.
    """
    permute = jax.vmap(lambda key: jax.random.permutation(key, public)[:slots])
    shared = permute(jax.random.split(key, layers))
    own = public + jnp.arange(layers * private).reshape(layers, private)
    return jnp.concatenate([shared, own], axis=1).astype(jnp.int32)


def check(name: str, index: np.ndarray, entries: int) -> None:
    """Raises ValueError if an index table leaves its pool of `entries` rows or repeats a row within a layer."""
    index = index.reshape(len(index), -1)
    if index.size and not 0 <= index.min() <= index.max() < entries:
        raise ValueError(f"{name}: indices {index.min()}..{index.max()} leave the pool of {entries} shards")
    if any(len(np.unique(row)) != len(row) for row in index):
        raise ValueError(f"{name}: a layer uses the same shard twice")


def unused(index: np.ndarray, entries: int) -> int:
    """Number of shards that no layer uses ("dead": they train with zero gradient)."""
    return entries - len(np.unique(index))


def gather(pool: Array, index: Array) -> Array:
    """Rows of a pool for every layer, pool (N, width), index (L, n) with no row repeated in a layer -> (L, n, width).

    The backward adds one layer after the other. Within a layer no row repeats, so each scatter is free of collisions:
    it is deterministic on every backend, and on a CPU it costs 0.6-1 of the plain scatter-add and a fifth of a
    one-hot product (docs/decisions/0003-pool-gather.md).
    """
    return _gather(pool.shape[0], pool, index)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gather(entries: int, pool: Array, index: Array) -> Array:
    del entries
    return pool.at[index].get(mode="promise_in_bounds")


def _gather_forward(entries: int, pool: Array, index: Array) -> tuple[Array, Array]:
    return _gather(entries, pool, index), index


def _gather_backward(entries: int, index: Array, cotangent: Array) -> tuple[Array, None]:
    def add(total: Array, layer: tuple[Array, Array]) -> tuple[Array, None]:
        rows, values = layer
        return total.at[rows].add(values, unique_indices=True, mode="promise_in_bounds"), None

    zero = jnp.zeros((entries, *cotangent.shape[2:]), cotangent.dtype)
    return jax.lax.scan(add, zero, (index, cotangent))[0], None


_gather.defvjp(_gather_forward, _gather_backward)
