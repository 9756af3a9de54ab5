"""MultiLoRA: parallel LoRAs with trained scalings that start at zero (Wang et al., arXiv 2311.11501)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxpeft import spec as base
from jaxpeft.methods.lora import uniform
from jaxpeft.sites import Group, Sites
from jaxpeft.updates import LowRank

CARD = base.Card(
    title="MultiLoRA",
    formula="(alpha / (n r)) · Σ_i a_iᵀ b_i diag(scaling_i)",
    parameters="L · n · (r · (in + out) + out)",
    source="arXiv 2311.11501 §3",
    budget="rank",
)


@dataclass(frozen=True, kw_only=True)
class Spec(base.Spec):
    """ΔW = (alpha / (n r)) · Σ_i a_iᵀ b_i diag(scaling_i): n LoRAs, each with a factor for every output.

    Trained, float32: ``a`` (L, n, r, in), ``b`` (L, n, r, out), ``scaling`` (L, n, out). Start: a ~ U(±1/√in),
    b ~ U(±1/√r), both Kaiming-uniform, and scaling = 0, so ΔW = 0. Parameters: L · n · (r · (in + out) + out) a group.
    Source: arXiv 2311.11501 §3. Alpha is divided by the rank of ΔW, as everywhere in jaxpeft; the re-implementation of
    MTL-LoRA's authors divides by r.

    Attributes:
        rank: r, of each LoRA.
        parallel: n, number of LoRAs.

    Examples:
        >>> import jax, jax.numpy as jnp, jaxpeft
        >>> from jaxpeft.methods import multilora
        >>> sites = jaxpeft.find({"q_proj": {"kernel": jnp.zeros((64, 32))}})
        >>> adapter = jaxpeft.init(jax.random.key(0), multilora.Spec(rank=4, parallel=3), sites)
        >>> jaxpeft.count(adapter) == 3 * (4 * (64 + 32) + 32)
        True
    """

    rank: int
    parallel: int

    def __post_init__(self) -> None:
        super().__post_init__()
        base.require(self.rank >= 1, self, "rank", "at least 1")
        base.require(self.parallel >= 1, self, "parallel", "at least 1")

    def materialized_rank(self, group: Group) -> int:  # noqa: D102
        del group
        return self.parallel * self.rank


def count(spec: Spec, sites: Sites) -> int:
    """Trained parameters: Σ L · n · (r · (in + out) + out)."""
    return sum(g.layers * spec.parallel * (spec.rank * (g.in_dim + g.out_dim) + g.out_dim) for g in sites)


def init(key: Array, spec: Spec, sites: Sites, weights: Any = None) -> tuple[dict, dict]:
    """Trained arrays by group; `weights` is not read, and nothing is frozen."""
    del weights
    params = {}
    for g, group_key in zip(sites, jax.random.split(key, len(sites)), strict=True):
        a_key, b_key = jax.random.split(group_key)
        parts = (g.layers, spec.parallel)
        params[g.name] = {
            "a": uniform(a_key, (*parts, spec.rank, g.in_dim), g.in_dim),
            "b": uniform(b_key, (*parts, spec.rank, g.out_dim), spec.rank),
            "scaling": jnp.zeros((*parts, g.out_dim)),
        }
    return params, {g.name: {} for g in sites}


def updates(params: Mapping, constants: Mapping, spec: Spec, sites: Sites) -> dict[str, LowRank]:
    """One `LowRank` a group: the LoRAs one below the other, the scalings in their second factors."""
    made = {}
    for g in sites:
        trained, rank = params[g.name], spec.materialized_rank(g)
        a = trained["a"].reshape(g.layers, rank, g.in_dim)
        b = (trained["b"] * trained["scaling"][:, :, None]).reshape(g.layers, rank, g.out_dim)
        made[g.name] = LowRank(a, b, constants[g.name]["scale"])
    return made
