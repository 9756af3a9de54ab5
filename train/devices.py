"""Where things run: the mesh, what is put on it, and compilation ahead of time."""

import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec


def data_mesh() -> Mesh:
    """All devices of all processes along one axis, `data`."""
    return jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))


def everywhere(mesh: Mesh) -> NamedSharding:
    """An array whole on every device."""
    return NamedSharding(mesh, PartitionSpec())


def by_rows(mesh: Mesh) -> NamedSharding:
    """An array split over the devices along its first axis."""
    return NamedSharding(mesh, PartitionSpec("data"))


def replicate(tree: Any, mesh: Mesh) -> Any:
    """The whole tree on every device."""
    return jax.device_put(tree, everywhere(mesh))


def shapes(tree: Any, mesh: Mesh) -> Any:
    """What `replicate` gives, without memory."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=everywhere(mesh)), tree)


def shard(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Global arrays, split over the devices along the first axis, of what each process holds of a batch."""
    return {name: jax.make_array_from_process_local_data(by_rows(mesh), array) for name, array in batch.items()}


def whole_batches(size: int) -> int:
    """The size rounded up to a multiple of the devices, so that a batch splits over them evenly."""
    return -(-size // jax.device_count()) * jax.device_count()


class Compiled:
    """A jitted function that compiles each new shape explicitly, so that compilations can be counted and timed.

    Attributes:
      seconds: time spent tracing and compiling so far.
      executables: shapes of the arguments -> the compiled function.
    """

    def __init__(self, function: Callable, **options: Any):
        self.jitted = jax.jit(function, **options)
        self.executables: dict[Any, Any] = {}
        self.seconds = 0.0

    def __call__(self, *args: Any) -> Any:  # noqa: D102
        leaves, structure = jax.tree.flatten(args)
        key = (structure, tuple((leaf.shape, leaf.dtype) for leaf in leaves))
        if key not in self.executables:
            start = time.perf_counter()
            self.executables[key] = self.jitted.lower(*args).compile()
            self.seconds += time.perf_counter() - start
        return self.executables[key](*args)


def peak_memory_bytes() -> int:
    """Most memory used so far: of the fullest local device, or of this process where devices do not tell (CPU)."""
    peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use", 0) for device in jax.local_devices()]
    if max(peaks):
        return max(peaks)
    import resource  # not on Windows
    import sys

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
