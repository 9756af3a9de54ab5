"""DoRA with a dynamic rank distribution (Mao et al., arXiv 2405.17357, ACL 2024)."""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxpeft import spec as base
from jaxpeft.methods import gated
from jaxpeft.methods.gated import count, updates
from jaxpeft.methods.lora import uniform
from jaxpeft.sites import Group, Sites

__all__ = ["CARD", "Spec", "count", "init", "updates"]

CARD = base.Card(
    title="DoRA (dynamic rank)",
    formula="(alpha / r) · aᵀ diag(gate) b, the ranks with the smallest share of ‖ΔW‖ pruned over all weights",
    parameters="L · r · (in + out + 1), before pruning",
    source="arXiv 2405.17357 §3",
    budget="rank",
    shared="one budget of ranks for all weights",
)


@dataclass(frozen=True, kw_only=True)
class Spec(gated.Spec):
    """ΔW = (alpha / r) · aᵀ diag(gate) b = (alpha / r) · Σ gateᵢ aᵢᵀ bᵢ, each term a LoRA of rank one, some pruned.

    Not weight-decomposed DoRA (arXiv 2402.09353), which has the same name.

    Trained: ``a`` (L, r, in), ``b`` (L, r, out), ``gate`` (L, r), float32. Start: a ~ U(±√(6/in)), b ~ U(±√(6/r)), the
    Kaiming-uniform of the authors' code, and gate = 0, so ΔW = 0. Parameters: L · r · (in + out + 1) a group, of which
    target_rank a weight, on average, stay alive. Source: arXiv 2405.17357 §3 and its authors' code.

    Nothing is pruned unless the optimizer is wrapped in `jaxpeft.allocate.dynamic_dora`; the paper's regulariser is
    `jaxpeft.allocate.variance`.

    Attributes:
        rank: r, the ranks at the start.
        target_rank: the average rank that is left at the end.

    Examples:
        >>> import jax, jax.numpy as jnp, jaxpeft
        >>> from jaxpeft.methods import dynamic_dora
        >>> sites = jaxpeft.find({"q_proj": {"kernel": jnp.zeros((64, 32))}})
        >>> adapter = jaxpeft.init(jax.random.key(0), dynamic_dora.Spec(rank=12, target_rank=8), sites)
        >>> bool((jaxpeft.delta(adapter)["q_proj/kernel"] == 0).all())
        True
    """

    target_rank: int

    def __post_init__(self) -> None:
        super().__post_init__()
        base.require(1 <= self.target_rank <= self.rank, self, "target_rank", f"from 1 to rank={self.rank}")


def init(key: Array, spec: Spec, sites: Sites, weights: Any = None) -> tuple[dict, dict]:
    """Trained and frozen arrays by group; `weights` is not read."""
    del weights

    def draw(key: Array, group: Group) -> dict[str, Array]:
        a_key, b_key = jax.random.split(key)
        return {
            "a": math.sqrt(6) * uniform(a_key, (group.layers, spec.rank, group.in_dim), group.in_dim),
            "b": math.sqrt(6) * uniform(b_key, (group.layers, spec.rank, group.out_dim), spec.rank),
            "gate": jnp.zeros((group.layers, spec.rank)),
        }

    return gated.start(key, sites, draw)
