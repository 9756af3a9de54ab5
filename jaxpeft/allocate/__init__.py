"""Which ranks live: rules that prune, grow or replace ranks while an adapter trains, as wrappers of its optimizer.

A rule is `rule(optimizer, …)`, an optax transformation around another. It sees what every rule of this kind needs: the
raw gradients, the parameters, and where the optimizer moves them. What it remembers, the masks and the step it has come
to, is part of the optimizer's state, so a checkpoint has it and a compiled step runs through all budgets without being
compiled again: shapes are those of the largest rank, and a dead rank has a gate of exactly zero.

    >>> import jax, jax.numpy as jnp, jaxpeft, optax
    >>> from jaxpeft import allocate
    >>> from jaxpeft.methods import adalora
    >>> sites = jaxpeft.find({"up": {"kernel": jnp.zeros((64, 32))}, "down": {"kernel": jnp.zeros((32, 64))}})
    >>> adapter = jaxpeft.init(jax.random.key(0), adalora.Spec(rank=6, target_rank=4), sites)
    >>> optimizer = allocate.for_spec(adapter.spec, optax.adamw(1e-3), steps=100)
    >>> state = optimizer.init(adapter.params)
    >>> allocate.check(adapter, state)
    >>> allocate.check(adapter, optax.adamw(1e-3).init(adapter.params))  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ValueError: adalora chooses its ranks while it trains, but this optimizer state has no allocator: ...
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import optax

from jaxpeft.adapter import Adapter
from jaxpeft.allocate.allocator import State, permute_ranks
from jaxpeft.allocate.beams import beamlora
from jaxpeft.allocate.growing import increlora
from jaxpeft.allocate.outcome import compact, merge_most_similar, ranks
from jaxpeft.allocate.pruning import adalora, cubic_decay, cubic_drop, dynamic_dora, orthogonality, sora, variance
from jaxpeft.spec import Spec, method_of

__all__ = [
    "State",
    "adalora",
    "beamlora",
    "check",
    "compact",
    "cubic_decay",
    "cubic_drop",
    "dynamic_dora",
    "for_spec",
    "increlora",
    "merge_most_similar",
    "orthogonality",
    "permute_ranks",
    "ranks",
    "sora",
    "variance",
]

RULES: dict[str, tuple[Callable, tuple[str, ...]]] = {
    "adalora": (adalora, ("target_rank", "steps")),
    "beamlora": (beamlora, ("temperature", "steps")),
    "dynamic_dora": (dynamic_dora, ("target_rank", "steps")),
    "increlora": (increlora, ("target_rank", "start_rank", "rank_step", "steps")),
    "sora": (sora, ()),
}
"""Methods that choose their ranks while they train: their rule, and what it takes from the spec and the run."""


def for_spec(
    spec: Spec, optimizer: optax.GradientTransformation, steps: int, **settings: Any
) -> optax.GradientTransformation:
    """The optimizer in the rule of a method that chooses its ranks while it trains; unchanged for the others.

    Args:
        spec: any spec.
        optimizer: what trains the adapter's parameters.
        steps: updates in all.
        **settings: further arguments of the rule, e.g. `initial_steps` of `adalora`, or `threshold` of `sora`.

    Raises:
        ValueError: the parts of a mixed spec ask for different rules.
        TypeError: the rule needs a setting, or does not know one.
    """
    wanted = {}
    for part in getattr(spec, "parts", (spec,)):
        if (name := _method(part)) in RULES:
            known = {**dataclasses.asdict(part), "steps": steps}
            wanted[name, *(known[field] for field in RULES[name][1])] = part
    if not wanted:
        return optimizer
    if len(wanted) > 1:
        raise ValueError(f"one optimizer runs one rule, but the parts ask for different ones: {list(wanted.values())}")
    ((name, *values),) = wanted
    rule, fields = RULES[name]
    return rule(optimizer, **dict(zip(fields, values, strict=True)), **settings)


def check(adapter: Adapter, opt_state: Any) -> None:
    """Raises ValueError if an adapter chooses its ranks while it trains, but this optimizer state has no allocator.

    Without one such a method trains, silently, as LoRA of its largest rank. Call it once, after `optimizer.init`.
    """
    allocated = {name for state in _states(opt_state) for name in state.live}
    for group in adapter.sites:
        method = _method(adapter.spec.part(group))
        if method in RULES and group.name not in allocated:
            raise ValueError(
                f"{method} chooses its ranks while it trains, but this optimizer state has no allocator: {group.name} "
                f"would keep all {adapter.spec.materialized_rank(group)}. Wrap the optimizer: "
                "jaxpeft.allocate.for_spec(spec, optimizer, steps)"
            )


def _states(tree: Any) -> list[State]:
    leaves = jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, State))
    return [leaf for leaf in leaves if isinstance(leaf, State)]


def _method(spec: Spec) -> str:
    return method_of(spec).__name__.removeprefix("jaxpeft.methods.")
