"""VB-LoRA: factors composed from one bank of vectors (Li et al., arXiv 2405.15179, NeurIPS 2024)."""

import dataclasses
import math
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
    title="VB-LoRA",
    formula="alpha · aᵀ b, every sub-vector of a and b a convex combination of k vectors of a bank",
    parameters="h · c + L · r · h · (in + out) / c, with h vectors of length c",
    source="arXiv 2405.15179 §3",
    budget="num_vectors",
    shared="one bank of vectors for all groups",
    zero_start=False,
)


@dataclass(frozen=True, kw_only=True)
class Spec(base.Spec):
    """ΔW = alpha · aᵀ b, the rows of a and b cut into sub-vectors that are admixed from one bank.

    A sub-vector is Σ_{j in top-k} softmax(top-k of its logits)_j · bank_j. Trained, float32: ``bank`` (h, c), shared by
    all groups; ``logits_a`` (L, r, in/c, h) and ``logits_b`` (L, r, out/c, h). Start: bank ~ U(±bank_bound), logits ~
    N(0, logits_std²). It is not a no-op: ΔW is small, but not zero. Parameters: h · c + Σ L · r · h · (in + out) / c
    while training; stored, after `compact`, h · c + Σ L · r · (2k - 1) · (in + out) / c. Source: arXiv 2405.15179 §3
    and its authors' integration into PEFT, which recommends learning rates of 1e-3 for ``bank`` and of 1e-2 for
    ``logits_a`` and ``logits_b``. The paper has no alpha: it is 1 here.

    Attributes:
        rank: r.
        num_vectors: h, vectors in the bank.
        vector_length: c, the paper's b; it divides every in and out.
        top_k: k, vectors in a combination.
        bank_bound: spread of the bank's start.
        logits_std: spread of the logits' start.

    Examples:
        >>> import jax, jax.numpy as jnp, jaxpeft
        >>> from jaxpeft.methods import vblora
        >>> sites = jaxpeft.find({"q_proj": {"kernel": jnp.zeros((64, 32))}})
        >>> spec = vblora.Spec(rank=4, num_vectors=10, vector_length=16)
        >>> adapter = jaxpeft.init(jax.random.key(0), spec, sites)
        >>> {name: leaf.shape for name, leaf in adapter.params["q_proj/kernel"].items()}
        {'logits_a': (1, 4, 4, 10), 'logits_b': (1, 4, 2, 10)}
        >>> stored = vblora.compact(adapter.params, spec, sites)
        >>> sum(leaf.size for leaf in jax.tree.leaves(stored)) == 10 * 16 + 4 * (64 + 32) // 16 * (2 * 2 - 1)
        True
    """

    rank: int
    num_vectors: int
    vector_length: int
    top_k: int = 2
    bank_bound: float = 0.02
    logits_std: float = 0.1
    alpha: float = dataclasses.field(default=1.0, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        base.require(self.rank >= 1, self, "rank", "at least 1")
        base.require(self.num_vectors >= 2, self, "num_vectors", "at least 2")
        base.require(self.vector_length >= 1, self, "vector_length", "at least 1")
        # The one weight of a top-1 is always 1, so no logit would get a gradient.
        base.require(2 <= self.top_k <= self.num_vectors, self, "top_k", f"from 2 to num_vectors={self.num_vectors}")
        base.require(self.bank_bound > 0, self, "bank_bound", "a positive number: a bank of zeros gets no gradient")
        base.require(self.logits_std >= 0, self, "logits_std", "at least 0")

    def check(self, sites: Sites) -> None:
        """Raises ValueError if the vectors do not tile the factors of every group."""
        length = self.vector_length
        for g in sites:
            if g.in_dim % length or g.out_dim % length:
                common = math.gcd(*(dim for each in sites for dim in (each.in_dim, each.out_dim)))
                near = min((n for n in range(1, common + 1) if common % n == 0), key=lambda n: abs(n - length))
                raise ValueError(
                    f"vblora.Spec: vector_length={length} does not divide in={g.in_dim} and out={g.out_dim} of "
                    f"{g.name}; nearest that divides those of all groups: {near}"
                )


def count(spec: Spec, sites: Sites) -> int:
    """Trained parameters: h · c + Σ L · r · h · (in + out) / c."""
    logits = sum(g.layers * spec.rank * (g.in_dim + g.out_dim) // spec.vector_length for g in sites)
    return spec.num_vectors * (spec.vector_length + logits)


def init(key: Array, spec: Spec, sites: Sites, weights: Any = None) -> tuple[dict, dict]:
    """The bank and the logits by group; nothing is frozen, `weights` is not read."""
    del weights
    spec.check(sites)
    bank_key, *keys = jax.random.split(key, 1 + 2 * len(sites))
    bound, shape = spec.bank_bound, (spec.num_vectors, spec.vector_length)
    params: dict[str, dict] = {SHARED: {"bank": jax.random.uniform(bank_key, shape, minval=-bound, maxval=bound)}}
    for g, a_key, b_key in zip(sites, keys[::2], keys[1::2], strict=True):
        params[g.name] = {
            name: spec.logits_std
            * jax.random.normal(key, (g.layers, spec.rank, dim // spec.vector_length, spec.num_vectors))
            for name, key, dim in (("logits_a", a_key, g.in_dim), ("logits_b", b_key, g.out_dim))
        }
    return params, {g.name: {} for g in sites}


def updates(params: Mapping, constants: Mapping, spec: Spec, sites: Sites) -> dict[str, LowRank]:
    """One `LowRank` a group: the bank expanded over its layers, once for the whole step."""
    bank = params[SHARED]["bank"]

    def factor(logits: Array) -> Array:
        weights, index = top_k(logits, spec)
        rows = jnp.einsum("lrnk,lrnkc->lrnc", weights, bank.at[index].get(mode="promise_in_bounds"))
        return rows.reshape(*rows.shape[:2], -1)

    return {
        g.name: LowRank(
            factor(params[g.name]["logits_a"]), factor(params[g.name]["logits_b"]), constants[g.name]["scale"]
        )
        for g in sites
    }


def top_k(logits: Array, spec: Spec) -> tuple[Array, Array]:
    """Weights of the chosen vectors, in falling order, and their indices: (..., h) -> (..., k) twice."""
    values, index = jax.lax.top_k(logits, spec.top_k)
    return jax.nn.softmax(values), index


def compact(params: Mapping, spec: Spec, sites: Sites) -> dict[str, dict[str, Array]]:
    """What a trained adapter needs stored: the bank, and for each sub-vector k indices and k - 1 weights.

    Returns:
        ``bank``, and by group ``index_a``, ``index_b`` (L, r, n, k) in the smallest integers that hold h, and
        ``weights_a``, ``weights_b`` (L, r, n, k-1): the weights but the largest, since they sum to 1.
    """
    small, stored = np.min_scalar_type(spec.num_vectors - 1), {SHARED: dict(params[SHARED])}
    for g in sites:
        stored[g.name] = {}
        for side in "ab":
            weights, index = top_k(params[g.name][f"logits_{side}"], spec)
            stored[g.name] |= {f"index_{side}": index.astype(small), f"weights_{side}": weights[..., 1:]}
    return stored


def expand(stored: Mapping, spec: Spec, sites: Sites) -> dict[str, dict[str, Array]]:
    """Trained arrays with the updates of a compact form; vectors not chosen get logits of -inf, so they stay out."""
    params = {SHARED: dict(stored[SHARED])}
    for g in sites:
        params[g.name] = {}
        for side in "ab":
            index, others = stored[g.name][f"index_{side}"], stored[g.name][f"weights_{side}"]
            weights = jnp.concatenate([1 - others.sum(axis=-1, keepdims=True), others], axis=-1)
            empty = jnp.full((*index.shape[:-1], spec.num_vectors), -jnp.inf)
            logits = jnp.put_along_axis(empty, index.astype(jnp.int32), jnp.log(weights), axis=-1, inplace=False)
            params[g.name][f"logits_{side}"] = logits
    return params
