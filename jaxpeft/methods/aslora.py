"""ASLoRA: adaptive sharing across layers (Hu et al., arXiv 2412.10135)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxpeft import pools
from jaxpeft import spec as base
from jaxpeft.methods.lora import uniform
from jaxpeft.sites import Group, Sites
from jaxpeft.updates import LowRank

CARD = base.Card(
    title="ASLoRA",
    formula="(alpha / r) · aᵀ b[g], a shared by all layers, b by those that were merged",
    parameters="r · (in + L · out) at the start, r · (in + groups · out) in the end",
    source="arXiv 2412.10135 §3",
    budget="rank",
    shared="a, and each b by the layers that its index table points to it",
)


@dataclass(frozen=True, kw_only=True)
class Spec(base.Spec):
    """ΔW of layer l is (alpha / r) · aᵀ b[g(l)]: one a for all layers, and ever fewer b while training goes on.

    Trained: ``a`` (r, in), ``b`` (L, r, out), float32. Frozen: ``b_index`` (L,) int32, which b a layer uses, at the
    start its own. Start: a ~ U(±1/√in), b = 0, so ΔW = 0. Parameters: r · (in + L · out) a group.
    `jaxpeft.allocate.merge_most_similar` averages the two most similar b's and points their layers to one; the table is
    an argument of a compiled step, so a merge recompiles nothing, and `jaxpeft.summary` counts the b's that no layer
    uses any more as dead parameters. Source: arXiv 2412.10135 §3; scale and start are those of LoRA.

    Attributes:
        rank: r.
        groups: different b's that are left in the end; merging stops there.

    Examples:
        >>> import jax, jax.numpy as jnp, jaxpeft
        >>> from jaxpeft.methods import aslora
        >>> sites = jaxpeft.find({"layers": {"q_proj": {"kernel": jnp.zeros((6, 64, 32))}}}, layouts={".*": "lio"})
        >>> adapter = jaxpeft.init(jax.random.key(0), aslora.Spec(rank=4, groups=2), sites)
        >>> {name: leaf.shape for name, leaf in adapter.params["layers/q_proj/kernel"].items()}
        {'a': (4, 64), 'b': (6, 4, 32)}
    """

    rank: int
    groups: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        base.require(self.rank >= 1, self, "rank", "at least 1")
        base.require(self.groups >= 1, self, "groups", "at least 1")

    def materialized_rank(self, group: Group) -> int:  # noqa: D102
        del group
        return self.rank


def count(spec: Spec, sites: Sites) -> int:
    """Trained parameters: Σ r · (in + L · out), those of merged b's included."""
    return sum(spec.rank * (g.in_dim + g.layers * g.out_dim) for g in sites)


def init(key: Array, spec: Spec, sites: Sites, weights: Any = None) -> tuple[dict, dict]:
    """Factors by group (trained) and their index tables (frozen); `weights` is not read."""
    del weights
    params, constants = {}, {}
    for g, group_key in zip(sites, jax.random.split(key, len(sites)), strict=True):
        params[g.name] = {
            "a": uniform(group_key, (spec.rank, g.in_dim), g.in_dim),
            "b": jnp.zeros((g.layers, spec.rank, g.out_dim)),
        }
        constants[g.name] = {"b_index": jnp.arange(g.layers, dtype=jnp.int32)}
    return params, constants


def updates(params: Mapping, constants: Mapping, spec: Spec, sites: Sites) -> dict[str, LowRank]:
    """One `LowRank` a group, stacked over its layers."""
    del spec
    expanded = {}
    for g in sites:
        a, b, frozen = params[g.name]["a"], params[g.name]["b"], constants[g.name]
        rows = pools.gather(b.reshape(g.layers, -1), frozen["b_index"][:, None]).reshape(b.shape)
        expanded[g.name] = LowRank(a[None], rows, frozen["scale"])
    return expanded


def check_constants(constants: Mapping, spec: Spec, sites: Sites) -> None:
    """Raises ValueError if an index table names a b that does not exist."""
    del spec
    for g in sites:
        pools.check(f"{g.name}/b_index", np.asarray(constants[g.name]["b_index"]), g.layers)


def dead(constants: Mapping, spec: Spec, group: Group) -> float:
    """Share of the group's parameters in b's that were merged into others."""
    unused = pools.unused(np.asarray(constants[group.name]["b_index"]), group.layers)
    return unused * spec.rank * group.out_dim / count(spec, Sites((group,)))
