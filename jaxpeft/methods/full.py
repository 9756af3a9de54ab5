"""Full fine-tuning of the selected weights: heads, norms, biases, or a whole model to compare with."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import Array

from jaxpeft import spec as base
from jaxpeft.sites import Sites
from jaxpeft.updates import Dense

CARD = base.Card(
    title="full fine-tuning",
    formula="w, one number for each of the weight",
    parameters="L · in · out",
    source="PEFT's `modules_to_save`; BitFit (arXiv 2106.10199) on biases alone",
    budget="",
    vectors=True,
)


@dataclass(frozen=True, kw_only=True)
class Spec(base.Spec):
    """ΔW = alpha · w: the weight is trained whole, as the difference from the frozen one.

    Trained: ``w`` (L, in, out), float32, zero at the start. Biases and a norm's scale are weights with in = 1. With
    `jaxpeft.methods.mixed` it trains some weights whole next to another method on the rest.

    Examples:
        >>> import jax, jax.numpy as jnp, jaxpeft
        >>> from jaxpeft.methods import full
        >>> sites = jaxpeft.find({"norm": {"scale": jnp.ones(64)}, "head": {"bias": jnp.zeros(3)}}, ".*")
        >>> jaxpeft.count(jaxpeft.init(jax.random.key(0), full.Spec(), sites))
        67
    """

    alpha: float = dataclasses.field(default=1.0, compare=False)


def count(spec: Spec, sites: Sites) -> int:
    """Trained parameters: Σ L · in · out."""
    del spec
    return sites.size


def init(key: Array, spec: Spec, sites: Sites, weights: Any = None) -> tuple[dict, dict]:
    """Differences by group, zero; `key` and `weights` are not read."""
    del key, spec, weights
    return {g.name: {"w": jnp.zeros((g.layers, g.in_dim, g.out_dim))} for g in sites}, {g.name: {} for g in sites}


def updates(params: Mapping, constants: Mapping, spec: Spec, sites: Sites) -> dict[str, Dense]:
    """One `Dense` a group."""
    del spec
    return {g.name: Dense(params[g.name]["w"], constants[g.name]["scale"]) for g in sites}
