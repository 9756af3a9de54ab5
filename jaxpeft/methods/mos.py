"""MoS: mixture of shards (Wang et al., arXiv 2410.00938, ICLR 2025)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

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
    title="MoS",
    formula="(alpha / r) · aᵀ b, the rows of a and b assembled from shards",
    parameters="e · L · (in + out)",
    source="arXiv 2410.00938 §3",
    budget="equivalent_rank",
    shared="two pools of shards a group",
)


@dataclass(frozen=True, kw_only=True)
class Spec(base.Spec):
    """Low-rank factors assembled from pools of shards that all layers of a module type share.

    Each group owns two pools of N = e·L·l shards, ``a`` (N, in/l) and ``b`` (N, out/l), both trained, float32. Of them
    p·l belong to each layer alone (private); the rest is public. A layer's factors are r rows of l shards each, picked
    by frozen index tables ``a_index`` and ``b_index`` (L, r, l): r-p rows of public shards, drawn without replacement,
    for a and b independently (pair dissociation), then the p private rows, the same in both. ΔW = (alpha / r) · aᵀ b.

    Start: a ~ U(±1/√in) with the full in, b = 0, so ΔW = 0. Parameters: e · L · (in + out) a group, those of LoRA at
    rank e, whatever r, l and p. Source: arXiv 2410.00938 §3 and its authors' code; they use alpha 16, dropout 0.1.

    The paper's ablations are settings: pair dissociation off (-pd) `pair_dissociation=False`; vector sharding off (-vs)
    `shards_per_vector=1`; shard privatization off (-sp) `private_rank=0`; subset selection all three; pure sharing
    `rank=None, private_rank=0, shards_per_vector=1`; random scaling the same with `scaling="frozen"` or `"trained"`.

    Attributes:
        rank: r, the rank of every ΔW; None takes the whole pool, r = e·L (pure sharing).
        equivalent_rank: e, the budget in ranks of LoRA.
        private_rank: p of the e that each layer keeps to itself.
        shards_per_vector: l, shards that make up one row of a factor; it divides in and out.
        pair_dissociation: whether b's public rows are drawn apart from a's.
        scaling: a vector of length r for each layer between the factors, drawn from N(1, scaling_std²) and frozen, or
            trained from there.
        scaling_std: its spread (the paper states none).

    Examples:
        >>> import jax, jax.numpy as jnp, jaxpeft
        >>> from jaxpeft.methods import mos
        >>> sites = jaxpeft.find({"layers": {"q_proj": {"kernel": jnp.zeros((8, 64, 32))}}}, layouts={".*": "lio"})
        >>> spec = mos.Spec(rank=8, equivalent_rank=2, private_rank=1, shards_per_vector=4)
        >>> adapter = jaxpeft.init(jax.random.key(0), spec, sites)
        >>> {name: leaf.shape for name, leaf in adapter.params["layers/q_proj/kernel"].items()}
        {'a': (64, 16), 'b': (64, 8)}
        >>> jaxpeft.count(adapter) == 2 * 8 * (64 + 32)
        True
    """

    rank: int | None
    equivalent_rank: int
    private_rank: int = 1
    shards_per_vector: int = 4
    pair_dissociation: bool = True
    scaling: Literal["none", "frozen", "trained"] = "none"
    scaling_std: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        e, p, r = self.equivalent_rank, self.private_rank, self.rank
        base.require(e >= 1, self, "equivalent_rank", "at least 1")
        base.require(self.shards_per_vector >= 1, self, "shards_per_vector", "at least 1")
        base.require(0 <= p <= e, self, "private_rank", f"from 0 to equivalent_rank={e}")
        base.require(self.scaling in ("none", "frozen", "trained"), self, "scaling", "none, frozen or trained")
        if r is None:
            base.require(p == 0, self, "private_rank", "0 with rank=None, which shares the whole pool")
        else:
            base.require(r >= 1, self, "rank", "at least 1, or None for the whole pool")
            base.require(p <= r, self, "private_rank", f"at most rank={r}")
            base.require(p < e or r == e, self, "rank", f"{e} when every rank is private (private_rank={p})")

    def materialized_rank(self, group: Group) -> int:  # noqa: D102
        return self.equivalent_rank * group.layers if self.rank is None else self.rank

    def check(self, group: Group) -> None:
        """Raises ValueError if the spec does not fit a group."""
        base.require_divides(self, "shards_per_vector", group)
        public = (self.equivalent_rank - self.private_rank) * group.layers
        needed = self.materialized_rank(group) - self.private_rank
        if needed > public:
            raise ValueError(
                f"mos.Spec: rank={self.rank} needs {needed} public ranks of {group.name}, but its {group.layers} "
                f"layers share {public}; largest rank here: {public + self.private_rank}"
            )


def count(spec: Spec, sites: Sites) -> int:
    """Trained parameters: Σ e · L · (in + out), and Σ L · r more with a trained scaling."""
    pooled = sum(spec.equivalent_rank * g.layers * (g.in_dim + g.out_dim) for g in sites)
    scalings = sum(g.layers * spec.materialized_rank(g) for g in sites)
    return pooled + (scalings if spec.scaling == "trained" else 0)


def init(key: Array, spec: Spec, sites: Sites, weights: Any = None) -> tuple[dict, dict]:
    """Pools by group (trained) and their index tables (frozen); `weights` is not read."""
    del weights
    params, constants = {}, {}
    shards = spec.shards_per_vector
    for g, group_key in zip(sites, jax.random.split(key, len(sites)), strict=True):
        spec.check(g)
        pool_key, a_key, b_key, scaling_key = jax.random.split(group_key, 4)
        entries = spec.equivalent_rank * g.layers * shards
        private = spec.private_rank * shards
        rank = spec.materialized_rank(g)

        def table(key: Array, g: Group = g, rank: int = rank, private: int = private, entries: int = entries) -> Array:
            public = entries - g.layers * private
            index = pools.draw(key, layers=g.layers, slots=rank * shards - private, public=public, private=private)
            return index.reshape(g.layers, rank, shards)

        params[g.name] = {
            "a": uniform(pool_key, (entries, g.in_dim // shards), g.in_dim),
            "b": jnp.zeros((entries, g.out_dim // shards)),
        }
        constants[g.name] = {"a_index": table(a_key), "b_index": table(b_key if spec.pair_dissociation else a_key)}
        if spec.scaling != "none":
            owner = params if spec.scaling == "trained" else constants
            owner[g.name]["scaling"] = 1 + spec.scaling_std * jax.random.normal(scaling_key, (g.layers, rank))
    return params, constants


def updates(params: Mapping, constants: Mapping, spec: Spec, sites: Sites) -> dict[str, LowRank]:
    """One `LowRank` a group: the pools expanded over its layers, once for the whole step."""
    expanded = {}
    for g in sites:
        trained, frozen = params[g.name], constants[g.name]
        a = assemble(trained["a"], frozen["a_index"])
        if spec.scaling != "none":
            a = a * (trained if spec.scaling == "trained" else frozen)["scaling"][:, :, None]
        expanded[g.name] = LowRank(a, assemble(trained["b"], frozen["b_index"]), frozen["scale"])
    return expanded


def assemble(pool: Array, index: Array) -> Array:
    """Factors of all layers: pool (N, width), index (L, r, l) -> (L, r, l·width); a row is its shards side by side."""
    layers, rank, shards = index.shape
    return pools.gather(pool, index.reshape(layers, rank * shards)).reshape(layers, rank, -1)


def check_constants(constants: Mapping, spec: Spec, sites: Sites) -> None:
    """Raises ValueError if an index table leaves its pool or repeats a shard within a layer."""
    for g in sites:
        entries = spec.equivalent_rank * g.layers * spec.shards_per_vector
        for name in ("a_index", "b_index"):
            pools.check(f"{g.name}/{name}", np.asarray(constants[g.name][name]), entries)


def dead(constants: Mapping, spec: Spec, group: Group) -> float:
    """Share of the group's pool parameters that no layer uses.

    Expected (1 - (r-p) / ((e-p)·L))^L of the public shards: they get no gradient and keep their start.
    """
    entries = spec.equivalent_rank * group.layers * spec.shards_per_vector
    widths = {"a_index": group.in_dim, "b_index": group.out_dim}
    unused = sum(pools.unused(np.asarray(constants[group.name][name]), entries) * dim for name, dim in widths.items())
    return unused / (entries * sum(widths.values()))
