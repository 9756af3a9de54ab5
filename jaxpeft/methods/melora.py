"""MELoRA: mini-ensemble low-rank adapters, side by side on the diagonal (Ren et al., arXiv 2402.17263, ACL 2024)."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxpeft import spec as base
from jaxpeft.methods.lora import uniform
from jaxpeft.sites import Group, Sites
from jaxpeft.updates import LowRank, Update

CARD = base.Card(
    title="MELoRA",
    formula="(alpha / (k q)) · diag(a_1ᵀ b_1, …, a_kᵀ b_k)",
    parameters="L · q · (in + out)",
    source="arXiv 2402.17263 §3",
    budget="rank",
)


@dataclass(frozen=True, kw_only=True)
class Spec(base.Spec):
    """ΔW = (alpha / (k q)) · diag(a_1ᵀ b_1, …, a_kᵀ b_k): k mini LoRAs, each on its share of the inputs and outputs.

    Trained, float32: ``a`` (L, k, q, in/k), ``b`` (L, k, q, out/k). Start: a ~ U(±1/√(in/k)), each mini LoRA's own
    start, b = 0, so ΔW = 0. Parameters: L · q · (in + out) a group, those of LoRA at rank q, for a ΔW of rank k q.
    Source: arXiv 2402.17263 §3 and its authors' code, which scales each mini LoRA on its own; here alpha is divided by
    the rank of ΔW, as everywhere in jaxpeft.

    Attributes:
        rank: q, of each mini LoRA.
        mini_loras: k; it divides in and out.

    Examples:
        >>> import jax, jax.numpy as jnp, jaxpeft
        >>> from jaxpeft.methods import melora
        >>> sites = jaxpeft.find({"q_proj": {"kernel": jnp.zeros((64, 32))}})
        >>> adapter = jaxpeft.init(jax.random.key(0), melora.Spec(rank=2, mini_loras=4), sites)
        >>> {name: leaf.shape for name, leaf in adapter.params["q_proj/kernel"].items()}
        {'a': (1, 4, 2, 16), 'b': (1, 4, 2, 8)}
    """

    rank: int
    mini_loras: int

    def __post_init__(self) -> None:
        super().__post_init__()
        base.require(self.rank >= 1, self, "rank", "at least 1")
        base.require(self.mini_loras >= 1, self, "mini_loras", "at least 1")

    def materialized_rank(self, group: Group) -> int:  # noqa: D102
        del group
        return self.rank * self.mini_loras

    def check(self, group: Group) -> None:
        """Raises ValueError if the mini LoRAs do not divide a group's weights."""
        base.require_divides(self, "mini_loras", group)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class BlockDiagonal(Update):
    """ΔW = scale · diag(a_1ᵀ b_1, …, a_kᵀ b_k); applied block by block, without the zeros between them.

    Attributes:
        a: (..., k, q, in/k)
        b: (..., k, q, out/k)
        scale: (...)
    """

    a: Array
    b: Array
    scale: Array

    def delta(self) -> Array:  # noqa: D102
        return self.factors().delta()

    def delta_matmul(self, x: Array) -> Array:  # noqa: D102
        k, _, width = self.a.shape
        hidden = jnp.einsum("...ki,kqi->...kq", x.reshape(*x.shape[:-1], k, width), self.a.astype(x.dtype))
        y = jnp.einsum("...kq,kqo->...ko", hidden * self.scale.astype(x.dtype), self.b.astype(x.dtype))
        return y.reshape(*x.shape[:-1], k * self.b.shape[-1])

    def delta_rows(self, take: Callable[[Array], Array]) -> Array:  # noqa: D102
        return self.factors().delta_rows(take)

    def factors(self) -> LowRank:
        """The product of rank k q that this is, its factors with their zeros."""

        def spread(blocks: Array) -> Array:
            *layers, k, q, width = blocks.shape
            return jnp.einsum("...kqi,kj->...kqji", blocks, jnp.eye(k)).reshape(*layers, k * q, k * width)

        return LowRank(spread(self.a), spread(self.b), self.scale)


def count(spec: Spec, sites: Sites) -> int:
    """Trained parameters: Σ L · q · (in + out)."""
    return sum(g.layers * spec.rank * (g.in_dim + g.out_dim) for g in sites)


def init(key: Array, spec: Spec, sites: Sites, weights: Any = None) -> tuple[dict, dict]:
    """Trained arrays by group; `weights` is not read, and nothing is frozen."""
    del weights
    params, k = {}, spec.mini_loras
    for g, group_key in zip(sites, jax.random.split(key, len(sites)), strict=True):
        spec.check(g)
        params[g.name] = {
            "a": uniform(group_key, (g.layers, k, spec.rank, g.in_dim // k), g.in_dim // k),
            "b": jnp.zeros((g.layers, k, spec.rank, g.out_dim // k)),
        }
    return params, {g.name: {} for g in sites}


def updates(params: Mapping, constants: Mapping, spec: Spec, sites: Sites) -> dict[str, BlockDiagonal]:
    """One `BlockDiagonal` a group, stacked over its layers."""
    del spec
    return {g.name: BlockDiagonal(params[g.name]["a"], params[g.name]["b"], constants[g.name]["scale"]) for g in sites}
