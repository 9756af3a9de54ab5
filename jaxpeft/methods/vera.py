"""VeRA: vector-based random matrix adaptation (Kopiczko et al., arXiv 2310.11454, ICLR 2024)."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import Array

from jaxpeft import spec as base
from jaxpeft.methods.lora import uniform
from jaxpeft.sites import Sites
from jaxpeft.spec import SHARED
from jaxpeft.updates import LowRank, Update

CARD = base.Card(
    title="VeRA",
    formula="alpha · aᵀ diag(lambda_d) b diag(lambda_b), a and b frozen",
    parameters="L · (r + out)",
    source="arXiv 2310.11454 §3",
    budget="rank",
    shared="one pair of frozen factors for all groups",
)


@dataclass(frozen=True, kw_only=True)
class Spec(base.Spec):
    """ΔW = alpha · aᵀ diag(lambda_d) b diag(lambda_b): one frozen random pair for all layers, two trained vectors each.

    Trained: ``lambda_d`` (L, r), ``lambda_b`` (L, out), float32. Frozen, shared by all groups: ``a`` (r, largest in),
    ``b`` (r, largest out); a group uses their first in and out columns. Start: a ~ U(±√(6/in)) and b ~ U(±√(6/r))
    (Kaiming-uniform), lambda_d = d_initial, lambda_b = 0, so ΔW = 0. Parameters: L · (r + out) a group. The paper has
    no alpha: it is 1 here. Source: arXiv 2310.11454 §3; the start of its authors' integration into PEFT.

    Attributes:
        rank: r; in the hundreds, because a rank costs one parameter a layer.
        d_initial: start of lambda_d.

    Examples:
        >>> import jax, jax.numpy as jnp, jaxpeft
        >>> from jaxpeft.methods import vera
        >>> sites = jaxpeft.find({"q_proj": {"kernel": jnp.zeros((64, 32))}, "up": {"kernel": jnp.zeros((64, 128))}})
        >>> adapter = jaxpeft.init(jax.random.key(0), vera.Spec(rank=256), sites)
        >>> {name: leaf.shape for name, leaf in adapter.params["q_proj/kernel"].items()}
        {'lambda_d': (1, 256), 'lambda_b': (1, 32)}
        >>> {name: leaf.shape for name, leaf in adapter.constants["shared"].items()}
        {'a': (256, 64), 'b': (256, 128)}
    """

    rank: int
    d_initial: float = 0.1
    alpha: float = dataclasses.field(default=1.0, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        base.require(self.rank >= 1, self, "rank", "at least 1")
        base.require(self.d_initial != 0, self, "d_initial", "not 0: lambda_b is, and two zeros get no gradient")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ScaledLowRank(Update):
    """ΔW = scale · aᵀ diag(inner) b diag(outer), computed as ((x aᵀ) · inner · scale) b · outer.

    The vectors multiply activations, so with frozen factors the backward makes no gradient larger than a vector.

    Attributes:
        a: (..., r, in)
        b: (..., r, out)
        inner: (..., r)
        outer: (..., out)
        scale: (...)
    """

    axes: ClassVar[Mapping[str, str]] = {"a": "ri", "b": "ro", "outer": "o"}

    a: Array
    b: Array
    inner: Array
    outer: Array
    scale: Array

    def delta(self) -> Array:  # noqa: D102
        return self.factors().delta()

    def delta_matmul(self, x: Array) -> Array:  # noqa: D102
        hidden = jnp.einsum("...i,ri->...r", x, self.a.astype(x.dtype))
        return (
            (hidden * (self.inner * self.scale).astype(x.dtype)) @ self.b.astype(x.dtype) * self.outer.astype(x.dtype)
        )

    def delta_rows(self, take: Callable[[Array], Array]) -> Array:  # noqa: D102
        return self.factors().delta_rows(take)

    def factors(self) -> LowRank:  # noqa: D102
        return LowRank(self.a * self.inner[..., None], self.b * self.outer[..., None, :], self.scale)


def count(spec: Spec, sites: Sites) -> int:
    """Trained parameters: Σ L · (r + out)."""
    return sum(g.layers * (spec.rank + g.out_dim) for g in sites)


def init(key: Array, spec: Spec, sites: Sites, weights: Any = None) -> tuple[dict, dict]:
    """Vectors by group (trained) and the pair that all groups share (frozen); `weights` is not read."""
    del weights
    a_key, b_key = jax.random.split(key)
    rank, in_dim, out_dim = spec.rank, max(g.in_dim for g in sites), max(g.out_dim for g in sites)
    params = {
        g.name: {
            "lambda_d": jnp.full((g.layers, rank), spec.d_initial, jnp.float32),
            "lambda_b": jnp.zeros((g.layers, g.out_dim)),
        }
        for g in sites
    }
    constants: dict[str, dict] = {g.name: {} for g in sites}
    constants[SHARED] = {
        "a": math.sqrt(6) * uniform(a_key, (rank, in_dim), in_dim),
        "b": math.sqrt(6) * uniform(b_key, (rank, out_dim), rank),
    }
    return params, constants


def updates(params: Mapping, constants: Mapping, spec: Spec, sites: Sites) -> dict[str, ScaledLowRank]:
    """One `ScaledLowRank` a group, the shared pair serving all its layers."""
    shared, made = constants[SHARED], {}
    for g in sites:
        a = shared["a"][None, :, : g.in_dim]
        b = shared["b"][None, :, : g.out_dim]
        vectors = params[g.name]
        made[g.name] = ScaledLowRank(a, b, vectors["lambda_d"], vectors["lambda_b"], constants[g.name]["scale"])
    return made
