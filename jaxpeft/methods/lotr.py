"""LoTR: low tensor rank adaptation (Bershatsky et al., arXiv 2402.01376)."""

import dataclasses
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
    title="LoTR",
    formula="(alpha / r) · aᵀ core b, a and b shared by the layers",
    parameters="r · (in + out) + L · r²",
    source="arXiv 2402.01376 §3",
    budget="rank",
    shared="a and b of a group",
)


@dataclass(frozen=True, kw_only=True)
class Spec(base.Spec):
    """ΔW = (alpha / r) · aᵀ core b: the layers of a group are one tensor of Tucker-2 rank (r, r).

    Trained, float32: ``a`` (r, in) and ``b`` (r, out), shared by the group's layers; ``core`` (L, r, r), one a layer.
    All updates of a group thus lie in the same r rows and r columns. Start: a, b ~ N(0, 1), core = 0, so ΔW = 0.
    Parameters: r · (in + out) + L · r² a group. Source: arXiv 2402.01376 §3; start, scale and alpha 1 of its authors'
    code, where a is the right factor R and b the left factor L. Their example has one pair for query and value
    together; here every group has its own.

    Attributes:
        rank: r.

    Examples:
        >>> import jax, jax.numpy as jnp, jaxpeft
        >>> from jaxpeft.methods import lotr
        >>> sites = jaxpeft.find({"layers": {"q_proj": {"kernel": jnp.zeros((8, 64, 32))}}}, layouts={".*": "lio"})
        >>> adapter = jaxpeft.init(jax.random.key(0), lotr.Spec(rank=4), sites)
        >>> {name: leaf.shape for name, leaf in adapter.params["layers/q_proj/kernel"].items()}
        {'a': (4, 64), 'b': (4, 32), 'core': (8, 4, 4)}
    """

    alpha: float = dataclasses.field(default=1.0, compare=False)
    rank: int

    def __post_init__(self) -> None:
        super().__post_init__()
        base.require(self.rank >= 1, self, "rank", "at least 1")

    def materialized_rank(self, group: Group) -> int:  # noqa: D102
        del group
        return self.rank


def count(spec: Spec, sites: Sites) -> int:
    """Trained parameters: Σ r · (in + out) + L · r²."""
    return sum(spec.rank * (g.in_dim + g.out_dim) + g.layers * spec.rank**2 for g in sites)


def init(key: Array, spec: Spec, sites: Sites, weights: Any = None) -> tuple[dict, dict]:
    """Shared factors and cores by group; `weights` is not read, and nothing is frozen."""
    del weights
    params = {}
    for g, group_key in zip(sites, jax.random.split(key, len(sites)), strict=True):
        a_key, b_key = jax.random.split(group_key)
        params[g.name] = {
            "a": jax.random.normal(a_key, (spec.rank, g.in_dim)),
            "b": jax.random.normal(b_key, (spec.rank, g.out_dim)),
            "core": jnp.zeros((g.layers, spec.rank, spec.rank)),
        }
    return params, {g.name: {} for g in sites}


def updates(params: Mapping, constants: Mapping, spec: Spec, sites: Sites) -> dict[str, LowRank]:
    """One `LowRank` a group, the cores multiplied into a."""
    made = {}
    for g in sites:
        trained = params[g.name]
        a = jnp.einsum("lrs,ri->lsi", trained["core"], trained["a"], precision="highest")
        made[g.name] = LowRank(a, trained["b"][None], constants[g.name]["scale"])
    return made
