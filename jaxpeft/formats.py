"""Formats of few bits: how a block of floats becomes codes and a scale, and what a code stands for."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
"""The 16 values of 4-bit NormalFloat: quantiles of a normal distribution, and zero; arXiv 2305.14314, app. E."""


@dataclass(frozen=True)
class Kind:
    """One format.

    Attributes:
        bits: of one code.
        block: weights of one block, by default.
        fixed: whether the format knows no other block.
        double: whether the scales are quantized too, by default.
        encode: blocks (…, n, block, …) float32 and the axis of `block` -> codes of that shape, scales and minima with 1
            in its place; minima are None where zero is a code.
        decode: codes -> float32, before scale and minimum.
    """

    bits: int
    block: int
    fixed: bool
    double: bool
    encode: Callable[[Array, int], tuple[Array, Array, Array | None]]
    decode: Callable[[Array], Array]


def _encode_nf4(blocks: Array, axis: int) -> tuple[Array, Array, None]:
    largest = jnp.abs(blocks).max(axis, keepdims=True)
    x = blocks / _nonzero(largest)
    # The nearest value's number is how many midpoints lie below; a sum of comparisons is one pass without an index.
    midpoints = (np.asarray(NF4[1:]) + np.asarray(NF4[:-1])) / 2
    codes = sum((x > np.float32(midpoint)).astype(jnp.uint8) for midpoint in midpoints)
    return jnp.asarray(codes), largest, None


def _decode_nf4(codes: Array) -> Array:
    # Halving the table bit by bit is elementwise; looking it up is a gather, which accelerators are slow at. With
    # jnp.where each step is a call of its own, and on CPU they do not become one loop.
    values = [jax.lax.full_like(codes, value, jnp.float32) for value in NF4]
    for bit in (1, 2, 4, 8):
        chosen = (codes & bit) != 0
        values = [jax.lax.select(chosen, high, low) for low, high in zip(values[::2], values[1::2], strict=True)]
    return values[0]


def encode_symmetric(bits: int, bound: float, blocks: Array, axis: int) -> tuple[Array, Array, None]:
    """As `Kind.encode`: steps of (largest magnitude) / bound."""
    # A bound half a step beyond the last code uses that code's whole step, so no step is larger than it must be.
    scales = jnp.abs(blocks).max(axis, keepdims=True) / bound
    codes = jnp.clip(jnp.round(blocks / _nonzero(scales)), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return (codes + 8).astype(jnp.uint8) if bits == 4 else codes.astype(jnp.int8), scales, None


def _encode_q4_1(blocks: Array, axis: int) -> tuple[Array, Array, Array]:
    least = blocks.min(axis, keepdims=True)
    scales = (blocks.max(axis, keepdims=True) - least) / 15
    codes = jnp.clip(jnp.floor((blocks - least) / _nonzero(scales) + 0.5), 0, 15)
    return codes.astype(jnp.uint8), scales.astype(jnp.float16), least.astype(jnp.float16)


def _encode_q8_0(blocks: Array, axis: int) -> tuple[Array, Array, None]:
    codes, scales, _ = encode_symmetric(8, 127, blocks, axis)
    return codes, scales.astype(jnp.float16), None


def _nonzero(scales: Array) -> Array:
    return jnp.where(scales == 0, 1, scales)


def _as_number(codes: Array) -> Array:
    return codes.astype(jnp.float32)


KINDS = {
    "nf4": Kind(4, 64, False, True, _encode_nf4, _decode_nf4),
    "int8": Kind(8, 64, False, False, partial(encode_symmetric, 8, 127.5), _as_number),
    "int4": Kind(4, 64, False, False, partial(encode_symmetric, 4, 7.5), lambda codes: codes.astype(jnp.float32) - 8),
    "q4_1": Kind(4, 32, True, False, _encode_q4_1, _as_number),
    "q8_0": Kind(8, 32, True, False, _encode_q8_0, _as_number),
}
"""The formats by name; ``q4_1`` and ``q8_0`` are GGUF's."""
