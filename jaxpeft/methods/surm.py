"""SURM: structured unrestricted-rank matrices (Sehanobish et al., arXiv 2406.17740, NeurIPS 2024)."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array

from jaxpeft import spec as base
from jaxpeft import structured
from jaxpeft.methods.lora import uniform
from jaxpeft.sites import Group, Sites
from jaxpeft.structured import Chain, LowDisplacementRank
from jaxpeft.updates import Kronecker, Update

CARD = base.Card(
    title="SURM",
    formula="alpha · Sᵀ, S circulant, Toeplitz, Kronecker or of low displacement rank",
    parameters="2 · L · max(in, out) (circulant)",
    source="arXiv 2406.17740 §4–5",
    budget="rank",
)

PRODUCTS = {"circulant": "hadamard", "symmetric_toeplitz": "matmul", "toeplitz": "hadamard"}
"""The paper's product of each kind whose matrices have one vector."""


@dataclass(frozen=True, kw_only=True)
class Spec(base.Spec):
    """ΔW = alpha · Sᵀ, that is y = W0ᵀx + alpha · S x with a structured S, whose rank its parameters do not bound.

    Trained, float32, with n = max(in, out):

    - circulant: S = C(b ⊙ a), C(c)_ij = c_{(i-j) mod n}; ``a``, ``b`` (L, n);
    - symmetric_toeplitz: S = T(b)·T(a), T(t)_ij = t_|i-j|; ``a``, ``b`` (L, n);
    - toeplitz: S = T(b ⊙ a), T(t)_ij = t_{i-j}; ``a``, ``b`` (L, in + out - 1);
    - kronecker: S = (B ⊗ A) / r; ``a`` (L, r, in/r), ``b`` (L, out/r, r);
    - ldr: S = Σ_{i≤r} Z₁(g_i)·Z₋₁(h_i), circulant times skew-circulant; ``h``, ``g`` (L, r, n).

    Start: exactly one piece is zero, so ΔW = 0: b or g; without a second vector the trained scale, else a. The other:
    circulant a ~ N(0, 1), Toeplitz a and h ~ N(0, 0.02²), taking the paper's 0.02 for a standard deviation, Kronecker
    a ~ U(±1/√(in/r)). Parameters a weight: 2n for the first two kinds, 2 (in + out - 1), in + out, 2nr. Source: arXiv
    2406.17740 §4–5 and the code of its authors.

    Toeplitz and Kronecker matrices fit any weight. Circulant, symmetric Toeplitz and ldr matrices are square in the
    paper; where in ≠ out, ours are (n, n): x is padded with zeros and the first `out` results are kept. Ours as well:
    the blocks, and the products that the paper does not have, made the same way (its own are the forms above,
    ``hadamard`` of the second kind and ``single`` of the first).

    Attributes:
        kind: the structure of S.
        product: of the first three kinds, how S comes from its vectors: ``hadamard``, one matrix of b ⊙ a; ``matmul``,
            the matrix (out, n) of b times the matrix (n, in) of a, for toeplitz with ``a`` (L, in + n - 1) and ``b``
            (L, n + out - 1); ``single``, ``a`` alone. None is the form above.
        rank: r of kronecker, a divisor of in and out, best near √n; r of ldr; None for the other kinds.
        block: size of the blocks of a circulant S, which divides in and out: ``a``, ``b`` (L, in/block, out/block,
            block). None is one block.
        trainable_scale: a scalar ``s`` (L,) on top of alpha, from 1; from 0 with ``single``.
        path: ``fft`` computes x·ΔW by transforms, ``dense`` forms ΔW, ``auto`` takes the faster one for the size of the
            weight (`jaxpeft.structured.prefers_fft`, measured on a CPU). On a mesh take ``dense``: XLA does not
            partition an FFT, it gathers the operand on every device (docs/decisions/0006).

    Examples:
        >>> import jax, jax.numpy as jnp, jaxpeft
        >>> from jaxpeft.methods import surm
        >>> sites = jaxpeft.find({"q_proj": {"kernel": jnp.zeros((64, 64))}})
        >>> adapter = jaxpeft.init(jax.random.key(0), surm.Spec(kind="circulant"), sites)
        >>> {name: leaf.shape for name, leaf in adapter.params["q_proj/kernel"].items()}
        {'a': (1, 64), 'b': (1, 64)}
    """

    alpha: float = dataclasses.field(default=1.0, compare=False)
    kind: Literal["circulant", "symmetric_toeplitz", "toeplitz", "kronecker", "ldr"] = "circulant"
    product: Literal["hadamard", "matmul", "single"] | None = None
    rank: int | None = None
    block: int | None = None
    trainable_scale: bool = False
    path: structured.Path = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        kinds, products = (*PRODUCTS, "kronecker", "ldr"), (None, "hadamard", "matmul", "single")
        base.require(self.kind in kinds, self, "kind", f"one of {', '.join(kinds)}")
        base.require(self.product in products, self, "product", "hadamard, matmul, single, or None for the paper's")
        base.require(self.path in structured.PATHS, self, "path", f"one of {', '.join(structured.PATHS)}")
        if self.kind in PRODUCTS:
            base.require(self.rank is None, self, "rank", f"None: {self.kind} has no rank to choose")
        else:
            base.require(self.rank is not None and self.rank >= 1, self, "rank", f"at least 1 for {self.kind}")
            base.require(self.product is None, self, "product", f"None: {self.kind} has factors of its own")
        if self.kind == "kronecker":
            base.require(self.path == "auto", self, "path", "auto: a Kronecker product is applied piece by piece")
        if self.block is not None:
            base.require(self.kind == "circulant", self, "block", f"None: {self.kind} does not come in blocks")
            base.require(self.block >= 1, self, "block", "at least 1")
            base.require(self.product != "matmul", self, "product", "hadamard or single with blocks")

    @property
    def form(self) -> str | None:
        """The product, the paper's where none is given."""
        return self.product or PRODUCTS.get(self.kind)

    def materialized_rank(self, group: Group) -> int | None:  # noqa: D102
        del group
        return self.rank if self.kind == "kronecker" else None

    def shapes(self, group: Group) -> dict[str, tuple[int, ...]]:
        """Shapes of a layer's leaves, the zero one of two last; ValueError if the spec does not fit the group."""
        rows, columns, n = group.in_dim, group.out_dim, max(group.in_dim, group.out_dim)
        if self.rank is not None and self.kind == "ldr":
            return {"h": (self.rank, n), "g": (self.rank, n)}
        if self.rank is not None:
            base.require_divides(self, "rank", group)
            return {"a": (self.rank, rows // self.rank), "b": (columns // self.rank, self.rank)}
        a = b = (n,) if self.kind != "toeplitz" else (rows + columns - 1,)
        if self.block is not None:
            base.require_divides(self, "block", group)
            a = b = (rows // self.block, columns // self.block, self.block)
        if self.kind == "toeplitz" and self.form == "matmul":
            a, b = (rows + n - 1,), (n + columns - 1,)
        return {"a": a} if self.form == "single" else {"a": a, "b": b}


def count(spec: Spec, sites: Sites) -> int:
    """Trained parameters: Σ L · the leaves of the table, and Σ L more with a trained scale."""
    return sum(g.layers * (sum(map(math.prod, spec.shapes(g).values())) + spec.trainable_scale) for g in sites)


def init(key: Array, spec: Spec, sites: Sites, weights: Any = None) -> tuple[dict, dict]:
    """Trained arrays by group; none is frozen, and `weights` is not read."""
    del weights
    params = {}
    for g, group_key in zip(sites, jax.random.split(key, len(sites)), strict=True):
        leaves = {name: jnp.zeros((g.layers, *shape)) for name, shape in spec.shapes(g).items()}
        first, *others = leaves
        if others or spec.trainable_scale:
            shape = leaves[first].shape
            normal = jax.random.normal(group_key, shape) * (1.0 if spec.kind == "circulant" else 0.02)
            leaves[first] = uniform(group_key, shape, shape[-1]) if spec.kind == "kronecker" else normal
        if spec.trainable_scale:
            leaves["s"] = jnp.full(g.layers, 1.0 if others else 0.0)
        params[g.name] = leaves
    return params, {g.name: {} for g in sites}


def updates(params: Mapping, constants: Mapping, spec: Spec, sites: Sites) -> dict[str, Update]:
    """The structured update of every group, stacked over its layers."""
    return {g.name: _update(params[g.name], constants[g.name]["scale"], spec, g) for g in sites}


def _update(leaves: Mapping, scale: Array, spec: Spec, group: Group) -> Update:
    rows, columns, n = group.in_dim, group.out_dim, max(group.in_dim, group.out_dim)
    scale = scale * leaves["s"] if spec.trainable_scale else scale
    scaled = functools.partial(jax.vmap(jnp.multiply), scale)
    if spec.kind == "kronecker":
        return Kronecker((jnp.swapaxes(leaves["b"], 1, 2), jnp.swapaxes(leaves["a"], 1, 2)), scale)
    if spec.kind == "ldr":
        update = LowDisplacementRank(scaled(leaves["g"]), leaves["h"], rows, columns)
    else:
        whole = spec.kind == "circulant" and spec.block is None
        a, b = (vector[:, None, None] if whole else vector for vector in (leaves["a"], leaves.get("b", leaves["a"])))
        if spec.form == "matmul":
            first = structured.of_vector(spec.kind, a, rows, n)
            update = Chain(first, structured.of_vector(spec.kind, scaled(b), n, columns))
        else:
            vector = scaled(a if spec.form == "single" else a * b)
            update = structured.of_vector(spec.kind, vector, rows, columns)
    return structured.by_path(spec.path, update, rows, columns)
