"""A rule that replaces ranks by copies of better ones: BeamLoRA."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from jaxpeft.allocate.allocator import (
    Gated,
    State,
    allocator,
    choose,
    everywhere,
    over_ranks,
    permute_ranks,
    split,
    where,
    with_gates,
)
from jaxpeft.methods.beamlora import importance


def beamlora(
    optimizer: optax.GradientTransformation,
    *,
    temperature: float,
    steps: int,
    every: int,
    threshold: float = 0.95,
    end_steps: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Replaces the ranks that matter least by copies of those that matter most (BeamLoRA, arXiv 2502.13604 §3).

    After every `every` updates the ranks of all weights are sorted by importance, r · softmax(gate / temperature);
    those beyond a share p of the sum are replaced, in a weight at most half. The worst becomes a copy of the best, the
    second worst of the second best, and so on, a and b with the optimizer's moments; the two share the mean of their
    gates, and all gates' moments become zero. So that a copy does not remain one, it is what its original was half of
    `every` updates ago: parameters and state are held twice. p rises by a cosine from `threshold` to one. As in the
    authors' code, but for the pairing with the best ranks, which they shuffle.

    Args:
        optimizer: what trains the parameters.
        temperature: of the softmax, as in the spec.
        steps: updates in all; none of the last `every` replaces anything.
        every: updates between two replacements; the authors use 3000.
        threshold: p at the start.
        end_steps: updates until p is one; `steps` by default.

    Returns:
        A transformation with `State`.

    Raises:
        ValueError: `every` has no half; or, from `init`, no group of the parameters has gates.
    """
    if every < 2:
        raise ValueError(f"beamlora: every={every}, expected at least 2: copies are of the state half of it ago")
    end = steps if end_steps is None else end_steps

    def begin(groups: Gated, inner: Any) -> tuple[dict, dict]:
        # Copies, for a step that donates both parameters and state cannot donate one buffer twice.
        return everywhere(groups), jax.tree.map(jnp.copy, {"params": groups, "inner": inner})

    def rule(gradients: Gated, params: Gated, moved: Gated, state: State) -> tuple[Gated, State]:
        del gradients, params
        made, past = state.count + 1, state.memory
        share = 1 - (1 - threshold) * (1 + jnp.cos(jnp.pi * jnp.minimum(made / end, 1))) / 2

        def replace(moved: Gated, inner: Any) -> tuple[Gated, Any]:
            gates = {name: group["gate"] for name, group in moved.items()}
            source, partner = beams(gates, temperature, share)
            means = {name: (gate + jnp.take_along_axis(gate, partner[name], 1)) / 2 for name, gate in gates.items()}
            new = {name: table != jnp.arange(table.shape[1]) for name, table in source.items()}
            moved = choose(new, permute_ranks(past["params"], source), moved)
            inner = choose(new, permute_ranks(past["inner"], source), inner)
            inner = over_ranks(lambda _, key, leaf: jnp.zeros_like(leaf) if key == "gate" else leaf, new, inner)
            return with_gates(moved, means), inner

        due = (made % every == 0) & (steps - made >= every)
        moved, inner = jax.lax.cond(due, replace, lambda *same: same, moved, state.inner)
        halfway = made % every == every // 2
        return moved, state._replace(inner=inner, memory=where(halfway, {"params": moved, "inner": inner}, past))

    return allocator(optimizer, begin, rule)


def beams(gates: dict[str, Array], temperature: float, share: Array) -> tuple[dict[str, Array], dict[str, Array]]:
    """{group: (L, r)}: the rank whose copy every rank becomes, and the rank it shares the mean of their gates with."""
    scores = {name: importance(gate, temperature) for name, gate in gates.items()}
    flat = jnp.concatenate([score.ravel() for score in scores.values()])
    order = jnp.argsort(-flat)
    beyond = jnp.zeros(flat.shape, bool).at[order].set(jnp.cumsum(flat[order]) > share * flat.sum())
    source, partner = {}, {}
    for name, pruned in split(beyond, scores).items():
        rank = pruned.shape[1]
        replaced = jnp.minimum(pruned.sum(axis=1), rank // 2)[:, None]
        best_first = jnp.argsort(-scores[name], axis=1)
        place = jnp.argsort(best_first, axis=1)
        mirrored, worst = rank - 1 - place, place >= rank - replaced
        source[name] = jnp.take_along_axis(best_first, jnp.where(worst, mirrored, place), axis=1)
        shares = worst | (place < replaced)
        partner[name] = jnp.take_along_axis(best_first, jnp.where(shares, mirrored, place), axis=1)
    return source, partner
