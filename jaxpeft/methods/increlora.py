"""IncreLoRA: incremental parameter allocation (Zhang et al., arXiv 2308.12043)."""

from dataclasses import dataclass
from typing import Any

from jax import Array

from jaxpeft import spec as base
from jaxpeft.methods import gated
from jaxpeft.methods.adalora import triplets
from jaxpeft.methods.gated import count, updates
from jaxpeft.sites import Sites

__all__ = ["CARD", "Spec", "count", "init", "updates"]

CARD = base.Card(
    title="IncreLoRA",
    formula="(alpha / r) · aᵀ diag(gate) b, ranks added where they matter most",
    parameters="L · r · (in + out + 1) with room for r ranks, of which the target lives",
    source="arXiv 2308.12043 §3",
    budget="rank",
    shared="one budget of ranks for all weights",
)


@dataclass(frozen=True, kw_only=True)
class Spec(gated.Spec):
    """AdaLoRA the other way round: every weight starts with few ranks, and the most important ones get more.

    ΔW = (alpha / r) · aᵀ diag(gate) b. Trained: ``a`` (L, r, in), ``b`` (L, r, out), ``gate`` (L, r), float32.
    Start: a, b ~ N(0, 0.02²), gate = 0, so ΔW = 0. A weight's first `start_rank` triplets are alive; the next
    `rank_step` are its reserve, which `jaxpeft.allocate.increlora` holds at a gate of 1e-5, so that a and b learn
    before they count ("advance learning"). The rest wait at a gate of zero. Parameters: L · r · (in + out + 1) a group,
    allocated at once so that growing never recompiles; target_rank a weight, on average, are alive in the end.
    Source: arXiv 2308.12043 §3 and its authors' code. They divide alpha by a weight's current rank; here r is fixed, so
    that a new rank does not shrink the others.

    Attributes:
        rank: r, the largest rank a weight may reach.
        target_rank: the average rank at the end.
        start_rank: ranks every weight starts with.
        rank_step: ranks a chosen weight gains at once.

    Examples:
        >>> from jaxpeft.methods import increlora
        >>> increlora.Spec(rank=16, target_rank=8, rank_step=4).start_rank
        1
    """

    target_rank: int
    start_rank: int = 1
    rank_step: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        base.require(1 <= self.target_rank <= self.rank, self, "target_rank", f"from 1 to rank={self.rank}")
        base.require(
            1 <= self.start_rank <= self.target_rank, self, "start_rank", f"from 1 to target_rank={self.target_rank}"
        )
        room = self.rank - self.start_rank
        base.require(1 <= self.rank_step <= max(room, 1), self, "rank_step", f"from 1 to rank - start_rank = {room}")


def init(key: Array, spec: Spec, sites: Sites, weights: Any = None) -> tuple[dict, dict]:
    """Trained and frozen arrays by group; `weights` is not read."""
    del weights
    return gated.start(key, sites, lambda key, group: triplets(key, group, spec.rank))
