"""BOFT: orthogonal fine-tuning by butterfly factorization (Liu et al., arXiv 2311.06243)."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import Array

from jaxpeft import spec as base
from jaxpeft.methods.ia3 import rescale
from jaxpeft.methods.oft import cayley, turned
from jaxpeft.sites import Group, Sites
from jaxpeft.updates import Base, Update

CARD = base.Card(
    title="BOFT",
    formula="R_N ⋯ R₁ · W0 · diag(1 + s) - W0, R_i a permuted block-diagonal of rotations",
    parameters="L · (N · in · b + out)",
    source="arXiv 2311.06243 §4",
    budget="block_size",
    scaled=False,
)


@dataclass(frozen=True, kw_only=True)
class Spec(base.Spec):
    """W' = R_N ⋯ R₁ · W0 · diag(1 + s), a product of N sparse rotations of the inputs; applied one after the other.

    R_i is block-diagonal, in / b rotations (I + Q)(I - Q)⁻¹ of size b, between a permutation and its inverse. That of
    R_i regroups the half-blocks within every 2^i of them, so that a block joins two that lie 2^(i-1) apart, and N
    factors join 2^(N-1) · b inputs. N = 1 is OFT, with a scale.

    Trained, float32: ``q`` (L, N, in/b, b, b), of which Q = (q - qᵀ) / 2 counts, and ``s`` (L, out), the scale minus
    one. Start: both 0, so W' = W0. Parameters: L · (N · in · b + out) a group. Source: arXiv 2311.06243 §4, and for the
    permutations and the scale its authors' code, which is PEFT's (their rotations turn the other way: its ``boft_R`` is
    qᵀ). PEFT falls back to N = 1 where its CUDA kernel is missing; here N is what is asked for.

    A rotation has no scale: alpha has no effect.

    Attributes:
        block_size: b, inputs of one block; even, and 2^(N-1) · b divides in, if N > 1.
        butterfly_factors: N.

    Examples:
        >>> import jax, jax.numpy as jnp, jaxpeft
        >>> from jaxpeft.methods import boft
        >>> sites = jaxpeft.find({"q_proj": {"kernel": jnp.zeros((64, 32))}})
        >>> adapter = jaxpeft.init(jax.random.key(0), boft.Spec(block_size=4, butterfly_factors=3), sites)
        >>> {name: leaf.shape for name, leaf in adapter.params["q_proj/kernel"].items()}
        {'q': (1, 3, 16, 4, 4), 's': (1, 32)}
    """

    alpha: float = dataclasses.field(default=1.0, compare=False)
    block_size: int
    butterfly_factors: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        base.require(self.block_size >= 2, self, "block_size", "at least 2")
        base.require(self.butterfly_factors >= 1, self, "butterfly_factors", "at least 1")
        even = self.butterfly_factors == 1 or self.block_size % 2 == 0
        base.require(even, self, "block_size", "an even number with more than one butterfly factor")

    def check(self, group: Group) -> None:
        """Raises ValueError if the spec does not fit a group."""
        joined = self.block_size * 2 ** (self.butterfly_factors - 1)
        if group.in_dim % joined:
            step = 1 if self.butterfly_factors == 1 else 2
            sizes = [b for b in range(2, group.in_dim + 1, step) if group.in_dim % (joined // self.block_size * b) == 0]
            near = min(sizes, key=lambda b: abs(b - self.block_size), default="none; use fewer butterfly_factors")
            raise ValueError(
                f"boft.Spec: {self.butterfly_factors} butterfly factors of block_size={self.block_size} join {joined} "
                f"inputs, which does not divide in={group.in_dim} of {group.name}; nearest block_size that fits: {near}"
            )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Butterfly(Update):
    """W' = R_N ⋯ R₁ · W0 · diag(1 + s), applied as x·R_N ⋯ R₁·W0.

    Attributes:
        q: (..., N, blocks, b, b)
        s: (..., out)
    """

    additive: ClassVar[bool] = False

    q: Array
    s: Array

    def turns(self) -> list[Array]:
        """R_i - I of every block, (blocks, b, b), for i from 1 to N."""
        return list(cayley((self.q - jnp.swapaxes(self.q, -1, -2)) / 2))

    def materialize(self, weight: Array) -> Array:  # noqa: D102
        columns = weight.T
        for level, turn in enumerate(self.turns()):
            columns = columns + permuted(columns, jnp.swapaxes(turn, -1, -2), level)
        return columns.T * (1 + self.s)

    def matmul(self, x: Array, base: Base) -> Array:  # noqa: D102
        for level, turn in reversed(list(enumerate(self.turns()))):
            x = x + permuted(x, turn, level)
        return rescale(base.dot(x), self.s)


def permuted(x: Array, turn: Array, level: int) -> Array:
    """x·P(R - I)Pᵀ for x (..., in): P puts the half-blocks that lie 2^level apart beside each other."""
    if level == 0:
        return turned(x, turn)
    halves = x.reshape(*x.shape[:-1], -1, 2, 2**level, turn.shape[-1] // 2)
    moved = turned(jnp.swapaxes(halves, -2, -3).reshape(x.shape), turn)
    halves = moved.reshape(*x.shape[:-1], -1, 2**level, 2, turn.shape[-1] // 2)
    return jnp.swapaxes(halves, -2, -3).reshape(x.shape)


def count(spec: Spec, sites: Sites) -> int:
    """Trained parameters: Σ L · (N · in · b + out)."""
    return sum(g.layers * (spec.butterfly_factors * g.in_dim * spec.block_size + g.out_dim) for g in sites)


def init(key: Array, spec: Spec, sites: Sites, weights: Any = None) -> tuple[dict, dict]:
    """Trained arrays by group; neither `key` nor `weights` is read, and nothing is frozen."""
    del key, weights
    params, b = {}, spec.block_size
    for g in sites:
        spec.check(g)
        blocks = (g.layers, spec.butterfly_factors, g.in_dim // b, b, b)
        params[g.name] = {"q": jnp.zeros(blocks), "s": jnp.zeros((g.layers, g.out_dim))}
    return params, {g.name: {} for g in sites}


def updates(params: Mapping, constants: Mapping, spec: Spec, sites: Sites) -> dict[str, Butterfly]:
    """One `Butterfly` a group, stacked over its layers."""
    del constants, spec
    return {g.name: Butterfly(params[g.name]["q"], params[g.name]["s"]) for g in sites}
