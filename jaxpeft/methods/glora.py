"""GLoRA: generalized LoRA (Chavan et al., arXiv 2306.07967)."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import jax
import jax.numpy as jnp
from jax import Array

from jaxpeft import spec as base
from jaxpeft.methods.ia3 import rescale
from jaxpeft.methods.lora import uniform
from jaxpeft.sites import Group, Sites
from jaxpeft.updates import Base, LowRank, Update

CARD = base.Card(
    title="GLoRA",
    formula="alpha · (W0 * A + B), A and B each low-rank, a vector, a scalar or absent",
    parameters="2 · L · r · (in + out) with both low-rank",
    source="arXiv 2306.07967 §3",
    budget="rank",
)

Path = Literal["lora", "vector", "scalar", "none"]


@dataclass(frozen=True, kw_only=True)
class Spec(base.Spec):
    """W' = W0 + alpha · (W0 * A + B), for each of A and B one of four paths.

    Trained, float32, for a path A (B likewise): low-rank A = a_inᵀ a_out from ``a_in`` (L, r, in) and ``a_out``
    (L, r, out); a vector over the outputs, ``a_out`` (L, 1, out), the same for every input; a scalar, ``a_out``
    (L, 1, 1); or nothing. Start: a_in ~ U(±1/√in), a_out = 0, so ΔW = 0. Parameters: L · r · (in + out), L · out or L
    for each path. Source: arXiv 2306.07967 §3, PEFT's start; alpha = 1 is the paper's.

    A vector or scalar A rescales the outputs, and nothing is formed. A low-rank A would cost r products with W0 without
    forming it, so W0 * A is formed. With A = "none" this is LoRA, and the paths B = "vector" and "scalar" have rank 1.

    The paper's paths C, D, E act on the bias, b0 + D * b0 + E + C · W0. They are not here: an update is of one weight.
    Their sum is a free vector, so training the bias itself reaches every b' that they reach. Neither is the paper's
    evolutionary search over the paths of each layer.

    Attributes:
        rank: r of the low-rank paths.
        a: path of the multiplier A.
        b: path of the addend B.

    Examples:
        >>> import jax, jax.numpy as jnp, jaxpeft
        >>> from jaxpeft.methods import glora
        >>> sites = jaxpeft.find({"q_proj": {"kernel": jnp.zeros((64, 32))}})
        >>> adapter = jaxpeft.init(jax.random.key(0), glora.Spec(rank=4, a="vector"), sites)
        >>> {name: leaf.shape for name, leaf in adapter.params["q_proj/kernel"].items()}
        {'a_out': (1, 1, 32), 'b_in': (1, 4, 64), 'b_out': (1, 4, 32)}
    """

    alpha: float = dataclasses.field(default=1.0, compare=False)
    rank: int
    a: Path = "lora"
    b: Path = "lora"

    def __post_init__(self) -> None:
        super().__post_init__()
        base.require(self.rank >= 1, self, "rank", "at least 1")
        for name in ("a", "b"):
            base.require(getattr(self, name) in get_args(Path), self, name, f"one of {', '.join(get_args(Path))}")
        base.require((self.a, self.b) != ("none", "none"), self, "a", "a path, if b is none")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Scaled(Update):
    """W' = W0 · diag(1 + gain) + addend.

    Attributes:
        gain: (..., out)
        addend: an additive update, or None.
    """

    additive: ClassVar[bool] = False
    axes: ClassVar[Mapping[str, str]] = {"gain": "o", "addend": "io"}

    gain: Array
    addend: LowRank | None

    def materialize(self, weight: Array) -> Array:  # noqa: D102
        scaled = weight * (1 + self.gain)
        return scaled if self.addend is None else scaled + self.addend.delta()

    def matmul(self, x: Array, base: Base) -> Array:  # noqa: D102
        y = rescale(base.dot(x), self.gain)
        return y if self.addend is None else y + self.addend.delta_matmul(x).astype(y.dtype)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Modulated(Update):
    """W' = W0 * (1 + multiplier) + addend, formed: without, W0 would be multiplied once for every rank.

    Attributes:
        multiplier: what W0 is multiplied by, element by element, minus one.
        addend: an additive update, or None.
    """

    additive: ClassVar[bool] = False
    formed: ClassVar[bool] = True
    axes: ClassVar[Mapping[str, str]] = {"multiplier": "io", "addend": "io"}

    multiplier: LowRank
    addend: LowRank | None = None

    def change(self, weight: Array) -> Array:
        """W' - W0, float32."""
        change = weight * self.multiplier.delta()
        return change if self.addend is None else change + self.addend.delta()

    def materialize(self, weight: Array) -> Array:  # noqa: D102
        return weight + self.change(weight)

    def matmul(self, x: Array, base: Base) -> Array:  # noqa: D102
        y = base.dot(x)
        return y + (x @ self.change(base.weight).astype(x.dtype)).astype(y.dtype)


def shapes(spec: Spec, group: Group) -> dict[str, tuple[int, int]]:
    """Shape of every leaf of one layer, by name."""
    found = {}
    for name, path in (("a", spec.a), ("b", spec.b)):
        if path == "lora":
            found[f"{name}_in"] = (spec.rank, group.in_dim)
        if path != "none":
            rank = spec.rank if path == "lora" else 1
            found[f"{name}_out"] = (rank, 1 if path == "scalar" else group.out_dim)
    return found


def count(spec: Spec, sites: Sites) -> int:
    """Trained parameters: Σ over both paths of L · r · (in + out), L · out, L or 0."""
    return sum(g.layers * math.prod(shape) for g in sites for shape in shapes(spec, g).values())


def init(key: Array, spec: Spec, sites: Sites, weights: Any = None) -> tuple[dict, dict]:
    """Trained arrays by group; `weights` is not read, and nothing is frozen."""
    del weights
    params = {}
    for g, group_key in zip(sites, jax.random.split(key, len(sites)), strict=True):
        keys = dict(zip(("a_in", "b_in"), jax.random.split(group_key), strict=True))
        params[g.name] = {
            name: uniform(keys[name], (g.layers, *shape), g.in_dim) if name in keys else jnp.zeros((g.layers, *shape))
            for name, shape in shapes(spec, g).items()
        }
    return params, {g.name: {} for g in sites}


def updates(params: Mapping, constants: Mapping, spec: Spec, sites: Sites) -> dict[str, Update]:
    """A `LowRank`, `Scaled` or `Modulated` a group, by the path of A."""
    found: dict[str, Update] = {}
    for g in sites:
        scale = constants[g.name]["scale"]
        a, b = (low_rank(params[g.name], name, scale, g) for name in ("a", "b"))
        if a is None:
            assert b is not None
            found[g.name] = b
        elif spec.a == "lora":
            found[g.name] = Modulated(a, b)
        else:
            found[g.name] = Scaled(a.b[:, 0] * scale[:, None], b)
    return found


def low_rank(trained: Mapping, name: str, scale: Array, group: Group) -> LowRank | None:
    """A path as a low-rank matrix: vectors and scalars are the same for every input."""
    if f"{name}_out" not in trained:
        return None
    out = trained[f"{name}_out"]
    ins = trained.get(f"{name}_in", jnp.ones((group.layers, 1, group.in_dim)))
    return LowRank(ins, jnp.broadcast_to(out, (*out.shape[:2], group.out_dim)), scale)
