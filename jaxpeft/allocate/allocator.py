"""The mechanism of every rule: masks and memory in the optimizer's state, around another optimizer, at fixed shapes."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from jaxpeft.sites import paths_and_leaves

LEAVES = ("a", "b", "gate")
"""The arrays of a group whose ranks are allocated: (L, r, in), (L, r, out), (L, r)."""

Gated = dict[str, dict[str, Array]]


class State(NamedTuple):
    """State of an allocator.

    Attributes:
        count: updates made so far.
        live: {group: (L, r)}, the ranks that the last allocation left.
        memory: what the rule remembers.
        inner: the wrapped optimizer's state.
    """

    count: Array
    live: dict[str, Array]
    memory: Any
    inner: Any


def allocator(
    optimizer: optax.GradientTransformation,
    begin: Callable[[Gated, Any], tuple[dict, Any]],
    rule: Callable[[Gated, Gated, Gated, State], tuple[Gated, State]],
    *,
    dead_gates_learn: bool = True,
) -> optax.GradientTransformationExtraArgs:
    """A rule around an optimizer.

    Args:
        optimizer: what trains the parameters.
        begin: (gated parameters, the optimizer's state) -> (live masks, memory).
        rule: (gradients, parameters, parameters after the optimizer's update, state after it) -> (parameters, state),
            of the gated groups; the count is the number of the update, from 0.
        dead_gates_learn: whether the optimizer sees the gradients of gates that are not alive.
    """
    optimizer = optax.with_extra_args_support(optimizer)

    def init(params: Any) -> State:
        inner = optimizer.init(params)
        live, memory = begin(gated(params), inner)
        return State(jnp.zeros((), jnp.int32), live, memory, inner)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, State]:
        if params is None:
            raise ValueError("an allocator needs the parameters: optimizer.update(gradients, state, params)")
        gradients = dict(updates)
        if not dead_gates_learn:
            for name, live in state.live.items():
                gradients[name] = {**gradients[name], "gate": jnp.where(live, gradients[name]["gate"], 0)}
        moves, inner = optimizer.update(gradients, state.inner, params, **extra)
        moved = gated(optax.apply_updates(params, moves))
        ruled, state = rule(gated(gradients), gated(params), moved, state._replace(inner=inner))
        changed = dict(cast(dict[str, Any], moves))
        for name, group in ruled.items():
            for leaf, new in group.items():
                move = jnp.where(new == moved[name][leaf], changed[name][leaf], new - params[name][leaf])
                changed[name] = {**changed[name], leaf: move}
        return changed, state._replace(count=optax.safe_increment(state.count))

    return optax.GradientTransformationExtraArgs(init, update)


def gated(params: Any) -> Gated:
    """The groups that have gates, and of them a, b and gate.

    Raises:
        ValueError: there is none.
    """
    found = {
        name: {leaf: group[leaf] for leaf in LEAVES}
        for name, group in params.items()
        if isinstance(group, Mapping) and set(LEAVES) <= group.keys()
    }
    if not found:
        paths = [path for path, _ in paths_and_leaves(params)]
        raise ValueError(f"an allocator needs groups with the arrays {', '.join(LEAVES)}, found {paths}")
    return found


def permute_ranks(tree: Any, table: Mapping[str, Array]) -> Any:
    """Reorders or copies ranks in an adapter's parameters, or in an optimizer state that has arrays like them.

    Args:
        tree: any pytree; in it, the arrays a, b and gate under a group of the table are changed, the others are not.
        table: {group: (L, r)}, the rank whose values each rank takes.

    Examples:
        >>> import jax.numpy as jnp
        >>> params = {"up": {"gate": jnp.array([[1.0, 2.0, 3.0]])}}
        >>> permute_ranks(params, {"up": jnp.array([[2, 1, 2]])})["up"]["gate"].tolist()
        [[3.0, 2.0, 3.0]]
    """

    def take(index: Array, key: str, leaf: Array) -> Array:
        del key
        return jnp.take_along_axis(leaf, index.reshape(*index.shape, *(1,) * (leaf.ndim - 2)), axis=1)

    return over_ranks(take, table, tree)


def over_ranks(fn: Callable, table: Mapping[str, Any], tree: Any, *rest: Any) -> Any:
    """`fn(table[group], name, leaf, …)` for the arrays a, b and gate of the table's groups, wherever they are."""

    def one(path: tuple, leaf: Any, *others: Any) -> Any:
        group, name = [str(getattr(key, "key", "")) for key in (None, None, *path)[-2:]]
        if group in table and name in LEAVES:
            return fn(table[group], name, leaf, *others)
        return leaf

    return jax.tree_util.tree_map_with_path(one, tree, *rest)


def choose(mask: dict[str, Array], new: Any, old: Any) -> Any:
    """`new` for the ranks of the mask and `old` for all else."""
    return over_ranks(
        lambda chosen, _, kept, other: jnp.where(chosen.reshape(*chosen.shape, *(1,) * (kept.ndim - 2)), other, kept),
        mask,
        old,
        new,
    )


def places(scores: dict[str, Array]) -> dict[str, Array]:
    """The place of every score among those of all groups, 0 for the largest; ties are broken, so places are unique."""
    flat = jnp.concatenate([score.ravel() for score in scores.values()])
    return split(jnp.argsort(jnp.argsort(-flat)), scores)


def split(flat: Array, like: dict[str, Array]) -> dict[str, Array]:
    """A vector in the shapes of the arrays that were joined to it."""
    parts = jnp.split(flat, np.cumsum([leaf.size for leaf in like.values()])[:-1])
    return {name: part.reshape(leaf.shape) for (name, leaf), part in zip(like.items(), parts, strict=True)}


def with_gates(groups: Gated, gates: Mapping[str, Array]) -> Gated:
    """The groups with other gates."""
    return {name: {**group, "gate": gates[name]} for name, group in groups.items()}


def average(decay: float, old: Any, new: Any) -> Any:
    """The exponential moving average after one more value."""
    return jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, old, new)


def where(condition: Any, new: Any, old: Any) -> Any:
    """`new` if the condition holds, else `old`, for trees."""
    return jax.tree.map(lambda new, old: jnp.where(condition, new, old), new, old)


def everywhere(groups: Gated) -> dict[str, Array]:
    """The mask of all ranks."""
    return {name: jnp.ones(group["gate"].shape, bool) for name, group in groups.items()}


def weights(groups: Gated) -> int:
    """Number of weights that share the budget."""
    return sum(len(group["gate"]) for group in groups.values())
