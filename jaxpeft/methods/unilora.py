"""Uni-LoRA: all factors read from one trained vector (Li et al., arXiv 2506.00799)."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxpeft import spec as base
from jaxpeft.sites import Sites
from jaxpeft.spec import SHARED
from jaxpeft.updates import LowRank

CARD = base.Card(
    title="Uni-LoRA",
    formula="alpha · aᵀ b, every entry of a and b an entry of one vector / √(times it is used)",
    parameters="d, in total",
    source="arXiv 2506.00799 §3",
    budget="theta_length",
    shared="one vector for all groups",
    zero_start=False,
)


@dataclass(frozen=True, kw_only=True)
class Spec(base.Spec):
    """ΔW = alpha · aᵀ b, where all D = Σ L · r · (in + out) entries of the factors are a projection of one vector.

    The projection has one non-zero entry 1/√n_j in every row, n_j being the rows that use entry j: it is an isometry.
    Trained: ``theta`` (d,), float32, shared by all groups. Frozen: ``a_index`` (L, r, in), ``b_index`` (L, r, out),
    int32, and ``norm`` (d,) = 1/√n, shared. Start: theta ~ U(±theta_bound). It is not a no-op: ΔW is small, but not
    zero. Parameters: d, whatever the model. Source: arXiv 2506.00799 §3 and its authors' code. The paper has no alpha:
    it is 1 here. It draws the entry of every row uniformly; here, as in PEFT, every entry is used ⌊D/d⌋ or ⌈D/d⌉ times
    at random places, so none is dead.

    Attributes:
        rank: r.
        theta_length: d, the budget.
        theta_bound: spread of theta's start.

    Examples:
        >>> import jax, jax.numpy as jnp, jaxpeft
        >>> from jaxpeft.methods import unilora
        >>> sites = jaxpeft.find({"q_proj": {"kernel": jnp.zeros((64, 32))}})
        >>> adapter = jaxpeft.init(jax.random.key(0), unilora.Spec(rank=4, theta_length=100), sites)
        >>> jaxpeft.count(adapter), adapter.constants["q_proj/kernel"]["a_index"].shape
        (100, (1, 4, 64))
    """

    rank: int
    theta_length: int
    theta_bound: float = 0.02
    alpha: float = dataclasses.field(default=1.0, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        base.require(self.rank >= 1, self, "rank", "at least 1")
        base.require(self.theta_length >= 1, self, "theta_length", "at least 1")
        base.require(self.theta_bound > 0, self, "theta_bound", "a positive number: zero factors get no gradient")

    def entries(self, sites: Sites) -> int:
        """D, the entries of all factors; raises ValueError if theta is longer than that."""
        total = sum(g.layers * self.rank * (g.in_dim + g.out_dim) for g in sites)
        base.require(self.theta_length <= total, self, "theta_length", f"at most {total}, the entries of all factors")
        return total


def count(spec: Spec, sites: Sites) -> int:
    """Trained parameters: d."""
    del sites
    return spec.theta_length


def init(key: Array, spec: Spec, sites: Sites, weights: Any = None) -> tuple[dict, dict]:
    """Theta (trained), index tables by group and the norm (frozen); `weights` is not read."""
    del weights
    theta_key, index_key = jax.random.split(key)
    length, bound = spec.theta_length, spec.theta_bound
    entry = jnp.arange(spec.entries(sites), dtype=jnp.int32) % length
    index, start = jax.random.permutation(index_key, entry), 0
    constants: dict[str, dict] = {}
    for g in sites:
        constants[g.name] = {}
        for name, dim in (("a_index", g.in_dim), ("b_index", g.out_dim)):
            stop = start + g.layers * spec.rank * dim
            constants[g.name][name] = index[start:stop].reshape(g.layers, spec.rank, dim)
            start = stop
    constants[SHARED] = {"norm": norm(constants, spec, sites)}
    params: dict[str, dict] = {g.name: {} for g in sites}
    params[SHARED] = {"theta": jax.random.uniform(theta_key, (length,), minval=-bound, maxval=bound)}
    return params, constants


def norm(constants: Mapping, spec: Spec, sites: Sites) -> Array:
    """1/√(times each entry of theta is used), which makes the projection an isometry."""
    tables = [constants[g.name][name].ravel() for g in sites for name in ("a_index", "b_index")]
    return jax.lax.rsqrt(jnp.bincount(jnp.concatenate(tables), length=spec.theta_length).astype(jnp.float32))


def updates(params: Mapping, constants: Mapping, spec: Spec, sites: Sites) -> dict[str, LowRank]:
    """One `LowRank` a group: theta spread over its layers, once for the whole step."""
    del spec
    theta = params[SHARED]["theta"] * constants[SHARED]["norm"]

    def factor(index: Array) -> Array:
        return theta.at[index].get(mode="promise_in_bounds")

    return {
        g.name: LowRank(
            factor(constants[g.name]["a_index"]), factor(constants[g.name]["b_index"]), constants[g.name]["scale"]
        )
        for g in sites
    }


def check_constants(constants: Mapping, spec: Spec, sites: Sites) -> None:
    """Raises ValueError if an index table leaves theta, or the norm is not that of the tables."""
    for g in sites:
        for name in ("a_index", "b_index"):
            index = np.asarray(constants[g.name][name])
            if not 0 <= index.min() <= index.max() < spec.theta_length:
                found = f"{index.min()}..{index.max()}"
                raise ValueError(f"{g.name}/{name}: indices {found} leave theta with {spec.theta_length} entries")
    if not np.allclose(constants[SHARED]["norm"], norm(constants, spec, sites)):
        raise ValueError(f"{SHARED}/norm is not 1/√(times each entry of theta is used in the index tables)")
