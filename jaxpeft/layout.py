"""What the axes of a weight mean: one letter an axis, ``i`` in, ``o`` out, ``l`` a stack of layers or experts."""

import math
from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array

from jaxpeft.blocks import Quantized, dequantized


def axes(layout: str, letter: str) -> list[int]:
    """The axes that carry a letter."""
    return [axis for axis, at in enumerate(layout) if at == letter]


def sizes(shape: Sequence[int], layout: str, letter: str) -> tuple[int, ...]:
    """Sizes of the axes that carry a letter."""
    return tuple(shape[axis] for axis in axes(layout, letter))


def to_matrix(weight: Array | Quantized, layout: str) -> Array:
    """A weight as (*stack, in, out), its in-axes and its out-axes flattened; one in few bits as what it stands for.

    Examples:
        >>> to_matrix(jnp.zeros((2, 3, 8)), "iio").shape, to_matrix(jnp.zeros((5, 4, 3)), "oli").shape
        ((6, 8), (4, 3, 5))
    """
    stack = sizes(weight.shape, layout, "l")
    dims = (math.prod(sizes(weight.shape, layout, "i")), math.prod(sizes(weight.shape, layout, "o")))
    return jnp.transpose(dequantized(weight), _stack_in_out(layout)).reshape(*stack, *dims)


def from_matrix(matrix: Array, layout: str, shape: Sequence[int]) -> Array:
    """The inverse of `to_matrix`, for a weight of the given shape."""
    order = _stack_in_out(layout)
    apart = matrix.reshape([shape[axis] for axis in order])
    return jnp.transpose(apart, [order.index(axis) for axis in range(len(order))])


def _stack_in_out(layout: str) -> list[int]:
    return [*axes(layout, "l"), *axes(layout, "i"), *axes(layout, "o")]
