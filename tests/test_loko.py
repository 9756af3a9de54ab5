"""LoKO: the Kalman filter it is, and how fast it learns online."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpeft
from jaxpeft import loko
from jaxpeft.methods import lora


def dense_kalman(theta, covariance, h, y, noise):
    """One step of the textbook filter, covariance in full."""
    s = h @ covariance @ h.T + noise
    gain = covariance @ h.T @ np.linalg.inv(s)
    return theta + gain @ (y - h @ theta), covariance - gain @ h @ covariance


def test_a_dense_filter_where_the_covariance_stays_diagonal() -> None:
    """Every observation sees parameters of its own, so nothing is lost with the rest of the covariance."""
    rng = np.random.default_rng(0)
    theta, covariance, noise = np.zeros(6), 2.0 * np.eye(6), 0.3 * np.eye(2)
    params = {"w": jnp.zeros(6)}
    state = loko.init(params, 2, variance=2.0, noise=0.3)
    for _ in range(5):
        for first in (0, 2, 4):
            h = np.zeros((2, 6))
            h[[0, 1], [first, first + 1]] = rng.normal(size=2)
            y = rng.normal(size=2)
            theta, covariance = dense_kalman(theta, covariance, h, y, noise)
            params, state = loko.step(lambda p, h=h: h @ p["w"], params, state, jnp.asarray(y), noise_decay=1.0)
    np.testing.assert_allclose(params["w"], theta, atol=1e-5)
    np.testing.assert_allclose(state.variance["w"], np.diag(covariance), atol=1e-6)
    np.testing.assert_allclose(state.noise, noise, atol=1e-7)


def test_one_step_of_a_dense_filter_and_the_diagonal_of_its_covariance() -> None:
    rng = np.random.default_rng(1)
    h, y = rng.normal(size=(3, 8)), rng.normal(size=3)
    theta, covariance = dense_kalman(np.ones(8), 0.5 * np.eye(8), h, y, 0.1 * np.eye(3))
    params = {"a": jnp.ones((2, 2)), "b": jnp.ones(4)}
    state = loko.init(params, 3, variance=0.5, noise=0.1)
    jacobian = {"a": jnp.asarray(h[:, :4]).reshape(3, 2, 2), "b": jnp.asarray(h[:, 4:])}
    params, state = loko.update(params, state, jacobian, jnp.asarray(y - h @ np.ones(8)), noise_decay=0.9)
    found = np.concatenate([np.ravel(params["a"]), params["b"]])
    np.testing.assert_allclose(found, theta, atol=1e-5)
    variance = np.concatenate([np.ravel(state.variance["a"]), state.variance["b"]])
    np.testing.assert_allclose(variance, np.diag(covariance), atol=1e-6)
    residual = y - h @ theta
    estimate = np.outer(residual, residual) + h @ np.diag(np.diag(covariance)) @ h.T
    np.testing.assert_allclose(state.noise, 0.9 * 0.1 * np.eye(3) + 0.1 * estimate, atol=1e-5)


def online(samples: int = 60):
    """A regression whose true weight is the base plus an update of rank one, one example at a time."""
    base = {"w": {"kernel": jax.random.normal(jax.random.key(0), (6, 2))}}
    keys = jax.random.split(jax.random.key(1), 3)
    true = base["w"]["kernel"] + jnp.outer(*[jax.random.normal(k, n) for k, n in zip(keys, ((6,), (2,)), strict=False)])
    inputs = jax.random.normal(keys[2], (samples, 6))
    adapter = jaxpeft.init(jax.random.key(3), lora.Spec(rank=2, alpha=2), jaxpeft.find(base))
    forward = jaxpeft.adapt(lambda base, x: x @ base["w"]["kernel"])

    def predict(params, x):
        return forward(base, adapter.replace(params=params), x)

    return adapter.params, predict, inputs, inputs @ true


def errors_of(params_by_step, predict, inputs, targets) -> jax.Array:
    """Mean squared error over all examples after every step."""
    each = jax.vmap(predict, (None, 0))
    return jax.vmap(lambda params: jnp.mean((each(params, inputs) - targets) ** 2))(params_by_step)


def run_sgd(rate, params, predict, inputs, targets):
    def step(params, example):
        x, y = example
        gradients = jax.grad(lambda params: jnp.sum((predict(params, x) - y) ** 2))(params)
        params = jax.tree.map(lambda p, g: p - rate * g, params, gradients)
        return params, params

    return errors_of(jax.lax.scan(step, params, (inputs, targets))[1], predict, inputs, targets)


def run_loko(params, predict, inputs, targets):
    def step(carry, example):
        x, y = example
        params, state = loko.step(lambda params: predict(params, x), *carry, y, noise_decay=0.9)
        return (params, state), (params, state)

    steps, states = jax.lax.scan(step, (params, loko.init(params, 2)), (inputs, targets))[1]
    return errors_of(steps, predict, inputs, targets), states


def test_fewer_samples_than_sgd_of_tuned_rate() -> None:
    params, predict, inputs, targets = online()
    mine, states = jax.jit(lambda params: run_loko(params, predict, inputs, targets))(params)
    sgd = jax.jit(jax.vmap(lambda rate: run_sgd(rate, params, predict, inputs, targets)))
    theirs = sgd(jnp.geomspace(1e-3, 0.3, 16))
    start = float(jnp.mean((jax.vmap(predict, (None, 0))(params, inputs) - targets) ** 2))

    def samples(errors):
        """Until a hundredth of the first error."""
        reached = np.flatnonzero(np.nan_to_num(errors, nan=np.inf) < 0.01 * start)
        return int(reached[0]) + 1 if len(reached) else len(errors) + 1

    assert samples(mine) < len(inputs)
    assert samples(mine) < min(map(samples, theirs))

    for variance in jax.tree.leaves(states.variance):
        assert (np.diff(variance, axis=0) <= 0).all(), "every observation adds knowledge"
        assert (variance >= 0).all()
    assert np.linalg.eigvalsh(states.noise).min() > 0


@pytest.mark.parametrize("fields", [{"variance": 0.0}, {"noise": -1.0}])
def test_variances_must_be_positive(fields) -> None:
    with pytest.raises(ValueError, match="expected positive numbers"):
        loko.init({"w": jnp.zeros(2)}, 1, **fields)
