"""A rule that starts with few ranks and adds some: IncreLoRA."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxpeft.allocate.allocator import Gated, State, allocator, average, everywhere, places, weights, where, with_gates


def increlora(
    optimizer: optax.GradientTransformation,
    *,
    target_rank: int,
    start_rank: int,
    rank_step: int,
    steps: int,
    initial_steps: int,
    every: int,
    top_h: int,
    beta1: float = 0.85,
    beta2: float = 0.85,
) -> optax.GradientTransformationExtraArgs:
    """Gives the most important weights more ranks (IncreLoRA, arXiv 2308.12043 §3).

    At every multiple of `every` after `initial_steps`, the `top_h` weights of largest score gain `rank_step` ranks,
    until target_rank ranks a weight, on average, are alive. A score is the product of two averages, as in `adalora`, of
    one number a weight. The authors sum |ΔW ⊙ ∂L/∂ΔW| over the entries of ΔW / √(in · out); that gradient is never
    formed here, so each rank's part of the sum, |gateᵢ · ∂L/∂gateᵢ|, is added up instead, which is at most theirs. The
    reserve, a weight's next `rank_step` ranks, has gates of 1e-5 that do not train, while their a and b do.

    Args:
        optimizer: what trains the parameters.
        target_rank: average rank at the end.
        start_rank: ranks that every weight starts with.
        rank_step: ranks that a chosen weight gains.
        steps: updates in all, to check that the target is reached.
        initial_steps: updates before the first growth; the authors use 100 to 1000.
        every: updates between two; the authors use 100 to 1000.
        top_h: weights that grow at a time; the authors use 3 to 10.
        beta1: decay of the averaged sensitivity.
        beta2: decay of the averaged deviation.

    Returns:
        A transformation with `State`.

    Raises:
        ValueError: from `init`, if no group of the parameters has gates, or the target is not reached within `steps`.
    """

    def begin(groups: Gated, inner: Any) -> tuple[dict, dict]:
        del inner
        rounds = math.ceil((target_rank - start_rank) * weights(groups) / (top_h * rank_step))
        # Growth happens at multiples of `every` only.
        if (needed := (initial_steps // every + rounds) * every) >= steps:
            raise ValueError(
                f"increlora: growing from {start_rank} to {target_rank} ranks in {weights(groups)} weights takes "
                f"{rounds} rounds of {every} updates and ends at update {needed}, but there are {steps}; expected a "
                "larger top_h or rank_step, or a smaller every"
            )
        live = {name: jnp.arange(mask.shape[1]) < start_rank * mask for name, mask in everywhere(groups).items()}
        memory = {
            kind: {n: jnp.zeros(len(g["gate"])) for n, g in groups.items()} for kind in ("sensitivity", "uncertainty")
        }
        return live, memory

    def rule(gradients: Gated, params: Gated, moved: Gated, state: State) -> tuple[Gated, State]:
        total = sum(mask.sum() for mask in state.live.values())
        growing, target = total < target_rank * weights(moved), target_rank * weights(moved)
        sensitivity = {}
        for name, group in params.items():
            parts = jnp.abs(group["gate"] * gradients[name]["gate"]).sum(axis=1)
            sensitivity[name] = parts / math.sqrt(group["a"].shape[-1] * group["b"].shape[-1])
        averaged = average(beta1, state.memory["sensitivity"], sensitivity)
        deviation = jax.tree.map(lambda new, mean: jnp.abs(new - mean), sensitivity, averaged)
        memory = {"sensitivity": averaged, "uncertainty": average(beta2, state.memory["uncertainty"], deviation)}
        memory = where(growing, memory, state.memory)

        live = {name: mask.sum(axis=1) for name, mask in state.live.items()}
        room = {name: mask.shape[1] - live[name] for name, mask in state.live.items()}
        scores = {
            name: jnp.where(room[name] > 0, memory["sensitivity"][name] * memory["uncertainty"][name], -1.0)
            for name in moved
        }
        due = growing & (state.count > initial_steps) & (state.count % every == 0)
        gained = {}
        for name, place in places(scores).items():
            wanted = jnp.where(place < top_h, jnp.clip(target - total - place * rank_step, 0, rank_step), 0)
            gained[name] = jnp.where(due, jnp.minimum(wanted, room[name]), 0)
        ranks = {name: (live[name] + gained[name])[:, None] for name in moved}
        full = total + sum(gain.sum() for gain in gained.values()) >= target
        gates = {}
        for name, group in moved.items():
            number = jnp.arange(group["gate"].shape[1])
            reserve = jnp.where((number < ranks[name] + rank_step) & ~full, 1e-5, 0.0)
            gates[name] = jnp.where(number < ranks[name], group["gate"], reserve)
        masks = {name: jnp.arange(mask.shape[1]) < ranks[name] for name, mask in state.live.items()}
        return with_gates(moved, gates), state._replace(live=masks, memory=memory)

    return allocator(optimizer, begin, rule, dead_gates_learn=False)
