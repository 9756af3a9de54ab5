"""Which plain LoRA is an adapter? Exactly one where its updates are low-rank; the nearest one, with its error, else."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxpeft.adapter import Adapter, by_path, check_base
from jaxpeft.layout import to_matrix
from jaxpeft.methods import full, lora, mixed
from jaxpeft.sites import Group, Sites, flatten
from jaxpeft.spec import Spec
from jaxpeft.updates import Update


@dataclass(frozen=True)
class Conversion:
    """What a conversion to low rank kept.

    Attributes:
        error: {path: ‖ΔW - converted‖ / ‖ΔW‖}, the largest over a stacked array's layers; 0 if ΔW is zero.
        rank: {path: largest rank over the layers}; for a weight that is kept whole, min(in, out).
    """

    error: dict[str, float]
    rank: dict[str, int]

    @property
    def exact(self) -> bool:
        """Whether nothing was cut off."""
        return not any(self.error.values())

    def __str__(self) -> str:
        ranks, worst = sorted(set(self.rank.values())), max(self.error, key=self.error.__getitem__)
        rank = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
        kept = "exactly" if self.exact else f"with a relative error up to {self.error[worst]:.2%} ({worst})"
        return f"{len(self.rank)} arrays at rank {rank}, {kept}"


@dataclass(frozen=True)
class Factors:
    """One weight's ΔW = aᵀ b in float32, on the host.

    Attributes:
        a: (r, in)
        b: (r, out)
        error: what was cut off, as a share of ‖ΔW‖.
    """

    a: np.ndarray
    b: np.ndarray
    error: float = 0.0

    @property
    def rank(self) -> int:
        """Number of rows, r."""
        return len(self.a)

    def delta(self) -> np.ndarray:
        """ΔW, (in, out)."""
        return self.a.T @ self.b


@dataclass(frozen=True)
class Whole:
    """One weight's ΔW as an array (in, out), in float32, on the host."""

    delta: np.ndarray


def to_lora(
    adapter: Adapter, *, rank: int | None = None, energy: float | None = None, base: Any = None
) -> tuple[Adapter, Conversion]:
    """The adapter as plain LoRA; not under jit.

    Without `rank` and `energy` the result has the rank that each weight's update is made of, and is the same update:
    for MoS, PRoLoRA, VeRA and every other method that yields two factors. With one of them every ΔW is cut to its best
    approximation, its largest singular values. Vectors, and the weights that a part of a mixed spec trains whole
    (a head), stay whole.

    Args:
        adapter: any adapter whose updates can be merged.
        rank: the most a weight's update may have; exact factors that have no more stay as they are.
        energy: of each weight the smallest rank that keeps this share of ‖ΔW‖², in (0, 1].
        base: the base parameters; needed by updates that depend on the weight they change (DoRA, IA3, OFT, …).

    Returns:
        An adapter of `lora.Spec`, or of `mixed.Spec` where ranks differ between groups or weights stay whole, with
        alpha = rank, and what was cut off. Within a group the smaller ranks are filled up with zeros.

    Raises:
        ValueError: neither is given and an update is no product of two factors; both are given; a value is out of
            range; the base is missing or another one; the update cannot be merged at all.

    Examples:
        >>> import jax, jax.numpy as jnp, jaxpeft
        >>> from jaxpeft.methods import mos
        >>> sites = jaxpeft.find({"layers": [{"q_proj": {"kernel": jnp.zeros((64, 32))}} for _ in range(4)]})
        >>> adapter = jaxpeft.init(jax.random.key(0), mos.Spec(rank=4, equivalent_rank=2, private_rank=1), sites)
        >>> plain, report = jaxpeft.to_lora(adapter)
        >>> plain.spec.rank, report.exact
        (4, True)
    """
    check_size(rank, energy)
    rows: dict[str, list[Factors | Whole]] = {}
    for group, update, weight in each_weight(adapter, base):
        if stays_whole(adapter.spec, group):
            row = Whole(dense(update, weight))
        elif rank is None and energy is None:
            row = exact_factors(update)
            if row is None:
                raise ValueError(
                    f"the update of {group.name} is {type(update).__name__}, no product of two factors; pass rank= or "
                    "energy= for its nearest LoRA"
                )
            if row.rank > min(group.in_dim, group.out_dim):  # as RandLoRA's; the product needs no more
                row = cut(row, min(group.in_dim, group.out_dim), None)
        else:
            row = cut(exact_factors(update) or dense(update, weight), rank, energy)
        rows.setdefault(group.name, []).append(row)
    return assemble(adapter.sites, rows)


def check_size(rank: int | None, energy: float | None) -> None:
    """Raises ValueError unless at most one is given, and it is in range."""
    if rank is not None and energy is not None:
        raise ValueError(f"rank={rank} and energy={energy}: give one of the two")
    if rank is not None and rank < 1:
        raise ValueError(f"rank={rank}: expected at least 1")
    if energy is not None and not 0 < energy <= 1:
        raise ValueError(f"energy={energy}: expected a share of ‖ΔW‖² in (0, 1]")


def check_same(path: str, one: Group, other: Group) -> None:
    """Raises ValueError unless two adapters mean the same by a path that both change."""
    if (one.shape, one.layout) != (other.shape, other.layout):
        raise ValueError(
            f"{path} has shape {one.shape} and layout {one.layout!r} in one adapter, {other.shape} and "
            f"{other.layout!r} in another; they are for different bases"
        )


def stays_whole(spec: Spec, group: Group) -> bool:
    """Whether a group is trained whole beside the method: a vector, or a `full` part of a mixed spec."""
    head = isinstance(spec, mixed.Spec) and isinstance(spec.part(group), full.Spec)
    return head or "i" not in group.layout


def each_weight(adapter: Adapter, base: Any = None) -> Iterator[tuple[Group, Update, Array | None]]:
    """Every adapted weight's group, update and frozen value (in, out), by group, path and stack axes.

    The value is None without a base.
    """
    leaves = None if base is None else flatten(base)
    if leaves is not None:
        check_base(adapter.sites, leaves)
    for path, (group, update) in by_path(adapter).items():
        matrices = None if leaves is None else to_matrix(leaves[path], group.layout).astype(jnp.float32)
        for index in places(group):
            yield group, at(update, index), None if matrices is None else matrices[index]


def places(group: Group) -> list[tuple[int, ...]]:
    """Indices into the stack axes of one of a group's arrays, of the weights that are adapted."""
    stack = group.sizes("l")
    return [index for index in np.ndindex(*stack) if group.entries is None or index[0] in group.entries]


def at(update: Update, index: tuple[int, ...]) -> Update:
    """The update of one weight, of an update whose arrays lead with stack axes; an axis of size 1 serves all."""

    def one(leaf: Array) -> Array:
        return leaf[tuple(i if size > 1 else 0 for i, size in zip(index, leaf.shape, strict=False))]

    return jax.tree.map(one, update)


def exact_factors(update: Update) -> Factors | None:
    """The two factors that an update is the product of, with its scale in b; None if it is not."""
    factors = update.factors() if update.additive and not update.on_output else None
    return None if factors is None else Factors(np.asarray(factors.a), np.asarray(factors.b * factors.scale))


def dense(update: Update, weight: Array | None) -> np.ndarray:
    """ΔW (in, out) of one weight.

    Raises:
        ValueError: it depends on the weight, which is not there, or there is none.
    """
    if update.on_output:
        raise ValueError(f"{type(update).__name__} changes what a layer gives out; it has no ΔW")
    if update.additive:
        return np.asarray(_delta(update))
    if weight is None:
        raise ValueError(f"the update {type(update).__name__} depends on the weight it changes; pass base=")
    return np.asarray(_change(update, weight))


@jax.jit
def _delta(update: Update) -> Array:
    return update.delta()


@jax.jit
def _change(update: Update, weight: Array) -> Array:
    return update.materialize(weight) - weight


def cut(delta: Factors | np.ndarray, rank: int | None, energy: float | None) -> Factors:
    """The best factors of a rank, or of a share of ‖ΔW‖²; exact factors of no more than `rank` as they are."""
    if isinstance(delta, Factors):
        if rank is not None and delta.rank <= rank:
            return delta
        # The singular values of aᵀ b are those of the small product of the two triangles.
        (q_in, r_in), (q_out, r_out) = np.linalg.qr(delta.a.T), np.linalg.qr(delta.b.T)
        u, s, vt = np.linalg.svd(r_in @ r_out.T, full_matrices=False)
        u, vt = q_in @ u, vt @ q_out.T
    else:
        u, s, vt = np.linalg.svd(delta, full_matrices=False)
    squares = np.cumsum(np.square(s, dtype=np.float64))
    whole = squares[-1]
    if energy is not None:
        rank = 1 + int(np.searchsorted(squares, energy * whole * (1 - 1e-9)))
    kept = min(rank or len(s), len(s))
    root = np.sqrt(s[:kept])
    error = float(np.sqrt(max(0.0, 1 - squares[kept - 1] / whole))) if whole > 0 and kept < len(s) else 0.0
    return Factors((u[:, :kept] * root).T, root[:, None] * vt[:kept], error)


def assemble(sites: Sites, rows: Mapping[str, Sequence[Factors | Whole]]) -> tuple[Adapter, Conversion]:
    """An adapter of every weight's factors or whole update; a group with one that is whole is kept whole.

    Args:
        sites: its groups.
        rows: {group: one for each of its L weights}.
    """
    params, ranks = {}, {}
    for group in sites:
        own = rows[group.name]
        factors = [row for row in own if isinstance(row, Factors)]
        if len(factors) == len(own):
            ranks[group.name] = max(row.rank for row in factors)
            params[group.name] = {
                leaf: jnp.asarray(np.stack([_filled(getattr(row, leaf), ranks[group.name]) for row in factors]))
                for leaf in ("a", "b")
            }
        else:
            whole = [row.delta() if isinstance(row, Factors) else row.delta for row in own]
            params[group.name] = {"w": jnp.asarray(np.stack(whole))}
    constants = {group.name: {"scale": jnp.ones(group.layers)} for group in sites}
    return Adapter(params, constants, _spec(sites, ranks), sites), _report(sites, rows, ranks)


def _filled(factor: np.ndarray, rank: int) -> np.ndarray:
    return np.concatenate([factor, np.zeros((rank - len(factor), factor.shape[1]), np.float32)]).astype(np.float32)


def _spec(sites: Sites, ranks: Mapping[str, int]) -> Spec:
    """`lora`, `full`, or `mixed` of both and of several ranks; the commonest is the default."""
    if not ranks:
        return full.Spec()
    ((rank, _),) = Counter(ranks.values()).most_common(1)
    default = lora.Spec(rank=rank, alpha=rank)
    others = [group for group in sites if ranks.get(group.name) != rank]
    overrides = {}
    for group in others:
        own = ranks.get(group.name)
        overrides[mixed.pattern(group, sites)] = full.Spec() if own is None else lora.Spec(rank=own, alpha=own)
    return mixed.Spec(default=default, overrides=overrides) if overrides else default


def _report(sites: Sites, rows: Mapping[str, Sequence[Factors | Whole]], ranks: Mapping[str, int]) -> Conversion:
    error, rank = {}, {}
    for group in sites:
        own, each = iter(rows[group.name]), len(places(group))
        for path in group.paths:
            found = [next(own) for _ in range(each)]
            error[path] = max(getattr(row, "error", 0.0) for row in found)
            rank[path] = ranks.get(group.name, min(group.in_dim, group.out_dim))
    return Conversion(error, rank)
