"""Trainable token rows: some rows of an embedding, or of any weight, trained whole; the others stay as they are."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import Array

from jaxpeft import spec as base
from jaxpeft.sites import Group, Sites
from jaxpeft.updates import Update

CARD = base.Card(
    title="trainable token rows",
    formula="alpha · the trained rows at their indices, zero elsewhere",
    parameters="L · k · out, k rows",
    source="PEFT's `trainable_token_indices`",
    budget="",
)


@dataclass(frozen=True, kw_only=True)
class Spec(base.Spec):
    """ΔW[indices] = alpha · rows: for new tokens in an embedding. A tied head sees the same rows.

    Trained: ``rows`` (L, k, out), float32, zero at the start. Frozen: ``index`` (L, k).

    Attributes:
        indices: rows of the weight, such as token ids; each once.

    Examples:
        >>> import jax, jax.numpy as jnp, jaxpeft
        >>> from jaxpeft.methods import rows
        >>> base = {"embed": {"embedding": jnp.ones((100, 8))}}
        >>> adapter = jaxpeft.init(jax.random.key(0), rows.Spec(indices=(98, 99)), jaxpeft.find(base, ".*"))
        >>> jaxpeft.count(adapter)
        16
    """

    alpha: float = dataclasses.field(default=1.0, compare=False)
    indices: tuple[int, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "indices", tuple(self.indices))
        base.require(len(self.indices) > 0, self, "indices", "at least one row")
        base.require(min(self.indices) >= 0, self, "indices", "no negative row")
        base.require(len(set(self.indices)) == len(self.indices), self, "indices", "each row once")

    def check(self, group: Group) -> None:
        """Raises ValueError if a row is beyond the weight."""
        expected = f"rows of {group.name}, 0 to {group.in_dim - 1}"
        base.require(max(self.indices) < group.in_dim, self, "indices", expected)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rows(Update):
    """ΔW with some rows, (in, out).

    Attributes:
        rows: (..., k, out)
        index: (..., k) where they are, each once.
        scale: (...)
        in_dim: number of all rows.
    """

    axes: ClassVar[Mapping[str, str]] = {"rows": "no"}

    rows: Array
    index: Array
    scale: Array
    in_dim: int = dataclasses.field(metadata={"static": True})

    def delta(self) -> Array:  # noqa: D102
        return jnp.zeros((self.in_dim, self.rows.shape[-1])).at[self.index].add(self.rows * self.scale)

    def delta_matmul(self, x: Array) -> Array:  # noqa: D102
        # Not x[..., index]: XLA's partitioner fails on gathers along an axis that a mesh splits.
        chosen = jax.nn.one_hot(self.index, self.in_dim, dtype=x.dtype)
        return jnp.einsum("...i,ki->...k", x, chosen) @ (self.rows * self.scale).astype(x.dtype)

    def delta_rows(self, take: Callable[[Array], Array]) -> Array:  # noqa: D102
        place = jnp.zeros((self.in_dim, 1), jnp.int32).at[self.index, 0].set(1 + jnp.arange(len(self.index)))
        place = take(place)[..., 0]  # 0 for rows that are not trained.
        return jnp.where((place > 0)[..., None], (self.rows * self.scale)[jnp.maximum(place, 1) - 1], 0)


def count(spec: Spec, sites: Sites) -> int:
    """Trained parameters: Σ L · k · out."""
    return sum(g.layers * len(spec.indices) * g.out_dim for g in sites)


def init(key: Array, spec: Spec, sites: Sites, weights: Any = None) -> tuple[dict, dict]:
    """Rows by group, zero, and their indices; `key` and `weights` are not read."""
    del key, weights
    params, constants = {}, {}
    for g in sites:
        spec.check(g)
        params[g.name] = {"rows": jnp.zeros((g.layers, len(spec.indices), g.out_dim))}
        constants[g.name] = {"index": jnp.tile(jnp.array(spec.indices, jnp.int32), (g.layers, 1))}
    return params, constants


def updates(params: Mapping, constants: Mapping, spec: Spec, sites: Sites) -> dict[str, Rows]:
    """One `Rows` a group."""
    del spec
    return {
        g.name: Rows(params[g.name]["rows"], constants[g.name]["index"], constants[g.name]["scale"], g.in_dim)
        for g in sites
    }
