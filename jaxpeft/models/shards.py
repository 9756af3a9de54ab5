"""How do tensors become safetensors files, one tensor in memory at a time?"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
"""{dtype: its name in a safetensors file} of the dtypes that are written."""

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


@dataclass(frozen=True)
class Tensor:
    """A tensor that is to be written.

    Attributes:
      name: its name in the file.
      shape: its shape.
      dtype: one of `DTYPES`.
      read: makes its values; called once, when its turn comes.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        """Bytes of its values."""
        return math.prod(self.shape) * (4 if self.dtype == "float32" else 2)


def parse_size(size: int | str) -> int:
    """Bytes of a size such as ``"5GB"``, ``"300MiB"`` or a number.

    Raises:
      ValueError: it is no size, or not positive.

    >>> parse_size("5GB"), parse_size("1.5 MiB"), parse_size(1000)
    (5000000000, 1572864, 1000)
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?\s*", str(size).upper())
    if found is None or found[2] not in _UNITS or not (count := int(float(found[1]) * _UNITS[found[2]])):
        raise ValueError(f"size {size!r}: expected a positive number of bytes, such as '5GB', '300MiB' or 5000000")
    return count


def write(folder: Path, tensors: Sequence[Tensor], max_shard_size: int) -> None:
    """Writes ``model.safetensors``, or several files and ``model.safetensors.index.json``.

    Args:
      folder: an existing folder.
      tensors: in the order of the files.
      max_shard_size: most bytes of one file's tensors; a larger tensor has a file of its own.
    """
    shards: list[list[Tensor]] = []
    room = 0
    for tensor in tensors:
        if not shards or tensor.nbytes > room:
            shards.append([])
            room = max_shard_size
        shards[-1].append(tensor)
        room -= tensor.nbytes
    names = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    if len(shards) == 1:
        names = ["model.safetensors"]
    for name, shard in zip(names, shards, strict=True):
        write_file(folder / name, shard)
    if len(shards) > 1:
        weight_map = {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        index = {"metadata": {"total_size": sum(tensor.nbytes for tensor in tensors)}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def write_file(path: Path, tensors: Sequence[Tensor]) -> None:
    """Writes one safetensors file: the length of its header in 8 bytes, the header in JSON, the values one by one."""
    # torch transformers refuses files that do not say which library's layout they have.
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        start, end = end, end + tensor.nbytes
        header[tensor.name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)  # the values begin at a multiple of their size
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for tensor in tensors:
            values = np.ascontiguousarray(tensor.read())
            if (values.shape, str(values.dtype)) != (tensor.shape, tensor.dtype):
                found = f"{values.dtype} {values.shape}"
                raise ValueError(f"{tensor.name}: found {found}, expected {tensor.dtype} {tensor.shape}")
            file.write(values.view(np.uint8).data)
