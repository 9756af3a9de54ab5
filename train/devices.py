"""Where things run: the mesh, what is put on it, and compilation ahead of time."""

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jax.sharding import Mesh as DeviceMesh

from jaxpeft.sharding import BATCH
from train.config import ConfigError, Mesh

AXES = ("data", "fsdp", "sequence", "tensor")
"""From the slowest links to the fastest: neighbours along the last axis are neighbouring devices."""


def sizes(config: Mesh, devices: int) -> dict[str, int]:
    """The size of every mesh axis; -1 takes what the others leave.

    Raises:
      ConfigError: the sizes do not multiply to the number of devices.
    """
    asked = {axis: getattr(config, axis) for axis in AXES}
    fixed = math.prod(size for size in asked.values() if size > 0)
    found = {axis: devices // fixed if size < 0 else size for axis, size in asked.items()}
    if math.prod(found.values()) != devices:
        written = " x ".join(f"{axis} {size}" for axis, size in asked.items())
        wanted = f"the product of the sizes must be {devices}; one of them may be -1"
        if sum(size < 0 for size in asked.values()) == 1:
            near = max(divisor for divisor in range(1, min(fixed, devices) + 1) if devices % divisor == 0)
            wanted = f"the product of the sizes that are not -1 must divide {devices} (the nearest that does: {near})"
        raise ConfigError([f"mesh: {written} does not fit {devices} devices; {wanted}"])
    return found


def mesh(config: Mesh) -> DeviceMesh:
    """All devices of all processes."""
    found = sizes(config, jax.device_count())
    return jax.make_mesh(tuple(found.values()), tuple(found), axis_types=(AxisType.Auto,) * len(found))


def everywhere(mesh: DeviceMesh) -> NamedSharding:
    """An array whole on every device."""
    return NamedSharding(mesh, PartitionSpec())


def of_batch(mesh: DeviceMesh, shape: Sequence[int]) -> NamedSharding:
    """An array (sequences, …, length) split by sequences and, where the mesh splits those too, along them."""
    entries: list[Any] = [BATCH, *[None] * (len(shape) - 1)]
    if len(shape) > 1 and shape[-1] % mesh.shape["sequence"] == 0:
        entries[-1] = "sequence"
    return NamedSharding(mesh, PartitionSpec(*entries))


def whole_batches(size: int, mesh: DeviceMesh) -> int:
    """The size rounded up to a multiple of the devices that a batch is split over."""
    parts = math.prod(mesh.shape[axis] for axis in BATCH)
    return -(-size // parts) * parts


def rows_here(mesh: DeviceMesh, size: int) -> list[int]:
    """The rows of a batch of `size` sequences that this process's devices hold; devices may share rows."""
    indices = of_batch(mesh, (size,)).addressable_devices_indices_map((size,))
    return sorted({row for (index,) in indices.values() for row in range(*index.indices(size))})


def shard(batch: dict[str, np.ndarray], mesh: DeviceMesh, size: int) -> dict[str, jax.Array]:
    """Global arrays (size, …) of the rows that this process holds, `rows_here`, in their order."""
    place = np.zeros(size, np.int64)
    rows = rows_here(mesh, size)
    place[rows] = np.arange(len(rows))

    def put(local: np.ndarray) -> jax.Array:
        shape = (size, *local.shape[1:])
        return jax.make_array_from_callback(
            shape, of_batch(mesh, shape), lambda index: local[(place[index[0]], *index[1:])]
        )

    return {name: put(array) for name, array in batch.items()}


def put(arrays: Sequence[np.ndarray], mesh: DeviceMesh) -> list[jax.Array]:
    """Global arrays (sequences, …), split like a batch, of what every process holds whole."""
    return [
        jax.make_array_from_callback(array.shape, of_batch(mesh, array.shape), lambda index, array=array: array[index])
        for array in arrays
    ]


class Compiled:
    """A jitted function that compiles each new shape explicitly, so that compilations can be counted and timed.

    Args:
      function: what is compiled, with `mesh` for the mesh of its context.
      mesh: where it runs.
      options: of `jax.jit`.

    Attributes:
      seconds: time spent tracing and compiling so far.
      executables: shapes of the arguments -> the compiled function.
    """

    def __init__(self, function: Callable, mesh: DeviceMesh, **options: Any):
        self.jitted = jax.jit(function, **options)
        self.mesh = mesh
        self.executables: dict[Any, Any] = {}
        self.seconds = 0.0

    def __call__(self, *args: Any) -> Any:  # noqa: D102
        leaves, structure = jax.tree.flatten(args)
        key = (structure, tuple((leaf.shape, leaf.dtype) for leaf in leaves))
        if key not in self.executables:
            start = time.perf_counter()
            self.executables[key] = self.lower(*args).compile()
            self.seconds += time.perf_counter() - start
        return self.executables[key](*args)

    def lower(self, *args: Any) -> Any:
        """The function for arguments of these shapes, not yet compiled."""
        with jax.set_mesh(self.mesh):
            return self.jitted.lower(*args)


def peak_memory_bytes() -> int:
    """Most memory used so far: of the fullest local device, or of this process where devices do not tell (CPU)."""
    peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use", 0) for device in jax.local_devices()]
    if max(peaks):
        return max(peaks)
    import resource  # not on Windows
    import sys

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
