"""Tied-LoRA: one pair of factors, scaled in every layer (Renduchintala et al., arXiv 2311.09578, NAACL 2024)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxpeft import spec as base
from jaxpeft.methods.lora import uniform
from jaxpeft.methods.vera import ScaledLowRank
from jaxpeft.sites import Group, Sites

CARD = base.Card(
    title="Tied-LoRA",
    formula="(alpha / r) · aᵀ diag(u) b diag(v), a and b tied over layers",
    parameters="r · (in + out) + L · (r + out)",
    source="arXiv 2311.09578 §3",
    budget="rank",
    shared="a and b by all layers of a group",
)


@dataclass(frozen=True, kw_only=True)
class Spec(base.Spec):
    """ΔW = (alpha / r) · aᵀ diag(u) b diag(v), with a and b tied over the layers of a group.

    ``a`` (r, in), ``b`` (r, out), ``u`` (L, r), ``v`` (L, out), float32; those in `trained` are trained, the others
    frozen. Start: a ~ U(±1/√in), b ~ U(±1/√r), u = v = 1, but the first of b, v, u, a that is trained is 0, so ΔW = 0.
    Parameters: r · (in + out) + L · (r + out) a group, less what is frozen. Source: arXiv 2311.09578 §3.

    The paper compares configurations TL1 to TL6 of what is trained. The default, all four, is TL6, its best; we could
    not check its table of the other five, so settings are chosen by what they train, not by those names. The paper ties
    over the layers of one fused query-key-value projection; tying within each group, and the start of what is frozen,
    are our reading. Two settings are methods of their own: `trained="ab"` is ShareLoRA with both factors shared, and
    `trained="uv"` is VeRA with a pair for each group.

    Attributes:
        rank: r.
        trained: the trained pieces, letters of "abuv" in that order.

    Examples:
        >>> import jax, jax.numpy as jnp, jaxpeft
        >>> from jaxpeft.methods import tiedlora
        >>> sites = jaxpeft.find({"layers": {"qkv": {"kernel": jnp.zeros((6, 16, 48))}}}, layouts={".*": "lio"})
        >>> adapter = jaxpeft.init(jax.random.key(0), tiedlora.Spec(rank=4), sites)
        >>> {name: leaf.shape for name, leaf in adapter.params["layers/qkv/kernel"].items()}
        {'a': (4, 16), 'b': (4, 48), 'u': (6, 4), 'v': (6, 48)}
    """

    rank: int
    trained: str = "abuv"

    def __post_init__(self) -> None:
        super().__post_init__()
        base.require(self.rank >= 1, self, "rank", "at least 1")
        nearest = "".join(letter for letter in "abuv" if letter in self.trained) or "abuv"
        base.require(self.trained == nearest, self, "trained", f"letters of 'abuv' in that order, e.g. {nearest!r}")

    def materialized_rank(self, group: Group) -> int:  # noqa: D102
        del group
        return self.rank

    def shapes(self, group: Group) -> dict[str, tuple[int, ...]]:
        """The shape of every piece of a group."""
        layers, rank = group.layers, self.rank
        return {
            "a": (rank, group.in_dim),
            "b": (rank, group.out_dim),
            "u": (layers, rank),
            "v": (layers, group.out_dim),
        }


def count(spec: Spec, sites: Sites) -> int:
    """Trained parameters: Σ r · (in + out) + L · (r + out), less what is frozen."""
    return sum(
        rows * columns for g in sites for name, (rows, columns) in spec.shapes(g).items() if name in spec.trained
    )


def init(key: Array, spec: Spec, sites: Sites, weights: Any = None) -> tuple[dict, dict]:
    """Trained and frozen pieces by group; `weights` is not read."""
    del weights
    params, constants = {}, {}
    zero = next(name for name in "bvua" if name in spec.trained)
    for g, group_key in zip(sites, jax.random.split(key, len(sites)), strict=True):
        a_key, b_key = jax.random.split(group_key)
        shapes = spec.shapes(g)
        pieces = {
            "a": uniform(a_key, shapes["a"], g.in_dim),
            "b": uniform(b_key, shapes["b"], spec.rank),
            "u": jnp.ones(shapes["u"]),
            "v": jnp.ones(shapes["v"]),
        }
        pieces[zero] = jnp.zeros(shapes[zero])
        params[g.name] = {name: piece for name, piece in pieces.items() if name in spec.trained}
        constants[g.name] = {name: piece for name, piece in pieces.items() if name not in spec.trained}
    return params, constants


def updates(params: Mapping, constants: Mapping, spec: Spec, sites: Sites) -> dict[str, ScaledLowRank]:
    """One `ScaledLowRank` a group, the tied pair serving all its layers."""
    made = {}
    for g in sites:
        pieces = {**constants[g.name], **params[g.name]}
        made[g.name] = ScaledLowRank(pieces["a"][None], pieces["b"][None], pieces["u"], pieces["v"], pieces["scale"])
    return made
