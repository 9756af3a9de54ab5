"""MALoRA with a static gate: experts on a shared down-projection (Wang et al., arXiv 2410.22782, NAACL 2025)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxpeft import spec as base
from jaxpeft.methods.lora import uniform
from jaxpeft.sites import Group, Sites
from jaxpeft.spec import SHARED
from jaxpeft.updates import LowRank

CARD = base.Card(
    title="MALoRA, static gate",
    formula="(alpha / d) · aᵀ Σ_t gate_t P_tᵀ B_t",
    parameters="L · (d · in + N · r · (d + out))",
    source="arXiv 2410.22782 §3, its router made independent of the data",
    budget="rank",
    shared="a by all experts of a weight",
)


@dataclass(frozen=True, kw_only=True)
class Spec(base.Spec):
    """ΔW = (alpha / d) · aᵀ Σ_t gate_t P_tᵀ B_t: experts that read one shared d-dimensional subspace of the inputs.

    Trained, float32: ``a`` (L, d, in), the paper's S_A; ``p`` (L, N, r, d), the coefficient matrices P_t; ``b``
    (L, N, r, out), the up-projections B_t. Frozen: ``gate`` (N,), which all groups share, 1/N each at the start, the
    average of the experts. `adapter.replace(constants=malora.with_expert(adapter.constants, 2))` takes one expert, that
    of a known task for example, and compiles nothing anew. Start: b = 0, so ΔW = 0; a ~ U(±1/√in), p ~ U(±1/√d).
    Parameters: L · (d · in + N · r · (d + out)) a group.

    This is not the paper's gate. There a router picks experts for each token, so the output is no fixed matrix times
    the input: no ΔW exists and nothing can be merged. That router is not supported.

    Source: arXiv 2410.22782. Certain: the experts' down-projections are small coefficient matrices times one shared
    low-dimensional projection, and their up-projections are their own, of a rank that what is saved can raise. Our
    reading: the gate without data, in its two plain settings; the scale alpha / d; the laws of the start.

    Attributes:
        rank: r, of every expert's up-projection; more than d adds nothing to ΔW.
        shared_rank: d, dimension of the shared subspace.
        experts: N.

    Examples:
        >>> import jax, jax.numpy as jnp, jaxpeft
        >>> from jaxpeft.methods import malora
        >>> sites = jaxpeft.find({"q_proj": {"kernel": jnp.zeros((64, 32))}})
        >>> adapter = jaxpeft.init(jax.random.key(0), malora.Spec(rank=4, shared_rank=8, experts=2), sites)
        >>> {name: leaf.shape for name, leaf in adapter.params["q_proj/kernel"].items()}
        {'a': (1, 8, 64), 'b': (1, 2, 4, 32), 'p': (1, 2, 4, 8)}
    """

    rank: int
    shared_rank: int
    experts: int

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in ("rank", "shared_rank", "experts"):
            base.require(getattr(self, field) >= 1, self, field, "at least 1")

    def materialized_rank(self, group: Group) -> int:  # noqa: D102
        del group
        return self.shared_rank


def with_expert(constants: Mapping, expert: int | None) -> dict:
    """The frozen arrays of an adapter with the gate on one expert, or on the average of all for None."""
    experts = constants[SHARED]["gate"].size
    if expert is None:
        gate = jnp.full(experts, 1 / experts, jnp.float32)
    elif 0 <= expert < experts:
        gate = jnp.zeros(experts, jnp.float32).at[expert].set(1)
    else:
        raise ValueError(f"malora.with_expert: expert={expert}, expected from 0 to {experts - 1}, or None for all")
    return {**constants, SHARED: {**constants[SHARED], "gate": gate}}


def count(spec: Spec, sites: Sites) -> int:
    """Trained parameters: Σ L · (d · in + N · r · (d + out))."""
    d, each = spec.shared_rank, spec.experts * spec.rank
    return sum(g.layers * (d * g.in_dim + each * (d + g.out_dim)) for g in sites)


def init(key: Array, spec: Spec, sites: Sites, weights: Any = None) -> tuple[dict, dict]:
    """Trained arrays by group, and the gate (frozen); `weights` is not read."""
    del weights
    params, d = {}, spec.shared_rank
    for g, group_key in zip(sites, jax.random.split(key, len(sites)), strict=True):
        a_key, p_key = jax.random.split(group_key)
        params[g.name] = {
            "a": uniform(a_key, (g.layers, d, g.in_dim), g.in_dim),
            "b": jnp.zeros((g.layers, spec.experts, spec.rank, g.out_dim)),
            "p": uniform(p_key, (g.layers, spec.experts, spec.rank, d), d),
        }
    gate = jnp.full(spec.experts, 1 / spec.experts, jnp.float32)
    return params, {SHARED: {"gate": gate}, **{g.name: {} for g in sites}}


def updates(params: Mapping, constants: Mapping, spec: Spec, sites: Sites) -> dict[str, LowRank]:
    """One `LowRank` of rank d a group, the experts mixed in its second factor."""
    del spec
    made = {}
    for g in sites:
        trained = params[g.name]
        gated = trained["p"] * constants[SHARED]["gate"][:, None, None]
        b = jnp.einsum("lnrd,lnro->ldo", gated, trained["b"], precision="highest")
        made[g.name] = LowRank(trained["a"], b, constants[g.name]["scale"])
    return made
