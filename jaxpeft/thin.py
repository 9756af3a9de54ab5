"""The product with a thin factor, in the order of operands that suits its gradient."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.interpreters import ad
from jax.sharding import AxisType

from jaxpeft.primitive import define


def times(hidden: Array, factor: Array) -> Array:
    """``hidden @ factor`` for hidden (..., r) and a factor (r, out) of the same dtype -> (..., out).

    The factor's gradient is contracted as hiddenᵀ · cotangent. JAX transposes a product the other way round,
    (cotangentᵀ · hidden)ᵀ, and where a backend wants the left operand row by row, as XLA's CPU backend does, that
    copies the (tokens, out) cotangent into its transpose instead of the (tokens, r) hidden: 3.9 ms against 0.5 for
    1,024 tokens, out = 1,536 and r = 16 on two cores, more where XLA fuses what makes the cotangent into the copy
    (docs/decisions/0016-the-training-step.md). It is a primitive, because a `jax.custom_vjp` has no forward mode. All
    its products have the precision that `jax.default_matmul_precision` has at the call.

    Examples:
        >>> import jax.numpy as jnp
        >>> times(jnp.ones((2, 3)), jnp.ones((3, 4))).shape
        (2, 4)
    """
    if any(kind != AxisType.Auto for kind in jax.sharding.get_abstract_mesh().axis_types):
        return hidden @ factor  # On explicit and manual axes gradients are told where they lie, by JAX's rules.
    precision = jax.config.jax_default_matmul_precision  # pyright: ignore[reportAttributeAccessIssue]
    return _times.bind(hidden, factor, shared=0, precision=precision)


def _dot(left: Array, right: Array, left_axes: Any, right_axes: Any, *, shared: int, precision: Any) -> Array:
    both = tuple(range(shared))
    return jax.lax.dot_general(left, right, ((left_axes, right_axes), (both, both)), precision=precision)


def _product(hidden: Array, factor: Array, *, shared: int, precision: Any) -> Array:
    """Of hidden (*S, ..., r) and a factor (*S, r, out), whose first `shared` axes S they have in common."""
    return _dot(hidden, factor, (hidden.ndim - 1,), (shared,), shared=shared, precision=precision)


def _of_hidden(cotangent: Array, hidden: Any, factor: Array, *, shared: int, precision: Any) -> Array:
    del hidden
    return _dot(cotangent, factor, (cotangent.ndim - 1,), (shared + 1,), shared=shared, precision=precision)


def _of_factor(cotangent: Array, hidden: Array, factor: Any, *, shared: int, precision: Any) -> Array:
    del factor
    tokens = tuple(range(shared, hidden.ndim - 1))
    return _dot(hidden, cotangent, tokens, tokens, shared=shared, precision=precision)


def _batched(primitive: Any, operands: Any, axes: Any, *, shared: int, precision: Any) -> tuple[Array, int]:
    (hidden, factor), (of_hidden, of_factor) = operands, axes
    if of_factor is None:  # One axis more of tokens.
        hidden = jnp.moveaxis(hidden, of_hidden, shared)
        return primitive.bind(hidden, factor, shared=shared, precision=precision), shared
    if of_hidden is None:
        return jax.vmap(partial(_product, shared=shared, precision=precision), in_axes=axes)(hidden, factor), 0
    hidden, factor = jnp.moveaxis(hidden, of_hidden, 0), jnp.moveaxis(factor, of_factor, 0)
    return primitive.bind(hidden, factor, shared=shared + 1, precision=precision), 0


_times = define("thin_product", _product, _batched, ("shared", "precision"))
ad.defbilinear(_times, _of_hidden, _of_factor)
