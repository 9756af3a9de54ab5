"""ShareLoRA: factors shared by all layers (Song et al., arXiv 2406.10785)."""

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
from jaxpeft.updates import LowRank

CARD = base.Card(
    title="ShareLoRA",
    formula="(alpha / r) · aᵀ b, a or b or both shared by all layers",
    parameters="r · (in + L · out), r · (L · in + out) or r · (in + out)",
    source="arXiv 2406.10785 §3",
    budget="rank",
    shared="a, b or both by all layers of a group",
)


@dataclass(frozen=True, kw_only=True)
class Spec(base.Spec):
    """ΔW = (alpha / r) · aᵀ b, with a factor that the layers of a group have in common.

    Trained, float32: ``a`` (L, r, in), ``b`` (L, r, out), without the L where shared: ``a`` with `share="a"` (ShareA),
    ``b`` with `share="b"` (ShareB), both with `share="ab"` (ShareAB). Start: a ~ U(±1/√in), b = 0, so ΔW = 0.
    Parameters: r · (in + out) a group, an unshared factor's L times. Source: arXiv 2406.10785 §3 and its authors' code;
    they share within one kind of projection, never across. Sharing in self-attention alone is a choice of sites.

    Attributes:
        rank: r.
        share: the shared factors.

    Examples:
        >>> import jax, jax.numpy as jnp, jaxpeft
        >>> from jaxpeft.methods import sharelora
        >>> sites = jaxpeft.find({"layers": {"q_proj": {"kernel": jnp.zeros((6, 16, 48))}}}, layouts={".*": "lio"})
        >>> adapter = jaxpeft.init(jax.random.key(0), sharelora.Spec(rank=4, share="a"), sites)
        >>> {name: leaf.shape for name, leaf in adapter.params["layers/q_proj/kernel"].items()}
        {'a': (4, 16), 'b': (6, 4, 48)}
    """

    rank: int
    share: Literal["a", "b", "ab"] = "a"

    def __post_init__(self) -> None:
        super().__post_init__()
        base.require(self.rank >= 1, self, "rank", "at least 1")
        base.require(self.share in ("a", "b", "ab"), self, "share", "a, b or ab")

    def materialized_rank(self, group: Group) -> int:  # noqa: D102
        del group
        return self.rank

    def copies(self, factor: str, group: Group) -> tuple[int, ...]:
        """Leading axes of a group's factor: none if it is shared, L if every layer has its own."""
        return () if factor in self.share else (group.layers,)


def count(spec: Spec, sites: Sites) -> int:
    """Trained parameters: Σ r · (in + out), an unshared factor's L times."""
    return spec.rank * sum(
        math.prod(spec.copies("a", g)) * g.in_dim + math.prod(spec.copies("b", g)) * g.out_dim for g in sites
    )


def init(key: Array, spec: Spec, sites: Sites, weights: Any = None) -> tuple[dict, dict]:
    """Trained and frozen arrays by group; `weights` is not read."""
    del weights
    params = {}
    for g, group_key in zip(sites, jax.random.split(key, len(sites)), strict=True):
        params[g.name] = {
            "a": uniform(group_key, (*spec.copies("a", g), spec.rank, g.in_dim), g.in_dim),
            "b": jnp.zeros((*spec.copies("b", g), spec.rank, g.out_dim)),
        }
    return params, {g.name: {} for g in sites}


def updates(params: Mapping, constants: Mapping, spec: Spec, sites: Sites) -> dict[str, LowRank]:
    """One `LowRank` a group, what is shared serving all its layers."""
    made = {}
    for g in sites:
        a = params[g.name]["a"].reshape(-1, spec.rank, g.in_dim)
        b = params[g.name]["b"].reshape(-1, spec.rank, g.out_dim)
        made[g.name] = LowRank(a, b, constants[g.name]["scale"])
    return made
