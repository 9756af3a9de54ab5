"""(IA)³: infused adapter by inhibiting and amplifying inner activations (Liu et al., arXiv 2205.05638)."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from jax import Array

from jaxpeft import spec as base
from jaxpeft.sites import Group, Sites
from jaxpeft.updates import Base, Update

CARD = base.Card(
    title="(IA)³",
    formula="W0 · diag(alpha · g); on the input diag(alpha · g) · W0",
    parameters="L · out; on the input L · in",
    source="arXiv 2205.05638 §3.3",
    budget="",
)


@dataclass(frozen=True, kw_only=True)
class Spec(base.Spec):
    """W' = W0 · diag(1 + alpha · g): every output of a weight, or every input, is rescaled.

    Trained: ``g`` (L, out), or (L, in) with `on="input"`, float32: the paper's multiplier l minus one. Start: g = 0,
    the paper's l = 1. Parameters: L · out, or L · in, a group. Source: arXiv 2205.05638 §3.3; alpha = 1 is the paper's.

    The paper rescales the outputs of the keys and values and the hidden activation of the feed-forward network, which
    is the input of its second weight (PEFT's ``feedforward_modules``): two adapters, applied together as a list. Only
    the kernel is rescaled; where the layer has a bias, PEFT rescales it by l too.

    The Hadamard Adapter (Chen et al., arXiv 2407.11033), A' = w * A + b on the self-attention's output A, initially
    w = 1, b = 0, is this method on the attention's output projection with 1 + g = w, together with that projection's
    bias trained as it is: `on="input"` if A is the heads' output, and the free bias then holds b · W0; `on="output"` if
    A is what the projection gives, and it holds b and w * bias. What we could read about the paper, secondary accounts,
    does not settle which: they write A as the heads side by side, and place the adapter right before the norm.

    Attributes:
        on: what is rescaled, "output" or "input".

    Examples:
        >>> import jax, jax.numpy as jnp, jaxpeft
        >>> from jaxpeft.methods import ia3
        >>> sites = jaxpeft.find({"v_proj": {"kernel": jnp.zeros((64, 32))}})
        >>> adapter = jaxpeft.init(jax.random.key(0), ia3.Spec(), sites)
        >>> {name: leaf.shape for name, leaf in adapter.params["v_proj/kernel"].items()}
        {'g': (1, 32)}
    """

    alpha: float = dataclasses.field(default=1.0, compare=False)
    on: Literal["output", "input"] = "output"

    def __post_init__(self) -> None:
        super().__post_init__()
        base.require(self.on in ("output", "input"), self, "on", "output or input")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rescaled(Update):
    """W' = W0 · diag(1 + gain), or diag(1 + gain) · W0.

    Attributes:
        gain: (..., out), or (..., in) on the input.
        on: "output" or "input".
    """

    additive: ClassVar[bool] = False

    gain: Array
    on: str = dataclasses.field(metadata={"static": True})

    def materialize(self, weight: Array) -> Array:  # noqa: D102
        return weight * (1 + (self.gain if self.on == "output" else self.gain[:, None]))

    def matmul(self, x: Array, base: Base) -> Array:  # noqa: D102
        return rescale(base.dot(x), self.gain) if self.on == "output" else base.dot(rescale(x, self.gain))


def rescale(values: Array, gain: Array) -> Array:
    """Values · (1 + gain) over the last axis; the product is float32, because 1 + gain has few bits left in less."""
    return (values * (1 + gain)).astype(values.dtype)


def width(spec: Spec, group: Group) -> int:
    """Features that are rescaled in one layer."""
    return group.out_dim if spec.on == "output" else group.in_dim


def count(spec: Spec, sites: Sites) -> int:
    """Trained parameters: Σ L · out, or Σ L · in."""
    return sum(g.layers * width(spec, g) for g in sites)


def init(key: Array, spec: Spec, sites: Sites, weights: Any = None) -> tuple[dict, dict]:
    """Trained arrays by group; neither `key` nor `weights` is read, and nothing is frozen."""
    del key, weights
    return {g.name: {"g": jnp.zeros((g.layers, width(spec, g)))} for g in sites}, {g.name: {} for g in sites}


def updates(params: Mapping, constants: Mapping, spec: Spec, sites: Sites) -> dict[str, Rescaled]:
    """One `Rescaled` a group, stacked over its layers."""
    return {g.name: Rescaled(params[g.name]["g"] * constants[g.name]["scale"][:, None], spec.on) for g in sites}
