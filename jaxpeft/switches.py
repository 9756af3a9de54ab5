"""What can be switched on over any method: a start from the weights, and a trained magnitude; and where it cannot."""

from collections.abc import Mapping

import jax.numpy as jnp
from jax import Array

from jaxpeft.sites import Group, Sites
from jaxpeft.spec import Spec, require
from jaxpeft.updates import Decomposed, LowRank, Update
from jaxpeft.values import over_stack, widened


def count(spec: Spec, sites: Sites) -> int:
    """Trained parameters that switches add to the method's own: Σ L · out with `dora`."""
    return sum(g.layers * g.out_dim for g in sites if spec.part(g).dora)


def start(
    params: dict, constants: dict, spec: Spec, sites: Sites, weights: Mapping[str, Array] | None
) -> tuple[dict, dict]:
    """The trained and frozen arrays of a method's start with those of its switches; ``scale`` is already there.

    Raises:
        ValueError: a switch needs the weights and there are none, or the method cannot have it.
    """
    for g in sites:
        part = spec.part(g)
        if part.start == "method":
            continue
        rank = _rank_of_factors(part, g, params[g.name])
        first = {"pissa": _pissa, "olora": _olora}[part.start]
        a, b = first(_weights(part, "start", g, weights), rank, constants[g.name]["scale"])
        params[g.name] = {"a": a, "b": b}
        constants[g.name] |= {"a_start": a, "b_start": b}
    return params, constants


def magnitudes(
    params: dict,
    constants: Mapping,
    updates: Mapping[str, Update],
    spec: Spec,
    sites: Sites,
    weights: Mapping[str, Array] | None,
) -> dict:
    """The trained arrays, with a ``magnitude`` in every group that has one: the norms of what the start makes."""
    for g in sites:
        part = spec.part(g)
        if not part.dora:
            continue
        update = _from_zero(updates[g.name], part, constants, g)
        require(update.additive, part, "dora", f"False: this update of {g.name} multiplies the weight itself")
        require("i" in g.layout, part, "dora", f"False: {g.name} is a vector")
        weight = _weights(part, "dora", g, weights)
        decomposed = Decomposed(widened(update, weight.dtype), jnp.zeros((g.layers, g.out_dim)), jnp.ones(g.layers))
        norms = over_stack(Decomposed.norm, 1)(decomposed, weight)
        params[g.name] = {**params[g.name], "magnitude": norms}
    return params


def wrap(updates: Mapping[str, Update], params: Mapping, constants: Mapping, spec: Spec, sites: Sites) -> dict:
    """The updates as their switches change them."""
    wrapped = dict(updates)
    for g in sites:
        part = spec.part(g)
        update = _from_zero(updates[g.name], part, constants, g)
        if part.dora:
            update = Decomposed(update, params[g.name]["magnitude"], jnp.ones(g.layers))
        wrapped[g.name] = update
    return wrapped


def _from_zero(update: Update, spec: Spec, constants: Mapping, g: Group) -> Update:
    """ΔW without its start, if that was set from the weight: a product of twice the rank."""
    if spec.start == "method":
        return update
    assert isinstance(update, LowRank)
    frozen = constants[g.name]
    a = jnp.concatenate([update.a, frozen["a_start"]], axis=1)
    return LowRank(a, jnp.concatenate([update.b, -frozen["b_start"]], axis=1), update.scale)


def _pissa(weights: Array, rank: int, scale: Array) -> tuple[Array, Array]:
    """The r largest singular components of W0, shared between the factors (PiSSA §3)."""
    u, s, v = jnp.linalg.svd(weights, full_matrices=False)
    root = jnp.sqrt(s[:, :rank] / scale[:, None])[..., None]
    return jnp.swapaxes(u[..., :rank], 1, 2) * root, v[:, :rank] * root


def _olora(weights: Array, rank: int, scale: Array) -> tuple[Array, Array]:
    """The first r columns of Q and rows of R of W0ᵀ = Q R, Q on the output side (OLoRA §3)."""
    del scale
    q, r = jnp.linalg.qr(jnp.swapaxes(weights, 1, 2))
    return r[:, :rank], jnp.swapaxes(q[..., :rank], 1, 2)


def _rank_of_factors(spec: Spec, g: Group, params: Mapping[str, Array]) -> int:
    """The rank; an error unless the factors belong to one layer each and are trained as they are."""
    rank = spec.materialized_rank(g)
    wanted = {"a": (g.layers, rank, g.in_dim), "b": (g.layers, rank, g.out_dim)}
    found = {name: leaf.shape for name, leaf in params.items()}
    expected = f"'method': it sets factors {wanted} layer by layer, and {g.name} trains {found}"
    require(found == wanted, spec, "start", expected)
    most = min(g.in_dim, g.out_dim)
    assert rank is not None
    require(rank <= most, spec, "rank", f"at most {most}, the singular values of {g.name}")
    return rank


def _weights(spec: Spec, field: str, g: Group, weights: Mapping[str, Array] | None) -> Array:
    require(weights is not None, spec, field, "weights=base in jaxpeft.init: its start reads them")
    assert weights is not None
    return weights[g.name]
