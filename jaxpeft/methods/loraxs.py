"""LoRA-XS: a small matrix between frozen singular vectors (Bałazy et al., arXiv 2405.17604, ECAI 2025)."""

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
    title="LoRA-XS",
    formula="(alpha / r) · U_r Σ_r R V_rᵀ, with W0 = U Σ Vᵀ",
    parameters="L · r²",
    source="arXiv 2405.17604 §3",
    budget="rank",
    zero_start=False,
)


@dataclass(frozen=True, kw_only=True)
class Spec(base.Spec):
    """ΔW = (alpha / r) · aᵀ R b, with a = (U_r Σ_r)ᵀ and b = V_rᵀ from the singular value decomposition W0 = U Σ Vᵀ.

    Trained: ``R`` (L, r, r), float32. Frozen and stored: ``a`` (L, r, in), ``b`` (L, r, out), so that the adapter does
    not depend on the signs that a decomposition chooses. Start: R ~ N(0, r_std²). The authors' 1e-5 is almost a no-op,
    but not quite, as a float32 weight can show ΔW of the size 1e-5 · (alpha / r) · Σ₁; `r_std=0` is one, and trains.
    Parameters: L · r² a group. Source: arXiv 2405.17604 §3 and its authors' code, in which Σ is on the input's side.

    Attributes:
        rank: r, at most min(in, out).
        r_std: spread of R's start.

    Examples:
        >>> import jax, jax.numpy as jnp, jaxpeft
        >>> from jaxpeft.methods import loraxs
        >>> base = {"q_proj": {"kernel": jax.random.normal(jax.random.key(1), (64, 32))}}
        >>> adapter = jaxpeft.init(jax.random.key(0), loraxs.Spec(rank=4), jaxpeft.find(base), weights=base)
        >>> {name: leaf.shape for name, leaf in adapter.params["q_proj/kernel"].items()}
        {'R': (1, 4, 4)}
    """

    rank: int
    r_std: float = 1e-5

    def __post_init__(self) -> None:
        super().__post_init__()
        base.require(self.rank >= 1, self, "rank", "at least 1")
        base.require(self.r_std >= 0, self, "r_std", "at least 0")

    def materialized_rank(self, group: Group) -> int:  # noqa: D102
        del group
        return self.rank

    def check(self, group: Group) -> None:
        """Raises ValueError if a weight has fewer singular vectors than the rank."""
        if self.rank > (largest := min(group.in_dim, group.out_dim)):
            raise ValueError(
                f"loraxs.Spec: rank={self.rank} is more than the singular values of {group.name}, in={group.in_dim} "
                f"and out={group.out_dim}; largest rank here: {largest}"
            )


def count(spec: Spec, sites: Sites) -> int:
    """Trained parameters: Σ L · r²."""
    return sum(g.layers * spec.rank**2 for g in sites)


def init(key: Array, spec: Spec, sites: Sites, weights: Any = None) -> tuple[dict, dict]:
    """R by group (trained) and the scaled singular vectors of `weights` (frozen)."""
    if weights is None:
        raise ValueError("loraxs starts from the singular vectors of the weights; pass weights=base to jaxpeft.init")
    params, constants = {}, {}
    for g, group_key in zip(sites, jax.random.split(key, len(sites)), strict=True):
        spec.check(g)
        left, values, right = jnp.linalg.svd(weights[g.name], full_matrices=False)
        scaled = left[..., : spec.rank] * values[:, None, : spec.rank]
        params[g.name] = {"R": spec.r_std * jax.random.normal(group_key, (g.layers, spec.rank, spec.rank))}
        constants[g.name] = {"a": scaled.swapaxes(1, 2), "b": right[:, : spec.rank]}
    return params, constants


def updates(params: Mapping, constants: Mapping, spec: Spec, sites: Sites) -> dict[str, LowRank]:
    """One `LowRank` a group, R multiplied into the narrower factor."""
    del spec
    made = {}
    for g in sites:
        middle, frozen = params[g.name]["R"], constants[g.name]
        a, b = frozen["a"], frozen["b"]
        if g.in_dim <= g.out_dim:
            a = jnp.einsum("lqi,lqr->lri", a, middle, precision="highest")
        else:
            b = jnp.einsum("lqr,lro->lqo", middle, b, precision="highest")
        made[g.name] = LowRank(a, b, frozen["scale"])
    return made
