"""What an adapter costs and what its structure allows: parameters, bytes and ranks by group."""

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jaxpeft import checks
from jaxpeft.adapter import Adapter
from jaxpeft.sites import Group
from jaxpeft.spec import SHARED, method_of, name_of
from jaxpeft.table import html_table, table
from jaxpeft.updates import Update
from jaxpeft.values import over_stack

LARGEST_MATRIX = 2**24
"""Entries of the largest stacked matrix whose rank is computed."""


@dataclass(frozen=True)
class GroupSummary:
    """One group's row.

    Attributes:
        name: the group, or ``shared`` for what belongs to all groups together.
        group: the sites; None for ``shared``.
        trained: trained parameters; a pool counts once.
        stored_bytes: bytes of trained arrays, and of frozen ones in the integers they are saved as, each once. Of index
            tables that are shapes only the largest that they can be, as the integers depend on the values: `at_most`.
        expanded_bytes: bytes of the updates when they are expanded over the layers, for one step.
        share: trained parameters over base parameters of the group.
        dead: share of the trained parameters that no layer uses; None where the method has no such thing or the arrays
            are shapes only.
        column_rank: rank of [ΔW_1 | … | ΔW_L], outputs as rows, for trained arrays in general position: the dimension
            of the space that the updates of all layers can reach together. None where it is not known: shapes only,
            an update that multiplies the weight, or too large to compute.
        at_most: whether `stored_bytes` is an upper bound.
    """

    name: str
    group: Group | None
    trained: int
    stored_bytes: int
    expanded_bytes: int
    share: float | None
    dead: float | None
    column_rank: int | None
    at_most: bool = False


@dataclass(frozen=True)
class Summary:
    """What `summary` returns; printing shows a table."""

    spec: Any
    rows: tuple[GroupSummary, ...]

    @property
    def trained(self) -> int:
        """Trained parameters; a shared pool counts once."""
        return sum(row.trained for row in self.rows)

    @property
    def stored_bytes(self) -> int:
        """Bytes that the adapter stores; an upper bound if it is one for a row."""
        return sum(row.stored_bytes for row in self.rows)

    def __str__(self) -> str:
        rows, total = self._table()
        return "\n".join([f"{name_of(self.spec)}.{self.spec!r}", *table(rows), total])

    def _repr_html_(self) -> str:
        rows, total = self._table()
        return html_table(rows, f"{name_of(self.spec)}: {total}")

    def _table(self) -> tuple[list[tuple[str, ...]], str]:
        lines: list[tuple[str, ...]] = [
            ("group", "layers", "in", "out", "trained", "stored", "expanded", "share of base", "dead", "column rank")
        ]
        for row in self.rows:
            sizes = ("", "", "") if row.group is None else (row.group.layers, row.group.in_dim, row.group.out_dim)
            stored = f"{'≤ ' if row.at_most else ''}{row.stored_bytes:,} B"
            costs = (f"{row.trained:,}", stored, f"{row.expanded_bytes:,} B")
            share = "" if row.share is None else f"{row.share:.3%}"
            dead = "" if row.dead is None else f"{row.dead:.1%}"
            rank = "" if row.column_rank is None else str(row.column_rank)
            lines.append((row.name, *map(str, sizes), *costs, share, dead, rank))
        groups = [row.group for row in self.rows if row.group is not None]
        share = self.trained / sum(group.layers * group.in_dim * group.out_dim for group in groups)
        size = f"{'at most ' if any(row.at_most for row in self.rows) else ''}{self.stored_bytes:,} bytes"
        return lines, f"{self.trained:,} trained parameters, {share:.3%} of the adapted weights; {size}"


def summary(adapter: Adapter) -> Summary:
    r"""Counts of an adapter by group.

    Args:
        adapter: any adapter, of arrays or of shapes.

    Examples:
        >>> import jax, jax.numpy as jnp, jaxpeft
        >>> from jaxpeft.methods import lora
        >>> sites = jaxpeft.find({"up": {"kernel": jnp.zeros((64, 32))}})
        >>> found = jaxpeft.summary(jaxpeft.init(jax.random.key(0), lora.Spec(rank=2), sites))
        >>> print("\n".join(str(found).splitlines()[1:]))
        group      layers  in  out  trained  stored  expanded  share of base  dead  column rank
        up/kernel  1       64  32   192      772 B   772 B     9.375%               2
        192 trained parameters, 9.375% of the adapted weights; 772 bytes
    """
    checks.adapter(adapter)
    concrete = all(isinstance(leaf, jax.Array | np.ndarray) for leaf in jax.tree.leaves(adapter))
    updates = jax.eval_shape(Adapter.updates, adapter)
    general = _in_general_position(adapter).updates() if concrete else {}
    rows = []
    for name in (*(group.name for group in adapter.sites), SHARED):
        params, constants = (jax.tree.leaves(tree.get(name, {})) for tree in (adapter.params, adapter.constants))
        trained = sum(leaf.size for leaf in params)
        stored = sum(leaf.size * leaf.dtype.itemsize for leaf in params)
        stored += sum(leaf.size * (saved_dtype(leaf) if concrete else leaf.dtype).itemsize for leaf in constants)
        at_most = not concrete and any(np.issubdtype(leaf.dtype, np.integer) for leaf in constants)
        if name == SHARED:
            if params or constants:
                rows.append(GroupSummary(name, None, trained, stored, 0, None, None, None, at_most))
            continue
        group, spec = adapter.sites[name], adapter.spec.part(adapter.sites[name])
        expanded = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(updates[name]))
        share = trained / (group.layers * group.in_dim * group.out_dim)
        dead = getattr(method_of(spec), "dead", None)
        unused = dead(adapter.constants, spec, group) if dead and concrete else None
        rank = column_rank(general[name], group) if concrete else None
        rows.append(GroupSummary(name, group, trained, stored, expanded, share, unused, rank, at_most))
    return Summary(adapter.spec, tuple(rows))


def column_rank(update: Update, group: Group) -> int | None:
    """Rank of the group's updates side by side, outputs as rows; None where it is not known."""
    if not update.additive:
        return None
    factors = update.factors()
    # As many random inputs as one layer's rank can be span all that it can give out.
    inputs = min(group.in_dim, group.out_dim, group.in_dim if factors is None else factors.b.shape[1])
    rows = group.layers * inputs
    if rows * group.out_dim > LARGEST_MATRIX:
        return None
    x = jax.random.normal(jax.random.key(0), (inputs, group.in_dim))
    outputs = over_stack(lambda update: update.delta_matmul(x), 1)(update).reshape(rows, group.out_dim)
    return int(np.linalg.matrix_rank(np.asarray(outputs, np.float64), rtol=1e-5))


def _in_general_position(adapter: Adapter) -> Adapter:
    """The adapter with random numbers in all trained arrays."""
    leaves, structure = jax.tree.flatten(adapter.params)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    random = [jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)]
    return adapter.replace(params=jax.tree.unflatten(structure, random))


def saved_dtype(leaf: Any) -> np.dtype:
    """The dtype a frozen array is saved in: the smallest unsigned integer for an index table, its own otherwise."""
    if np.issubdtype(leaf.dtype, np.integer) and leaf.size:
        return np.min_scalar_type(int(np.max(leaf)))
    return np.dtype(leaf.dtype)
