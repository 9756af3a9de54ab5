"""SMoA: high-rank structured modulation adapter (Liu et al., arXiv 2601.07507)."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxpeft import spec as base
from jaxpeft.methods.lora import uniform
from jaxpeft.sites import Group, Sites
from jaxpeft.updates import Base, Update

CARD = base.Card(
    title="SMoA",
    formula="alpha · Σ_k (a_kᵀ b_k) * W_k, W_k the K bands of the spectrum of W0",
    parameters="L · K · r · (in + out)",
    source="arXiv 2601.07507",
    budget="rank",
)


@dataclass(frozen=True, kw_only=True)
class Spec(base.Spec):
    """ΔW = alpha · Σ_k (a_kᵀ b_k) * W_k, where W0 = W_1 + … + W_K are bands of its singular components.

    With W0 = U Σ V and σ in descending order, E(i) = Σ_{j≤i} σ_j / Σ σ_j is the energy of the first i components.
    Component i belongs to band k where (k-1)/K ≤ E(i-1) < k/K, so every band holds about the same energy.

    Trained, float32: ``a`` (L, K, r, in), ``b`` (L, K, r, out). Frozen: ``basis`` (L, m, m), m = min(in, out), the
    singular vectors of the smaller side, and ``band`` (L, m) int32, the number of each one's band: W_k is W0 projected
    on the vectors of band k, so W0 itself is not stored again. Start: a ~ U(±1/√in), b = 0, so ΔW = 0. Parameters:
    L · K · r · (in + out) a group. ΔW is formed in every step, at the cost of K + 1 products of W0 with the basis.

    Source: arXiv 2601.07507. Of the paper we have the abstract, which says that parts of W0 are amplified or suppressed
    in several subspaces; the formula, the bands by quantiles of cumulative energy, and that it sums σ and not σ², are
    from a secondary summary. Our reading: equal quantiles, LoRA's start, and no scale (alpha = 1), as in HiRA, which is
    the case K = 1, W_1 = W0.

    Attributes:
        rank: r of every band.
        bands: K.

    Examples:
        >>> import jax, jax.numpy as jnp, jaxpeft
        >>> from jaxpeft.methods import smoa_structured
        >>> weights = {"q_proj": {"kernel": jax.random.normal(jax.random.key(0), (64, 32))}}
        >>> spec = smoa_structured.Spec(rank=4, bands=2)
        >>> adapter = jaxpeft.init(jax.random.key(0), spec, jaxpeft.find(weights), weights)
        >>> {name: leaf.shape for name, leaf in adapter.params["q_proj/kernel"].items()}
        {'a': (1, 2, 4, 64), 'b': (1, 2, 4, 32)}
    """

    alpha: float = dataclasses.field(default=1.0, compare=False)
    rank: int
    bands: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        base.require(self.rank >= 1, self, "rank", "at least 1")
        base.require(self.bands >= 1, self, "bands", "at least 1")

    def check(self, group: Group) -> None:
        """Raises ValueError if the spec does not fit a group."""
        most = min(group.in_dim, group.out_dim)
        if self.bands > most:
            raise ValueError(
                f"smoa_structured.Spec: bands={self.bands}, but {group.name} has {most} singular components; "
                f"largest that fits: {most}"
            )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Banded(Update):
    """ΔW = scale · Σ_k (a_kᵀ b_k) * W_k, formed.

    It has no `axes`: split factors are small beside the basis, but over them XLA reduces the gradient of the formed ΔW.

    Attributes:
        a: (..., K, r, in)
        b: (..., K, r, out)
        basis: (..., m, m), singular vectors of the smaller side of W0, one a row.
        band: (..., m), the band of each vector.
        scale: (...)
    """

    additive: ClassVar[bool] = False
    formed: ClassVar[bool] = True
    a: Array
    b: Array
    basis: Array
    band: Array
    scale: Array

    def change(self, weight: Array) -> Array:
        """ΔW of one weight, float32."""
        wide = weight.shape[0] < weight.shape[1]
        tall = weight.T if wide else weight
        masks = (self.band == jnp.arange(len(self.a))[:, None]).astype(jnp.float32)
        with jax.default_matmul_precision("highest"):
            bands = ((tall @ self.basis.T) * masks[:, None]) @ self.basis
            multipliers = jnp.einsum("kri,kro->kio", self.a * self.scale, self.b)
        return jnp.sum(multipliers * (jnp.swapaxes(bands, 1, 2) if wide else bands), axis=0)

    def materialize(self, weight: Array) -> Array:  # noqa: D102
        return weight + self.change(weight)

    def matmul(self, x: Array, base: Base) -> Array:  # noqa: D102
        y = base.dot(x)
        return y + (x @ self.change(base.weight).astype(x.dtype)).astype(y.dtype)


def count(spec: Spec, sites: Sites) -> int:
    """Trained parameters: Σ L · K · r · (in + out)."""
    return sum(g.layers * spec.bands * spec.rank * (g.in_dim + g.out_dim) for g in sites)


def init(key: Array, spec: Spec, sites: Sites, weights: Mapping | None = None) -> tuple[dict, dict]:
    """Trained factors by group, and the frozen bands of its weights."""
    if weights is None:
        raise ValueError("smoa_structured reads the weights' singular vectors; pass weights=base to jaxpeft.init")
    params, constants = {}, {}
    for g, group_key in zip(sites, jax.random.split(key, len(sites)), strict=True):
        spec.check(g)
        shape = (g.layers, spec.bands, spec.rank)
        params[g.name] = {"a": uniform(group_key, (*shape, g.in_dim), g.in_dim), "b": jnp.zeros((*shape, g.out_dim))}
        constants[g.name] = spectrum(weights[g.name], spec.bands)
    return params, constants


def spectrum(weights: Array, bands: int) -> dict[str, Array]:
    """Singular vectors of the smaller side of every weight (L, in, out), and the band of each."""
    left, values, right = jnp.linalg.svd(weights, full_matrices=False)
    total = jnp.sum(values, axis=-1, keepdims=True)
    before = (jnp.cumsum(values, axis=-1) - values) / jnp.where(total > 0, total, 1)
    band = jnp.clip(jnp.floor(bands * before), 0, bands - 1).astype(jnp.int32)
    return {"basis": jnp.swapaxes(left, 1, 2) if weights.shape[1] < weights.shape[2] else right, "band": band}


def updates(params: Mapping, constants: Mapping, spec: Spec, sites: Sites) -> dict[str, Banded]:
    """One `Banded` a group, stacked over its layers."""
    del spec

    def banded(trained: Mapping, frozen: Mapping) -> Banded:
        return Banded(trained["a"], trained["b"], frozen["basis"], frozen["band"], frozen["scale"])

    return {g.name: banded(params[g.name], constants[g.name]) for g in sites}


def check_constants(constants: Mapping, spec: Spec, sites: Sites) -> None:
    """Raises ValueError if a component has no band."""
    for g in sites:
        band = np.asarray(constants[g.name]["band"])
        if band.min() < 0 or band.max() >= spec.bands:
            raise ValueError(f"{g.name}/band: bands {band.min()}..{band.max()}, but there are {spec.bands}")


def dead(constants: Mapping, spec: Spec, group: Group) -> float:
    """Share of the group's parameters in bands without a component, as where the first holds the energy of two."""
    band = np.asarray(constants[group.name]["band"])
    return 1 - sum(len(np.unique(layer)) for layer in band) / (group.layers * spec.bands)
