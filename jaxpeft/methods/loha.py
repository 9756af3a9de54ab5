"""LoHa: low-rank Hadamard product (FedPara, Hyeon-Woo et al., arXiv 2108.06098; LyCORIS, arXiv 2309.14859)."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import Array

from jaxpeft import spec as base
from jaxpeft.methods.lora import uniform
from jaxpeft.sites import Group, Sites
from jaxpeft.updates import LowRank, Update

CARD = base.Card(
    title="LoHa",
    formula="(alpha / r) · (a₁ᵀ b₁) * (a₂ᵀ b₂)",
    parameters="2 · L · r · (in + out)",
    source="arXiv 2108.06098, Proposition 1",
    budget="rank",
)


@dataclass(frozen=True, kw_only=True)
class Spec(base.Spec):
    """ΔW = (alpha / r) · (a₁ᵀ b₁) * (a₂ᵀ b₂), the element-wise product of two matrices of rank r.

    Trained, float32: ``a1``, ``a2`` (L, r, in) and ``b1``, ``b2`` (L, r, out). ΔW has rank r² at most (Proposition 1):
    it is exactly one low-rank product, whose factors hold the products of every row of a₁ with every row of a₂, and of
    b₁ with b₂. It is applied as that, without forming ΔW, which is also the cheaper way as long as
    r² < in · out / (in + out): r up to 45 for a weight of 4096 × 4096. The scale is LyCORIS's: it divides by r, not r².

    Start: a₁ ~ U(±1/√in), b₁ and b₂ ~ U(±1/√r), a₂ = 0, so ΔW = 0: PEFT's choice (LyCORIS has normal factors and
    zeroes b₂). Parameters: 2 L · r · (in + out) a group. Source: arXiv 2108.06098; arXiv 2309.14859 for its use as an
    update of frozen weights.

    Attributes:
        rank: r, of each of the two matrices.

    Examples:
        >>> import jax, jax.numpy as jnp, jaxpeft
        >>> from jaxpeft.methods import loha
        >>> sites = jaxpeft.find({"q_proj": {"kernel": jnp.zeros((64, 32))}})
        >>> adapter = jaxpeft.init(jax.random.key(0), loha.Spec(rank=4), sites)
        >>> {name: leaf.shape for name, leaf in adapter.params["q_proj/kernel"].items()}
        {'a1': (1, 4, 64), 'b1': (1, 4, 32), 'a2': (1, 4, 64), 'b2': (1, 4, 32)}
        >>> adapter.updates()["q_proj/kernel"].factors().a.shape
        (1, 16, 64)
    """

    rank: int

    def __post_init__(self) -> None:
        super().__post_init__()
        base.require(self.rank >= 1, self, "rank", "at least 1")

    def materialized_rank(self, group: Group) -> int:  # noqa: D102
        del group
        return self.rank**2

    def scale(self, group: Group) -> float:
        """The factor alpha / r, alpha / √r with `rslora`: LoHa's r is the rank of one of its two matrices."""
        del group
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Hadamard(Update):
    """ΔW = scale · (a1ᵀ b1) * (a2ᵀ b2).

    Attributes:
        a1: (..., r, in)
        b1: (..., r, out)
        a2: (..., r, in)
        b2: (..., r, out)
        scale: (...)
    """

    axes: ClassVar[Mapping[str, str]] = {"a1": "ri", "b1": "ro", "a2": "ri", "b2": "ro"}

    a1: Array
    b1: Array
    a2: Array
    b2: Array
    scale: Array

    def delta(self) -> Array:  # noqa: D102
        return LowRank(self.a1, self.b1, self.scale).delta() * LowRank(self.a2, self.b2, jnp.ones(())).delta()

    def delta_matmul(self, x: Array) -> Array:  # noqa: D102
        return self.factors().delta_matmul(x)

    def delta_rows(self, take: Callable[[Array], Array]) -> Array:  # noqa: D102
        return self.factors().delta_rows(take)

    def factors(self) -> LowRank:  # noqa: D102
        return LowRank(products(self.a1, self.a2), products(self.b1, self.b2), self.scale)


def products(first: Array, second: Array) -> Array:
    """Every row of one factor times every row of another: (..., r, n), (..., s, n) -> (..., r·s, n)."""
    rows = first[..., :, None, :] * second[..., None, :, :]
    return rows.reshape(*rows.shape[:-3], -1, rows.shape[-1])


def count(spec: Spec, sites: Sites) -> int:
    """Trained parameters: Σ 2 L · r · (in + out)."""
    return sum(2 * g.layers * spec.rank * (g.in_dim + g.out_dim) for g in sites)


def init(key: Array, spec: Spec, sites: Sites, weights: Any = None) -> tuple[dict, dict]:
    """Trained arrays by group; `weights` is not read, and nothing is frozen."""
    del weights
    params = {}
    for g, group_key in zip(sites, jax.random.split(key, len(sites)), strict=True):
        a1_key, b1_key, b2_key = jax.random.split(group_key, 3)
        ins, outs = (g.layers, spec.rank, g.in_dim), (g.layers, spec.rank, g.out_dim)
        params[g.name] = {
            "a1": uniform(a1_key, ins, g.in_dim),
            "b1": uniform(b1_key, outs, spec.rank),
            "a2": jnp.zeros(ins),
            "b2": uniform(b2_key, outs, spec.rank),
        }
    return params, {g.name: {} for g in sites}


def updates(params: Mapping, constants: Mapping, spec: Spec, sites: Sites) -> dict[str, Hadamard]:
    """One `Hadamard` a group, stacked over its layers."""
    del spec

    def product(p: Mapping, scale: Array) -> Hadamard:
        return Hadamard(p["a1"], p["b1"], p["a2"], p["b2"], scale)

    return {g.name: product(params[g.name], constants[g.name]["scale"]) for g in sites}
