"""How do the blocks of a GGUF file become parameters as they are?"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np

from jaxpeft.blocks import Quantized
from jaxpeft.models import convert, gguf
from jaxpeft.models.config import Config
from jaxpeft.models.names import hf_name, is_kernel
from jaxpeft.quantize import shardings
from jaxpeft.sites import paths_and_leaves, with_leaves


def quantized_params(source: str | os.PathLike, config: Config, like: Any, *, weights: bool = True) -> Any:
    """The parameters of a GGUF file, Q4_1 and Q8_0 weights in their own blocks; they stand for the values in them.

    Args:
      source: the file.
      config: of the model.
      like: tree of `jax.ShapeDtypeStruct` with shardings, from `jaxpeft.models.load` with ``weights=False``. A weight
        whose layers are not all of one of these two types becomes floats.
      weights: False gives shapes.
    """
    tensors = {convert.hf_tensor_name(name): tensor for name, tensor in gguf.read(source).tensors.items()}
    made = []
    for path, leaf in paths_and_leaves(like):
        name = hf_name(path)
        layers = range(leaf.shape[0]) if "{}" in name else (0,)
        stored = [tensors[name.format(layer)] for layer in layers]
        arrange = partial(_arranged, path, config, stacked="{}" in name)
        # Blocks lie along the rows of the file: the inputs of an output, or the features of a token.
        axis = -2 if is_kernel(path) else -1
        made.append(_blocks(stored, leaf, arrange, axis, weights) or _floats(stored, leaf, arrange, weights))
    return with_leaves(like, made)


def _blocks(
    stored: Sequence[gguf.Tensor], leaf: jax.ShapeDtypeStruct, arrange: Callable, axis: int, weights: bool
) -> Quantized | None:
    types = {tensor.block_type.name for tensor in stored}
    if len(types) > 1 or not types <= {"Q4_1", "Q8_0"}:
        return None
    kind = types.pop().lower()
    codes, scales, mins = zip(*map(_parts, stored), strict=True)
    layout = "l" * (len(leaf.shape) - 2) + "io"
    least = None if kind == "q8_0" else arrange(mins)
    weight = Quantized(arrange(codes), arrange(scales), least, None, None, kind, axis, leaf.dtype, layout)
    placed = shardings(weight, leaf.sharding)
    if not weights:
        return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), weight, placed)
    return jax.tree.map(_place, weight, placed)


def _parts(tensor: gguf.Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Codes, scales and minima of a tensor, rows as in the file."""
    blocks = tensor.raw.reshape(*tensor.shape[:-1], -1, tensor.block_type.size)
    rows = (*tensor.shape[:-1], -1)

    def halves(at: int) -> np.ndarray:
        return np.ascontiguousarray(blocks[..., at : at + 2]).view("<f2").reshape(rows)

    if tensor.block_type.name == "Q8_0":
        return blocks[..., 2:].reshape(rows).view(np.int8), halves(0), None
    return blocks[..., 4:].reshape(rows), halves(0), halves(2)


def _floats(stored: Sequence[gguf.Tensor], leaf: jax.ShapeDtypeStruct, arrange: Callable, weights: bool) -> Any:
    if not weights:
        return leaf
    return _place(arrange([tensor.dequantize() for tensor in stored]).astype(leaf.dtype), leaf.sharding)


def _arranged(path: str, config: Config, rows: Sequence[np.ndarray], *, stacked: bool) -> np.ndarray:
    """Arrays of a weight, one a layer with the file's rows, as its parameter lies: (layers, in, out) for a kernel."""
    heads = {"q": config.num_attention_heads, "k": config.num_key_value_heads}
    projection = path.rpartition("_proj")[0][-1:] if "self_attn" in path else ""
    if projection in heads:
        rows = [convert.unpermute(array, heads[projection]) for array in rows]
    if is_kernel(path):
        rows = [array.T for array in rows]
    return np.stack(rows) if stacked else np.ascontiguousarray(rows[0])


def _place(array: np.ndarray, sharding: jax.sharding.Sharding) -> jax.Array:
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])
