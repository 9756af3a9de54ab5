"""LoRA-Mini: both factors of LoRA split in two, the inner halves trained (Singh et al., arXiv 2411.15804)."""

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
    title="LoRA-Mini",
    formula="(alpha / r) · (a a_outer)ᵀ (b b_outer), the outer matrices frozen",
    parameters="L · r · (a + b)",
    source="arXiv 2411.15804 §3",
    budget="rank",
)


@dataclass(frozen=True, kw_only=True)
class Spec(base.Spec):
    """ΔW = (alpha / r) · a_outerᵀ aᵀ b b_outer: four matrices, of which the two inner ones train.

    Trained, float32: ``a`` (L, r, outer_in), ``b`` (L, r, outer_out). Frozen: ``a_outer`` (L, outer_in, in) and
    ``b_outer`` (L, outer_out, out), or (1, …) with `share_outer`. Start: b = 0, so ΔW = 0; a ~ U(±1/√outer_in),
    a_outer ~ U(±1/√in), b_outer ~ U(±1/√outer_out). Parameters: L · r · (outer_in + outer_out) a group.

    Source: arXiv 2411.15804. Certain: the four parts and their shapes, of which the inner two train. Our reading: the
    laws of the start, LoRA's for each matrix; alpha / r; and `share_outer`.

    Attributes:
        rank: r, between the inner matrices.
        outer_in: a, the width between the matrices of the input side.
        outer_out: b, the same of the output side.
        share_outer: whether the layers of a group have the same frozen matrices, which are stored once.

    Examples:
        >>> import jax, jax.numpy as jnp, jaxpeft
        >>> from jaxpeft.methods import loramini
        >>> sites = jaxpeft.find({"q_proj": {"kernel": jnp.zeros((64, 32))}})
        >>> adapter = jaxpeft.init(jax.random.key(0), loramini.Spec(rank=4, outer_in=8, outer_out=8), sites)
        >>> jaxpeft.count(adapter) == 4 * (8 + 8)
        True
    """

    rank: int
    outer_in: int
    outer_out: int
    share_outer: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in ("rank", "outer_in", "outer_out"):
            base.require(getattr(self, field) >= 1, self, field, "at least 1")

    def materialized_rank(self, group: Group) -> int:  # noqa: D102
        del group
        return self.rank


def count(spec: Spec, sites: Sites) -> int:
    """Trained parameters: Σ L · r · (outer_in + outer_out)."""
    return sum(g.layers * spec.rank * (spec.outer_in + spec.outer_out) for g in sites)


def init(key: Array, spec: Spec, sites: Sites, weights: Any = None) -> tuple[dict, dict]:
    """Inner (trained) and outer (frozen) matrices by group; `weights` is not read."""
    del weights
    params, constants = {}, {}
    for g, group_key in zip(sites, jax.random.split(key, len(sites)), strict=True):
        a_key, in_key, out_key = jax.random.split(group_key, 3)
        layers = 1 if spec.share_outer else g.layers
        params[g.name] = {
            "a": uniform(a_key, (g.layers, spec.rank, spec.outer_in), spec.outer_in),
            "b": jnp.zeros((g.layers, spec.rank, spec.outer_out)),
        }
        constants[g.name] = {
            "a_outer": uniform(in_key, (layers, spec.outer_in, g.in_dim), g.in_dim),
            "b_outer": uniform(out_key, (layers, spec.outer_out, g.out_dim), spec.outer_out),
        }
    return params, constants


def updates(params: Mapping, constants: Mapping, spec: Spec, sites: Sites) -> dict[str, LowRank]:
    """One `LowRank` a group, inner and outer matrices multiplied."""
    del spec
    made = {}
    for g in sites:
        trained, frozen = params[g.name], constants[g.name]
        # matmul repeats outer matrices that have one layer for all.
        a = jnp.matmul(trained["a"], frozen["a_outer"], precision="highest")
        b = jnp.matmul(trained["b"], frozen["b_outer"], precision="highest")
        made[g.name] = LowRank(a, b, frozen["scale"])
    return made
