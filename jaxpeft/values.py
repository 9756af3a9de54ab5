"""An adapted weight as an array value: the weight and its updates, standing for W + ΔW; and the notes of its uses."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import AxisType

from jaxpeft.blocks import Quantized, dequantized
from jaxpeft.layout import axes, from_matrix, sizes, to_matrix
from jaxpeft.updates import Update


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Adapted:
    """A weight and its updates, standing for the array W' = W + Σ ΔW; a pytree.

    Attributes:
        weight: W in the layout it is stored in, an array or in few bits.
        updates: their arrays lead with the layout's stack axes, in order; where one array serves all, with size 1. None
            for a weight in few bits that is not adapted.
        layout: one letter an axis of `weight`, as in `jaxpeft.sites.Group`.
        order: the value is `weight` transposed by this permutation.
        site: path of the weight, for reports.
    """

    weight: Array | Quantized
    updates: tuple[Update, ...]
    layout: str = dataclasses.field(metadata={"static": True})
    order: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    site: str = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the value."""
        return tuple(self.weight.shape[axis] for axis in self.order)

    @property
    def formed(self) -> bool:
        """Whether every update needs ΔW as an array anyway."""
        return bool(self.updates) and all(update.formed for update in self.updates)

    @property
    def letters(self) -> str:
        """The layout of the value."""
        return "".join(self.layout[axis] for axis in self.order)

    def axes(self, letter: str) -> list[int]:
        """Axes of `weight` that carry a letter."""
        return axes(self.layout, letter)

    def dims(self, letter: str) -> tuple[int, ...]:
        """Sizes of the axes of `weight` that carry a letter."""
        return sizes(self.weight.shape, self.layout, letter)

    def materialize(self) -> Array:
        """W' formed in float32, or in the dtype of W where that is wider, and cast once to the dtype of W."""
        if not self.updates:
            return jnp.transpose(dequantized(self.weight), self.order)

        def form(updates: tuple[Update, ...], weight: Array | Quantized) -> Array:
            frozen = to_matrix(weight, self.layout).astype(working_dtype(weight.dtype))
            formed = over_stack(materialize, len(self.axes("l")))(updates, frozen).astype(weight.dtype)
            return from_matrix(formed, self.layout, weight.shape)

        return jnp.transpose(in_auto(form, self.weight)(self.updates, self.weight), self.order)


def working_dtype(dtype: Any) -> np.dtype:
    """What to form W + ΔW in, for a W of this dtype: float32, or W's own where that is wider; of float64 under x64."""
    return jax.dtypes.canonicalize_dtype(jnp.promote_types(dtype, jnp.float32))


def widened(update: Update, dtype: Any) -> Update:
    """An update with its float32 arrays as wide as the weight of this dtype that it changes."""
    to = working_dtype(dtype)
    return jax.tree.map(lambda leaf: leaf.astype(to) if leaf.dtype == jnp.float32 else leaf, update)


def materialize(updates: tuple[Update, ...], weight: Array) -> Array:
    """W + Σ ΔW for one weight (in, out), float32 or wider; every update changes the frozen W, not another's W'."""
    total, *others = [update.materialize(weight) for update in updates]
    for other in others:
        total = total + (other - weight)
    return total


def in_auto(function: Callable, like: Any) -> Callable:
    """A function whose result lies as `like` does; how its operations lie is the compiler's to choose.

    On a mesh of explicit axes every product of two split arrays would have to say how its result lies.
    """
    sharding = jax.typeof(like.codes if isinstance(like, Quantized) else like).sharding
    if AxisType.Explicit not in sharding.mesh.axis_types:
        return function
    return jax.sharding.auto_axes(function, out_sharding=sharding)


def over_stack(fn: Callable, axes: int) -> Callable:
    """Maps a function of one weight over the leading stack axes of its arguments; an axis of size 1 serves all."""
    if axes == 0:
        return fn

    def mapped(*args: Any) -> Any:
        size = max(leaf.shape[0] for leaf in jax.tree.leaves(args))
        leaves, in_axes, join = by_layer(args, size)
        return jax.vmap(lambda leaves: over_stack(fn, axes - 1)(*join(leaves)), in_axes=(in_axes,))(leaves)

    return mapped


def by_layer(tree: Any, size: int) -> tuple[list[Array], list[int | None], Callable[[list], Any]]:
    """The arrays of a tree for `jax.vmap` over their leading axis.

    Returns:
        The arrays, those that serve all of `size` layers without their axis; 0 or None for each; and the tree's
        structure, as a function of the arrays of one layer.
    """
    leaves, structure = jax.tree.flatten(tree)
    serves_all = [leaf.shape[0] == 1 < size for leaf in leaves]
    arrays = [leaf[0] if shared else leaf for leaf, shared in zip(leaves, serves_all, strict=True)]
    return arrays, [None if shared else 0 for shared in serves_all], structure.unflatten


@dataclass(frozen=True)
class Use:
    """One place where a model consumed an adapted weight.

    Attributes:
        site: path of the weight.
        primitive: name of the JAX primitive. A product over the out-axes is "dot_general, transposed": a tied head, or
            a layout that has in and out the wrong way round.
        fused: whether nothing was formed that the updates do not need; otherwise the weight was.
    """

    site: str
    primitive: str
    fused: bool


_recorders: ContextVar[tuple[Counter[Use], ...]] = ContextVar("recorders", default=())


@contextmanager
def recording() -> Iterator[Counter[Use]]:
    """Counts the uses of adapted weights while a model is evaluated, which is at trace time."""
    uses: Counter[Use] = Counter()
    token = _recorders.set((*_recorders.get(), uses))
    try:
        yield uses
    finally:
        _recorders.reset(token)


def record(value: Adapted, primitive: str, *, fused: bool) -> None:
    """Notes one use of an adapted weight."""
    for uses in _recorders.get():
        uses[Use(value.site, primitive, fused)] += 1
