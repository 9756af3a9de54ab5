"""C3A: circular convolution adaptation (Chen et al., arXiv 2407.19342, ACL 2025)."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array

from jaxpeft import spec as base
from jaxpeft import structured
from jaxpeft.sites import Sites
from jaxpeft.structured import Circulant
from jaxpeft.updates import Update

CARD = base.Card(
    title="C3A",
    formula="(alpha / in) · Cᵀ, C of circulant blocks",
    parameters="L · in · out / b",
    source="arXiv 2407.19342 §3.2–3.4",
    budget="",
    zero_start=False,
)

INITS = ("xavier_uniform", "kaiming_uniform", "gaussian", "zeros")


@dataclass(frozen=True, kw_only=True)
class Spec(base.Spec):
    """ΔW = (alpha / in) · Cᵀ, with C (out, in) of blocks of size b, each circulant: C_qp[i, j] = w_qp[(j - i) mod b].

    Trained: ``w`` (L, out/b, in/b, b), float32: the first rows of the blocks. Parameters: L · in · out / b a group,
    fewer for larger b; b = in = out is one circulant. Each block is the transpose of a circulant of `surm`.

    Start: Xavier-uniform by default, w ~ U(±√(6 / (in + out))), so ΔW ≠ 0. The paper (§4.3) compares the four and finds
    no difference beyond the noise between runs; the default is that of its authors' code in Hugging Face PEFT, and so
    is the division by in, which the paper does not write. Source: arXiv 2407.19342 §3.2–3.4.

    Attributes:
        block_size: b, a divisor of in and out, at best their greatest.
        init: ``xavier_uniform``; ``kaiming_uniform``, U(±1/√in); ``gaussian``, N(0, 1); or ``zeros``, ΔW = 0.
        path: as in `surm.Spec`.

    Examples:
        >>> import jax, jax.numpy as jnp, jaxpeft
        >>> from jaxpeft.methods import c3a
        >>> sites = jaxpeft.find({"q_proj": {"kernel": jnp.zeros((64, 32))}})
        >>> adapter = jaxpeft.init(jax.random.key(0), c3a.Spec(block_size=16), sites)
        >>> adapter.params["q_proj/kernel"]["w"].shape
        (1, 2, 4, 16)
    """

    alpha: float = dataclasses.field(default=1.0, compare=False)
    block_size: int
    init: Literal["xavier_uniform", "kaiming_uniform", "gaussian", "zeros"] = "xavier_uniform"
    path: structured.Path = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        base.require(self.block_size >= 1, self, "block_size", "at least 1")
        base.require(self.init in INITS, self, "init", f"one of {', '.join(INITS)}")
        base.require(self.path in structured.PATHS, self, "path", f"one of {', '.join(structured.PATHS)}")


def count(spec: Spec, sites: Sites) -> int:
    """Trained parameters: Σ L · in · out / b."""
    return sum(g.layers * g.in_dim * g.out_dim // spec.block_size for g in sites)


def init(key: Array, spec: Spec, sites: Sites, weights: Any = None) -> tuple[dict, dict]:
    """Kernels of the convolutions by group; none is frozen, and `weights` is not read."""
    del weights
    params = {}
    for g, group_key in zip(sites, jax.random.split(key, len(sites)), strict=True):
        base.require_divides(spec, "block_size", g)
        shape = (g.layers, g.out_dim // spec.block_size, g.in_dim // spec.block_size, spec.block_size)
        if spec.init == "zeros":
            w = jnp.zeros(shape)
        elif spec.init == "gaussian":
            w = jax.random.normal(group_key, shape)
        else:
            bound = math.sqrt(6 / (g.in_dim + g.out_dim)) if spec.init == "xavier_uniform" else 1 / math.sqrt(g.in_dim)
            w = jax.random.uniform(group_key, shape, minval=-bound, maxval=bound)
        params[g.name] = {"w": w}
    return params, {g.name: {} for g in sites}


def updates(params: Mapping, constants: Mapping, spec: Spec, sites: Sites) -> dict[str, Update]:
    """One `Circulant` of many blocks a group, stacked over its layers."""
    made = {}
    for g in sites:
        w = params[g.name]["w"] * (constants[g.name]["scale"] / g.in_dim)[:, None, None, None]
        # A circulant is known here by its first row, there by its first column: that row backwards, but for its start.
        first_columns = jnp.roll(jnp.flip(jnp.swapaxes(w, 1, 2), -1), 1, -1)
        made[g.name] = structured.by_path(spec.path, Circulant(first_columns, g.in_dim, g.out_dim), g.in_dim, g.out_dim)
    return made
