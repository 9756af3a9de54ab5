"""Which adapter answers which row? Many adapters over one base in one batch, each row's chosen by a number in an array.

The adapted function is mapped over the rows (`jax.vmap`) with each row's own updates; products with the base stay one
product for the whole batch, and only the thin ones of the updates are done row by row. The rows' updates are laid out
for the loop over layers, layer by layer and then row by row: another order would be copied into this one by every call
of the model. `rows` lays them out once for many calls.
"""

import dataclasses
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer

from jaxpeft.adapter import Adapter
from jaxpeft.apply import adapt
from jaxpeft.sites import Sites
from jaxpeft.spec import Spec, kind_of
from jaxpeft.updates import LowRank, Update

BASE = -1
"""Number of a row that no adapter answers."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Expanded:
    """The updates of one adapter or several, made from their pools; takes an adapter's place in `adapt`.

    Attributes:
        made: {group: update}; of several, every array leads with their number N, then with the group's layers.
        spec: of the adapter they come from; of several, of the first.
        sites: the adapted weights.
    """

    made: dict[str, Update]
    spec: Spec = dataclasses.field(metadata={"static": True})
    sites: Sites = dataclasses.field(metadata={"static": True})

    def updates(self) -> dict[str, Update]:
        """As `Adapter.updates`."""
        return self.made


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rows:
    """The updates of every row of a batch, where a loop over the layers wants them; `rows` makes it.

    Attributes:
        made: as in `Expanded`, but every array leads with the group's layers, then with the rows B.
        spec: as in `Expanded`.
        sites: as in `Expanded`.
    """

    made: dict[str, Update]
    spec: Spec = dataclasses.field(metadata={"static": True})
    sites: Sites = dataclasses.field(metadata={"static": True})


Adapters = Adapter | Expanded


def stack(adapters: Sequence[Adapter]) -> Adapter:
    """Adapters of one spec and the same sites as one tree, whose arrays lead with their number N.

    Alpha may differ: it is an array. Adapters of other ranks or methods go into a stack of their own; `batched` takes
    several.

    Raises:
        ValueError: there is none, or two differ in spec, sites or shapes.

    Example:
        >>> import jax, jax.numpy as jnp, jaxpeft
        >>> from jaxpeft import batch
        >>> from jaxpeft.methods import lora
        >>> sites = jaxpeft.find({"up": {"kernel": jnp.zeros((3, 4))}})
        >>> adapters = [jaxpeft.init(jax.random.key(i), lora.Spec(rank=2), sites) for i in range(5)]
        >>> batch.stack(adapters).params["up/kernel"]["a"].shape
        (5, 1, 2, 3)
    """
    adapters = list(adapters)
    if not adapters:
        raise ValueError("stack needs at least one adapter")
    first = adapters[0]
    for number, other in enumerate(adapters[1:], 1):
        for what in ("spec", "sites"):
            if getattr(first, what) != getattr(other, what):
                raise ValueError(
                    f"adapter {number} has another {what} than adapter 0: {getattr(other, what)}, not "
                    f"{getattr(first, what)}; stack it apart, and pass both stacks"
                )
        shapes, others = (jax.tree.map(np.shape, (one.params, one.constants)) for one in (first, other))
        if shapes != others:
            raise ValueError(f"adapter {number} has arrays of other shapes than adapter 0; stack it apart")
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *adapters)


def size(stacked: Adapters) -> int:
    """N, the number of adapters in a stack."""
    return jax.tree.leaves(stacked)[0].shape[0]


def member(stacked: Adapter, number: int) -> Adapter:
    """One adapter of a stack."""
    return jax.tree.map(lambda leaf: leaf[number], stacked)


@jax.jit
def expand(adapter: Adapter) -> Expanded:
    """The updates of an adapter, for when it is used many times and its pools stay as they are, as in decoding."""
    return Expanded(adapter.updates(), adapter.spec, adapter.sites)


def rows(stacks: Adapters | Sequence[Adapters], ids: Array) -> list[Rows]:
    """Each row's updates, for when the same adapters answer many calls of a `batched` function, as in decoding.

    Args:
        stacks: as in `batched`.
        ids: as in `batched`.

    Returns:
        What to pass in place of the stacks, with None for `ids`. Stacks whose updates are alike, whatever methods made
        them, are one: a row costs what the largest rank costs, and smaller ones are filled with zeros. For each further
        kind there is one more, whose arrays are zero where the row's adapter is of another kind, and all rows pay for
        it.

    Raises:
        ValueError: a stack is none; ids are not one integer a row, or, where they are known, count no adapter.

    Example:
        >>> import jax, jax.numpy as jnp, jaxpeft
        >>> from jaxpeft import batch
        >>> from jaxpeft.methods import lora
        >>> base = {"up": {"kernel": jnp.ones((3, 4))}}
        >>> adapters = [jaxpeft.init(jax.random.key(i), lora.Spec(rank=2), jaxpeft.find(base)) for i in range(5)]
        >>> own = batch.rows(batch.stack(adapters), jnp.array([4, 0, batch.BASE]))
        >>> own[0].made["up/kernel"].a.shape
        (1, 3, 2, 3)
        >>> batch.batched(lambda base, x: x @ base["up"]["kernel"])(base, own, None, jnp.ones((3, 3))).shape
        (3, 4)
    """
    stacks = list(stacks) if isinstance(stacks, Sequence) else [stacks]
    ids = jnp.asarray(ids)
    if ids.ndim != 1 or not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ValueError(f"ids has shape {ids.shape} and type {ids.dtype}; expected one integer a row, (B,)")
    for one in stacks:
        _check_stacked(one)
    count = sum(map(size, stacks))
    if not isinstance(ids, Tracer) and (wrong := [at for at in ids.tolist() if not BASE <= at < count]):
        raise ValueError(f"ids holds {wrong[0]}; expected 0 to {count - 1}, or {BASE} for the base alone")
    first, found = 0, []
    for one in stacks:
        found.append(_rows(one, ids - first))
        first += size(one)
    return _joined(found)


def place(own: Rows, row: Array | int, updates: Expanded | None) -> Rows:
    """The same with another adapter's updates, of the same types and shapes, in one row; with zeros for None."""

    def placed(leaf: Array, one: Array) -> Array:
        return jax.lax.dynamic_update_index_in_dim(leaf, one, row, 1)

    made = jax.tree.map(lambda leaf: jnp.zeros_like(leaf[:, 0]), own.made) if updates is None else updates.made
    return dataclasses.replace(own, made=jax.tree.map(placed, own.made, made))


def batched(fn: Callable) -> Callable:
    """The function for rows that belong to different adapters.

    Args:
        fn: as in `jaxpeft.adapt`: called as ``fn(base, *args, **kwargs)``. Each array in `args`, and each array that it
            returns, leads with the batch; what is in `kwargs` is the same for all rows.

    Returns:
        A function ``(base, stacks, ids, *args, dropout_key=None, **kwargs)``. `stacks` is what `stack` returned,
        `Expanded` ones, or a sequence of both; `ids` (B,) int counts through them, `BASE` for a row without an adapter.
        Or `stacks` is what `rows` returned, and `ids` None. Differentiable in the stacks' `params`, so one step trains
        many adapters; what is dropped, every row draws by itself. Other ids, and other adapters of the same spec in
        their place, compile nothing again.

    Example:
        >>> import jax, jax.numpy as jnp, jaxpeft
        >>> from jaxpeft import batch
        >>> from jaxpeft.methods import lora
        >>> base = {"up": {"kernel": jnp.ones((3, 4))}}
        >>> sites = jaxpeft.find(base)
        >>> adapters = [jaxpeft.init(jax.random.key(i), lora.Spec(rank=2), sites) for i in range(5)]
        >>> forward = batch.batched(lambda base, x: x @ base["up"]["kernel"])
        >>> forward(base, batch.stack(adapters), jnp.array([4, 0, batch.BASE]), jnp.ones((3, 3))).shape
        (3, 4)
    """
    forward = adapt(fn)

    def run(
        base: Any,
        stacks: Adapters | Sequence[Adapters] | Sequence[Rows],
        ids: Array | None,
        *args: Any,
        dropout_key: Array | None = None,
        **kwargs: Any,
    ) -> Any:
        own = _given(stacks) if ids is None else rows(stacks, ids)  # pyright: ignore[reportArgumentType]
        count = _count(own) if ids is None else len(ids)
        _check(count, args)
        # Rows without updates drop nothing.
        keys = None if dropout_key is None or count is None else jax.random.split(dropout_key, count)

        def row(own: list[Rows], key: Array | None, args: Any) -> Any:
            updates = [Expanded(one.made, one.spec, one.sites) for one in own]
            out = forward(base, updates, *jax.tree.map(lambda leaf: leaf[None], args), dropout_key=key, **kwargs)
            return jax.tree.map(lambda leaf: leaf[0], out)

        return jax.vmap(row, in_axes=(1, 0, 0))(own, keys, args)

    return run


def _check_stacked(one: Any) -> None:
    """Raises ValueError for one adapter alone, which is no stack."""
    if not isinstance(one, Adapter | Expanded):
        raise ValueError(f"expected what batch.stack returned, or several of them, found {kind_of(one)}")
    if isinstance(one, Adapter) and any(one.constants[group.name]["scale"].ndim < 2 for group in one.sites):
        raise ValueError("found an adapter that is not stacked; expected what batch.stack returned, or several of them")


def _given(stacks: Any) -> list[Rows]:
    own = [stacks] if isinstance(stacks, Rows) else list(stacks)
    if wrong := [type(one).__name__ for one in own if not isinstance(one, Rows)]:
        raise ValueError(f"ids is None, which is for what batch.rows returned; found {wrong[0]}, which needs ids")
    return own


def _count(own: Sequence[Rows]) -> int | None:
    """Rows of a batch; None if no updates say it."""
    return next((leaf.shape[1] for leaf in jax.tree.leaves(list(own))), None)


def _check(count: int | None, args: Any) -> None:
    for leaf in jax.tree.leaves(args):
        if count is not None and np.shape(leaf)[:1] != (count,):
            raise ValueError(f"an argument has shape {np.shape(leaf)}; expected {count} rows, as ids has")


def _rows(stacked: Adapters, ids: Array) -> Rows:
    """Each row's updates; all arrays are zero, which changes nothing, where the id is of no adapter of this stack."""
    known = (ids >= 0) & (ids < size(stacked))
    own = jax.tree.map(lambda leaf: leaf[jnp.clip(ids, 0, size(stacked) - 1)], stacked)
    if isinstance(own, Adapter):
        own = jax.vmap(lambda adapter: Expanded(adapter.updates(), adapter.spec, adapter.sites))(own)

    def laid_out(leaf: Array) -> Array:
        zeroed = jnp.where(known.reshape(-1, *(1,) * (leaf.ndim - 1)), leaf, jnp.zeros((), leaf.dtype))
        return jnp.moveaxis(zeroed, 0, 1)

    return Rows(jax.tree.map(laid_out, own.made), own.spec, own.sites)


def _joined(found: Sequence[Rows]) -> list[Rows]:
    """The same with what is alike in one: each row's updates are zero in all but its own, so their sum is its own."""
    alike: dict[Hashable, list[Rows]] = {}
    for one in found:
        alike.setdefault(_kind(one), []).append(one)
    joined = []
    for first, *others in alike.values():
        made = first.made
        for other in others:
            made = {name: _added(update, other.made[name]) for name, update in made.items()}
        joined.append(dataclasses.replace(first, made=made))
    return joined


def _kind(one: Rows) -> Hashable:
    """What rows have in common whose updates can be added: all but the rank, and how they are dropped in training."""

    def of(update: Update) -> Hashable:
        leaves, structure = jax.tree.flatten(update)
        kept = [leaf.shape[:2] + leaf.shape[3:] if type(update) is LowRank else leaf.shape for leaf in leaves]
        return structure, tuple((shape, str(leaf.dtype)) for shape, leaf in zip(kept, leaves, strict=True))

    parts = [one.spec.part(group) for group in one.sites]
    dropped = tuple((part.dropout, part.dropout_on, part.dropout_pattern) for part in parts)
    return one.sites, dropped, tuple((name, of(one.made[name])) for name in sorted(one.made))


def _added(left: Update, right: Update) -> Update:
    """The sum of two rows' arrays; of low-rank updates after the smaller rank is filled with zeros."""

    def added(left: Array, right: Array) -> Array:
        shape = np.maximum(left.shape, right.shape)
        left, right = (jnp.pad(leaf, [(0, size) for size in shape - leaf.shape]) for leaf in (left, right))
        return left + right

    return jax.tree.map(added, left, right)
