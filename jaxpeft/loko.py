"""LoKO: a Kalman filter that trains an adapter online, one observation at a time (Abdi et al., arXiv 2410.11551).

The trained parameters θ are the state to estimate, an example's target y is a noisy observation of the model's output,
y = h(θ) + v with v ~ N(0, R), and h is linearised at the present estimate. Of the covariance of θ only the diagonal p
is kept, so a step costs what the model's Jacobian does, linear in the number of parameters.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array


class State(NamedTuple):
    """State of the filter.

    Attributes:
        variance: p, the diagonal of the parameters' covariance, a tree like them.
        noise: R (m, m), the covariance of the observations' noise.
    """

    variance: Any
    noise: Array


def init(params: Any, outputs: int, *, variance: float = 1.0, noise: float = 1.0) -> State:
    """The state before the first observation.

    Args:
        params: the trained parameters, e.g. `adapter.params`.
        outputs: m, the numbers in one observation.
        variance: of every parameter: the square of how far it may be from where it must go.
        noise: variance of every number of an observation.

    Raises:
        ValueError: a variance is not positive.
    """
    if variance <= 0 or noise <= 0:
        raise ValueError(f"loko.init: variance={variance} and noise={noise}, expected positive numbers")
    return State(jax.tree.map(lambda leaf: jnp.full_like(leaf, variance), params), noise * jnp.eye(outputs))


def update(params: Any, state: State, jacobian: Any, error: Array, *, noise_decay: float = 0.95) -> tuple[Any, State]:
    """One step of the filter: with H the Jacobian and e the error,

        S = H diag(p) Hᵀ + R,   θ ← θ + p ⊙ Hᵀ S⁻¹ e,   p ← p - p ⊙ diag(Hᵀ S⁻¹ H) ⊙ p,

    the extended Kalman filter without process noise, of whose new covariance the diagonal is kept. Then R, for the next
    observation, is averaged with what this one says of it. The paper's estimate of R is an exponential moving average
    too; of what could not be confirmed, and this is our reading: ε εᵀ + H diag(p) Hᵀ with the new p, where ε = R S⁻¹ e
    is what the step leaves of the error in the linearised model.

    Args:
        params: θ.
        state: from `init` or the step before.
        jacobian: H, a tree like `params` whose leaves lead with the m outputs, as `jax.jacrev` returns it.
        error: e = y - h(θ), (m,).
        noise_decay: weight of the old R in the average; 1 keeps R as `init` set it.

    Returns:
        The new parameters and state.
    """
    weighted = jax.tree.map(lambda h, p: h * p, jacobian, state.variance)
    rows = [jnp.reshape(leaf, (error.size, -1)) for leaf in jax.tree.leaves(jacobian)]
    gains = [jnp.reshape(leaf, (error.size, -1)) for leaf in jax.tree.leaves(weighted)]
    predicted = sum(gain @ row.T for gain, row in zip(gains, rows, strict=True))
    factor = jax.scipy.linalg.cho_factor(predicted + state.noise, lower=True)
    whitened = jax.scipy.linalg.cho_solve(factor, error)
    params = jax.tree.map(lambda theta, gain: theta + jnp.tensordot(whitened, gain, 1), params, weighted)

    def known(gain: Array) -> Array:
        """diag(P Hᵀ S⁻¹ H P), from half of it: S = C Cᵀ."""
        flat = jax.scipy.linalg.solve_triangular(factor[0], gain.reshape(error.size, -1), lower=True)
        return jnp.sum(flat**2, axis=0).reshape(gain.shape[1:])

    variance = jax.tree.map(lambda p, gain: jnp.maximum(p - known(gain), 0), state.variance, weighted)
    left = [row * jnp.reshape(p, -1) for row, p in zip(rows, jax.tree.leaves(variance), strict=True)]
    after = sum(new @ row.T for new, row in zip(left, rows, strict=True))
    residual = state.noise @ whitened
    noise = noise_decay * state.noise + (1 - noise_decay) * (jnp.outer(residual, residual) + after)
    return params, State(variance, noise)


def step(
    predict: Callable[[Any], Array], params: Any, state: State, target: Array, *, noise_decay: float = 0.95
) -> tuple[Any, State]:
    """`update` with the Jacobian and the error of a model at one observation.

    Args:
        predict: params -> outputs; for classes, the softmax of the logits. Its outputs, flattened, are the m numbers of
            one observation: few, for H is m times as large as the parameters.
        params: θ.
        state: from `init` or the step before.
        target: y, in the shape of the outputs; for classes, one-hot.
        noise_decay: as in `update`.

    Returns:
        The new parameters and state.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jaxpeft import loko
        >>> params = {"w": jnp.zeros(2)}
        >>> state = loko.init(params, outputs=1, noise=1e-6)
        >>> for x, y in [((1.0, 0.0), 3.0), ((0.0, 1.0), -2.0)]:
        ...     params, state = loko.step(lambda p: p["w"] @ jnp.array(x), params, state, jnp.array(y))
        >>> [round(float(weight), 3) for weight in params["w"]]
        [3.0, -2.0]
    """

    def outputs(params: Any) -> tuple[Array, Array]:
        flat = jnp.ravel(predict(params))
        return flat, flat

    jacobian, found = jax.jacrev(outputs, has_aux=True)(params)
    return update(params, state, jacobian, jnp.ravel(target) - found, noise_decay=noise_decay)
