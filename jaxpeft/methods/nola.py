"""NOLA: LoRA's factors as mixtures of random bases (Koohpayegani et al., arXiv 2310.02556, ICLR 2024)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxpeft import spec as base
from jaxpeft.sites import Group, Sites
from jaxpeft.updates import LowRank

CARD = base.Card(
    title="NOLA",
    formula="(alpha / r) · (Σ_i a_i A_i)ᵀ (Σ_j b_j B_j), A_i and B_j random",
    parameters="L · (k + l), k bases A_i and l bases B_j",
    source="arXiv 2310.02556 §3",
    budget="bases",
    shared="the random bases, by default",
)

CHUNK = 16
"""Bases that exist at a time: it bounds the memory, and changes no value."""

CHECKED = 4
"""Values of a basis that are kept to recognise it."""


@dataclass(frozen=True, kw_only=True)
class Spec(base.Spec):
    """ΔW = (alpha / r) · aᵀ b with a = Σ_i a_i A_i and b = Σ_j b_j B_j: only the coefficients train.

    Trained, float32: ``a`` (L, k), ``b`` (L, l). Frozen: ``a_seed`` and ``b_seed`` (1, 2) uint32, or (L, 2) without
    `share_bases`. The bases A_i (r, in) and B_j (r, out) ~ U(-1, 1) are never stored: each step draws them from the
    seeds, forward and backward, 16 at a time. An adapter therefore means something only where JAX draws the same
    numbers; ``a_check`` and ``b_check`` hold the first of them, and loading refuses an adapter whose bases came out
    otherwise.

    Start: b = 0, so ΔW = 0; a ~ N(0, 1/(k·in)), which gives the factor the variance of LoRA's. Parameters:
    L · (k + l) a group, whatever r, in and out. Source: arXiv 2310.02556 §3 and its authors' code. Our reading: the
    start of a; the authors' example adds the mixture to a frozen LoRA start of a instead and starts both at zero.

    Attributes:
        rank: r.
        bases: k, number of bases of a.
        bases_b: l, number of bases of b; None for k.
        share_bases: whether the layers of a group have the same bases; else each draws its own, which takes L times as
            long.

    Examples:
        >>> import jax, jax.numpy as jnp, jaxpeft
        >>> from jaxpeft.methods import nola
        >>> sites = jaxpeft.find({"q_proj": {"kernel": jnp.zeros((64, 32))}})
        >>> adapter = jaxpeft.init(jax.random.key(0), nola.Spec(rank=4, bases=100), sites)
        >>> jaxpeft.count(adapter), adapter.updates()["q_proj/kernel"].a.shape
        (200, (1, 4, 64))
    """

    rank: int
    bases: int
    bases_b: int | None = None
    share_bases: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        base.require(self.rank >= 1, self, "rank", "at least 1")
        base.require(self.bases >= 1, self, "bases", "at least 1")
        base.require(self.bases_b is None or self.bases_b >= 1, self, "bases_b", "at least 1, or None")

    def materialized_rank(self, group: Group) -> int:  # noqa: D102
        del group
        return self.rank


def count(spec: Spec, sites: Sites) -> int:
    """Trained parameters: Σ L · (k + l)."""
    return sum(g.layers * (spec.bases + (spec.bases_b or spec.bases)) for g in sites)


def init(key: Array, spec: Spec, sites: Sites, weights: Any = None) -> tuple[dict, dict]:
    """Coefficients by group (trained); seeds and the first values that they yield (frozen); `weights` is not read."""
    del weights
    params, constants = {}, {}
    for g, group_key in zip(sites, jax.random.split(key, len(sites)), strict=True):
        a_key, seed_key = jax.random.split(group_key)
        seeds = jax.random.bits(seed_key, (2, 1 if spec.share_bases else g.layers, 2), jnp.uint32)
        params[g.name] = {
            "a": jax.random.normal(a_key, (g.layers, spec.bases)) / math.sqrt(spec.bases * g.in_dim),
            "b": jnp.zeros((g.layers, spec.bases_b or spec.bases)),
        }
        constants[g.name] = {"a_seed": seeds[0], "b_seed": seeds[1]} | checks(seeds[0], seeds[1], spec, g)
    return params, constants


def updates(params: Mapping, constants: Mapping, spec: Spec, sites: Sites) -> dict[str, LowRank]:
    """One `LowRank` a group, mixed once for the whole step."""

    def factor(coefficients: Array, seeds: Array, width: int) -> Array:
        shape = (spec.rank, width)
        sharing = coefficients.reshape(len(seeds), -1, coefficients.shape[-1])
        mixed = jax.lax.map(lambda of: mixture(shape, *of), (sharing, seeds))
        return mixed.reshape(len(coefficients), *shape)

    made = {}
    for g in sites:
        trained, frozen = params[g.name], constants[g.name]
        a = factor(trained["a"], frozen["a_seed"], g.in_dim)
        made[g.name] = LowRank(a, factor(trained["b"], frozen["b_seed"], g.out_dim), frozen["scale"])
    return made


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def mixture(shape: tuple[int, int], coefficients: Array, seed: Array) -> Array:
    """Σ_i coefficients_i · basis_i: (L, k) -> (L, *shape); neither direction holds more than `CHUNK` bases."""
    layers, bases = coefficients.shape
    parts = jnp.pad(coefficients, ((0, 0), (0, -bases % CHUNK))).reshape(layers, -1, CHUNK)

    def add(total: Array, of: tuple[Array, Array]) -> tuple[Array, None]:
        numbers, part = of
        return total + jnp.einsum("lc,crw->lrw", part, draw(seed, numbers, shape), precision="highest"), None

    return jax.lax.scan(
        add, jnp.zeros((layers, *shape), coefficients.dtype), (chunks(bases), jnp.moveaxis(parts, 1, 0))
    )[0]


def _mixture_forward(shape: tuple[int, int], coefficients: Array, seed: Array) -> tuple[Array, tuple[Array, Array]]:
    return mixture(shape, coefficients, seed), (coefficients, seed)


def _mixture_backward(shape: tuple[int, int], saved: tuple[Array, Array], cotangent: Array) -> tuple[Array, None]:
    (layers, bases), seed = saved[0].shape, saved[1]

    def project(none: None, numbers: Array) -> tuple[None, Array]:
        return none, jnp.einsum("lrw,crw->lc", cotangent, draw(seed, numbers, shape), precision="highest")

    parts = jax.lax.scan(project, None, chunks(bases))[1]
    return jnp.moveaxis(parts, 0, 1).reshape(layers, -1)[:, :bases], None


mixture.defvjp(_mixture_forward, _mixture_backward)


def chunks(bases: int) -> Array:
    """Numbers of the bases, (chunks, CHUNK); the last chunk may go beyond them."""
    return jnp.arange(bases + -bases % CHUNK).reshape(-1, CHUNK)


def draw(seed: Array, numbers: Array, shape: tuple[int, int]) -> Array:
    """The bases of these numbers, (len(numbers), *shape) ~ U(-1, 1)."""
    key = jax.random.wrap_key_data(seed, impl="threefry2x32")

    def one(i: Array) -> Array:
        return jax.random.uniform(jax.random.fold_in(key, i), shape, jnp.float32, minval=-1, maxval=1)

    return jax.vmap(one)(numbers)


def checks(a_seed: Array, b_seed: Array, spec: Spec, group: Group) -> dict[str, Array]:
    """The first values of the first basis of every seed, (seeds, CHECKED)."""

    def first(width: int) -> Any:
        return jax.vmap(lambda seed: draw(seed, jnp.arange(1), (spec.rank, width)).ravel()[:CHECKED])

    return {"a_check": first(group.in_dim)(a_seed), "b_check": first(group.out_dim)(b_seed)}


def check_constants(constants: Mapping, spec: Spec, sites: Sites) -> None:
    """Raises ValueError if the seeds no longer yield the bases that the adapter was trained with."""
    for g in sites:
        frozen = constants[g.name]
        for name, found in checks(frozen["a_seed"], frozen["b_seed"], spec, g).items():
            # Compilers may round the last bit differently; another stream differs in the first digit.
            if not np.allclose(found, frozen[name], atol=1e-5):
                raise ValueError(
                    f"{g.name}/{name}: the seed yields bases that begin with {np.asarray(found)[0]}, not with "
                    f"{np.asarray(frozen[name])[0]} as in training; use the version of jax, and the value of "
                    "jax_threefry_partitionable, that it was trained with"
                )
