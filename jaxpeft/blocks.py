"""How a weight lies in few bits: codes in blocks along one axis, a scale for every block; and what they stand for."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import AxisType

from jaxpeft.formats import KINDS, encode_symmetric

SECOND_BLOCK = 256
"""Most scales that share one second-level scale; arXiv 2305.14314 §3."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Quantized:
    """One weight of a base tree in few bits; a pytree that behaves as the array it stands for.

    w = scale · decode(code) + min for every block, and where scales are quantized too,
    scale = scale_mean + scale_step · scales.

    Every array has the axes of the weight in their order, so slices of a stack, transposes and a kernel's
    `PartitionSpec` hold for all of them; only `axis` is shorter. Two 4-bit codes share a byte: of a block, the first
    half lies in the low and the second in the high nibbles, as in GGUF.

    Attributes:
        codes: (…, size or size / 2, …) int8 or uint8.
        scales: (…, size / block, …) float32 or float16; int8 where they are quantized themselves.
        mins: as scales; None where the format has none.
        scale_steps, scale_means: (…, size / block / second-level block, …) float32; None where scales are plain.
        kind: one of `KINDS`.
        axis: the axis of the blocks, counted from the last, so that it holds for a slice of a stack as well.
        dtype: of the weight it stands for.
        layout: one letter an axis of the weight, as in `jaxpeft.sites.Group`.
    """

    codes: Array
    scales: Array
    mins: Array | None
    scale_steps: Array | None
    scale_means: Array | None
    kind: str = dataclasses.field(metadata={"static": True})
    axis: int = dataclasses.field(metadata={"static": True})
    dtype: np.dtype = dataclasses.field(metadata={"static": True})
    layout: str = dataclasses.field(metadata={"static": True})

    @property
    def ndim(self) -> int:
        """Number of axes of the weight."""
        return len(self.codes.shape)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight."""
        shape = list(self.codes.shape)
        shape[self.axis] *= 8 // KINDS[self.kind].bits
        return tuple(shape)

    @property
    def size(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    @property
    def block(self) -> int:
        """Weights that share a scale."""
        return self.shape[self.axis] // self.scales.shape[self.axis]

    @property
    def nbytes(self) -> int:
        """Bytes of all its arrays."""
        return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))

    def dequantize(self) -> Array:
        """The weight it stands for: computed in float32, cast once to `dtype`."""
        scales = self.plain_scales()
        codes, at = _in_blocks(self.unpacked(), scales.shape[self.axis], self.axis)
        blocks = KINDS[self.kind].decode(codes) * jnp.expand_dims(scales, at)
        if self.mins is not None:
            blocks = blocks + jnp.expand_dims(self.mins.astype(jnp.float32), at)
        return blocks.reshape(self.shape).astype(jax.dtypes.canonicalize_dtype(self.dtype))

    def plain_scales(self) -> Array:
        """The scales that stand behind the codes, float32."""
        scales = self.scales.astype(jnp.float32)
        if self.scale_steps is None or self.scale_means is None:
            return scales
        codes, at = _in_blocks(scales, self.scale_steps.shape[self.axis], self.axis)
        codes = codes * jnp.expand_dims(self.scale_steps, at) + jnp.expand_dims(self.scale_means, at)
        return codes.reshape(scales.shape)

    def unpacked(self) -> Array:
        """One code a weight, of the weight's shape; 4-bit codes as 0 to 15."""
        if KINDS[self.kind].bits == 8:
            return self.codes
        codes, at = _in_blocks(self.codes, self.scales.shape[self.axis], self.axis)
        return jnp.concatenate([codes & 15, codes >> 4], at).reshape(self.shape)

    def astype(self, dtype: Any) -> Self:
        """The same codes, standing for a weight of another float type."""
        return dataclasses.replace(self, dtype=jnp.dtype(dtype))


def encode(weight: Array, kind: str, axis: int, block: int, double: bool, layout: str) -> Quantized:
    """A weight in blocks along one axis; `block` divides it."""
    axis -= weight.ndim if axis >= 0 else 0
    blocks, at = _in_blocks(weight.astype(jnp.float32), weight.shape[axis] // block, axis)
    codes, scales, mins = KINDS[kind].encode(blocks, at)
    codes = packed(codes.reshape(weight.shape), kind, axis, codes.shape[at - 1])
    shape = list(weight.shape)
    shape[axis] = -1
    scales, mins = scales.reshape(shape), None if mins is None else mins.reshape(shape)
    steps = means = None
    if double:
        count = scales.shape[axis]
        second = next(size for size in range(min(count, SECOND_BLOCK), 0, -1) if count % size == 0)
        grouped, at = _in_blocks(scales, count // second, axis)
        # The mean is the second-level block's own and not the tensor's: then a slice, a row and a shard are complete.
        means = _mean(grouped, at)
        signed, steps, _ = encode_symmetric(8, 127, grouped - means, at)
        scales, steps, means = signed.reshape(shape), steps.reshape(shape), means.reshape(shape)
    return Quantized(codes, scales, mins, steps, means, kind, axis, jnp.dtype(weight.dtype), layout)


def packed(codes: Array, kind: str, axis: int, count: int) -> Array:
    """The inverse of `Quantized.unpacked`, for `count` blocks along an axis counted from the last."""
    if KINDS[kind].bits == 8:
        return codes
    blocks, at = _in_blocks(codes, count, axis)
    low, high = jnp.split(blocks, 2, at)
    shape = list(codes.shape)
    shape[axis] = -1
    return (low | high << 4).reshape(shape)


def _mean(scales: Array, axis: int) -> Array:
    """The mean of at most `SECOND_BLOCK` scales, none negative, to 22 bits of the largest.

    It has the same bits wherever they lie. A sum of floats depends on its order, and so on how devices share the axis;
    a sum of integers does not, and an integer times a power of two is exact, whatever a compiler fuses it with.
    """
    largest = jnp.maximum(scales.max(axis, keepdims=True), jnp.finfo(jnp.float32).tiny)
    unit = jax.lax.bitcast_convert_type(jax.lax.bitcast_convert_type(largest, jnp.int32) & 0x7F800000, jnp.float32)
    integers = jnp.round(scales / unit * 2**21).astype(jnp.int32)  # Below 2²²; 2³⁰ as a sum.
    size = scales.shape[axis]
    mean = (integers.sum(axis, keepdims=True) + size // 2) // size
    return mean.astype(jnp.float32) * (unit * 2.0**-21)


def _in_blocks(array: Array, count: int, axis: int) -> tuple[Array, int]:
    """One axis, counted from the last, as (count, block); and where `block` is."""
    axis += array.ndim
    shape = (*array.shape[:axis], count, array.shape[axis] // count, *array.shape[axis + 1 :])
    return array.reshape(shape), axis + 1


def is_quantized(node: Any) -> bool:
    """Whether a node of a base tree is a weight in few bits: then it is one leaf."""
    return isinstance(node, Quantized)


def as_floats(leaf: Any) -> Any:
    """What a model is traced with in place of a leaf: the shape of its floats where it is in few bits."""
    if not isinstance(leaf, Quantized):
        return leaf
    codes = jax.typeof(leaf.codes)
    sharding = codes.sharding if AxisType.Explicit in codes.sharding.mesh.axis_types else None
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding, manual_axis_type=codes.mat)


def dequantized(weight: Any) -> Any:
    """A weight as an array."""
    return weight.dequantize() if isinstance(weight, Quantized) else weight


def rearranged(weight: Any, move: Callable[[Array], Array], source: Sequence[int | None]) -> Any:
    """A weight, or all arrays of one in few bits, moved.

    Args:
        weight: an array, or a `Quantized`.
        move: what moves axes, drops or adds axes of size one, or cuts axes other than that of the blocks.
        source: for every axis of the result, which axis of the weight it was; None for a new one.
    """
    if not isinstance(weight, Quantized):
        return move(weight)
    axis = list(source).index(weight.axis + weight.ndim) - len(source)
    return dataclasses.replace(jax.tree.map(move, weight), axis=axis)
