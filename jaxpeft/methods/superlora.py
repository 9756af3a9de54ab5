"""SuperLoRA: grouping, folding, shuffling, projection and tensor factoring (Chen et al., arXiv 2403.11887)."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxpeft import hadamard
from jaxpeft import spec as base
from jaxpeft.methods.lora import uniform
from jaxpeft.sites import Group, Sites
from jaxpeft.spec import SHARED
from jaxpeft.updates import Dense, Kronecker, LowRank, Update

CARD = base.Card(
    title="SuperLoRA",
    formula="(alpha / r) · slices of F(⊗ₖ Cₖ ×₁ Aₖ₁ ×₂ … ×_M Aₖ_M) over all weights",
    parameters="G · K · (r^M + M · r · d), d = ⌈(ρ N / G)^(1/(K M))⌉",
    source="arXiv 2403.11887 §3",
    budget="rank",
    shared="the tensors of G slices that run across weights",
)


@dataclass(frozen=True, kw_only=True)
class Spec(base.Spec):
    """One vector of all weights, cut into slices; each slice is a folded, projected product of small tensors.

    The weights, in the order of the sites and row by row (in · out entries each), are one vector of N entries. It is
    cut into G slices of N_g = ⌈N/G⌉; a cut may fall inside a weight. With scale alpha / r, slice g is

        F_g(⊗_{k=1..K} C_gk ×₁ A_gk1 ×₂ … ×_M A_gkM),

    a Kronecker product of K Tucker tensors, cropped to its fold and flattened, of which the first ⌈ρ N_g⌉ entries
    enter the frozen projection F_g. A fold is a hyper-cube of order M and side d = ⌈(ρ N_g)^(1/M)⌉ unless `fold` says
    otherwise; piece k has sides d_k with ∏ d_k ≥ d, as equal as they can be (for a matrix: the most equal divisors).

    Trained, float32, one leading entry a slice: ``plane_k_m`` (G, r, d_k) is A_gkm, ``core_k`` (G, r, …, r) is C_gk,
    ``dense_k`` (G, d_k, …, d_k) a piece that is trained whole; k and m count from 1. They are under ``shared``, or with
    `groups="weight"` under every group, G being its L. Frozen, beside them: ``signs``, ``permutation``, ``gaussian``
    (G, P) of fastfood, P the power of two from N_g up; ``shuffle`` (G, N_g).

    Start: plane factors and whole pieces U(±1/√d_k), cores the identity, and one piece of the last tensor is zero, so
    ΔW = 0: its core for `core="zero"`, else its last plane factor; itself if it is whole.
    Parameters: Σ_g Σ_k r^M + r · Σ_m d_km (without r^M for an identity core; ∏_m d_km of a whole piece).
    Source: arXiv 2403.11887 §3. Our reading: U(±1/√d_k), the order of the vector, how sides are split, and that
    `core="trainable"` starts at the identity. Its 3-D "LoRTA" is not `jaxpeft.methods.lorta`, of the same name.

    Where a slice is one weight, folded as it is and neither shuffled nor projected, nothing is formed: the update is
    `LowRank` or `Kronecker`. Else N floats are formed a step.

    Special cases: LoRA with `groups="weight", fold="matrix"`, LoKr also with `splits=2, dense_splits=1`; LoNKr with
    `splits` above 2; its LoRTA with `order` above 2; LoTR with `fold="stack", order=3, core="zero"` and one group a
    module type; intrinsic dimension with `order=1, rank=1` and a `compression` below 1; all of a slice trained with
    `dense_splits=1`.

    Attributes:
        groups: G, or "weight" for one slice a weight.
        order: M.
        rank: r, of every mode of every tensor.
        splits: K.
        dense_splits: how many of the K pieces, the first ones, are trained whole (plane factors I, r = d_k).
        compression: ρ, entries before the projection as a share of those after it.
        core: frozen superdiagonal "identity" (a CP tensor), "trainable" from there, or trainable from "zero".
        fold: "cube" (2-D "reshaped", M-D); "matrix" (M = 2, "not reshaped"): rows of the weights' common width, which
            for a slice of one weight is (in, out); "stack" (M = 3): (weights, in, out) of equal weights, with the
            identity for the factor of the first mode and the core (weights, r, r).
        projection: "none" (ρ = 1); "permutation", zeros appended and all entries shuffled; "fastfood".
        scaled_projection: fastfood times √(P / (ρ N_g)): its output's entries are as large as its input's.
        shuffle: entries of a slice are permuted, after any projection; "permutation" implies it.

    Examples:
        >>> import jax, jax.numpy as jnp, jaxpeft
        >>> from jaxpeft.methods import superlora
        >>> sites = jaxpeft.find({"q_proj": {"kernel": jnp.zeros((64, 32))}, "v_proj": {"kernel": jnp.zeros((64, 8))}})
        >>> spec = superlora.Spec(groups=3, order=3, rank=2, core="zero")
        >>> adapter = jaxpeft.init(jax.random.key(0), spec, sites)
        >>> {name: leaf.shape for name, leaf in adapter.params["shared"].items()}  # 10³ ≥ ⌈2560 / 3⌉ > 9³
        {'core_1': (3, 2, 2, 2), 'plane_1_1': (3, 2, 10), 'plane_1_2': (3, 2, 10), 'plane_1_3': (3, 2, 10)}
        >>> jaxpeft.count(adapter) == 3 * (2**3 + 3 * 2 * 10)
        True
    """

    groups: int | Literal["weight"]
    order: int
    rank: int
    splits: int = 1
    dense_splits: int = 0
    compression: float = 1.0
    core: Literal["identity", "trainable", "zero"] = "identity"
    fold: Literal["cube", "matrix", "stack"] = "cube"
    projection: Literal["none", "permutation", "fastfood"] = "none"
    scaled_projection: bool = False
    shuffle: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        whole = isinstance(self.groups, int)
        base.require(self.groups == "weight" or (whole and self.groups >= 1), self, "groups", "at least 1, or 'weight'")
        for field in ("order", "rank", "splits"):
            base.require(getattr(self, field) >= 1, self, field, "at least 1")
        base.require(0 <= self.dense_splits <= self.splits, self, "dense_splits", f"from 0 to splits={self.splits}")
        base.require(0 < self.compression <= 1, self, "compression", "in (0, 1]")
        base.require(self.core in ("identity", "trainable", "zero"), self, "core", "identity, trainable or zero")
        base.require(self.fold in ("cube", "matrix", "stack"), self, "fold", "cube, matrix or stack")
        base.require(
            self.projection in ("none", "permutation", "fastfood"), self, "projection", "none, permutation or fastfood"
        )
        if self.compression < 1:
            base.require(self.projection != "none", self, "projection", "permutation or fastfood below compression=1")
        if self.scaled_projection:
            base.require(self.projection == "fastfood", self, "projection", "fastfood with scaled_projection=True")
        if self.fold == "matrix":
            base.require(self.order == 2, self, "order", "2 with fold='matrix'")
        if self.fold == "stack":
            base.require(self.order == 3, self, "order", "3 with fold='stack'")
            base.require(whole, self, "groups", "a number with fold='stack'")
            base.require(self.splits == 1, self, "splits", "1 with fold='stack'")
            base.require(self.core == "zero" or self.dense_splits == 1, self, "core", "zero with fold='stack'")
            base.require(self.compression == 1, self, "compression", "1 with fold='stack'")

    def materialized_rank(self, group: Group) -> int:  # noqa: D102
        del group
        return self.rank


@dataclass(frozen=True)
class Slices:
    """Slices of one size, formed together.

    Attributes:
        number: how many.
        size: N_g, entries of each.
        folded: ⌈ρ N_g⌉, entries of each before the projection.
        shape: shape of the fold, cropped.
        pieces: sides of each of the K tensors.
    """

    number: int
    size: int
    folded: int
    shape: tuple[int, ...]
    pieces: tuple[tuple[int, ...], ...]


def partition(spec: Spec, sites: Sites) -> dict[str, Slices]:
    """The slices by where their arrays are: `SHARED`, or every group with `groups="weight"`.

    Raises:
        ValueError: the spec does not fit the sites.
    """
    if spec.groups == "weight":
        return {g.name: _slices(spec, g.layers, g.in_dim * g.out_dim, 1, g) for g in sites}
    if not len(sites):  # A part of a mixed spec that rules no group.
        return {}
    size, groups = -(-sites.size // spec.groups), spec.groups
    if (groups - 1) * size >= sites.size:
        raise ValueError(
            f"superlora.Spec: groups={groups} slices of ⌈N/G⌉={size} leave slices empty, N={sites.size}; "
            f"nearest that does not: {-(-sites.size // size)}"
        )
    first, *others = sites
    weights = sum(g.layers for g in sites)
    axes = {"cube": "", "matrix": "out", "stack": "in and out"}[spec.fold]
    for g in others:
        if ("in" in axes and g.in_dim != first.in_dim) or ("out" in axes and g.out_dim != first.out_dim):
            raise ValueError(
                f"superlora.Spec: fold={spec.fold!r} across weights needs equal {axes}; "
                f"{first.name} is {first.in_dim}x{first.out_dim}, {g.name} is {g.in_dim}x{g.out_dim}; "
                "fold='cube' fits any"
            )
    if spec.fold == "stack" and weights % groups:
        near = min((n for n in range(1, weights + 1) if weights % n == 0), key=lambda n: abs(n - groups))
        raise ValueError(
            f"superlora.Spec: groups={groups} does not divide {weights} weights; nearest that does: {near}"
        )
    return {SHARED: _slices(spec, groups, size, weights // groups, first)}


def _slices(spec: Spec, number: int, size: int, weights: int, group: Group) -> Slices:
    # Rounded, so that a share such as 0.07 · 100 = 7.000000000000001 is not one entry more.
    folded = math.ceil(round(spec.compression * size, 6))
    if spec.fold == "cube":
        shape = (_root(folded, spec.order),) * spec.order
    elif spec.fold == "matrix":
        shape = (-(-folded // group.out_dim), group.out_dim)
    else:
        shape = (weights, group.in_dim, group.out_dim)
    divide = _divisors if spec.fold == "matrix" else _balanced
    pieces = zip(*(divide(side, spec.splits) for side in shape), strict=True)
    return Slices(number, size, folded, shape, tuple(pieces))


def _root(number: int, order: int) -> int:
    """The least integer whose power is at least `number`; exact, which a floating-point root is not."""
    side = max(1, round(number ** (1 / order)) - 1)
    while side**order < number:
        side += 1
    return side


def _balanced(side: int, splits: int) -> list[int]:
    """Sides of the pieces, as equal as they can be, with a product of at least `side`."""
    sides = []
    for left in range(splits, 0, -1):
        sides.append(_root(side, left))
        side = -(-side // sides[-1])
    return sides


def _divisors(side: int, splits: int) -> list[int]:
    """Sides of the pieces, with `side` for their product: each the largest divisor up to the root, as LoKr has it."""
    sides = []
    for left in range(splits, 1, -1):
        sides.append(next(n for n in range(side, 0, -1) if side % n == 0 and n**left <= side))
        side //= sides[-1]
    return [*sides, side]


def count(spec: Spec, sites: Sites) -> int:
    """Trained parameters: Σ G · (∏ d of every whole piece, r^M + r · Σ d of every other)."""
    total = 0
    for slices in partition(spec, sites).values():
        whole = sum(math.prod(sides) for sides in slices.pieces[: spec.dense_splits])
        factored = 0
        for sides in slices.pieces[spec.dense_splits :]:
            modes = sides[1:] if spec.fold == "stack" else sides
            core = 0 if spec.core == "identity" else math.prod(sides) // math.prod(modes) * spec.rank ** len(modes)
            factored += core + spec.rank * sum(modes)
        total += slices.number * (whole + factored)
    return total


def init(key: Array, spec: Spec, sites: Sites, weights: Any = None) -> tuple[dict, dict]:
    """Small tensors (trained) and projections (frozen) of every slice; `weights` is not read."""
    del weights
    params: dict[str, dict] = {g.name: {} for g in sites}
    constants: dict[str, dict] = {g.name: {} for g in sites}
    parts = partition(spec, sites)
    for (owner, slices), owner_key in zip(parts.items(), jax.random.split(key, len(parts)), strict=True):
        pieces_key, project_key, shuffle_key = jax.random.split(owner_key, 3)
        params[owner] = {}
        for k, (sides, piece_key) in enumerate(
            zip(slices.pieces, jax.random.split(pieces_key, spec.splits), strict=True), start=1
        ):
            params[owner] |= _piece(piece_key, spec, slices.number, sides, k)
        frozen = hadamard.draw(project_key, slices.number, slices.size) if spec.projection == "fastfood" else {}
        if spec.shuffle or spec.projection == "permutation":
            frozen["shuffle"] = hadamard.permutations(shuffle_key, slices.number, slices.size)
        if frozen:
            constants[owner] = frozen
    return params, constants


def _piece(key: Array, spec: Spec, number: int, sides: tuple[int, ...], k: int) -> dict[str, Array]:
    """The start of tensor k of every slice."""
    last = k == spec.splits
    if k <= spec.dense_splits:
        shape = (number, *sides)
        return {f"dense_{k}": jnp.zeros(shape) if last else uniform(key, shape, sides[0])}
    piece = {}
    if spec.core != "identity":
        lead = sides[:1] if spec.fold == "stack" else ()
        core = jnp.zeros((number, *lead, *[spec.rank] * (spec.order - len(lead))))
        if spec.core == "trainable" or not last:
            core = core.at[:, *[jnp.arange(spec.rank)] * spec.order].set(1)
        piece[f"core_{k}"] = core
    keys = jax.random.split(key, spec.order)
    for m, side in enumerate(sides, start=1):
        if spec.fold == "stack" and m == 1:
            continue
        shape = (number, spec.rank, side)
        zero = last and spec.core != "zero" and m == spec.order
        piece[f"plane_{k}_{m}"] = jnp.zeros(shape) if zero else uniform(keys[m - 1], shape, side)
    return piece


def updates(params: Mapping, constants: Mapping, spec: Spec, sites: Sites) -> dict[str, Update]:
    """`LowRank` or `Kronecker` where nothing has to be formed; else `Dense`."""
    made: dict[str, Update] = {}
    for owner, slices in partition(spec, sites).items():
        trained = params[owner]
        if owner != SHARED:
            g = sites[owner]
            scale = constants[owner]["scale"]
            if is_factored(spec, slices, g):
                made[owner] = _factors(trained, spec, scale)
            else:
                formed = form(trained, constants[owner], spec, slices)
                made[owner] = Dense(formed.reshape(g.layers, g.in_dim, g.out_dim), scale)
            continue
        vector = form(trained, constants.get(owner, {}), spec, slices).reshape(-1)[: sites.size]
        parts = jax.lax.split(vector, [g.layers * g.in_dim * g.out_dim for g in sites])
        for g, part in zip(sites, parts, strict=True):
            made[g.name] = Dense(part.reshape(g.layers, g.in_dim, g.out_dim), constants[g.name]["scale"])
    return made


def is_factored(spec: Spec, slices: Slices, group: Group) -> bool:
    """Whether a slice is a weight of the group, and the Kronecker product of its pieces as they are."""
    product = tuple(math.prod(sides) for sides in zip(*slices.pieces, strict=True))
    return product == (group.in_dim, group.out_dim) and spec.projection == "none" and not spec.shuffle


def _factors(trained: Mapping, spec: Spec, scale: Array) -> Update:
    """The update of weights whose slices are matrices."""
    pieces = []
    for k in range(1, spec.splits + 1):
        if k <= spec.dense_splits:
            pieces.append(trained[f"dense_{k}"])
            continue
        a, b = trained[f"plane_{k}_1"], trained[f"plane_{k}_2"]
        if spec.core != "identity":
            a = jnp.einsum("lrs,lri->lsi", trained[f"core_{k}"], a, precision="highest")
        pieces.append(LowRank(a, b, jnp.ones_like(scale)))
    if spec.splits > 1:
        return Kronecker(tuple(pieces), scale)
    return Dense(pieces[0], scale) if spec.dense_splits else dataclasses.replace(pieces[0], scale=scale)


def form(trained: Mapping, frozen: Mapping, spec: Spec, slices: Slices) -> Array:
    """Every slice's entries, (G, N_g), all slices by the same contractions."""
    product = tensor(trained, spec, 1)
    for k in range(2, spec.splits + 1):
        product = jax.vmap(jnp.kron)(product, tensor(trained, spec, k))
    cropped = product[:, *(slice(side) for side in slices.shape)]
    entries = cropped.reshape(slices.number, -1)[:, : slices.folded]
    if spec.projection == "fastfood":
        entries = hadamard.fastfood(entries, frozen, slices.size)
        if spec.scaled_projection:
            entries = entries * math.sqrt(hadamard.padded(slices.size) / (spec.compression * slices.size))
    if "shuffle" in frozen:
        entries = hadamard.permute(hadamard.extend(entries, slices.size), frozen["shuffle"])
    return entries


def tensor(trained: Mapping, spec: Spec, k: int) -> Array:
    """C_k ×₁ A_k1 ×₂ … ×_M A_kM of every slice, (G, d_k1, …, d_kM)."""
    if k <= spec.dense_splits:
        return trained[f"dense_{k}"]
    modes = [f"plane_{k}_{m}" for m in range(1, spec.order + 1)]
    if spec.core == "identity":
        # A superdiagonal core: all modes keep one rank axis, which the last sums; r^M is never formed.
        formed = jnp.ones(trained[modes[-1]].shape[:2])
        for mode in modes[:-1]:
            formed = jnp.einsum("gr...,grd->gr...d", formed, trained[mode], precision="highest")
        return jnp.einsum("gr...,grd->g...d", formed, trained[modes[-1]], precision="highest")
    formed = trained[f"core_{k}"]
    for mode in modes:
        # Each mode consumes the first axis that is left of the core and appends its own; a stack's first is there.
        if mode in trained:
            formed = jnp.einsum("gr...,grd->g...d", formed, trained[mode], precision="highest")
        else:
            formed = jnp.moveaxis(formed, 1, -1)
    return formed


def check_constants(constants: Mapping, spec: Spec, sites: Sites) -> None:
    """Raises ValueError if a stored permutation is none, or a sign is neither 0 nor 1."""
    for owner in partition(spec, sites):
        for name, stored in constants.get(owner, {}).items():
            if name in ("permutation", "shuffle"):
                hadamard.check_permutations(f"{owner}/{name}", np.asarray(stored))
            if name == "signs" and np.asarray(stored).max() > 1:
                raise ValueError(f"{owner}/signs: an entry is neither 0 nor 1")
