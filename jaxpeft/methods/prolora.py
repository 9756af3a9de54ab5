"""PRoLoRA: partial rotation (Wang et al., arXiv 2402.16902, ACL 2024)."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from jax import Array

from jaxpeft import spec as base
from jaxpeft.methods.lora import uniform
from jaxpeft.sites import Group, Sites
from jaxpeft.updates import LowRank, Update

Axis = Literal["hidden", "rank"]


CARD = base.Card(
    title="PRoLoRA",
    formula="(alpha / r) · aᵀ b, the rows of a and b rotated copies of one chunk",
    parameters="L · (u · (in + out) + (r - u) · (⌈in/m⌉ + ⌈out/n⌉))",
    source="arXiv 2402.16902 §3",
    budget="rank",
)


@dataclass(frozen=True, kw_only=True)
class Spec(base.Spec):
    """Low-rank factors of which u ranks are free and R = r - u ranks repeat one chunk, rotated, along the hidden axis.

    The shared part of a is m chunks of width ⌈in/m⌉, cut to in; row k of chunk i is row (k + i·s) mod R of ``a_shared``
    with s = max(⌊R/m⌋, 1). b the same with n. Nothing crosses layers. ΔW = (alpha / r) · aᵀ b over all r ranks.

    Trained: ``a_unshared`` (L, u, in), ``b_unshared`` (L, u, out), ``a_shared`` (L, R, ⌈in/m⌉), ``b_shared``
    (L, R, ⌈out/n⌉), float32; an empty part (u = 0 or R = 0) has no leaves. Start: a ~ U(±1/√in) with the full in
    ("rectified"), b = 0, so ΔW = 0. Parameters: L · (u(in+out) + R(⌈in/m⌉+⌈out/n⌉)) a group. Source: arXiv 2402.16902
    §3, Eq. 2-5, and its authors' code; the paper uses alpha 16, dropout 0.1.

    The copies are expanded once a step, outside the layers. `expand=False` never makes them: every chunk of x meets the
    one shared chunk, and the results, R wide, are rotated and added. That holds no (r, in) copy, but as many
    activations as there are chunks, and is slower on a CPU (docs/decisions/0005-prolora-copies.md).

    The paper's ablations are settings: CLoRA `unshared_rank=0, rotate=False`; RoLoRA `unshared_rank=0`; -r
    `rotate=False`; -i `rectified_init=False`; its siblings by `share_along` and `rotate_along`.

    Attributes:
        rank: r.
        unshared_rank: u.
        sharing_in: m, how often a's chunk is repeated.
        sharing_out: n, how often b's chunk is repeated.
        rotate: whether the copies are rotated.
        rectified_init: whether a's start has the bound of the full in, instead of its own width's.
        share_along: the axis along which copies lie. Along "rank" the parts are (L, ⌈R/m⌉, in) and (L, ⌈R/n⌉, out).
        rotate_along: the axis along which copy i is rotated, by i · max(⌊size/copies⌋, 1).
        expand: whether the copies are made, or the product is computed without them.

    Examples:
        >>> import jax, jax.numpy as jnp, jaxpeft
        >>> from jaxpeft.methods import prolora
        >>> sites = jaxpeft.find({"q_proj": {"kernel": jnp.zeros((70, 35))}})
        >>> spec = prolora.Spec(rank=8, unshared_rank=1, sharing_in=7, sharing_out=7)
        >>> adapter = jaxpeft.init(jax.random.key(0), spec, sites)
        >>> {name: leaf.shape for name, leaf in adapter.params["q_proj/kernel"].items()}
        {'a_unshared': (1, 1, 70), 'b_unshared': (1, 1, 35), 'a_shared': (1, 7, 10), 'b_shared': (1, 7, 5)}
    """

    rank: int
    unshared_rank: int
    sharing_in: int
    sharing_out: int
    rotate: bool = True
    rectified_init: bool = True
    share_along: Axis = "hidden"
    rotate_along: Axis = "rank"
    expand: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        base.require(self.rank >= 1, self, "rank", "at least 1")
        base.require(0 <= self.unshared_rank <= self.rank, self, "unshared_rank", f"from 0 to rank={self.rank}")
        for field in ("sharing_in", "sharing_out"):
            base.require(getattr(self, field) >= 1, self, field, "at least 1")
        for field in ("share_along", "rotate_along"):
            base.require(getattr(self, field) in ("hidden", "rank"), self, field, "hidden or rank")

    @property
    def shared_rank(self) -> int:
        """R = r - u."""
        return self.rank - self.unshared_rank

    def materialized_rank(self, group: Group) -> int:  # noqa: D102
        del group
        return self.rank

    def chunk(self, dim: int, copies: int) -> tuple[int, int]:
        """Shape (rows, width) of the shared part of a factor (R, dim)."""
        if self.share_along == "hidden":
            return self.shared_rank, -(-dim // copies)
        return -(-self.shared_rank // copies), dim

    def check(self, group: Group) -> None:
        """Raises ValueError if the spec does not fit a group."""
        for field, dim in (("sharing_in", group.in_dim), ("sharing_out", group.out_dim)):
            limit = dim if self.share_along == "hidden" else max(self.shared_rank, 1)
            if getattr(self, field) > limit:
                raise ValueError(
                    f"prolora.Spec: {field}={getattr(self, field)} copies do not fit {group.name}; at most {limit}"
                )


def count(spec: Spec, sites: Sites) -> int:
    """Trained parameters: Σ L · (u(in+out) + R(⌈in/m⌉+⌈out/n⌉))."""
    total = 0
    for g in sites:
        rows_in, width_in = spec.chunk(g.in_dim, spec.sharing_in)
        rows_out, width_out = spec.chunk(g.out_dim, spec.sharing_out)
        total += g.layers * (spec.unshared_rank * (g.in_dim + g.out_dim) + rows_in * width_in + rows_out * width_out)
    return total


def init(key: Array, spec: Spec, sites: Sites, weights: Any = None) -> tuple[dict, dict]:
    """Trained and frozen arrays by group; `weights` is not read."""
    del weights
    params = {}
    for g, group_key in zip(sites, jax.random.split(key, len(sites)), strict=True):
        spec.check(g)
        unshared_key, shared_key = jax.random.split(group_key)
        params[g.name] = {}
        if spec.unshared_rank:
            params[g.name] |= {
                "a_unshared": uniform(unshared_key, (g.layers, spec.unshared_rank, g.in_dim), g.in_dim),
                "b_unshared": jnp.zeros((g.layers, spec.unshared_rank, g.out_dim)),
            }
        if spec.shared_rank:
            a_chunk, b_chunk = spec.chunk(g.in_dim, spec.sharing_in), spec.chunk(g.out_dim, spec.sharing_out)
            fan_in = g.in_dim if spec.rectified_init else a_chunk[1]
            params[g.name] |= {
                "a_shared": uniform(shared_key, (g.layers, *a_chunk), fan_in),
                "b_shared": jnp.zeros((g.layers, *b_chunk)),
            }
    return params, {g.name: {} for g in sites}


def updates(params: Mapping, constants: Mapping, spec: Spec, sites: Sites) -> dict[str, Update]:
    """One update a group, stacked over its layers."""
    made: dict[str, Update] = {}
    for g in sites:
        trained, scale, parts = params[g.name], constants[g.name]["scale"], []
        if spec.unshared_rank:
            parts.append(LowRank(trained["a_unshared"], trained["b_unshared"], scale))
        if spec.shared_rank:
            parts.append(Rotated(trained["a_shared"], trained["b_shared"], scale, spec, (g.in_dim, g.out_dim)))
        whole = parts[0] if len(parts) == 1 else PartiallyRotated(*parts)
        made[g.name] = whole.factors() if spec.expand else whole
    return made


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rotated(Update):
    """ΔW = scale · aᵀ b with a and b made of rotated copies of one chunk each.

    Attributes:
        a: (..., R, ⌈in/m⌉), or (..., ⌈R/m⌉, in) when shared along the rank.
        b: the same over out and n.
        scale: (...)
        spec: how the copies are laid out.
        dims: (in, out).
    """

    a: Array
    b: Array
    scale: Array
    spec: Spec = dataclasses.field(metadata={"static": True})
    dims: tuple[int, int] = dataclasses.field(metadata={"static": True})

    def factors(self) -> LowRank:
        """The copies expanded to (..., R, in) and (..., R, out)."""
        return LowRank(
            expand(self.a, self.spec, self.spec.sharing_in, self.dims[0]),
            expand(self.b, self.spec, self.spec.sharing_out, self.dims[1]),
            self.scale,
        )

    def delta(self) -> Array:  # noqa: D102
        return self.factors().delta()

    def delta_rows(self, take: Any) -> Array:  # noqa: D102
        return self.factors().delta_rows(take)

    def delta_matmul(self, x: Array) -> Array:  # noqa: D102
        if self.spec.share_along != "hidden" or (self.spec.rotate and self.spec.rotate_along != "rank"):
            return self.factors().delta_matmul(x)
        (rank, width_in), width_out = self.a.shape, self.b.shape[1]
        copies_in, copies_out = self.spec.sharing_in, self.spec.sharing_out
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, copies_in * width_in - self.dims[0])])
        chunks = jnp.einsum("...mc,rc->...mr", x.reshape(*x.shape[:-1], copies_in, width_in), self.a.astype(x.dtype))
        turns_in, turns_out = (turns(self.spec, copies, rank) for copies in (copies_in, copies_out))
        hidden = sum(jnp.roll(chunks[..., i, :], -turn, axis=-1) for i, turn in enumerate(turns_in))
        hidden = hidden * self.scale.astype(x.dtype)
        rolled = jnp.stack([jnp.roll(hidden, turn, axis=-1) for turn in turns_out], axis=-2)
        y = jnp.einsum("...nr,rc->...nc", rolled, self.b.astype(x.dtype))
        return y.reshape(*y.shape[:-2], copies_out * width_out)[..., : self.dims[1]]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PartiallyRotated(Update):
    """The sum of a plain and a rotated update, the plain ranks first."""

    axes: ClassVar[Mapping[str, str]] = {"unshared": "io"}

    unshared: LowRank
    shared: Rotated

    def factors(self) -> LowRank:
        """Both parts as one pair of factors (..., r, in), (..., r, out)."""
        shared = self.shared.factors()
        return LowRank(
            jnp.concatenate([self.unshared.a, shared.a], axis=-2),
            jnp.concatenate([self.unshared.b, shared.b], axis=-2),
            self.unshared.scale,
        )

    def delta(self) -> Array:  # noqa: D102
        return self.factors().delta()

    def delta_rows(self, take: Any) -> Array:  # noqa: D102
        return self.factors().delta_rows(take)

    def delta_matmul(self, x: Array) -> Array:  # noqa: D102
        return self.unshared.delta_matmul(x) + self.shared.delta_matmul(x)


def expand(chunk: Array, spec: Spec, copies: int, dim: int) -> Array:
    """The shared part of a factor, (..., R, dim), from its chunk (..., rows, width)."""
    share_axis, rotate_axis = (-1 if along == "hidden" else -2 for along in (spec.share_along, spec.rotate_along))
    rolled = [jnp.roll(chunk, -turn, axis=rotate_axis) for turn in turns(spec, copies, chunk.shape[rotate_axis])]
    whole = jnp.concatenate(rolled, axis=share_axis)
    return whole[..., : spec.shared_rank, :dim]


def turns(spec: Spec, copies: int, size: int) -> list[int]:
    """By how much each copy is rotated along an axis of the given size."""
    return [i * max(size // copies, 1) if spec.rotate else 0 for i in range(copies)]
