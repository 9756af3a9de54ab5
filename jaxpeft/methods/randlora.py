"""RandLoRA: full-rank updates from scaled random bases (Albert et al., arXiv 2502.00987, ICLR 2025)."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array

from jaxpeft import spec as base
from jaxpeft.sites import Group, Sites
from jaxpeft.spec import SHARED
from jaxpeft.updates import LowRank, Update

CARD = base.Card(
    title="RandLoRA",
    formula="(alpha / r) · Σ_j diag(gam_j) aᵀ diag(lam_j) b_j, a and b_j frozen; its transpose where out < in",
    parameters="L · n · (r + m), with m = min(in, out) and n = ⌈m / r⌉",
    source="arXiv 2502.00987 §4",
    budget="num_bases",
    shared="frozen bases for all groups",
)


@dataclass(frozen=True, kw_only=True)
class Spec(base.Spec):
    """ΔW = (alpha / r) · Σ_j diag(gam_j) aᵀ diag(lam_j) b_j where in ≤ out, else its transpose: n bases.

    With m = min(in, out) and M = max(in, out): trained ``lam`` (L, n, r), ``gam`` (L, n, m), float32. Frozen, shared by
    all groups: ``a`` (r, m), ``b`` (n, r, M), as large as the largest group needs; the others use their first rows and
    columns. Start: a and b of unit variance, lam = 0, gam = 1/m, so ΔW = 0. Parameters: L · n · (r + m) a group; with
    the n = ⌈m / r⌉ that makes ΔW full-rank, about L · m² / r. Source: arXiv 2502.00987 §4 and its authors' integration
    into PEFT, from which the defaults are; alpha is divided by the r of one basis.

    The bases are side by side one product of rank n · r, and are applied as such: at most twice the work of the frozen
    product, without ΔW; but the backward passes through an (n · r, m) array for each layer at a time, as in PEFT.

    Attributes:
        rank: r of one basis; the smaller it is, the more parameters.
        num_bases: n; None for a full rank in every group.
        distribution: of a's and b's entries: ``uniform``; ``sparse`` and ``very_sparse``, in {-1, 0, 1} with 1/3 and
            1/√m of them not 0 (before they get unit variance).
        order: ``paper`` pairs rank k of basis j in a with the same in b. PEFT and the authors' code, ``peft``, flatten
            a over (k, j) and b over (j, k) before they multiply, which pairs others; just as random, but not the same.

    Examples:
        >>> import jax, jax.numpy as jnp, jaxpeft
        >>> from jaxpeft.methods import randlora
        >>> sites = jaxpeft.find({"q_proj": {"kernel": jnp.zeros((64, 32))}})
        >>> adapter = jaxpeft.init(jax.random.key(0), randlora.Spec(rank=8), sites)
        >>> {name: leaf.shape for name, leaf in adapter.params["q_proj/kernel"].items()}
        {'lam': (1, 4, 8), 'gam': (1, 4, 32)}
    """

    rank: int
    num_bases: int | None = None
    distribution: Literal["uniform", "sparse", "very_sparse"] = "uniform"
    order: Literal["paper", "peft"] = "paper"
    alpha: float = dataclasses.field(default=640.0, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        base.require(self.rank >= 1, self, "rank", "at least 1")
        base.require(self.num_bases is None or self.num_bases >= 1, self, "num_bases", "at least 1, or None")
        known = ("uniform", "sparse", "very_sparse")
        base.require(self.distribution in known, self, "distribution", "uniform, sparse or very_sparse")
        base.require(self.order in ("paper", "peft"), self, "order", "paper or peft")

    def scale(self, group: Group) -> float:
        """Factor of the group's update, alpha / r; the rank of the whole product is n · r."""
        return super().scale(group) / self.rank

    def bases(self, narrow: int) -> int:
        """Bases of a weight with min(in, out) = narrow."""
        return self.num_bases or -(-narrow // self.rank)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Bases(Update):
    """ΔW = scale · Σ_j diag(gam_j) aᵀ diag(lam_j) b_j, (m, M), or its transpose.

    Attributes:
        a: (..., r, m)
        b: (..., n, r, M)
        lam: (..., n, r)
        gam: (..., n, m)
        scale: (...)
        transposed: whether in = M and out = m.
    """

    a: Array
    b: Array
    lam: Array
    gam: Array
    scale: Array
    transposed: bool = dataclasses.field(metadata={"static": True})

    def delta(self) -> Array:  # noqa: D102
        return self.factors().delta()

    def delta_matmul(self, x: Array) -> Array:  # noqa: D102
        return self.factors().delta_matmul(x)

    def delta_rows(self, take: Callable[[Array], Array]) -> Array:  # noqa: D102
        return self.factors().delta_rows(take)

    def factors(self) -> LowRank:
        """All bases side by side, as one product of rank n · r."""
        narrow = self.lam[..., None] * self.a[..., None, :, :] * self.gam[..., None, :]
        a, b = (leaf.reshape(*leaf.shape[:-3], -1, leaf.shape[-1]) for leaf in (narrow, self.b))
        return LowRank(b, a, self.scale) if self.transposed else LowRank(a, b, self.scale)


def count(spec: Spec, sites: Sites) -> int:
    """Trained parameters: Σ L · n · (r + m)."""
    return sum(g.layers * spec.bases(m) * (spec.rank + m) for g in sites for m in [min(g.in_dim, g.out_dim)])


def init(key: Array, spec: Spec, sites: Sites, weights: Any = None) -> tuple[dict, dict]:
    """Diagonals by group (trained) and the bases that all groups share (frozen); `weights` is not read."""
    del weights
    largest = sorted((max(g.in_dim for g in sites), max(g.out_dim for g in sites)))
    a_key, b_key = jax.random.split(key)
    constants: dict[str, dict] = {g.name: {} for g in sites}
    constants[SHARED] = {
        "a": draw(a_key, (spec.rank, largest[0]), spec, largest[0]),
        "b": draw(b_key, (spec.bases(largest[0]), spec.rank, largest[1]), spec, largest[0]),
    }
    params = {}
    for g in sites:
        m = min(g.in_dim, g.out_dim)
        lam, gam = (g.layers, spec.bases(m), spec.rank), (g.layers, spec.bases(m), m)
        params[g.name] = {"lam": jnp.zeros(lam), "gam": jnp.full(gam, 1 / m, jnp.float32)}
    return params, constants


def draw(key: Array, shape: tuple[int, ...], spec: Spec, narrow: int) -> Array:
    """Random entries of unit variance."""
    x = jax.random.uniform(key, shape, minval=-1, maxval=1)
    if spec.distribution != "uniform":
        share = 1 / 3 if spec.distribution == "sparse" else 1 / math.sqrt(narrow)
        x = jnp.where(jnp.abs(x) > 1 - share, jnp.sign(x), 0)
    return x / jnp.std(x)


def updates(params: Mapping, constants: Mapping, spec: Spec, sites: Sites) -> dict[str, Bases]:
    """One `Bases` a group, the shared bases serving all its layers."""
    shared, made = constants[SHARED], {}
    for g in sites:
        narrow, wide = sorted((g.in_dim, g.out_dim))
        n = spec.bases(narrow)
        a, b = shared["a"][:, :narrow], shared["b"][:n, :, :wide]
        if spec.order == "peft":
            b = b.reshape(spec.rank, n, wide).swapaxes(0, 1)
        lam, gam, scale = params[g.name]["lam"], params[g.name]["gam"], constants[g.name]["scale"]
        made[g.name] = Bases(a[None], b[None], lam, gam, scale, transposed=g.out_dim < g.in_dim)
    return made
