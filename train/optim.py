"""The optimizer and one training step."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import optax

import jaxpeft
from jaxpeft.spec import Spec
from train import devices, task
from train.config import Config, ConfigError, Optimizer

if TYPE_CHECKING:
    from train.job import Subject


def schedule(config: Optimizer, steps: int) -> optax.Schedule:
    """The learning rate of step 0 … steps - 1: a linear rise over the warm-up, then the decay."""
    warmup = round(config.warmup * steps)
    # From rate/(warmup + 1), so that no step is spent on a rate of zero, and down to nearly zero at the last.
    rise = optax.linear_schedule(config.learning_rate / (warmup + 1), config.learning_rate, warmup)
    rest = max(steps - warmup, 1)
    decay = {
        "linear": optax.linear_schedule(config.learning_rate, 0.0, rest),
        "cosine": optax.cosine_decay_schedule(config.learning_rate, rest),
        "constant": optax.constant_schedule(config.learning_rate),
    }[config.schedule]
    return optax.join_schedules([rise, decay], [warmup])


def optimizer(config: Optimizer, steps: int, spec: Spec) -> optax.GradientTransformation:
    """AdamW with clipping by the global norm, in the rule of a method that chooses its ranks.

    It sees the adapter's parameters only.

    Raises:
      ConfigError: a setting of the rule is missing or unknown.
    """
    clip = optax.clip_by_global_norm(config.clip) if config.clip else optax.identity()
    adamw = optax.adamw(
        schedule(config, steps), b1=config.b1, b2=config.b2, eps=config.eps, weight_decay=config.weight_decay
    )
    plain = optax.chain(clip, adamw, jaxpeft.scale_rates(config.rates))
    try:
        return jaxpeft.allocate.for_spec(spec, plain, steps, **config.allocator)
    except (TypeError, ValueError) as error:
        raise ConfigError([f"optimizer.allocator: {error}"]) from None


def step_function(
    forward: Callable, optimizer: optax.GradientTransformation, accumulate: int = 1, orthogonality: float = 0.0
) -> Callable:
    """One training step: (adapter, opt_state, base, batch, key, step) -> (adapter, opt_state, metrics).

    The loss is the mean over the learned tokens of the whole batch, however it is split, so accumulation gives the
    gradient of the unsplit batch. Jit it with the first two arguments donated.

    Args:
      forward: (base, adapter, targets=…, dropout_key=…, …) -> losses of the shape of the batch's weights, for instance
        (B, S) of an adapted `token_losses`.
      optimizer: applied to the adapter's parameters.
      accumulate: parts of a batch that run one after the other.
      orthogonality: weight of the adapter's `jaxpeft.allocate.orthogonality` in the loss; the reported loss is without.
    """

    def total_loss(params: Any, adapter: Any, base: Any, batch: dict[str, jax.Array], key: jax.Array) -> jax.Array:
        inputs = {name: array for name, array in batch.items() if name != "weights"}
        losses = forward(base, adapter.replace(params=params), **inputs, dropout_key=key)
        return jnp.sum(losses * batch["weights"])

    def step(adapter: Any, opt_state: Any, base: Any, batch: dict[str, jax.Array], key: jax.Array, step: jax.Array):
        key = jax.random.fold_in(key, step)
        grad = jax.value_and_grad(total_loss)
        if accumulate == 1:
            loss, gradients = grad(adapter.params, adapter, base, batch, key)
        else:

            def add(total: Any, part: Any) -> tuple[Any, None]:
                number, batch = part
                return jax.tree.map(
                    jnp.add, total, grad(adapter.params, adapter, base, batch, jax.random.fold_in(key, number))
                ), None

            zero = jax.tree.map(jnp.zeros_like, (jnp.float32(0), adapter.params))
            (loss, gradients), _ = jax.lax.scan(add, zero, (jnp.arange(accumulate), split(batch, accumulate)))
        learned = jnp.maximum(jnp.sum(batch["weights"]), 1)
        gradients = jax.tree.map(lambda gradient: gradient / learned, gradients)
        if orthogonality:
            penalty = jax.grad(lambda params: jaxpeft.allocate.orthogonality(adapter.replace(params=params)))
            more = penalty(adapter.params)
            gradients = jax.tree.map(lambda gradient, other: gradient + orthogonality * other, gradients, more)
        updates, opt_state = optimizer.update(gradients, opt_state, adapter.params)
        metrics = {"loss": loss / learned, "grad_norm": optax.tree.norm(gradients)}
        return adapter.replace(params=optax.apply_updates(adapter.params, updates)), opt_state, metrics

    return step


def state_shardings(optimizer: optax.GradientTransformation, subject: Subject) -> Any:
    """How the optimizer's state for a subject's adapter lies on the mesh: as the arrays that it mirrors."""
    params = subject.adapter.params
    return jaxpeft.sharding.like(jax.eval_shape(optimizer.init, params), params, subject.stored.params)


def compiled_step(
    config: Config, optimizer: optax.GradientTransformation, subject: Subject, donate: bool = True
) -> devices.Compiled:
    """`step_function` of a subject, on its mesh; what it returns lies as what it is given."""
    forward = jaxpeft.adapt(subject.losses, shardings=subject.shardings)
    return devices.Compiled(
        step_function(forward, optimizer, config.train.accumulate, config.optimizer.orthogonality),
        subject.mesh,
        donate_argnums=(0, 1) if donate else (),
        out_shardings=(subject.stored, state_shardings(optimizer, subject), devices.everywhere(subject.mesh)),
    )


def argument_shapes(
    config: Config, optimizer: optax.GradientTransformation, subject: Subject, shape: tuple[int, int]
) -> tuple:
    """The shapes of what `compiled_step` takes for a batch of (sequences, length), where they lie."""
    state = jax.eval_shape(optimizer.init, subject.adapter.params)
    batch = {
        name: jax.ShapeDtypeStruct(size, kind, sharding=devices.of_batch(subject.mesh, size))
        for name, (size, kind) in task.of(config).shapes(config, subject.model, *shape).items()
    }
    whole = devices.everywhere(subject.mesh)
    key = jax.ShapeDtypeStruct((), subject.key.dtype, sharding=whole)
    step = jax.ShapeDtypeStruct((), jnp.int32, sharding=whole)
    state = jaxpeft.sharding.shapes(state, state_shardings(optimizer, subject))
    return subject.adapter, state, subject.base, batch, key, step


def split(batch: dict[str, jax.Array], parts: int) -> dict[str, jax.Array]:
    """(B, …) -> (parts, B/parts, …). Part i takes rows i, i + parts, …, so every device keeps its own rows."""
    return jax.tree.map(lambda x: x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1), batch)
