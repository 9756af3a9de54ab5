"""HiRA: Hadamard high-rank adaptation (Huang et al., ICLR 2025, openreview TwJrTz9cRS)."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jax import Array

from jaxpeft import spec as base
from jaxpeft.methods import lora
from jaxpeft.methods.glora import Modulated
from jaxpeft.sites import Sites

CARD = base.Card(
    title="HiRA",
    formula="alpha · W0 * (aᵀ b)",
    parameters="L · r · (in + out)",
    source="openreview TwJrTz9cRS",
    budget="rank",
)


@dataclass(frozen=True, kw_only=True)
class Spec(base.Spec):
    """ΔW = alpha · W0 * (aᵀ b), element by element: a change of high rank from factors of rank r.

    Trained: ``a`` (L, r, in), ``b`` (L, r, out), float32. Start: LoRA's, a ~ U(±1/√in), b = 0, so ΔW = 0. Parameters:
    L · r · (in + out) a group. Source: openreview TwJrTz9cRS and its authors' code, whose scale is 1 by default.

    It is GLoRA with a low-rank A and no B. ΔW is formed in every step, but not W0 stored again: without forming, W0
    would be multiplied r times.

    Attributes:
        rank: r.

    Examples:
        >>> import jax, jax.numpy as jnp, jaxpeft
        >>> from jaxpeft.methods import hira
        >>> sites = jaxpeft.find({"q_proj": {"kernel": jnp.zeros((64, 32))}})
        >>> adapter = jaxpeft.init(jax.random.key(0), hira.Spec(rank=4), sites)
        >>> {name: leaf.shape for name, leaf in adapter.params["q_proj/kernel"].items()}
        {'a': (1, 4, 64), 'b': (1, 4, 32)}
    """

    alpha: float = dataclasses.field(default=1.0, compare=False)
    rank: int

    def __post_init__(self) -> None:
        super().__post_init__()
        base.require(self.rank >= 1, self, "rank", "at least 1")


def count(spec: Spec, sites: Sites) -> int:
    """Trained parameters: Σ L · r · (in + out)."""
    return sum(g.layers * spec.rank * (g.in_dim + g.out_dim) for g in sites)


def init(key: Array, spec: Spec, sites: Sites, weights: Any = None) -> tuple[dict, dict]:
    """Trained arrays by group, as LoRA's; `weights` is not read, and nothing is frozen."""
    return lora.init(key, lora.Spec(rank=spec.rank), sites, weights)


def updates(params: Mapping, constants: Mapping, spec: Spec, sites: Sites) -> dict[str, Modulated]:
    """One `Modulated` a group, stacked over its layers."""
    same = lora.updates(params, constants, lora.Spec(rank=spec.rank), sites)
    return {name: Modulated(product) for name, product in same.items()}
