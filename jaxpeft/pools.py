"""Shared pools of shards: drawing and checking index tables, and gathering with a deterministic backward."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.interpreters import ad

from jaxpeft.primitive import define


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
    one-hot product (docs/decisions/0003-pool-gather.md). It is a primitive, linear in the pool, because a
    `jax.custom_vjp` has no forward mode.
    """
    return _gather.bind(pool, index, shared=0, entries=pool.shape[0])


def _rows(pool: Array, index: Array, *, shared: int, entries: int) -> Array:
    """Of a pool (*S, N, ...) and an index (*S, L, n), whose first `shared` axes S they have in common."""
    del entries
    take = lambda pool, index: pool.at[index].get(mode="promise_in_bounds")  # noqa: E731
    return _over(take, shared)(pool, index)


def _sums(values: Array, index: Array, *, shared: int, entries: int) -> Array:
    """The transpose: values (*S, L, n, ...) added to the rows (*S, N, ...) that they were taken from."""

    def summed(values: Array, index: Array) -> Array:
        def add(total: Array, layer: tuple[Array, Array]) -> tuple[Array, None]:
            rows, values = layer
            return total.at[rows].add(values, unique_indices=True, mode="promise_in_bounds"), None

        # Like the values, to vary over the same axes of a mesh.
        none = jnp.zeros_like(values, shape=(entries, *values.shape[2:]))
        return jax.lax.scan(add, none, (index, values))[0]

    return _over(summed, shared)(values, index)


def _over(fn: Callable, shared: int) -> Callable:
    for _ in range(shared):
        fn = jax.vmap(fn)
    return fn


def _batched(before: int, after: int, primitive: Any, operands: Any, axes: Any, **params: Any) -> tuple[Array, int]:
    """One axis more, of a primitive whose first operand has `before` axes where its result has `after`.

    An axis of the index is one that both operands have; without, it lies behind those that the primitive looks at.
    """
    (first, index), (of_first, of_index), shared = operands, axes, params["shared"]
    if of_index is None:
        first = jnp.moveaxis(first, of_first, shared + before)
        return primitive.bind(first, index, **params), shared + after
    if of_first is None:
        first = jnp.broadcast_to(first, (index.shape[of_index], *first.shape))
        of_first = 0
    first, index = jnp.moveaxis(first, of_first, 0), jnp.moveaxis(index, of_index, 0)
    return primitive.bind(first, index, **params | {"shared": shared + 1}), 0


def _linear(name: str, implementation: Callable, before: int, after: int) -> jex.Primitive:
    """A primitive that is linear in its first operand."""
    made = define(name, implementation, partial(_batched, before, after), ("shared", "entries"))
    ad.defjvp(made, lambda tangent, _, index, **params: made.bind(tangent, index, **params), None)
    return made


_gather = _linear("pool_gather", _rows, 1, 2)
_scatter = _linear("pool_scatter", _sums, 2, 1)
ad.primitive_transposes[_gather] = lambda given, _, index, **params: [_scatter.bind(given, index, **params), None]
ad.primitive_transposes[_scatter] = lambda given, _, index, **params: [_gather.bind(given, index, **params), None]
