"""What is in a GGUF file? Metadata and weights, memory-mapped, dequantized by numpy alone.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; blocks: ``ggml-common.h`` of the same project.
"""

from __future__ import annotations

import dataclasses
import math
import mmap
import os
import struct
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

# Scalars of the metadata by their type number: struct's letter.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


def _f16(blocks: np.ndarray, at: int) -> np.ndarray:
    return np.ascontiguousarray(blocks[:, at : at + 2]).view("<f2").astype(np.float32)


def _nibbles(blocks: np.ndarray, at: int) -> np.ndarray:
    # The low halves are the block's first 16 weights, the high halves its last 16.
    packed = blocks[:, at : at + 16]
    return np.concatenate([packed & 15, packed >> 4], axis=1)


def _fifth_bits(blocks: np.ndarray, at: int) -> np.ndarray:
    return np.unpackbits(blocks[:, at : at + 4], axis=1, bitorder="little") << 4


def _q4_0(blocks):
    return _f16(blocks, 0) * (_nibbles(blocks, 2).astype(np.float32) - 8)


def _q4_1(blocks):
    return _f16(blocks, 0) * _nibbles(blocks, 4).astype(np.float32) + _f16(blocks, 2)


def _q5_0(blocks):
    return _f16(blocks, 0) * ((_nibbles(blocks, 6) | _fifth_bits(blocks, 2)).astype(np.float32) - 16)


def _q5_1(blocks):
    return _f16(blocks, 0) * (_nibbles(blocks, 8) | _fifth_bits(blocks, 4)).astype(np.float32) + _f16(blocks, 2)


def _q8_0(blocks):
    return _f16(blocks, 0) * blocks[:, 2:].view(np.int8).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class BlockType:
    """How `weights` weights lie in `size` bytes; `dequantize` takes (n, size) uint8 to (n, weights) float32."""

    name: str
    weights: int
    size: int
    dequantize: Callable[[np.ndarray], np.ndarray]


BLOCK_TYPES = {
    0: BlockType("F32", 1, 4, lambda blocks: blocks.view("<f4")),
    1: BlockType("F16", 1, 2, lambda blocks: blocks.view("<f2").astype(np.float32)),
    2: BlockType("Q4_0", 32, 18, _q4_0),
    3: BlockType("Q4_1", 32, 20, _q4_1),
    6: BlockType("Q5_0", 32, 22, _q5_0),
    7: BlockType("Q5_1", 32, 24, _q5_1),
    8: BlockType("Q8_0", 32, 34, _q8_0),
    30: BlockType("BF16", 1, 2, lambda blocks: blocks.view(ml_dtypes.bfloat16).astype(np.float32)),
}


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A weight in the file: `raw` is a view of the mapped bytes, read when `dequantize` is called."""

    shape: tuple[int, ...]
    block_type: BlockType
    raw: np.ndarray = dataclasses.field(repr=False)

    def dequantize(self) -> np.ndarray:
        """The weights, float32 of `shape`, rows being outputs as in torch."""
        return self.block_type.dequantize(self.raw.reshape(-1, self.block_type.size)).reshape(self.shape)


@dataclasses.dataclass(frozen=True)
class File:
    """A GGUF file: `metadata` by key, `tensors` by name."""

    metadata: dict[str, Any] = dataclasses.field(repr=False)
    tensors: dict[str, Tensor] = dataclasses.field(repr=False)


def read(path: str | os.PathLike) -> File:
    """Reads metadata and the places of the tensors; no weight is read yet.

    Args:
      path: a GGUF file, version 2 or 3, little-endian.

    Raises:
      ValueError: not a GGUF file, another version, truncated, or a tensor of a block type that is not in `BLOCK_TYPES`.
    """
    with open(path, "rb") as file:
        if os.fstat(file.fileno()).st_size < 24 or file.read(4) != b"GGUF":
            raise ValueError(f"{path}: not a GGUF file")
        # The map outlives the file object, and lives as long as an array views it.
        buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    try:
        return _parse(buffer, path)
    except struct.error as error:
        raise ValueError(f"{path}: truncated in its header at {len(buffer)} bytes") from error


def _parse(buffer: mmap.mmap, path: str | os.PathLike) -> File:
    cursor = _Cursor(buffer)
    version = cursor.scalar("I")
    if version not in (2, 3):
        raise ValueError(f"{path}: GGUF version {version} is not supported; supported: 2, 3 (little-endian)")
    num_tensors, num_entries = cursor.scalar("Q"), cursor.scalar("Q")
    metadata = {}
    for _ in range(num_entries):
        key = cursor.string()
        metadata[key] = cursor.value(cursor.scalar("I"))
    places = []
    for _ in range(num_tensors):
        name = cursor.string()
        shape = tuple(cursor.scalar("Q") for _ in range(cursor.scalar("I")))[::-1]
        places.append((name, shape, cursor.scalar("I"), cursor.scalar("Q")))

    alignment = metadata.get("general.alignment", 32)
    begin = -(-cursor.at // alignment) * alignment
    data = np.frombuffer(buffer, np.uint8)
    tensors = {}
    for name, shape, number, offset in places:
        block_type = BLOCK_TYPES.get(number)
        if block_type is None:
            known = ", ".join(kind.name for kind in BLOCK_TYPES.values())
            raise ValueError(f"{path}: {name} has ggml type {number}, which is not supported; supported: {known}")
        size = math.prod(shape) // block_type.weights * block_type.size
        raw = data[begin + offset : begin + offset + size]
        if raw.size != size:
            raise ValueError(f"{path}: truncated: {name} ends at byte {begin + offset + size} of {data.size}")
        tensors[name] = Tensor(shape, block_type, raw)
    return File(metadata, tensors)


class _Cursor:
    def __init__(self, buffer: mmap.mmap):
        self.buffer = buffer
        self.at = 4  # after the magic

    def scalar(self, letter: str) -> Any:
        (value,) = struct.unpack_from("<" + letter, self.buffer, self.at)
        self.at += struct.calcsize("<" + letter)
        return value

    def string(self) -> str:
        length = self.scalar("Q")
        (raw,) = struct.unpack_from(f"<{length}s", self.buffer, self.at)
        self.at += length
        return raw.decode("utf-8", errors="replace")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            element, count = self.scalar("I"), self.scalar("Q")
            return [self.value(element) for _ in range(count)]
        if kind not in _SCALARS:
            raise struct.error(f"metadata of unknown type {kind}")
        return self.scalar(_SCALARS[kind])
