"""LoRTA: low-rank tensor adaptation (Hounie et al., arXiv 2410.04060)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxpeft import spec as base
from jaxpeft.methods.lora import uniform
from jaxpeft.sites import Group, Sites
from jaxpeft.spec import SHARED
from jaxpeft.updates import LowRank

CARD = base.Card(
    title="LoRTA",
    formula="(alpha / r) · aᵀ diag(layer ⊙ type) [diag(head) b for every head]",
    parameters="r · (in + out / H + H + L + T) for all T groups of a shape",
    source="arXiv 2410.04060 §4",
    budget="rank",
    shared="all factors, by all groups of a shape",
)


@dataclass(frozen=True, kw_only=True)
class Spec(base.Spec):
    """All weights of a shape are one CP tensor of order 5: in, head dimension, head, layer, type of weight.

    ΔW of layer l and type t, at input i and output o = h · out/H + d (head h, dimension d inside it), is
    (alpha / r) · Σ_j a[j, i] · b[j, d] · heads[j, h] · layers[l, j] · types[t, j]. All updates of a shape thus
    have the same r rows to combine.

    Trained, float32, under ``shared``, once for every shape S = "{in}x{out}x{layers}" among the groups: ``a_S``
    (r, in), ``b_S`` (r, out/H), ``heads_S`` (r, H), ``layers_S`` (L, r), ``types_S`` (T, r), T being the number of
    groups of that shape, in the order of the sites. Start: a ~ U(±1/√r), b = 0, the others U(±√(6/r)), so ΔW = 0.
    Parameters: r · (in + out/H + H + L + T) a shape. Source: arXiv 2410.04060 §4; start and scale of its
    authors' instruction-tuning code (`init_scale` 0). There, as here, heads split the output of all of q, k, v and o;
    their PEFT fork splits the input. They adapt square attention weights; one tensor for each shape is our extension.

    Attributes:
        rank: r.
        heads: H; it divides every out.

    Examples:
        >>> import jax, jax.numpy as jnp, jaxpeft
        >>> from jaxpeft.methods import lorta
        >>> kernel = {"kernel": jnp.zeros((8, 64, 64))}
        >>> sites = jaxpeft.find({"layers": {"q_proj": kernel, "v_proj": kernel}}, layouts={".*": "lio"})
        >>> adapter = jaxpeft.init(jax.random.key(0), lorta.Spec(rank=4, heads=2), sites)
        >>> {name: leaf.shape for name, leaf in adapter.params["shared"].items() if name < "c"}
        {'a_64x64x8': (4, 64), 'b_64x64x8': (4, 32)}
        >>> jaxpeft.count(adapter) == 4 * (64 + 64 // 2 + 2 + 8 + 2)
        True
    """

    rank: int
    heads: int

    def __post_init__(self) -> None:
        super().__post_init__()
        base.require(self.rank >= 1, self, "rank", "at least 1")
        base.require(self.heads >= 1, self, "heads", "at least 1")

    def materialized_rank(self, group: Group) -> int:  # noqa: D102
        del group
        return self.rank


def tensors(spec: Spec, sites: Sites) -> dict[str, list[Group]]:
    """The groups of every shape, by the shape's name.

    Raises:
        ValueError: the heads do not divide the outputs of a group.
    """
    found: dict[str, list[Group]] = {}
    for g in sites:
        if g.out_dim % spec.heads:
            divisors = (n for n in range(1, g.out_dim + 1) if g.out_dim % n == 0)
            near = min(divisors, key=lambda n: abs(n - spec.heads))
            raise ValueError(
                f"lorta.Spec: heads={spec.heads} does not divide out={g.out_dim} of {g.name}; nearest that does: {near}"
            )
        found.setdefault(f"{g.in_dim}x{g.out_dim}x{g.layers}", []).append(g)
    return found


def count(spec: Spec, sites: Sites) -> int:
    """Trained parameters: Σ r · (in + out/H + H + L + T) over the shapes."""
    heads, total = spec.heads, 0
    for groups in tensors(spec, sites).values():
        g = groups[0]
        total += spec.rank * (g.in_dim + g.out_dim // heads + heads + g.layers + len(groups))
    return total


def init(key: Array, spec: Spec, sites: Sites, weights: Any = None) -> tuple[dict, dict]:
    """The factors of every shape's tensor; `weights` is not read, and nothing is frozen."""
    del weights
    shared, shapes, r = {}, tensors(spec, sites), spec.rank
    for (shape, groups), shape_key in zip(shapes.items(), jax.random.split(key, len(shapes)), strict=True):
        g = groups[0]
        a_key, heads_key, layers_key, types_key = jax.random.split(shape_key, 4)
        shared |= {
            f"a_{shape}": uniform(a_key, (r, g.in_dim), r),
            f"b_{shape}": jnp.zeros((r, g.out_dim // spec.heads)),
            f"heads_{shape}": math.sqrt(6) * uniform(heads_key, (r, spec.heads), r),
            f"layers_{shape}": math.sqrt(6) * uniform(layers_key, (g.layers, r), r),
            f"types_{shape}": math.sqrt(6) * uniform(types_key, (len(groups), r), r),
        }
    return {SHARED: shared, **{g.name: {} for g in sites}}, {g.name: {} for g in sites}


def updates(params: Mapping, constants: Mapping, spec: Spec, sites: Sites) -> dict[str, LowRank]:
    """One `LowRank` a group: layer and type multiply a, the heads lay out b."""
    made = {}
    for shape, groups in tensors(spec, sites).items():
        names = ("a", "b", "heads", "layers", "types")
        a, b, heads, layers, types = (params[SHARED][f"{name}_{shape}"] for name in names)
        columns = (heads[:, :, None] * b[:, None, :]).reshape(spec.rank, -1)
        for g, of_type in zip(groups, types, strict=True):
            rows = (layers * of_type)[:, :, None] * a
            made[g.name] = LowRank(rows, columns[None], constants[g.name]["scale"])
    return {g.name: made[g.name] for g in sites}
