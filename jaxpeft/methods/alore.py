"""ALoRE: aggregated low-rank experts in front of the weight (Du et al., arXiv 2412.08341)."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import Array

from jaxpeft import spec as base
from jaxpeft.methods.lora import uniform
from jaxpeft.sites import Group, Sites
from jaxpeft.updates import Base, Update

CARD = base.Card(
    title="ALoRE",
    formula="alpha · (Σ_e mixer_e ⊗ down_eᵀ up_e) W0",
    parameters="L · (n³ + 2 r · in)",
    source="arXiv 2412.08341 §3",
    budget="rank",
)


@dataclass(frozen=True, kw_only=True)
class Spec(base.Spec):
    """W' = (1 + alpha · D) W0 with D = Σ_e mixer_e ⊗ (down_eᵀ up_e): n low-rank experts that act on the input of W0.

    A layer computes (x + alpha · x D) W0, and D is merged into the weight that follows it; no matrix of W0's size is
    formed in training. Trained, float32: ``mixer`` (L, n, n, n), one n x n matrix for each of the n experts; ``down``
    and ``up`` (L, n, r, in/n). Start: up = 0, so W' = W0; mixer ~ U(±1/√n), down ~ U(±1/√(in/n)). Parameters:
    L · (n³ + 2 r · in) a group.

    Source: arXiv 2412.08341. Certain, from its abstract: experts of low rank, aggregated in several branches, in the
    hypercomplex space that Kronecker products make, merged into the frozen backbone "in a sequential manner". Our
    reading, of that and of the PHM layers it builds on: n terms with n x n mixers, each layer's own; D in front of the
    weight, with a residual connection; a D for every weight, where one could serve all that read the same input;
    alpha = 1; the laws of the start. For ViT-B/16, n = 4 and r = 4 before attention and before the MLP are 148,992
    parameters, and the paper states 0.15 M.

    Attributes:
        rank: r, of every expert.
        experts: n; it divides in.

    Examples:
        >>> import jax, jax.numpy as jnp, jaxpeft
        >>> from jaxpeft.methods import alore
        >>> sites = jaxpeft.find({"q_proj": {"kernel": jnp.zeros((64, 32))}})
        >>> adapter = jaxpeft.init(jax.random.key(0), alore.Spec(rank=2, experts=4), sites)
        >>> {name: leaf.shape for name, leaf in adapter.params["q_proj/kernel"].items()}
        {'down': (1, 4, 2, 16), 'mixer': (1, 4, 4, 4), 'up': (1, 4, 2, 16)}
    """

    alpha: float = dataclasses.field(default=1.0, compare=False)
    rank: int
    experts: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        base.require(self.rank >= 1, self, "rank", "at least 1")
        base.require(self.experts >= 1, self, "experts", "at least 1")

    def check(self, group: Group) -> None:
        """Raises ValueError if the experts do not divide a group's inputs."""
        base.require_divides(self, "experts", group, ("in",))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sequential(Update):
    """W' = (1 + scale · Σ_e mixer_e ⊗ (down_eᵀ up_e)) W0.

    Attributes:
        mixer: (..., n, n, n)
        down: (..., n, r, in/n)
        up: (..., n, r, in/n)
        scale: (...)
    """

    additive: ClassVar[bool] = False

    mixer: Array
    down: Array
    up: Array
    scale: Array

    def materialize(self, weight: Array) -> Array:  # noqa: D102
        terms = jnp.einsum("epq,eri,ero->piqo", self.mixer, self.down, self.up, precision="highest")
        in_dim = weight.shape[0]
        return weight + jnp.matmul(self.scale * terms.reshape(in_dim, in_dim), weight, precision="highest")

    def matmul(self, x: Array, base: Base) -> Array:  # noqa: D102
        mixer, down, up = (leaf.astype(x.dtype) for leaf in (self.mixer * self.scale, self.down, self.up))
        blocks = x.reshape(*x.shape[:-1], mixer.shape[0], down.shape[-1])
        hidden = jnp.einsum("...pi,eri->...per", blocks, down)
        mixed = jnp.einsum("...per,epq->...qer", hidden, mixer)
        return base.dot(x + jnp.einsum("...qer,ero->...qo", mixed, up).reshape(x.shape))


def count(spec: Spec, sites: Sites) -> int:
    """Trained parameters: Σ L · (n³ + 2 r · in)."""
    return sum(g.layers * (spec.experts**3 + 2 * spec.rank * g.in_dim) for g in sites)


def init(key: Array, spec: Spec, sites: Sites, weights: Any = None) -> tuple[dict, dict]:
    """Trained arrays by group; `weights` is not read, and nothing is frozen."""
    del weights
    params, n = {}, spec.experts
    for g, group_key in zip(sites, jax.random.split(key, len(sites)), strict=True):
        spec.check(g)
        mixer_key, down_key = jax.random.split(group_key)
        low_rank = (g.layers, n, spec.rank, g.in_dim // n)
        params[g.name] = {
            "down": uniform(down_key, low_rank, g.in_dim // n),
            "mixer": uniform(mixer_key, (g.layers, n, n, n), n),
            "up": jnp.zeros(low_rank),
        }
    return params, {g.name: {} for g in sites}


def updates(params: Mapping, constants: Mapping, spec: Spec, sites: Sites) -> dict[str, Sequential]:
    """One `Sequential` a group, stacked over its layers."""
    del spec
    made = {}
    for g in sites:
        trained = params[g.name]
        made[g.name] = Sequential(trained["mixer"], trained["down"], trained["up"], constants[g.name]["scale"])
    return made
