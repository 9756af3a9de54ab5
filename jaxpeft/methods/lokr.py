"""LoKr: low-rank Kronecker product (Yeh et al., LyCORIS, arXiv 2309.14859; KronA, Edalati et al., arXiv 2212.10650)."""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array

from jaxpeft import spec as base
from jaxpeft.methods.lora import uniform
from jaxpeft.sites import Group, Sites
from jaxpeft.updates import Kronecker, LowRank

CARD = base.Card(
    title="LoKr",
    formula="(alpha / r) · W1 ⊗ (aᵀ b)",
    parameters="L · (in₁ out₁ + r (in₂ + out₂)), in = in₁ in₂, out = out₁ out₂",
    source="arXiv 2309.14859 §3",
    budget="rank",
)


@dataclass(frozen=True, kw_only=True)
class Spec(base.Spec):
    """ΔW = (alpha / r) · W1 ⊗ W2, in = in₁·in₂ and out = out₁·out₂; the product is never formed.

    Trained, float32: W1 as ``w1`` (L, in₁, out₁); W2 as factors ``w2_a`` (L, r, in₂) and ``w2_b`` (L, r, out₂), or
    dense as ``w2`` (L, in₂, out₂) where r ≥ max(in₂, out₂) / 2. With `decompose_both` the same rule makes ``w1_a``,
    ``w1_b`` of W1. The scale is alpha / r in every case, as in PEFT; LyCORIS takes 1 where both are dense.

    Start: every leaf is U(±1/√fan-in), but one is 0, so ΔW = 0: `zero="w1"`, PEFT's default, W1 (its ``w1_b``);
    `zero="w2"`, LyCORIS's, W2 (its ``w2_a``). Parameters: L · (in₁ out₁ + r (in₂ + out₂)) a group.
    Source: arXiv 2309.14859 §3 and its authors' code; W1 ⊗ W2 with both dense is KronA, arXiv 2212.10650.

    Attributes:
        rank: r.
        decompose_factor: in₁ and out₁ are this number where it divides; else, and for None, the largest divisor that is
            neither above it nor above the square root.
        decompose_both: whether W1 is low-rank too.
        zero: the side that starts at zero.

    Examples:
        >>> import jax, jax.numpy as jnp, jaxpeft
        >>> from jaxpeft.methods import lokr
        >>> sites = jaxpeft.find({"q_proj": {"kernel": jnp.zeros((64, 128))}})
        >>> adapter = jaxpeft.init(jax.random.key(0), lokr.Spec(rank=2), sites)
        >>> {name: leaf.shape for name, leaf in adapter.params["q_proj/kernel"].items()}
        {'w1': (1, 8, 8), 'w2_a': (1, 2, 8), 'w2_b': (1, 2, 16)}
    """

    rank: int
    decompose_factor: int | None = None
    decompose_both: bool = False
    zero: Literal["w1", "w2"] = "w1"

    def __post_init__(self) -> None:
        super().__post_init__()
        base.require(self.rank >= 1, self, "rank", "at least 1")
        base.require((self.decompose_factor or 1) >= 1, self, "decompose_factor", "at least 1, or None")
        base.require(self.zero in ("w1", "w2"), self, "zero", "w1 or w2")

    def materialized_rank(self, group: Group) -> int:  # noqa: D102
        del group
        return self.rank


def count(spec: Spec, sites: Sites) -> int:
    """Trained parameters: Σ L · (those of W1 + those of W2)."""
    return sum(g.layers * math.prod(shape) for g in sites for shape in shapes(spec, g).values())


def init(key: Array, spec: Spec, sites: Sites, weights: Any = None) -> tuple[dict, dict]:
    """Trained arrays by group; `weights` is not read, and nothing is frozen."""
    del weights
    params = {}
    for g, group_key in zip(sites, jax.random.split(key, len(sites)), strict=True):
        leaves = shapes(spec, g)
        zero = ("w1", "w1_b") if spec.zero == "w1" else ("w2", "w2_a")
        params[g.name] = {}
        for (name, shape), leaf_key in zip(leaves.items(), jax.random.split(group_key, len(leaves)), strict=True):
            fan_in = shape[1] if name.endswith("_a") else shape[0]
            stacked = (g.layers, *shape)
            params[g.name][name] = jnp.zeros(stacked) if name in zero else uniform(leaf_key, stacked, fan_in)
    return params, {g.name: {} for g in sites}


def updates(params: Mapping, constants: Mapping, spec: Spec, sites: Sites) -> dict[str, Kronecker]:
    """One `Kronecker` of two pieces a group."""
    del spec

    def piece(trained: Mapping, name: str, layers: int) -> Array | LowRank:
        if name in trained:
            return trained[name]
        return LowRank(trained[f"{name}_a"], trained[f"{name}_b"], jnp.ones(layers))

    return {
        g.name: Kronecker(
            (piece(params[g.name], "w1", g.layers), piece(params[g.name], "w2", g.layers)), constants[g.name]["scale"]
        )
        for g in sites
    }


def shapes(spec: Spec, group: Group) -> dict[str, tuple[int, int]]:
    """Shape of every leaf of one layer, by name."""
    ins, outs = (factorize(dim, spec.decompose_factor) for dim in (group.in_dim, group.out_dim))
    found = {}
    for name, in_dim, out_dim, decompose in zip(("w1", "w2"), ins, outs, (spec.decompose_both, True), strict=True):
        if decompose and spec.rank < max(in_dim, out_dim) / 2:
            found |= {f"{name}_a": (spec.rank, in_dim), f"{name}_b": (spec.rank, out_dim)}
        else:
            found[name] = (in_dim, out_dim)
    return found


@functools.cache
def factorize(dim: int, factor: int | None = None) -> tuple[int, int]:
    """Two factors of a size, by the rule of `Spec.decompose_factor`.

    Examples:
        >>> factorize(128), factorize(128, 4), factorize(127), factorize(12, 5)
        ((8, 16), (4, 32), (1, 127), (3, 4))
    """
    if factor is not None and dim % factor == 0:
        return factor, dim // factor
    largest = min(math.isqrt(dim), factor or dim)
    first = next(divisor for divisor in range(largest, 0, -1) if dim % divisor == 0)
    return first, dim // first
