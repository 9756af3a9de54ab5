"""Rules that start with many ranks and close the gates of some: AdaLoRA, dynamic-rank DoRA, SoRA."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from jaxpeft.adapter import Adapter
from jaxpeft.allocate.allocator import (
    LEAVES,
    Gated,
    State,
    allocator,
    average,
    everywhere,
    gated,
    places,
    weights,
    where,
    with_gates,
)


def adalora(
    optimizer: optax.GradientTransformation,
    *,
    target_rank: int,
    steps: int,
    initial_steps: int | None = None,
    final_steps: int | None = None,
    every: int = 1,
    beta1: float = 0.85,
    beta2: float = 0.85,
) -> optax.GradientTransformationExtraArgs:
    """Prunes the triplets of least importance over all weights (AdaLoRA, arXiv 2303.10512, algorithm 1).

    An entry's importance is the average of its sensitivity |w · ∂L/∂w| times that of the sensitivity's deviation from
    its average; a triplet's is its gate's, plus the means over its row of a and of b. At every allocation the best
    `cubic_decay` of them stay and the other gates become zero. As in the paper a pruned gate may grow back until the
    next allocation; from step `steps - final_steps` on the mask is final.

    Args:
        optimizer: what trains the parameters.
        target_rank: average rank at the end.
        steps: updates in all; the first has number 0.
        initial_steps: updates before the first pruning, tᵢ; by default a tenth. The authors' runs have 9 to 15 %.
        final_steps: updates after the last pruning, t_f; by default half. The authors' runs have 44 to 58 %.
        every: an allocation at every multiple of this, ΔT.
        beta1: decay of the averaged sensitivity.
        beta2: decay of the averaged deviation.

    Returns:
        A transformation with `State`.

    Raises:
        ValueError: from `init`, if no group of the parameters has gates.
    """
    first, last = _phases(steps, initial_steps, final_steps)

    def begin(groups: Gated, inner: Any) -> tuple[dict, dict]:
        del inner
        return everywhere(groups), {"sensitivity": _zeros(groups), "uncertainty": _zeros(groups)}

    def rule(gradients: Gated, params: Gated, moved: Gated, state: State) -> tuple[Gated, State]:
        del params
        sensitivity = jax.tree.map(lambda w, g: jnp.abs(w * g), moved, gradients)
        averaged = average(beta1, state.memory["sensitivity"], sensitivity)
        deviation = jax.tree.map(lambda new, mean: jnp.abs(new - mean), sensitivity, averaged)
        memory = {"sensitivity": averaged, "uncertainty": average(beta2, state.memory["uncertainty"], deviation)}
        memory = where(state.count < last, memory, state.memory)
        scores = {}
        for name in moved:
            entries = {leaf: memory["sensitivity"][name][leaf] * memory["uncertainty"][name][leaf] for leaf in LEAVES}
            scores[name] = entries["gate"] + entries["a"].mean(axis=-1) + entries["b"].mean(axis=-1)
        budget = cubic_decay(state.count, _room(moved), target_rank * weights(moved), first, last)
        due = (state.count > first) & (state.count % every == 0)
        return _prune(moved, state._replace(memory=memory), scores, budget, due, last)

    return allocator(optimizer, begin, rule)


def cubic_decay(step: Any, start: int, end: int, first: int, last: int) -> Array:
    """AdaLoRA's budget (eq. 9): start until step `first`, end from step `last`, ⌊end + (start - end)(1 - p)³⌋ between.

    Examples:
        >>> [int(cubic_decay(step, 48, 32, 10, 30)) for step in (0, 10, 11, 20, 30, 99)]
        [48, 48, 45, 34, 32, 32]
    """
    return jnp.floor(end + (start - end) * (1 - _progress(step, first, last)) ** 3).astype(jnp.int32)


def orthogonality(adapter: Adapter) -> Array:
    """Mean ‖P Pᵀ - I‖ over the factors a and b of all weights: AdaLoRA's regulariser, to be added to the loss.

    As its authors' code and PEFT have it; the paper squares the norms. Their weights are 0.1 to 0.3.
    """
    norms = []
    for group in gated(adapter.params).values():
        for factor in (group["a"], group["b"]):
            gram = jnp.einsum("lri,lsi->lrs", factor, factor) - jnp.eye(factor.shape[1])
            # A norm has no gradient at zero.
            norms.append(jnp.sqrt(jnp.sum(gram**2, axis=(1, 2)) + 1e-12))
    return jnp.concatenate(norms).mean()


def dynamic_dora(
    optimizer: optax.GradientTransformation,
    *,
    target_rank: int,
    steps: int,
    initial_steps: int | None = None,
    final_steps: int | None = None,
    every: int = 1,
    beta: float = 0.9,
    eps: float = 1e-8,
) -> optax.GradientTransformationExtraArgs:
    """Prunes the ranks with the smallest share of their ΔW (dynamic-rank DoRA, arXiv 2405.17357 §3).

    A rank's score is the average of ‖gateᵢ aᵢᵀ bᵢ‖ / (‖Σ gateᵢ aᵢᵀ bᵢ‖ + eps). At every allocation the best
    `cubic_drop` of all weights' ranks stay and the other gates become zero; from step `steps - final_steps` on the mask
    is final. The paper states no beta and eps that we could confirm.

    Args:
        optimizer: what trains the parameters.
        target_rank: average rank at the end.
        steps: updates in all; the first has number 0.
        initial_steps: updates before pruning begins; by default a tenth.
        final_steps: updates after it ends; by default half.
        every: updates between two allocations.
        beta: decay of the averaged score.
        eps: added to ‖ΔW‖, which is zero at the start.

    Returns:
        A transformation with `State`.

    Raises:
        ValueError: from `init`, if no group of the parameters has gates.
    """
    first, last = _phases(steps, initial_steps, final_steps)

    def begin(groups: Gated, inner: Any) -> tuple[dict, dict]:
        del inner
        return everywhere(groups), {name: jnp.zeros_like(group["gate"]) for name, group in groups.items()}

    def rule(gradients: Gated, params: Gated, moved: Gated, state: State) -> tuple[Gated, State]:
        del gradients, params
        shares = {name: _shares(group, eps) for name, group in moved.items()}
        scores = where(state.count <= last, average(beta, state.memory, shares), state.memory)
        budget = cubic_drop(state.count, _room(moved), target_rank * weights(moved), first, last)
        due = (state.count >= first) & ((state.count - first) % every == 0)
        return _prune(moved, state._replace(memory=scores), scores, budget, due, last)

    return allocator(optimizer, begin, rule)


def cubic_drop(step: Any, start: int, end: int, first: int, last: int) -> Array:
    """Dynamic DoRA's budget: start until step `first`, end from step `last`, start - ⌊(start - end) p³⌋ between.

    Examples:
        >>> [int(cubic_drop(step, 48, 32, 10, 30)) for step in (0, 10, 20, 29, 30, 99)]
        [48, 48, 46, 35, 32, 32]
    """
    return start - jnp.floor((start - end) * _progress(step, first, last) ** 3).astype(jnp.int32)


def variance(adapter: Adapter) -> Array:
    """Mean variance of the rows of a and of b: dynamic DoRA's regulariser while ranks are pruned (its §3.4)."""
    factors = [group[leaf] for group in gated(adapter.params).values() for leaf in ("a", "b")]
    return jnp.concatenate([jnp.var(factor, axis=-1, ddof=1).ravel() for factor in factors]).mean()


def sora(
    optimizer: optax.GradientTransformation, *, threshold: float | optax.Schedule
) -> optax.GradientTransformationExtraArgs:
    """Shrinks every gate towards zero after its step, and stops there (SoRA, arXiv 2311.11696, eq. 6 and 7).

    gate ← sign(gate) · max(|gate| - ξ, 0), the proximal step of an L1 penalty. The paper's ξ is the learning rate times
    the penalty's weight; its authors' code has a constant, and also zeroes what the step left below ξ, which is not in
    the paper and not done here. A dead gate may come back: its gradient can carry it over the threshold.

    Args:
        optimizer: what trains the parameters.
        threshold: ξ, or a schedule of it over the updates.

    Returns:
        A transformation with `State`.

    Raises:
        ValueError: from `init`, if no group of the parameters has gates.
    """

    def begin(groups: Gated, inner: Any) -> tuple[dict, tuple]:
        del inner
        return everywhere(groups), ()

    def rule(gradients: Gated, params: Gated, moved: Gated, state: State) -> tuple[Gated, State]:
        del gradients, params
        size = threshold(state.count) if callable(threshold) else threshold
        gates = {
            name: jnp.sign(group["gate"]) * jnp.maximum(jnp.abs(group["gate"]) - size, 0)
            for name, group in moved.items()
        }
        return with_gates(moved, gates), state._replace(live={name: gate != 0 for name, gate in gates.items()})

    return allocator(optimizer, begin, rule)


def _prune(
    moved: Gated, state: State, scores: dict[str, Array], budget: Array, due: Array, last: int
) -> tuple[Gated, State]:
    """Closes the gates of all but the `budget` best ranks when an allocation is due, and for good after the last."""
    due = (due & (state.count <= last)) | (state.count == last)
    best = {name: place < budget for name, place in places(scores).items()}
    live = where(due, best, state.live)
    closed = due | (state.count > last)
    gates = {name: jnp.where(closed & ~live[name], 0.0, group["gate"]) for name, group in moved.items()}
    return with_gates(moved, gates), state._replace(live=live)


def _shares(group: Mapping[str, Array], eps: float) -> Array:
    """‖gateᵢ aᵢᵀ bᵢ‖ / (‖Σ gateᵢ aᵢᵀ bᵢ‖ + eps), (L, r), without forming a product."""
    a, b = group["a"] * group["gate"][:, :, None], group["b"]
    each = jnp.linalg.norm(a, axis=-1) * jnp.linalg.norm(b, axis=-1)
    squared = jnp.sum(jnp.einsum("lri,lsi->lrs", a, a) * jnp.einsum("lri,lsi->lrs", b, b), axis=(1, 2))
    return each / (jnp.sqrt(jnp.maximum(squared, 0)) + eps)[:, None]


def _zeros(groups: Gated) -> Gated:
    return jax.tree.map(jnp.zeros_like, groups)


def _room(groups: Gated) -> int:
    """Number of ranks there are."""
    return sum(group["gate"].size for group in groups.values())


def _phases(steps: int, initial_steps: int | None, final_steps: int | None) -> tuple[int, int]:
    """The update before the first allocation and that of the last."""
    first = steps // 10 if initial_steps is None else initial_steps
    last = steps - (steps // 2 if final_steps is None else final_steps)
    if not 0 <= first < last <= steps:
        raise ValueError(
            f"initial_steps={first} and final_steps={steps - last} leave no update to allocate at, of {steps}; "
            "expected initial_steps + final_steps below steps"
        )
    return first, last


def _progress(step: Any, first: int, last: int) -> Array:
    return jnp.clip((jnp.asarray(step) - first) / (last - first), 0, 1)
