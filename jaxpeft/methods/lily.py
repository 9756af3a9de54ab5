"""Lily with a static router: every layer mixes shared up-projections (Zhong et al., arXiv 2407.09946)."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxpeft import spec as base
from jaxpeft.methods.lora import uniform
from jaxpeft.sites import Sites
from jaxpeft.updates import LowRank

CARD = base.Card(
    title="Lily, static router",
    formula="alpha · aᵀ Σ_e p_e B_e, p = softmax(router)",
    parameters="⌈L / stride⌉ · r · in + E · r · out + L · E",
    source="arXiv 2407.09946 §3, its router made independent of the data",
    budget="rank",
    shared="up-projections a group, and down-projections of `stride` layers",
)


@dataclass(frozen=True, kw_only=True)
class Spec(base.Spec):
    """ΔW_l = alpha · a_{l // stride}ᵀ Σ_e p_le B_e with p_l = softmax(router_l), within each group.

    This is not the paper's router. There p is the softmax of a linear map of the hidden states, averaged over all
    tokens of the batch: what is added for one example depends on the others in its batch, so no ΔW exists and nothing
    can be merged. That router is not supported. The authors offer one that does not depend on the data, for merging
    (huggingface/peft issue 2563); the form it has here, a row of logits for each layer, is our reading.

    Trained, float32: ``a`` (⌈L / stride⌉, r, in); ``b`` (E, r, out); ``router`` (L, E). Start: a ~ U(±1/√in), b = 0, so
    ΔW = 0; router ~ N(0, 1), because experts that are mixed alike would stay alike. Parameters: ⌈L / stride⌉ · r · in +
    E · r · out + L · E a group. Source: arXiv 2407.09946 §3; what is shared within a group, and alpha as a plain
    factor, follow the authors' version in PEFT.

    Attributes:
        rank: r; the paper's point is that sharing affords a larger one.
        experts: E, number of up-projections of a group.
        stride: consecutive layers that share a down-projection.

    Examples:
        >>> import jax, jax.numpy as jnp, jaxpeft
        >>> from jaxpeft.methods import lily
        >>> sites = jaxpeft.find({"layers": {"q_proj": {"kernel": jnp.zeros((8, 64, 32))}}}, layouts={".*": "lio"})
        >>> adapter = jaxpeft.init(jax.random.key(0), lily.Spec(rank=16, experts=2, stride=4), sites)
        >>> {name: leaf.shape for name, leaf in adapter.params["layers/q_proj/kernel"].items()}
        {'a': (2, 16, 64), 'b': (2, 16, 32), 'router': (8, 2)}
    """

    alpha: float = dataclasses.field(default=1.0, compare=False)
    rank: int
    experts: int
    stride: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        base.require(self.rank >= 1, self, "rank", "at least 1")
        base.require(self.experts >= 2, self, "experts", "at least 2: one leaves nothing to mix")
        base.require(self.stride >= 1, self, "stride", "at least 1")


def count(spec: Spec, sites: Sites) -> int:
    """Trained parameters: Σ ⌈L / stride⌉ · r · in + E · r · out + L · E."""
    rank, experts, stride = spec.rank, spec.experts, spec.stride
    return sum(-(-g.layers // stride) * rank * g.in_dim + experts * (rank * g.out_dim + g.layers) for g in sites)


def init(key: Array, spec: Spec, sites: Sites, weights: Any = None) -> tuple[dict, dict]:
    """Trained arrays by group; `weights` is not read, and nothing is frozen."""
    del weights
    params = {}
    for g, group_key in zip(sites, jax.random.split(key, len(sites)), strict=True):
        a_key, router_key = jax.random.split(group_key)
        params[g.name] = {
            "a": uniform(a_key, (-(-g.layers // spec.stride), spec.rank, g.in_dim), g.in_dim),
            "b": jnp.zeros((spec.experts, spec.rank, g.out_dim)),
            "router": jax.random.normal(router_key, (g.layers, spec.experts)),
        }
    return params, {g.name: {} for g in sites}


def updates(params: Mapping, constants: Mapping, spec: Spec, sites: Sites) -> dict[str, LowRank]:
    """One `LowRank` a group, its second factors mixed once for the whole step."""
    made = {}
    for g in sites:
        trained = params[g.name]
        a = jnp.repeat(trained["a"], spec.stride, axis=0)[: g.layers]
        b = jnp.einsum("le,ero->lro", jax.nn.softmax(trained["router"]), trained["b"], precision="highest")
        made[g.name] = LowRank(a, b, constants[g.name]["scale"])
    return made
