"""MiSS: matrix shard sharing, formerly Bone and DiSHA (Kang and Yin, arXiv 2409.15371)."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from jax import Array

from jaxpeft import spec as base
from jaxpeft import thin
from jaxpeft.sites import Group, Sites
from jaxpeft.updates import Base, LowRank, Update

CARD = base.Card(
    title="MiSS",
    formula="alpha · D, the shard D (r, out) repeated along the input",
    parameters="L · r · out",
    source="arXiv 2409.15371",
    budget="rank",
)


@dataclass(frozen=True, kw_only=True)
class Spec(base.Spec):
    """ΔW is one trained shard, repeated: ΔW[i, o] = alpha · D[i mod r, o].

    The input's chunks of length r are added up first, so x·ΔW = alpha · (Σ_chunks x)·D: LoRA's product with a frozen a
    of repeated identities. Variants, trained leaf ``d``, float32:

    - standard: D (L, r, out); the last chunk of the input may be shorter.
    - mini: D (L, r, r'), repeated along the output as well: ΔW[i, o] = alpha · D[i mod r, o mod r'].
    - bat: D (L, out/r, r, r), which also multiplies the frozen weight, in blocks (p, q) of r inputs by r outputs:
      ΔW_pq = alpha · D_qᵀ·(W0_pq + I), with D_q as in PEFT's file. Not additive: W' depends on W0.

    Start: D = 0, so ΔW = 0. Parameters: L · r · out a group; mini L · r · r'. Source: arXiv 2409.15371, and the
    authors' code in Hugging Face PEFT, which names the variants and has no scale (alpha = 1).

    Attributes:
        rank: r.
        variant: ``standard``, ``mini`` or ``bat``.
        mini_rank: r' of mini, a divisor of out; None for the others.

    Examples:
        >>> import jax, jax.numpy as jnp, jaxpeft
        >>> from jaxpeft.methods import miss
        >>> sites = jaxpeft.find({"q_proj": {"kernel": jnp.zeros((64, 32))}})
        >>> jaxpeft.init(jax.random.key(0), miss.Spec(rank=4), sites).params["q_proj/kernel"]["d"].shape
        (1, 4, 32)
    """

    alpha: float = dataclasses.field(default=1.0, compare=False)
    rank: int
    variant: Literal["standard", "mini", "bat"] = "standard"
    mini_rank: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        base.require(self.rank >= 1, self, "rank", "at least 1")
        base.require(self.variant in ("standard", "mini", "bat"), self, "variant", "standard, mini or bat")
        if self.variant == "mini":
            base.require(self.mini_rank is not None and self.mini_rank >= 1, self, "mini_rank", "at least 1 for mini")
        else:
            base.require(self.mini_rank is None, self, "mini_rank", f"None for {self.variant}")

    def shape(self, group: Group) -> tuple[int, ...]:
        """Shape of a layer's shard; ValueError if the spec does not fit the group."""
        if self.rank > group.in_dim:
            raise ValueError(f"miss.Spec: rank={self.rank}, expected at most in={group.in_dim} of {group.name}")
        if self.variant == "bat":
            base.require_divides(self, "rank", group)
            return group.out_dim // self.rank, self.rank, self.rank
        if self.variant == "mini":
            base.require_divides(self, "mini_rank", group, ("out",))
        return self.rank, self.mini_rank or group.out_dim


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Repeated(Update):
    """ΔW[i, o] = scale · d[i mod r, o mod r'].

    Attributes:
        d: (..., r, r')
        scale: (...)
        in_dim: in.
        out_dim: out, a multiple of r'.
    """

    d: Array
    scale: Array
    in_dim: int = dataclasses.field(metadata={"static": True})
    out_dim: int = dataclasses.field(metadata={"static": True})

    def delta(self) -> Array:  # noqa: D102
        rank, size = self.d.shape
        return jnp.tile(self.d * self.scale, (-(-self.in_dim // rank), self.out_dim // size))[: self.in_dim]

    def delta_matmul(self, x: Array) -> Array:  # noqa: D102
        rank, size = self.d.shape
        padded = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -self.in_dim % rank)])
        hidden = padded.reshape(*x.shape[:-1], -1, rank).sum(axis=-2)
        y = thin.times(hidden * self.scale.astype(x.dtype), self.d.astype(x.dtype))
        return jnp.tile(y, self.out_dim // size)

    def factors(self) -> LowRank:  # noqa: D102
        *layers, rank, size = self.d.shape
        a = jnp.broadcast_to(
            (jnp.arange(self.in_dim) % rank == jnp.arange(rank)[:, None]) * 1.0, (*layers, rank, self.in_dim)
        )
        return LowRank(a, jnp.tile(self.d, self.out_dim // size), self.scale)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class BlockAffine(Update):
    """ΔW = scale · (D·W0 + D), block by block.

    Attributes:
        d: (..., out/r, r, r)
        scale: (...)
    """

    additive: ClassVar[bool] = False
    formed: ClassVar[bool] = True

    d: Array
    scale: Array

    def change(self, weight: Array) -> Array:
        """ΔW for a frozen weight, (in, out), float32 or wider."""
        blocks, rank, _ = self.d.shape
        w0 = weight.astype(jnp.promote_types(weight.dtype, jnp.float32)).reshape(-1, rank, blocks, rank)
        moved = jnp.einsum("pbqa,qbc->pcqa", w0, self.d, precision="highest")
        shard = jnp.transpose(self.d, (2, 0, 1))[None]
        return (self.scale * (moved + shard)).reshape(weight.shape)

    def materialize(self, weight: Array) -> Array:  # noqa: D102
        return weight + self.change(weight)

    def matmul(self, x: Array, base: Base) -> Array:  # noqa: D102
        y = base.dot(x)
        return y + (x @ self.change(base.weight).astype(x.dtype)).astype(y.dtype)


def count(spec: Spec, sites: Sites) -> int:
    """Trained parameters: Σ L · r · out; of mini Σ L · r · r'."""
    return sum(g.layers * spec.rank * (spec.mini_rank or g.out_dim) for g in sites)


def init(key: Array, spec: Spec, sites: Sites, weights: Any = None) -> tuple[dict, dict]:
    """The shards by group; nothing is drawn, nothing frozen, and `weights` is not read."""
    del key, weights
    return {g.name: {"d": jnp.zeros((g.layers, *spec.shape(g)))} for g in sites}, {g.name: {} for g in sites}


def updates(params: Mapping, constants: Mapping, spec: Spec, sites: Sites) -> dict[str, Update]:
    """One `Repeated` or `BlockAffine` a group, stacked over its layers."""
    made = {}
    for g in sites:
        d, scale = params[g.name]["d"], constants[g.name]["scale"]
        made[g.name] = BlockAffine(d, scale) if spec.variant == "bat" else Repeated(d, scale, g.in_dim, g.out_dim)
    return made
