"""OFT: orthogonal fine-tuning (Qiu et al., arXiv 2306.07280; on the input as in OFTv2, arXiv 2506.19847)."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxpeft import spec as base
from jaxpeft.sites import Group, Sites
from jaxpeft.updates import Base, Update

CARD = base.Card(
    title="OFT",
    formula="(R - I) · W0, R block-diagonal of (I + Q)(I - Q)⁻¹, Q skew-symmetric",
    parameters="L · (in / b) · b (b - 1) / 2",
    source="arXiv 2306.07280 §3",
    budget="block_size",
    scaled=False,
)


@dataclass(frozen=True, kw_only=True)
class Spec(base.Spec):
    """W' = R · W0, R block-diagonal of in / b rotations (I + Q)(I - Q)⁻¹ of b inputs each; applied as (x · R) · W0.

    Trained: ``q`` (L, in/b, b(b-1)/2), float32: the entries above the diagonal of every skew-symmetric Q = -Qᵀ, row by
    row; (L, 1, b(b-1)/2) with `block_share`. Start: q = 0, so R = I. Parameters: L · (in/b) · b (b-1)/2 a group.
    Source: arXiv 2306.07280 §3; rotating the input, and the truncated Neumann series, are OFTv2's, arXiv 2506.19847.

    A rotation has no scale: alpha has no effect. PEFT's series is this one; its exact solution turns the other way, so
    that its parameters are -q there.

    Attributes:
        block_size: b, inputs of one block; it divides in.
        block_share: whether all blocks of a layer are one rotation.
        cayley: "exact" solves for the rotation; "neumann" takes I + 2Q + 2Q² + 2Q³ + Q⁴, orthogonal up to O(Q⁴),
            without a solve (PEFT's default).

    Examples:
        >>> import jax, jax.numpy as jnp, jaxpeft
        >>> from jaxpeft.methods import oft
        >>> sites = jaxpeft.find({"q_proj": {"kernel": jnp.zeros((64, 32))}})
        >>> adapter = jaxpeft.init(jax.random.key(0), oft.Spec(block_size=16), sites)
        >>> {name: leaf.shape for name, leaf in adapter.params["q_proj/kernel"].items()}
        {'q': (1, 4, 120)}
    """

    alpha: float = dataclasses.field(default=1.0, compare=False)
    block_size: int
    block_share: bool = False
    cayley: Literal["exact", "neumann"] = "exact"

    def __post_init__(self) -> None:
        super().__post_init__()
        base.require(self.block_size >= 2, self, "block_size", "at least 2")
        base.require(self.cayley in ("exact", "neumann"), self, "cayley", "exact or neumann")

    def check(self, group: Group) -> None:
        """Raises ValueError if the spec does not fit a group."""
        base.require_divides(self, "block_size", group, ("in",), smallest=2)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rotated(Update):
    """W' = R · W0, applied as x·R·W0.

    Attributes:
        q: (..., blocks or 1, b(b-1)/2), the entries above the diagonal of every block's Q.
        cayley: "exact" or "neumann".
    """

    additive: ClassVar[bool] = False

    q: Array
    cayley: str = dataclasses.field(metadata={"static": True})

    def turn(self) -> Array:
        """R - I of every block, (blocks or 1, b, b), float32."""
        size = (1 + math.isqrt(1 + 8 * self.q.shape[-1])) // 2
        rows, columns = np.triu_indices(size, 1)
        upper = jnp.zeros((*self.q.shape[:-1], size, size)).at[..., rows, columns].set(self.q)
        return cayley(upper - jnp.swapaxes(upper, -1, -2), self.cayley)

    def materialize(self, weight: Array) -> Array:  # noqa: D102
        return weight + turned(weight.T, jnp.swapaxes(self.turn(), -1, -2)).T

    def matmul(self, x: Array, base: Base) -> Array:  # noqa: D102
        return base.dot(x + turned(x, self.turn()))


def turned(x: Array, turn: Array) -> Array:
    """x·(R - I) for x (..., in), in its dtype; the difference keeps the bits that R itself would lose in bfloat16."""
    blocks = x.reshape(*x.shape[:-1], -1, turn.shape[-1])
    turn = jnp.broadcast_to(turn, (blocks.shape[-2], *turn.shape[-2:]))
    return jnp.einsum("...ki,kij->...kj", blocks, turn.astype(x.dtype)).reshape(x.shape)


def cayley(skew: Array, how: str = "exact") -> Array:
    """R - I for R = (I + Q)(I - Q)⁻¹ or its series: skew Q (..., b, b) float32 -> (..., b, b)."""
    with jax.default_matmul_precision("highest"):
        if how == "exact":  # R - I = 2 Q (I - Q)⁻¹ = 2 (I - Q)⁻¹ Q, which commute.
            return 2 * jnp.linalg.solve(jnp.eye(skew.shape[-1]) - skew, skew)
        squared = skew @ skew
        return 2 * (skew + squared + squared @ skew) + squared @ squared


def count(spec: Spec, sites: Sites) -> int:
    """Trained parameters: Σ L · (in / b) · b (b-1)/2, one block a layer with `block_share`."""
    b = spec.block_size
    return sum(g.layers * (1 if spec.block_share else g.in_dim // b) * b * (b - 1) // 2 for g in sites)


def init(key: Array, spec: Spec, sites: Sites, weights: Any = None) -> tuple[dict, dict]:
    """Trained arrays by group; neither `key` nor `weights` is read, and nothing is frozen."""
    del key, weights
    params, b = {}, spec.block_size
    for g in sites:
        spec.check(g)
        params[g.name] = {"q": jnp.zeros((g.layers, 1 if spec.block_share else g.in_dim // b, b * (b - 1) // 2))}
    return params, {g.name: {} for g in sites}


def updates(params: Mapping, constants: Mapping, spec: Spec, sites: Sites) -> dict[str, Rotated]:
    """One `Rotated` a group, stacked over its layers."""
    del constants
    return {g.name: Rotated(params[g.name]["q"], spec.cayley) for g in sites}
