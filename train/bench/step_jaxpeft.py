"""The library's own rows of the step benchmark: the frozen bound, all parameters, and adapters."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxpeft
from jaxpeft import methods, models
from train.bench import step_jax
from train.bench.step_tokens import tokens
from train.bench.workers import Work


def frozen(folder: str, batch: int, length: int) -> Work:
    """Forward pass and gradient of the activations down to the first layer; nothing is trained.

    It is the gradient with respect to the layers' first norm scales, which adds one sum over the tokens a layer. Those
    of all layers are one array, so the scan over the layers leaves no cheaper way to reach the first.
    """
    lm, inputs = _read(folder, batch, length)

    def loss(scale: jax.Array, base: Any, read: jax.Array, targets: jax.Array) -> jax.Array:
        layers = {**base["layers"], "input_norm": {"scale": scale}}
        return lm.token_losses({**base, "layers": layers}, read, targets).mean()

    def step(gradient: jax.Array, base: Any, read: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
        del gradient
        found, gradient = jax.value_and_grad(loss)(base["layers"]["input_norm"]["scale"], base, read, targets)
        return gradient, found

    gradient = jnp.zeros_like(lm.params["layers"]["input_norm"]["scale"])
    return step_jax.work(step, gradient, (lm.params, *inputs), 0)


def full(folder: str, batch: int, length: int) -> Work:
    """`jax.grad` with respect to every parameter of the model."""
    lm, inputs = _read(folder, batch, length)

    def step(state: tuple[Any, Any], read: jax.Array, targets: jax.Array) -> tuple[Any, jax.Array]:
        params, moments = state
        loss, gradients = jax.value_and_grad(lambda params: lm.token_losses(params, read, targets).mean())(params)
        return step_jax.updated(gradients, params, moments), loss

    state = (lm.params, step_jax.OPTIMIZER.init(lm.params))
    return step_jax.work(step, state, inputs, lm.num_params)


def adapter(folder: str, batch: int, length: int, spec: Mapping[str, Any]) -> Work:
    """`jaxpeft.adapt` with an adapter of every linear weight of the layers."""
    lm, inputs = _read(folder, batch, length)
    made = jaxpeft.init(jax.random.key(0), methods.spec_from_dict(spec), jaxpeft.find(lm.params), weights=lm.params)
    state = (made, step_jax.OPTIMIZER.init(made.params))
    return step_jax.work(adapter_step(lm), state, (lm.params, *inputs), jaxpeft.count(made))


def adapter_step(lm: models.LanguageModel) -> step_jax.Step:
    """The step of an adapter: ((adapter, optimizer's state), base, tokens, targets) -> (state, loss)."""
    forward = jaxpeft.adapt(lm.token_losses)

    def step(state: tuple[Any, Any], base: Any, read: jax.Array, targets: jax.Array) -> tuple[Any, jax.Array]:
        adapter, moments = state

        def loss(params: Any) -> jax.Array:
            return forward(base, adapter.replace(params=params), read, targets).mean()

        found, gradients = jax.value_and_grad(loss)(adapter.params)
        params, moments = step_jax.updated(gradients, adapter.params, moments)
        return (adapter.replace(params=params), moments), found

    return step


def _read(folder: str, batch: int, length: int) -> tuple[models.LanguageModel, tuple[np.ndarray, np.ndarray]]:
    lm = models.load(folder, tokenizer=False)
    assert isinstance(lm, models.LanguageModel)
    return lm, tokens(lm.config.vocab_size, batch, length)
