"""What training did to the weights: intruder dimensions, and the rank of the change, by weight and stacked by group."""

import math
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxpeft.adapter import Adapter, check_base
from jaxpeft.sites import Group, Sites, find, flatten
from jaxpeft.table import table
from jaxpeft.values import over_stack
from jaxpeft.weights import Weights


@dataclass(frozen=True)
class Intruder:
    """A singular vector of W' that is like none of W0.

    Attributes:
        number: which of W' it is, from 0 for the largest singular value.
        value: its singular value.
        similarity: largest |cosine| between it and any singular vector of W0.
    """

    number: int
    value: float
    similarity: float


@dataclass(frozen=True)
class WeightReport:
    """One weight's row.

    Attributes:
        group: name of its group.
        layer: its number in the group.
        intruders: the intruders among the singular vectors that were looked at, largest singular value first.
        rank: numerical rank of ΔW.
        effective_rank: exp of the entropy of ΔW's singular values as shares of their sum; 0 if ΔW = 0.
    """

    group: str
    layer: int
    intruders: tuple[Intruder, ...]
    rank: int
    effective_rank: float


@dataclass(frozen=True)
class Report:
    """What `diagnose` returns; printing shows two tables.

    Attributes:
        weights: a row for every adapted weight.
        stacked_ranks: {group: rank of all its ΔW as one (L · in, out) matrix}: how many output directions its layers
            reach together; small where sharing confines all layers to one subspace.
    """

    weights: tuple[WeightReport, ...]
    stacked_ranks: dict[str, int]

    @property
    def intruders(self) -> int:
        """Number of intruder dimensions in all weights."""
        return sum(len(row.intruders) for row in self.weights)

    def __str__(self) -> str:
        rows = [("group", "layer", "rank", "effective", "intruders: number, singular value, similarity")]
        for row in self.weights:
            found = "; ".join(f"#{one.number} {one.value:.3g} {one.similarity:.2f}" for one in row.intruders)
            ranks = (str(row.rank), f"{row.effective_rank:.1f}")
            rows.append((row.group, str(row.layer), *ranks, f"{len(row.intruders)}: {found}" if found else "0"))
        stacked = [("group", "stacked rank"), *((name, str(rank)) for name, rank in self.stacked_ranks.items())]
        return "\n".join([*table(rows), "", *table(stacked), f"{self.intruders} intruder dimensions"])


def diagnose(base: Any, tuned: Any, sites: Sites | None = None, *, top: int = 10, epsilon: float = 0.5) -> Report:
    """Intruder dimensions and ranks of what training changed; not under jit.

    A singular vector y of W' is an intruder if it is among the `top` first and max |cos(y, x)| < epsilon over all
    singular vectors x of W0 ("LoRA vs Full Fine-tuning: An Illusion of Equivalence", arXiv 2410.21228, algorithm 1).
    Vectors of the output side are compared, the paper's left singular vectors. Models trained whole have few; LoRA of
    small rank has some, and forgets more of what the base knew.

    Args:
        base: the base parameters.
        tuned: an adapter of this base, or a tree like it that was trained whole or merged.
        sites: the weights of a tree to look at; by default all linear ones. An adapter has its own.
        top: singular vectors of W' to look at, k in the paper.
        epsilon: the largest similarity of an intruder.

    Returns:
        The report. Ranks count singular values above the rounding of what ΔW was computed from: for a tree, that is W'.

    Raises:
        ValueError: a weight is missing, or has another shape.

    Examples:
        >>> import jax, jax.numpy as jnp, jaxpeft
        >>> from jaxpeft.diagnose import diagnose
        >>> base = {"up": {"kernel": jnp.eye(8)[:6]}}
        >>> tuned = {"up": {"kernel": base["up"]["kernel"].at[:, 7].set(9.0)}}
        >>> print(diagnose(base, tuned, jaxpeft.find(base), top=1))
        group      layer  rank  effective  intruders: number, singular value, similarity
        up/kernel  0      1     1.0        1: #0 22.1 0.02
        <BLANKLINE>
        group      stacked rank
        up/kernel  1
        1 intruder dimensions
    """
    if isinstance(tuned, Adapter):
        sites = tuned.sites
    sites = find(base) if sites is None else sites
    check_base(sites, flatten(base))
    if not isinstance(tuned, Adapter):
        check_base(sites, flatten(tuned))
    rows, stacked = [], {}
    for group in sites:
        frozen = Weights(base, sites)[group.name]
        changed, delta, exact = _changed(frozen, tuned, sites, group)
        _, _, before = jnp.linalg.svd(frozen, full_matrices=False)
        _, values, after = jnp.linalg.svd(changed, full_matrices=False)
        similarity = jnp.abs(after[:, :top] @ jnp.swapaxes(before, 1, 2)).max(axis=-1)
        spectra = np.asarray(jnp.linalg.svd(delta, compute_uv=False))
        rounding = spectra[:, 0] if exact else np.asarray(values)[:, 0]
        bounds = rounding * np.finfo(np.float32).eps * max(group.in_dim, group.out_dim)
        for layer in range(group.layers):
            intruders = tuple(
                Intruder(number, float(values[layer, number]), float(cosine))
                for number, cosine in enumerate(similarity[layer])
                if cosine < epsilon
            )
            rank = int((spectra[layer] > bounds[layer]).sum())
            rows.append(WeightReport(group.name, layer, intruders, rank, _effective_rank(spectra[layer][:rank])))
        together = np.asarray(jnp.linalg.svd(delta.reshape(-1, group.out_dim), compute_uv=False))
        bound = np.finfo(np.float32).eps * max(group.layers * group.in_dim, group.out_dim)
        stacked[group.name] = int((together > bound * (together[0] if exact else rounding.max())).sum())
    return Report(tuple(rows), stacked)


def _changed(frozen: Array, tuned: Any, sites: Sites, group: Group) -> tuple[Array, Array, bool]:
    """W', ΔW (L, in, out), and whether ΔW is free of the rounding of W'."""
    if not isinstance(tuned, Adapter):
        changed = Weights(tuned, sites)[group.name]
        return changed, changed - frozen, False
    update = tuned.updates()[group.name]
    changed = over_stack(type(update).materialize, 1)(update, frozen)
    if update.additive:
        return changed, over_stack(type(update).delta, 1)(update), True
    return changed, changed - frozen, False


def _effective_rank(values: np.ndarray) -> float:
    """Exp of the entropy of the values as shares of their sum (Roy and Vetterli, 2007)."""
    if not len(values):
        return 0.0
    shares = values.astype(np.float64) / values.sum()
    return math.exp(-float((shares * np.log(shares)).sum()))
