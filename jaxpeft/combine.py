"""Several adapters as one: combined over their updates, so across methods, never over their factors."""

import warnings
from collections.abc import Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxpeft.adapter import Adapter, by_path, check_base
from jaxpeft.convert import (
    Conversion,
    Factors,
    Whole,
    assemble,
    at,
    check_same,
    check_size,
    cut,
    dense,
    exact_factors,
    places,
    stays_whole,
)
from jaxpeft.layout import to_matrix
from jaxpeft.sites import Group, Sites, flatten
from jaxpeft.spec import nearest
from jaxpeft.updates import Update

How = Literal["linear", "cat", "svd", "ties", "dare_linear", "dare_ties", "magnitude_prune", "lego"]
PRUNING = ("ties", "dare_linear", "dare_ties", "magnitude_prune")


def combine(
    adapters: Sequence[Adapter],
    weights: Sequence[float] | None = None,
    *,
    how: How = "linear",
    rank: int | None = None,
    energy: float | None = None,
    density: float | None = None,
    majority_sign: Literal["total", "frequency"] = "total",
    key: Array | None = None,
    base: Any = None,
) -> tuple[Adapter, Conversion]:
    """One adapter for several of any methods; not under jit.

    With wᵢ the weights and ΔWᵢ the updates of one weight, for every weight on its own:

    - ``linear``: Σ wᵢ ΔWᵢ. Exact: LoRA with the factors side by side where all have factors, a whole array elsewhere.
    - ``cat``: the same, and an error where an update has no two factors.
    - ``svd``: its nearest LoRA of `rank` or `energy`. Those two cut the result of every other way as well.
    - ``magnitude_prune``: every ΔWᵢ keeps its `density` largest entries, then ``linear``.
    - ``dare_linear``: every ΔWᵢ keeps each entry with probability `density`, divided by it, then ``linear``
      (DARE, arXiv 2311.03099).
    - ``ties``: pruned by magnitude; of every entry the mean of those wᵢ ΔWᵢ whose sign is the `majority_sign`, by
      ``total`` of the values or ``frequency`` of the signs (TIES-Merging, arXiv 2306.01708).
    - ``dare_ties``: the same, pruned as in ``dare_linear``.
    - ``lego``: the pairs (row of a, row of b) of all adapters are grouped by k-means into `rank` clusters (by default
      as many as the largest adapter has), whose means, weighted by wᵢ > 0, are the factors (LoRA-LEGO, arXiv
      2409.16167). A mean is shorter than what it is the mean of, so each is scaled to its members' mean length; the
      output's variance grows with the rank, so ΔW is scaled by √(mean rank of the adapters / `rank`). These two
      formulas are our reading: of the paper only the abstract and summaries were at hand.

    One adapter of weight 1 is itself. Vectors, and weights trained whole beside a method, stay whole.

    Args:
        adapters: one or more, for the same base; each may adapt other weights.
        weights: one for each, also negative; 1 / n each by default.
        how: see above.
        rank: as in `jaxpeft.to_lora`.
        energy: as in `jaxpeft.to_lora`.
        density: share of entries to keep, in (0, 1]; needed where something is pruned.
        majority_sign: see ``ties``.
        key: `jax.random.key`, needed by ``dare_linear``, ``dare_ties`` and ``lego``.
        base: as in `jaxpeft.to_lora`.

    Returns:
        The adapter, and what `rank` or `energy` cut off.

    Raises:
        ValueError: an argument is missing, out of range, or not used by `how`; two adapters name one weight with
            different shapes; an update has no factors, or needs the base.

    Examples:
        >>> import jax, jax.numpy as jnp, jaxpeft
        >>> from jaxpeft.methods import lora, mos
        >>> sites = jaxpeft.find({"layers": [{"q_proj": {"kernel": jnp.zeros((64, 32))}} for _ in range(4)]})
        >>> one = jaxpeft.init(jax.random.key(0), lora.Spec(rank=4), sites)
        >>> two = jaxpeft.init(jax.random.key(1), mos.Spec(rank=4, equivalent_rank=2, private_rank=1), sites)
        >>> both, report = jaxpeft.combine([one, two], [0.7, 0.3])
        >>> both.spec.rank, report.exact
        (8, True)
    """
    adapters = list(adapters)
    if not adapters:
        raise ValueError("combine needs at least one adapter")
    weights = [1 / len(adapters)] * len(adapters) if weights is None else [float(weight) for weight in weights]
    _check(adapters, weights, how, rank, energy, density, majority_sign, key)
    sites = _union(adapters)
    if len(adapters) == 1 and weights == [1.0] and how == "linear" and rank is None and energy is None:
        ranks = {
            path: adapters[0].spec.materialized_rank(g) or min(g.in_dim, g.out_dim) for g in sites for path in g.paths
        }
        return adapters[0], Conversion(dict.fromkeys(ranks, 0.0), ranks)
    leaves = None if base is None else flatten(base)
    if leaves is not None:
        check_base(sites, leaves)
    found = [by_path(adapter) for adapter in adapters]
    random = np.random.default_rng(None if key is None else np.asarray(jax.random.key_data(key)))
    rows: dict[str, list[Factors | Whole]] = {group.name: [] for group in sites}
    for group in sites:
        whole = any(stays_whole(one.spec, own) for one in adapters for own in one.sites if _overlap(own, group))
        for path in group.paths:
            frozen = None if leaves is None else to_matrix(leaves[path], group.layout).astype(jnp.float32)
            adapted = [
                (weight, one[path][1], {*places(one[path][0])})
                for weight, one in zip(weights, found, strict=True)
                if path in one
            ]
            for index in places(group):
                given = [(weight, at(update, index)) for weight, update, own in adapted if index in own]
                before = None if frozen is None else frozen[index]
                if how in PRUNING:
                    made = _pruned(given, before, how, density, majority_sign, random)
                elif how == "lego" and not whole:
                    made = _lego(_all_factors(given, group, how), rank, random)
                else:
                    made = _sum(given, before, group, how, whole)
                if not whole and (rank is not None or energy is not None):
                    made = cut(made, rank, energy)
                rows[group.name].append(made if isinstance(made, Factors) else Whole(made))
    return assemble(sites, rows)


def _check(
    adapters: list[Adapter],
    weights: list[float],
    how: str,
    rank: int | None,
    energy: float | None,
    density: float | None,
    majority_sign: str,
    key: Array | None,
) -> None:
    if len(weights) != len(adapters):
        raise ValueError(f"{len(weights)} weights for {len(adapters)} adapters; expected one for each")
    if how not in get_args(How):
        raise ValueError(f"how={how!r}; {nearest(how, get_args(How))}")
    check_size(rank, energy)
    if how == "svd" and rank is None and energy is None:
        raise ValueError("how='svd' needs rank= or energy=; without them 'linear' is exact")
    if (how in PRUNING) != (density is not None):
        expected = "a share of entries to keep, in (0, 1]" if how in PRUNING else "None: nothing is pruned"
        raise ValueError(f"density={density} with how={how!r}: expected {expected}")
    if density is not None and not 0 < density <= 1:
        raise ValueError(f"density={density}: expected a share of entries to keep, in (0, 1]")
    if majority_sign not in ("total", "frequency"):
        raise ValueError(f"majority_sign={majority_sign!r}: expected total or frequency")
    if how == "lego" and min(weights) <= 0:
        raise ValueError(f"weights={weights} with how='lego': expected positive ones, they are the weights of means")
    if key is None and how in ("dare_linear", "dare_ties", "lego"):
        raise ValueError(f"how={how!r} draws random numbers; pass key=jax.random.key(…)")


def _overlap(one: Group, other: Group) -> bool:
    """Whether two groups have a weight in common."""
    return not set(one.paths).isdisjoint(other.paths)


def _union(adapters: Sequence[Adapter]) -> Sites:
    """Every weight that an adapter adapts.

    Raises:
        ValueError: two adapters disagree on the shape or layout of one.
    """
    groups: dict[str, Group] = {}
    known: dict[str, Group] = {}
    for adapter in adapters:
        for group in adapter.sites:
            for path in group.paths:
                check_same(path, group, known.setdefault(path, group))
            old = groups.get(group.name, group)
            paths = tuple(dict.fromkeys((*old.paths, *group.paths)))
            entries = None
            if old.entries is not None and group.entries is not None:
                entries = tuple(sorted({*old.entries, *group.entries}))
            groups[group.name] = Group(group.name, paths, group.shape, group.layout, entries)
    return Sites(tuple(groups.values()))


def _all_factors(given: Sequence[tuple[float, Update]], group: Group, how: str) -> list[tuple[float, Factors]]:
    found = [(weight, exact_factors(update)) for weight, update in given]
    for (_, factors), (_, update) in zip(found, given, strict=True):
        if factors is None:
            raise ValueError(
                f"how={how!r}: the update {type(update).__name__} of {group.name} is no product of two factors; "
                "convert it first (jaxpeft.to_lora(…, rank=…)), or use 'svd'"
            )
    return [(weight, factors) for weight, factors in found if factors is not None]


def _sum(
    given: Sequence[tuple[float, Update]], before: Array | None, group: Group, how: str, whole: bool
) -> Factors | np.ndarray:
    """Σ wᵢ ΔWᵢ: the factors side by side, or as an array."""
    factors = [exact_factors(update) for _, update in given]
    if not whole and (how == "cat" or all(one is not None for one in factors)):
        pairs = _all_factors(given, group, how)
        a = np.concatenate([one.a for _, one in pairs])
        return Factors(a, np.concatenate([np.float32(weight) * one.b for weight, one in pairs]))
    deltas = np.stack([dense(update, before) for _, update in given])
    return _weighted(deltas, [weight for weight, _ in given]).sum(axis=0)


def _weighted(deltas: np.ndarray, weights: Sequence[float]) -> np.ndarray:
    return deltas * np.asarray(weights, np.float32)[:, None, None]


def _pruned(
    given: Sequence[tuple[float, Update]],
    before: Array | None,
    how: str,
    density: float | None,
    majority_sign: str,
    random: np.random.Generator,
) -> np.ndarray:
    """Pruned updates: their weighted sum, or for TIES the mean of those that agree with the majority's sign."""
    prune = _by_chance if how.startswith("dare") else _by_magnitude
    deltas = np.stack([prune(dense(update, before), density or 1.0, random) for _, update in given])
    weighted = _weighted(deltas, [weight for weight, _ in given])
    if not how.endswith("ties"):
        return weighted.sum(axis=0)
    signs = np.sign(deltas)
    agrees = signs == np.sign((deltas if majority_sign == "total" else signs).sum(axis=0))
    return (weighted * agrees).sum(axis=0) / np.maximum(agrees.sum(axis=0), 1).astype(np.float32)


def _by_magnitude(delta: np.ndarray, density: float, random: np.random.Generator) -> np.ndarray:
    """Zero but for the largest entries."""
    del random
    size = int(density * delta.size)
    kept = np.zeros_like(delta).reshape(-1)
    largest = np.argpartition(-np.abs(delta).reshape(-1), min(size, delta.size - 1))[:size]
    kept[largest] = delta.reshape(-1)[largest]
    return kept.reshape(delta.shape)


def _by_chance(delta: np.ndarray, density: float, random: np.random.Generator) -> np.ndarray:
    """Zero but for entries drawn with probability `density`; the mean stays."""
    return np.where(random.random(delta.shape, np.float32) < density, delta / np.float32(density), 0)


def _lego(own: Sequence[tuple[float, Factors]], rank: int | None, random: np.random.Generator) -> Factors:
    """The means of clusters of rank-one pairs, scaled as `combine` says."""
    from scipy.cluster.vq import kmeans2

    units = np.concatenate([np.concatenate([one.a, one.b], axis=1) for _, one in own]).astype(np.float64)
    shares = np.concatenate([np.full(one.rank, weight) for weight, one in own])
    ranks = [one.rank for _, one in own]
    wanted = rank or max(ranks)
    # Equal points, as dead ranks are, would leave clusters empty.
    points, labels = np.unique(units, axis=0, return_inverse=True)
    if len(units) <= wanted:
        labels = np.arange(len(units))
    elif len(points) > wanted:
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # of an empty cluster: a smaller rank
            labels = kmeans2(units, wanted, minit="++", rng=random)[1]
    means = []
    for label in np.unique(labels):
        members, share = units[labels == label], shares[labels == label] / shares[labels == label].sum()
        mean, length = share @ members, share @ np.linalg.norm(members, axis=1)
        means.append(mean * (length / max(np.linalg.norm(mean), np.finfo(np.float64).tiny)))
    a, b = np.split(np.stack(means).astype(np.float32), [own[0][1].a.shape[1]], axis=1)
    return Factors(a, b * np.float32(np.sqrt(np.mean(ranks) / len(means))))
