"""Which tensors does a PEFT file hold of an adapter: of its modules, shared by them, and of what is trained whole?"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxpeft.adapter import Adapter
from jaxpeft.hf import native
from jaxpeft.hf.names import Modules, Place, is_embedding, matrix_at, torch_shaped
from jaxpeft.hf.settings import factors_of
from jaxpeft.methods import mixed
from jaxpeft.sites import Group, Sites, flatten
from jaxpeft.spec import SHARED
from jaxpeft.updates import Decomposed, Dense, LowRank
from jaxpeft.values import over_stack
from jaxpeft.weights import Weights

PREFIX = "base_model.model."


def adapted_modules(
    adapter: Adapter, adapted: Sequence[Group], method: native.Format, modules: Modules, base: Any
) -> dict[str, np.ndarray]:
    """The arrays of every adapted module."""
    tensors = {}
    own = _lora_leaves(adapter, adapted, base) if method is native.LORA else _own_leaves(adapter, adapted, method)
    for group in adapted:
        known = method.tensors(adapter.spec.part(group))
        leaves = own[group.name]
        if missing := set(leaves) - {tensor.leaf for tensor in known}:
            raise AssertionError(f"{method.peft_type} has no tensors for {missing}")
        for layer, name in enumerate(modules.of_group(group)):
            module = PREFIX + name.rpartition(".")[0]
            for tensor in known:
                if tensor.leaf in leaves:
                    kind = tensor.embedding if tensor.embedding and is_embedding(group.paths[0]) else tensor.name
                    tensors[f"{module}.{kind}"] = tensor.view.write(leaves[tensor.leaf][layer])
    return tensors


def _own_leaves(adapter: Adapter, adapted: Sequence[Group], method: native.Format) -> dict[str, dict[str, np.ndarray]]:
    """A method's own trained arrays, with the scale in one of them where PEFT has none."""
    leaves = {group.name: {k: np.asarray(v) for k, v in adapter.params[group.name].items()} for group in adapted}
    if method.fold and not method.alpha:
        for group in adapted:
            own, scale = leaves[group.name], np.asarray(adapter.constants[group.name]["scale"])
            own[method.fold] = own[method.fold] * scale.reshape(-1, *(1,) * (own[method.fold].ndim - 1))
    return leaves


def _lora_leaves(adapter: Adapter, adapted: Sequence[Group], base: Any) -> dict[str, dict[str, np.ndarray]]:
    """The factors of all groups, with magnitudes if one group is DoRA."""
    updates, leaves = adapter.updates(), {}
    dora = any(isinstance(updates[group.name], Decomposed) for group in adapted)
    for group in adapted:
        update = updates[group.name]
        factors = factors_of(update)
        assert factors is not None
        a, b = (np.broadcast_to(leaf, (group.layers, *leaf.shape[1:])) for leaf in (factors.a, factors.b))
        leaves[group.name] = {"a": a, "b": b}
        if isinstance(update, Decomposed):
            leaves[group.name]["magnitude"] = np.asarray(update.magnitude)
        elif dora:
            leaves[group.name]["magnitude"] = _magnitude(factors, group, base)
    return leaves


def _magnitude(factors: LowRank, group: Group, base: Any) -> np.ndarray:
    """The norms with which a DoRA is the plain update."""
    if base is None:
        raise ValueError(f"some groups are DoRA and {group.name} is not: pass base=, whose norms make it one")
    ones = Decomposed(factors, jnp.zeros((group.layers, group.out_dim)), jnp.ones(group.layers))
    return np.asarray(over_stack(Decomposed.norm, 1)(ones, Weights(base, Sites((group,)))[group.name]))


def shared(adapter: Adapter, adapted: Sequence[Group], method: native.Format) -> dict[str, np.ndarray]:
    """The arrays that all modules share."""
    tensors = {}
    for tensor in method.shared:
        tree = adapter.constants if tensor.frozen else adapter.params
        own = tree[SHARED]
        if isinstance(adapter.spec, mixed.Spec):  # It keeps them by part.
            own = own[str(adapter.spec.number(adapted[0]))]
        tensors[f"base_model.{tensor.name}"] = tensor.view.write(np.asarray(own[tensor.leaf]))
    return tensors


def whole(
    adapter: Adapter,
    groups: Sequence[Group],
    method: native.Format,
    modules: Modules,
    places: Mapping[str, Place],
    base: Any,
    targets: Sequence[str],
) -> tuple[list[str], str, dict[str, np.ndarray]]:
    """Weights trained whole: ``modules_to_save``, ``bias``, and the tensors of both.

    Raises:
        ValueError: there is no base, or PEFT can say it neither by ``modules_to_save`` nor by ``bias``.
    """
    if not groups:
        return [], "none", {}
    if base is None:
        names = ", ".join(group.name for group in groups)
        raise ValueError(f"{names}: weights trained whole are written as W0 + ΔW; pass base=")
    leaves, updates, trained = flatten(base), adapter.updates(), {}
    for group in groups:
        deltas = np.asarray(over_stack(Dense.delta, 1)(updates[group.name]))
        for delta, name in zip(deltas, modules.of_group(group), strict=True):
            place = places[name]
            trained[name] = torch_shaped(matrix_at(leaves, place) + delta, place)
    bias = _bias(trained, places, method, targets)
    of_adapted = {name for name in trained if name.rpartition(".")[0] in targets}
    if clash := sorted(name for name in of_adapted if not (name.endswith(".bias") and bias != "none")):
        raise ValueError(f"{clash[0]} is trained whole and its module adapted, which PEFT cannot do at once")
    taken = {name for name in trained if name.endswith(".bias") and bias == "all"} | of_adapted
    tensors = {}
    for name in taken:
        layer = ".base_layer" if name in of_adapted else ""
        tensors[f"{PREFIX}{name.removesuffix('.bias')}{layer}.bias"] = trained[name]
    saved = list(dict.fromkeys(name.rpartition(".")[0] for name in trained if name not in taken))
    for name, place in places.items():
        if name.rpartition(".")[0] in saved:  # PEFT saves all parameters of a module.
            tensors[PREFIX + name] = trained[name] if name in trained else torch_shaped(matrix_at(leaves, place), place)
    return saved, bias, tensors


def _bias(trained: Collection[str], places: Mapping[str, Place], method: native.Format, targets: Sequence[str]) -> str:
    """What PEFT's ``bias`` says of the trained biases of adapted modules."""
    every = {name for name in places if name.endswith(".bias")}
    of_adapted = {name for name in every if name.rpartition(".")[0] in targets}
    found = of_adapted & set(trained)
    if not found:
        return "none"
    if not method.biases:
        raise ValueError(f"PEFT's {method.peft_type} trains no biases; pass rank= to write the nearest LoRA")
    if every <= set(trained):
        return "all"
    if found != of_adapted:
        raise ValueError(
            f"{len(found)} of the {len(of_adapted)} biases of adapted modules are trained; PEFT trains all or none of "
            f"them. Trained: {', '.join(sorted(found)[:5])}"
        )
    return method.bias_only
