"""What the methods with a trained gate for every rank have in common; `jaxpeft.allocate` says which ranks live.

Shapes never change: a factor has the largest rank a weight may reach, and a rank is dead when its gate is zero. So no
budget, schedule or allocation recompiles a step, and every update stays a `LowRank`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
from jax import Array

from jaxpeft import spec as base
from jaxpeft.sites import Group, Sites
from jaxpeft.updates import LowRank

Start = Callable[[Array, Group], dict[str, Array]]


@dataclass(frozen=True, kw_only=True)
class Spec(base.Spec):
    """ΔW = (alpha / r) · aᵀ diag(gate) b, with ``a`` (L, r, in), ``b`` (L, r, out) and ``gate`` (L, r) all trained.

    Attributes:
        rank: r, the ranks that a weight has room for.
    """

    rank: int

    def __post_init__(self) -> None:
        super().__post_init__()
        base.require(self.rank >= 1, self, "rank", "at least 1")

    def materialized_rank(self, group: Group) -> int:  # noqa: D102
        del group
        return self.rank


def count(spec: Any, sites: Sites) -> int:
    """Trained parameters before any rank is pruned: Σ L · r · (in + out + 1)."""
    return sum(g.layers * spec.rank * (g.in_dim + g.out_dim + 1) for g in sites)


def start(key: Array, sites: Sites, draw: Start) -> tuple[dict, dict]:
    """Trained arrays by group, each drawn with its own key, and no frozen ones."""
    keys = jax.random.split(key, len(sites))
    return {g.name: draw(k, g) for g, k in zip(sites, keys, strict=True)}, {g.name: {} for g in sites}


def updates(params: Mapping, constants: Mapping, spec: Any, sites: Sites) -> dict[str, LowRank]:
    """One `LowRank` a group, the gates multiplied into its a."""
    del spec
    return {g.name: gated(params[g.name], params[g.name]["gate"], constants[g.name]["scale"]) for g in sites}


def gated(trained: Mapping, gate: Array, scale: Array) -> LowRank:
    """aᵀ diag(gate) b of all layers of a group."""
    return LowRank(trained["a"] * gate[:, :, None], trained["b"], scale)
