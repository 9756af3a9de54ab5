"""BeamLoRA: the ranks of a LoRA as the beams of a search (Gu et al., arXiv 2502.13604, ACL 2025)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxpeft import spec as base
from jaxpeft.methods import gated
from jaxpeft.methods.gated import count
from jaxpeft.methods.lora import uniform
from jaxpeft.sites import Group, Sites
from jaxpeft.updates import LowRank

__all__ = ["CARD", "Spec", "count", "init", "updates"]

CARD = base.Card(
    title="BeamLoRA",
    formula="(alpha / r) · aᵀ diag(r · softmax(gate / temperature)) b",
    parameters="L · r · (in + out + 1)",
    source="arXiv 2502.13604 §3",
    budget="rank",
)


@dataclass(frozen=True, kw_only=True)
class Spec(gated.Spec):
    """ΔW = (alpha / r) · aᵀ diag(r · softmax(gate / temperature)) b: the ranks of a weight compete.

    Trained: ``a`` (L, r, in), ``b`` (L, r, out), ``gate`` (L, r), float32. Start: a ~ U(±1/√in), b = 0, all gates
    equal, so ΔW = 0 and every rank counts once. They are one where the authors' are zero: a softmax knows differences
    only, and the zero factor, which moves first, is b. Parameters: L · r · (in + out + 1) a group. Source:
    arXiv 2502.13604 §3 and its authors' code.

    `jaxpeft.allocate.beamlora` replaces the ranks of least weight with copies of the best while it trains.

    Attributes:
        rank: r, the beams of every weight.
        temperature: of the softmax; the authors use 0.05, and 0.03 for learning rates below 1e-4.

    Examples:
        >>> import jax, jax.numpy as jnp, jaxpeft
        >>> from jaxpeft.methods import beamlora
        >>> sites = jaxpeft.find({"q_proj": {"kernel": jnp.zeros((64, 32))}})
        >>> adapter = jaxpeft.init(jax.random.key(0), beamlora.Spec(rank=4), sites)
        >>> beamlora.importance(adapter.params["q_proj/kernel"]["gate"], 0.05).tolist()
        [[1.0, 1.0, 1.0, 1.0]]
    """

    temperature: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        base.require(self.temperature > 0, self, "temperature", "a positive number")


def init(key: Array, spec: Spec, sites: Sites, weights: Any = None) -> tuple[dict, dict]:
    """Trained and frozen arrays by group; `weights` is not read."""
    del weights

    def draw(key: Array, group: Group) -> dict[str, Array]:
        return {
            "a": uniform(key, (group.layers, spec.rank, group.in_dim), group.in_dim),
            "b": jnp.zeros((group.layers, spec.rank, group.out_dim)),
            "gate": jnp.ones((group.layers, spec.rank)),
        }

    return gated.start(key, sites, draw)


def updates(params: Mapping, constants: Mapping, spec: Spec, sites: Sites) -> dict[str, LowRank]:
    """One `LowRank` a group, stacked over its layers."""
    return {
        g.name: gated.gated(
            params[g.name], importance(params[g.name]["gate"], spec.temperature), constants[g.name]["scale"]
        )
        for g in sites
    }


def importance(gate: Array, temperature: float) -> Array:
    """What every rank counts, r · softmax(gate / temperature), (L, r); one on average."""
    return gate.shape[-1] * jax.nn.softmax(gate / temperature)
