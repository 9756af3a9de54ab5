"""FourierFT: fine-tuning with the discrete Fourier transform (Gao et al., arXiv 2405.03003, ICML 2024)."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxpeft import spec as base
from jaxpeft.sites import Group, Sites
from jaxpeft.updates import Update

CARD = base.Card(
    title="FourierFT",
    formula="alpha · Re(IFFT2(F)), F zero but at n places",
    parameters="L · n",
    source="arXiv 2405.03003 §3.1",
    budget="n_frequency",
    shared="the places of the coefficients, frozen, the same in all weights of one size",
    zero_start=False,
)


@dataclass(frozen=True, kw_only=True)
class Spec(base.Spec):
    """ΔW = alpha · Re(IFFT2(F)), with an (in, out) matrix F of spectral coefficients that is zero but at n places.

    Trained: ``c`` (L, n), float32. Frozen: ``entries`` (2, n), the places (frequency along in, along out), drawn
    without replacement and the same for all layers, and for all groups of the same in and out. IFFT2 divides by
    in · out, as in the paper's Algorithm 1 (its Eq. 3 leaves that out).

    Start: c ~ N(0, 1), so ΔW ≠ 0: the paper's text and Algorithm 1, and the default of its authors' code in Hugging
    Face PEFT, whose other choice is ``zeros``, ΔW = 0. Parameters: L · n a group. Source: arXiv 2405.03003 §3.1.

    Attributes:
        alpha: the paper's scaling, which it tunes: 300 in Algorithm 1, 100 to 150 on GLUE.
        n_frequency: n.
        init: ``normal`` or ``zeros``.

    Examples:
        >>> import jax, jax.numpy as jnp, jaxpeft
        >>> from jaxpeft.methods import fourierft
        >>> sites = jaxpeft.find({"q_proj": {"kernel": jnp.zeros((64, 32))}})
        >>> adapter = jaxpeft.init(jax.random.key(0), fourierft.Spec(n_frequency=100), sites)
        >>> adapter.params["q_proj/kernel"]["c"].shape, adapter.constants["q_proj/kernel"]["entries"].shape
        ((1, 100), (2, 100))
    """

    alpha: float = dataclasses.field(default=300.0, compare=False)
    n_frequency: int = 1000
    init: Literal["normal", "zeros"] = "normal"

    def __post_init__(self) -> None:
        super().__post_init__()
        base.require(self.n_frequency >= 1, self, "n_frequency", "at least 1")
        base.require(self.init in ("normal", "zeros"), self, "init", "normal or zeros")

    def check(self, group: Group) -> None:
        """Raises ValueError if a group has fewer frequencies than the spec asks for."""
        if self.n_frequency > (size := group.in_dim * group.out_dim):
            raise ValueError(
                f"fourierft.Spec: n_frequency={self.n_frequency} exceeds the {group.in_dim} · {group.out_dim} "
                f"frequencies of {group.name}; largest that fits: {size}"
            )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Spectrum(Update):
    """ΔW = scale · Re(IFFT2(F)), F[entries] = c.

    Attributes:
        c: (..., n)
        entries: (..., 2, n) integers; one layer names no place twice, unless its c is zero.
        scale: (...)
        in_dim: in.
        out_dim: out.
    """

    formed: ClassVar[bool] = True

    c: Array
    entries: Array
    scale: Array
    in_dim: int = dataclasses.field(metadata={"static": True})
    out_dim: int = dataclasses.field(metadata={"static": True})

    def delta(self) -> Array:  # noqa: D102
        spectrum = jnp.zeros((self.in_dim, self.out_dim)).at[self.entries[0], self.entries[1]].add(self.c)
        return jnp.fft.ifft2(spectrum).real * self.scale


def count(spec: Spec, sites: Sites) -> int:
    """Trained parameters: Σ L · n."""
    return sum(g.layers * spec.n_frequency for g in sites)


def init(key: Array, spec: Spec, sites: Sites, weights: Any = None) -> tuple[dict, dict]:
    """Coefficients by group (trained) and their places (frozen); `weights` is not read."""
    del weights
    params, constants, tables = {}, {}, {}
    entries_key, *keys = jax.random.split(key, 1 + len(sites))
    for g, group_key in zip(sites, keys, strict=True):
        spec.check(g)
        dims = g.in_dim, g.out_dim
        if dims not in tables:
            own_key = jax.random.fold_in(entries_key, len(tables))
            places = jax.random.choice(own_key, g.in_dim * g.out_dim, (spec.n_frequency,), replace=False)
            tables[dims] = jnp.stack(jnp.divmod(places, g.out_dim)).astype(jnp.int32)
        shape = g.layers, spec.n_frequency
        params[g.name] = {"c": jnp.zeros(shape) if spec.init == "zeros" else jax.random.normal(group_key, shape)}
        constants[g.name] = {"entries": tables[dims]}
    return params, constants


def updates(params: Mapping, constants: Mapping, spec: Spec, sites: Sites) -> dict[str, Spectrum]:
    """One `Spectrum` a group, stacked over its layers."""
    del spec
    made = {}
    for g in sites:
        entries = constants[g.name]["entries"]
        made[g.name] = Spectrum(params[g.name]["c"], entries[None], constants[g.name]["scale"], g.in_dim, g.out_dim)
    return made


def check_constants(constants: Mapping, spec: Spec, sites: Sites) -> None:
    """Raises ValueError if a place lies outside the spectrum or is named twice."""
    for g in sites:
        rows, columns = np.asarray(constants[g.name]["entries"])
        inside = (rows >= 0) & (rows < g.in_dim) & (columns >= 0) & (columns < g.out_dim)
        if not inside.all():
            raise ValueError(f"{g.name}/entries: places leave the spectrum of {g.in_dim} by {g.out_dim}")
        if len(np.unique(rows.astype(np.int64) * g.out_dim + columns)) != spec.n_frequency:
            raise ValueError(f"{g.name}/entries: expected {spec.n_frequency} different places")
