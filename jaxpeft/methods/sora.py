"""SoRA: sparse low-rank adaptation (Ding et al., arXiv 2311.11696, EMNLP 2023)."""

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
    title="SoRA",
    formula="(alpha / r) · aᵀ diag(gate) b, the gates sparse",
    parameters="L · r · (in + out + 1), before pruning",
    source="arXiv 2311.11696 §3",
    budget="rank",
)


@dataclass(frozen=True, kw_only=True)
class Spec(gated.Spec):
    """ΔW = (alpha / r) · aᵀ diag(gate) b with gates that a proximal step makes exactly zero.

    Trained: ``a`` (L, r, in), ``b`` (L, r, out), ``gate`` (L, r), float32. Start: a ~ U(±1/√in), b = 0,
    gate ~ N(0, 1), so ΔW = 0. Parameters: L · r · (in + out + 1) a group. Source: arXiv 2311.11696 §3; the start of its
    authors' code.

    The gates become sparse only under `jaxpeft.allocate.sora`; there is no budget, the threshold decides how many stay.

    Attributes:
        rank: r, the ranks at the start, r_max in the paper.

    Examples:
        >>> import jax, jax.numpy as jnp, jaxpeft
        >>> from jaxpeft.methods import sora
        >>> sites = jaxpeft.find({"q_proj": {"kernel": jnp.zeros((64, 32))}})
        >>> jaxpeft.count(jaxpeft.init(jax.random.key(0), sora.Spec(rank=8), sites))
        776
    """


def init(key: Array, spec: Spec, sites: Sites, weights: Any = None) -> tuple[dict, dict]:
    """Trained and frozen arrays by group; `weights` is not read."""
    del weights

    def draw(key: Array, group: Group) -> dict[str, Array]:
        a_key, gate_key = jax.random.split(key)
        return {
            "a": uniform(a_key, (group.layers, spec.rank, group.in_dim), group.in_dim),
            "b": jnp.zeros((group.layers, spec.rank, group.out_dim)),
            "gate": jax.random.normal(gate_key, (group.layers, spec.rank)),
        }

    return gated.start(key, sites, draw)
