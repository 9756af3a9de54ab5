"""How is a step of JAX compiled, counted and repeated?"""

import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import optax

from train import costs
from train.bench.workers import Work

OPTIMIZER = optax.adamw(1e-4, weight_decay=0.0)

Step = Callable[..., tuple[Any, jax.Array]]


def updated(gradients: Any, params: Any, moments: Any) -> tuple[Any, Any]:
    """Parameters and the optimizer's state after one step of `OPTIMIZER`."""
    updates, moments = OPTIMIZER.update(gradients, moments, params)
    return optax.apply_updates(params, updates), moments


def compiled(step: Step, state: Any, inputs: Sequence[Any]) -> jax.stages.Compiled:
    """A step (state, *inputs) -> (state, loss) of arrays or shapes, which donates its state."""
    return jax.jit(step, donate_argnums=0).lower(state, *inputs).compile()


def work(step: Step, state: Any, inputs: Sequence[Any], trained: int) -> Work:
    """A step that is compiled, and was taken once.

    Args:
      step: (state, *inputs) -> (state, loss); the state is donated.
      state: before the first step.
      inputs: what stays as it is.
      trained: parameters.
    """
    start = time.perf_counter()
    program = compiled(step, state, inputs)
    seconds = time.perf_counter() - start
    held = [state]

    def run() -> float:
        held[0], loss = jax.block_until_ready(program(held[0], *inputs))
        return float(loss)

    counted = costs.analyse(program.as_text())
    facts = {
        "trained": trained,
        "compile_seconds": seconds,
        "gflop": None if counted.unknown_loops else counted.flops / 1e9,
        "first_loss": run(),
    }
    return Work(run, facts, steady=True)
