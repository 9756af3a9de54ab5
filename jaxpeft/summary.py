"""What an adapter costs: trained parameters and stored bytes by group, and the share of the base they make up."""

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jaxpeft.adapter import Adapter
from jaxpeft.sites import Group
from jaxpeft.spec import method_of
from jaxpeft.table import table


@dataclass(frozen=True)
class GroupSummary:
    """One group's row.

    Attributes:
        group: the sites.
        trained: trained parameters.
        stored_bytes: bytes of trained arrays, and of frozen ones in the integers they are saved as.
        share: trained parameters over base parameters of the group.
        dead: share of the trained parameters that no layer uses; None where the method has no such thing or the arrays
            are shapes only.
    """

    group: Group
    trained: int
    stored_bytes: int
    share: float
    dead: float | None


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
        """Bytes that the adapter stores."""
        return sum(row.stored_bytes for row in self.rows)

    def __str__(self) -> str:
        lines = [("group", "layers", "in", "out", "trained", "stored", "share of base", "dead")]
        for row in self.rows:
            dead = "" if row.dead is None else f"{row.dead:.1%}"
            group = row.group
            sizes = (str(group.layers), str(group.in_dim), str(group.out_dim))
            lines.append((group.name, *sizes, f"{row.trained:,}", f"{row.stored_bytes:,} B", f"{row.share:.3%}", dead))
        base = sum(row.group.layers * row.group.in_dim * row.group.out_dim for row in self.rows)
        share = self.trained / base
        total = f"{self.trained:,} trained parameters, {share:.3%} of the adapted weights; {self.stored_bytes:,} bytes"
        name = type(self.spec).__module__.rpartition(".")[2]
        return "\n".join([f"{name}.{self.spec!r}", *table(lines), total])


def summary(adapter: Adapter) -> Summary:
    """Counts of an adapter by group.

    Args:
        adapter: any adapter, of arrays or of shapes.

    Example:
        >>> import jax, jax.numpy as jnp, jaxpeft
        >>> from jaxpeft.methods import lora
        >>> sites = jaxpeft.find({"up": {"kernel": jnp.zeros((64, 32))}})
        >>> print(jaxpeft.summary(jaxpeft.init(jax.random.key(0), lora.Spec(rank=2), sites)))
        lora.Spec(alpha=16.0, dropout=0.0, rank=2)
        group      layers  in  out  trained  stored  share of base  dead
        up/kernel  1       64  32   192      772 B   9.375%
        192 trained parameters, 9.375% of the adapted weights; 772 bytes
    """
    dead = getattr(method_of(adapter.spec), "dead", None)
    concrete = all(isinstance(leaf, jax.Array | np.ndarray) for leaf in jax.tree.leaves(adapter.constants))
    rows = []
    for group in adapter.sites:
        params, constants = (jax.tree.leaves(tree[group.name]) for tree in (adapter.params, adapter.constants))
        trained = sum(leaf.size for leaf in params)
        stored = sum(leaf.size * leaf.dtype.itemsize for leaf in params)
        stored += sum(leaf.size * (saved_dtype(leaf) if concrete else leaf.dtype).itemsize for leaf in constants)
        share = trained / (group.layers * group.in_dim * group.out_dim)
        unused = dead(adapter.constants, adapter.spec, group) if dead and concrete else None
        rows.append(GroupSummary(group, trained, stored, share, unused))
    return Summary(adapter.spec, tuple(rows))


def saved_dtype(leaf: Any) -> np.dtype:
    """The dtype a frozen array is saved in: the smallest unsigned integer for an index table, its own otherwise."""
    if np.issubdtype(leaf.dtype, np.integer) and leaf.size:
        return np.min_scalar_type(int(np.max(leaf)))
    return np.dtype(leaf.dtype)
