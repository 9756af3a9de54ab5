"""AdaLoRA: adaptive budget allocation (Zhang et al., arXiv 2303.10512, ICLR 2023)."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxpeft import spec as base
from jaxpeft.methods import gated
from jaxpeft.methods.gated import count, updates
from jaxpeft.sites import Group, Sites

__all__ = ["CARD", "Spec", "count", "init", "updates"]

CARD = base.Card(
    title="AdaLoRA",
    formula="(alpha / r) · aᵀ diag(gate) b, the triplets of least importance pruned over all weights",
    parameters="L · r · (in + out + 1), before pruning",
    source="arXiv 2303.10512 §3",
    budget="rank",
    shared="one budget of ranks for all weights",
)


@dataclass(frozen=True, kw_only=True)
class Spec(gated.Spec):
    """ΔW = (alpha / r) · aᵀ diag(gate) b, in the form of a singular value decomposition, P Λ Q in the paper.

    Trained: ``a`` (L, r, in), ``b`` (L, r, out), ``gate`` (L, r), float32. Start: a, b ~ N(0, 0.02²), gate = 0, so
    ΔW = 0. Parameters: L · r · (in + out + 1) a group, of which target_rank a weight, on average, stay alive.
    Source: arXiv 2303.10512 §3; start and scale of its authors' code and of Hugging Face PEFT, whose alpha / r also
    keeps the first r when ranks are pruned.

    Nothing is pruned unless the optimizer is wrapped: `jaxpeft.allocate.for_spec` does it, `jaxpeft.allocate.check`
    refuses an optimizer state that was not, and `jaxpeft.allocate.orthogonality` is the paper's regulariser.

    Attributes:
        rank: r, the ranks at the start; the paper takes 1.5 times the target.
        target_rank: the average rank that is left at the end.

    Examples:
        >>> import jax, jax.numpy as jnp, jaxpeft
        >>> from jaxpeft.methods import adalora
        >>> sites = jaxpeft.find({"q_proj": {"kernel": jnp.zeros((64, 32))}})
        >>> adapter = jaxpeft.init(jax.random.key(0), adalora.Spec(rank=12, target_rank=8), sites)
        >>> {name: leaf.shape for name, leaf in adapter.params["q_proj/kernel"].items()}
        {'a': (1, 12, 64), 'b': (1, 12, 32), 'gate': (1, 12)}
    """

    target_rank: int

    def __post_init__(self) -> None:
        super().__post_init__()
        base.require(1 <= self.target_rank <= self.rank, self, "target_rank", f"from 1 to rank={self.rank}")


def init(key: Array, spec: Spec, sites: Sites, weights: Any = None) -> tuple[dict, dict]:
    """Trained and frozen arrays by group; `weights` is not read."""
    del weights
    return gated.start(key, sites, lambda key, group: triplets(key, group, spec.rank))


def triplets(key: Array, group: Group, rank: int) -> dict[str, Array]:
    """Factors N(0, 0.02²) with all gates zero."""
    a_key, b_key = jax.random.split(key)
    return {
        "a": 0.02 * jax.random.normal(a_key, (group.layers, rank, group.in_dim)),
        "b": 0.02 * jax.random.normal(b_key, (group.layers, rank, group.out_dim)),
        "gate": jnp.zeros((group.layers, rank)),
    }
