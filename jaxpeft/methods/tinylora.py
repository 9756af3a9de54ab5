"""TinyLoRA: a few trained numbers in the singular subspaces of the weights (Morris et al., arXiv 2602.04118)."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxpeft import pools
from jaxpeft import spec as base
from jaxpeft.sites import Group, Sites
from jaxpeft.spec import SHARED
from jaxpeft.updates import LowRank

CARD = base.Card(
    title="TinyLoRA",
    formula="alpha · aᵀ (Σ_u v_u P_u)ᵀ b, a and b singular vectors of W0, frozen",
    parameters="u · ⌈L / tied_layers⌉",
    source="arXiv 2602.04118",
    budget="u",
    shared="one vector for `tied_layers` weights",
)


@dataclass(frozen=True, kw_only=True)
class Spec(base.Spec):
    """ΔW = alpha · aᵀ Rᵀ b with R = Σ_u v_u P_u: of all weights together, only the vectors v train.

    Trained, float32, shared by all groups: ``v`` (vectors, u). Frozen, of each group: ``a`` (L, r, in) and ``b``
    (L, r, out), the r largest singular vectors of W0; ``p`` (L, u, r, r) ~ N(0, 1/r); ``v_index`` (L,), the vector of
    every layer. Start: v = 0, so ΔW = 0; it reads W0. Parameters: u · Σ ⌈L / tied_layers⌉ over the groups, or
    u · ⌈Σ L / tied_layers⌉ if tiled: 13 for a whole model with u=13, tied_layers=None, sharing="tiled".

    Source: arXiv 2602.04118, W' = W + U Σ (Σ_u v_u P_u) Vᵀ, with Σ on the side of the outputs. Our reading: the paper
    gives P no distribution; N(0, 1/r), alpha = 1 and ``singular_values="both"`` are Hugging Face PEFT's.

    Attributes:
        rank: r.
        u: length of a trained vector.
        tied_layers: number of weights that share one vector; None for all.
        sharing: which weights those are: ``structured``, consecutive layers of one group; ``tiled``, weights of similar
            depth, whatever their group.
        singular_values: the factor that they scale: ``output``, b alone, as in the paper; ``both``, √Σ on each.

    Examples:
        >>> import jax, jax.numpy as jnp, jaxpeft
        >>> from jaxpeft.methods import tinylora
        >>> weights = {"q_proj": {"kernel": jnp.eye(64, 32)}}
        >>> adapter = jaxpeft.init(jax.random.key(0), tinylora.Spec(u=13), jaxpeft.find(weights), weights)
        >>> jaxpeft.count(adapter), adapter.constants["q_proj/kernel"]["p"].shape
        (13, (1, 13, 2, 2))
    """

    alpha: float = dataclasses.field(default=1.0, compare=False)
    rank: int = 2
    u: int
    tied_layers: int | None = 1
    sharing: Literal["structured", "tiled"] = "structured"
    singular_values: Literal["output", "both"] = "output"

    def __post_init__(self) -> None:
        super().__post_init__()
        base.require(self.rank >= 1, self, "rank", "at least 1")
        base.require(self.u >= 1, self, "u", "at least 1")
        base.require(self.tied_layers is None or self.tied_layers >= 1, self, "tied_layers", "at least 1, or None")
        base.require(self.sharing in ("structured", "tiled"), self, "sharing", "structured or tiled")
        base.require(self.singular_values in ("output", "both"), self, "singular_values", "output or both")

    def check(self, group: Group) -> None:
        """Raises ValueError if the group's weights have fewer singular values."""
        if self.rank > (most := min(group.in_dim, group.out_dim)):
            raise ValueError(
                f"tinylora.Spec: rank={self.rank}, but {group.name} is {group.in_dim} x {group.out_dim}; "
                f"largest rank: {most}"
            )


def count(spec: Spec, sites: Sites) -> int:
    """Trained parameters: u for every vector."""
    return spec.u * vectors(spec, sites)[0]


def vectors(spec: Spec, sites: Sites) -> tuple[int, dict[str, np.ndarray]]:
    """The number of vectors, and by group the vector of every layer, (L,)."""
    places = [(position, layer) for position, g in enumerate(sites) for layer in range(g.layers)]
    if spec.sharing == "tiled":
        runs = [sorted(places, key=lambda place: place[::-1])]
    else:
        runs = [[place for place in places if place[0] == position] for position in range(len(sites))]
    found, number = {}, 0
    for run in runs:
        tied = spec.tied_layers or len(run)
        found |= {place: number + i // tied for i, place in enumerate(run)}
        number += -(-len(run) // tied)
    index = {
        g.name: np.array([found[position, layer] for layer in range(g.layers)]) for position, g in enumerate(sites)
    }
    return number, index


def init(key: Array, spec: Spec, sites: Sites, weights: Any = None) -> tuple[dict, dict]:
    """The vectors (trained); singular vectors, projections and the index of vectors by group (frozen)."""
    if weights is None:
        raise ValueError("tinylora starts from the singular vectors of the weights; pass weights=base to jaxpeft.init")
    number, index = vectors(spec, sites)
    params: dict = {g.name: {} for g in sites} | {SHARED: {"v": jnp.zeros((number, spec.u))}}
    constants = {}

    def singular(weight: Array) -> tuple[Array, Array]:
        u, s, v = jnp.linalg.svd(weight, full_matrices=False)
        u, s, v = u[:, : spec.rank].T, s[: spec.rank, None], v[: spec.rank]
        return (u, s * v) if spec.singular_values == "output" else (jnp.sqrt(s) * u, jnp.sqrt(s) * v)

    for g, group_key in zip(sites, jax.random.split(key, len(sites)), strict=True):
        spec.check(g)
        # One layer at a time: the singular vectors of all layers before truncation are as large as the model.
        a, b = jax.lax.map(singular, weights[g.name])
        p = jax.random.normal(group_key, (g.layers, spec.u, spec.rank, spec.rank)) / spec.rank**0.5
        constants[g.name] = {"a": a, "b": b, "p": p, "v_index": jnp.asarray(index[g.name], jnp.int32)}
    return params, constants


def updates(params: Mapping, constants: Mapping, spec: Spec, sites: Sites) -> dict[str, LowRank]:
    """One `LowRank` a group, R applied to its first factor."""
    del spec
    made = {}
    for g in sites:
        frozen = constants[g.name]
        v = pools.gather(params[SHARED]["v"], frozen["v_index"][:, None])[:, 0]
        mixed = jnp.einsum("lu,lusr->lsr", v, frozen["p"], precision="highest")
        a = jnp.einsum("lsr,lri->lsi", mixed, frozen["a"], precision="highest")
        made[g.name] = LowRank(a, frozen["b"], frozen["scale"])
    return made


def check_constants(constants: Mapping, spec: Spec, sites: Sites) -> None:
    """Raises ValueError if a layer's vector does not exist."""
    number, _ = vectors(spec, sites)
    for g in sites:
        pools.check(f"{g.name}/v_index", np.asarray(constants[g.name]["v_index"])[:, None], number)
