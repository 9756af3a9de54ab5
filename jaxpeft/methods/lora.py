"""LoRA: low-rank adaptation (Hu et al., arXiv 2106.09685)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxpeft import spec as base
from jaxpeft.sites import Group, Sites
from jaxpeft.updates import LowRank

CARD = base.Card(
    title="LoRA",
    formula="(alpha / r) · aᵀ b",
    parameters="L · r · (in + out)",
    source="arXiv 2106.09685 §4.1",
    budget="rank",
)


@dataclass(frozen=True, kw_only=True)
class Spec(base.Spec):
    """ΔW = (alpha / r) · aᵀ b for every weight on its own.

    Trained: ``a`` (L, r, in), ``b`` (L, r, out), float32. Start: a ~ U(±1/√in), b = 0, so ΔW = 0.
    Parameters: L · r · (in + out) a group. Source: arXiv 2106.09685 §4.1; the start of its authors' code.

    Attributes:
        rank: r.

    Examples:
        >>> import jax, jax.numpy as jnp, jaxpeft
        >>> from jaxpeft.methods import lora
        >>> sites = jaxpeft.find({"q_proj": {"kernel": jnp.zeros((64, 32))}})
        >>> adapter = jaxpeft.init(jax.random.key(0), lora.Spec(rank=4), sites)
        >>> {name: leaf.shape for name, leaf in adapter.params["q_proj/kernel"].items()}
        {'a': (1, 4, 64), 'b': (1, 4, 32)}
    """

    rank: int

    def __post_init__(self) -> None:
        super().__post_init__()
        base.require(self.rank >= 1, self, "rank", "at least 1")

    def materialized_rank(self, group: Group) -> int:  # noqa: D102
        del group
        return self.rank


def count(spec: Spec, sites: Sites) -> int:
    """Trained parameters: Σ L · r · (in + out)."""
    return sum(g.layers * spec.rank * (g.in_dim + g.out_dim) for g in sites)


def init(key: Array, spec: Spec, sites: Sites, weights: Any = None) -> tuple[dict, dict]:
    """Trained and frozen arrays by group; `weights` is not read."""
    del weights
    params = {}
    for g, group_key in zip(sites, jax.random.split(key, len(sites)), strict=True):
        params[g.name] = {
            "a": uniform(group_key, (g.layers, spec.rank, g.in_dim), g.in_dim),
            "b": jnp.zeros((g.layers, spec.rank, g.out_dim)),
        }
    return params, {g.name: {} for g in sites}


def updates(params: Mapping, constants: Mapping, spec: Spec, sites: Sites) -> dict[str, LowRank]:
    """One `LowRank` a group, stacked over its layers."""
    del spec
    return {g.name: LowRank(params[g.name]["a"], params[g.name]["b"], constants[g.name]["scale"]) for g in sites}


def uniform(key: Array, shape: tuple[int, ...], fan_in: int) -> Array:
    """U(-1/√fan_in, 1/√fan_in): Kaiming-uniform with a = √5, the start of every first factor in this family."""
    return jax.random.uniform(key, shape, minval=-1, maxval=1) / math.sqrt(fan_in)
