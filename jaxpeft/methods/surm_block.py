"""SURM's adapter form: a structured matrix and a non-linearity behind a block (Sehanobish et al., arXiv 2406.17740)."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax.numpy as jnp
from jax import Array

from jaxpeft import spec as base
from jaxpeft.methods import surm
from jaxpeft.sites import Group, Sites
from jaxpeft.updates import Block

CARD = base.Card(
    title="SURM, adapter form",
    formula="none: h' = h + σ(alpha · S h) + β on the output h of a layer",
    parameters="3 · L · out (circulant)",
    source="arXiv 2406.17740 §4–5",
    budget="rank",
    mergeable=False,
    scaled=False,
    vectors=True,
)


@dataclass(frozen=True, kw_only=True)
class Spec(surm.Spec):
    """h' = h + σ(alpha · S·h) + β on a layer's output h, with the S of `jaxpeft.methods.surm`; no bottleneck.

    The paper puts it behind the attention and behind the feed-forward layer of every block, before the residual sum.
    The sites are the last weights before that sum: the kernels of the two output projections, or their biases if they
    have some (select the biases then: the kernel's output is not yet the layer's). Any model of any style will do, as
    the layer is known by its weight.

    Trained, float32: S's leaves for (out, out) weights, and ``bias`` (L, out), which is added after the non-linearity.
    Start: S = 0 and β = 0, the identity. Parameters: those of S and L · out a group. A non-linearity lies between the
    weight and the result, so there is no ΔW, and merging is an error. Source: arXiv 2406.17740 §4–5; the bias is that
    of its authors' code.

    Attributes:
        activation: σ, ``gelu`` in the paper, or any other of these with σ(0) = 0.

    Examples:
        >>> import jax, jax.numpy as jnp, jaxpeft
        >>> from jaxpeft.methods import surm_block
        >>> params = {"attention": {"o_proj": {"kernel": jnp.zeros((64, 32))}}}
        >>> adapter = jaxpeft.init(jax.random.key(0), surm_block.Spec(), jaxpeft.find(params))
        >>> jaxpeft.count(adapter) == 3 * 32
        True
    """

    activation: Literal["gelu", "relu", "silu", "identity"] = "gelu"

    def __post_init__(self) -> None:
        super().__post_init__()
        known = ("gelu", "relu", "silu", "identity")
        base.require(self.activation in known, self, "activation", f"one of {', '.join(known)}")
        base.require(self.dropout_on == "input", self, "dropout_on", "input: the adapter has no other place for it")

    def scale(self, group: Group) -> float:  # noqa: D102
        return super().scale(_squares(Sites((group,))).groups[0])


def _squares(sites: Sites) -> Sites:
    """Sites of the matrices S: square, as wide as a layer's output."""
    squares = [
        dataclasses.replace(g, paths=(g.name,), shape=(g.layers, g.out_dim, g.out_dim), layout="lio", entries=None)
        for g in sites
    ]
    return Sites(tuple(squares))


def count(spec: Spec, sites: Sites) -> int:
    """Trained parameters: those of S, and Σ L · out for the biases."""
    return surm.count(spec, _squares(sites)) + sum(g.layers * g.out_dim for g in sites)


def init(key: Array, spec: Spec, sites: Sites, weights: Any = None) -> tuple[dict, dict]:
    """S's arrays and a bias by group, trained; `weights` is not read."""
    params, constants = surm.init(key, spec, _squares(sites), weights)
    for g in sites:
        params[g.name]["bias"] = jnp.zeros((g.layers, g.out_dim))
    return params, constants


def updates(params: Mapping, constants: Mapping, spec: Spec, sites: Sites) -> dict[str, Block]:
    """One `Block` a group."""
    structured = surm.updates(params, constants, spec, _squares(sites))
    return {g.name: Block(structured[g.name], params[g.name]["bias"], spec.activation) for g in sites}
