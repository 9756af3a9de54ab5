"""Which devices does a plan compile for? Those of TPUs and GPUs that are described, not present, or of this process.

XLA's compilers need no device: a topology names the chips, abstract arrays stand for the real ones, and the compiled
program tells its memory, its arithmetic (`train.costs`) and, on TPUs, that it does not fit.
"""

import contextlib
import importlib.util
import math
import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils, topologies
from jax.sharding import AxisType, Mesh

from train.chips import CHIPS, Chip

_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16")
# Generation -> its slices, in chips along each axis, that Google Cloud documents.
SHAPES = {"v4": _CUBES, "v5e": _FLAT, "v5p": _CUBES, "v6e": _FLAT, "tpu7x": _CUBES}

MOST = 4096  # chips of a topology: twice the largest slice

# libtpu looks for the TPU it runs on: these answer for the machine that has none. Several processes may load it at
# once, as parallel tests do.
_WITHOUT_TPU = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
}

# What a TPU's compiler is asked for. Quick takes a quarter of the time or less, for nearly the same program: the same
# products and collectives, the peak of memory within a few percent. What is left out is mostly the placement of arrays
# in VMEM, so that more goes through main memory.
EFFORTS = {
    "quick": {"optimization_level": 9},
    "full": None,
}  # XLA's O0, by its number: older versions of jax take no name.

# An H100 SXM as XLA asks a real one to describe itself, xla.gpu.GpuTargetConfigProto.
_H100 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84942979072
  shared_memory_per_block_optin: 232448
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  cuda_compute_capability { major: 9 }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
runtime_version { major: 13 minor: 0 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


class TopologyError(ValueError):
    """A topology that is not known, or whose compiler is not installed."""


@dataclass(frozen=True)
class Topology:
    """Devices to compile for.

    Attributes:
      name: `v5e:4x4`.
      platform: `tpu`, `cuda` or `cpu`.
      devices: in the order of the compiler; more than there are chips where a chip has two.
      chip: its published figures; none of a CPU.
    """

    name: str
    platform: str
    devices: tuple[Any, ...]
    chip: Chip | None

    @property
    def device(self) -> Chip | None:
        """The share of the chip's figures that one device has."""
        return self.chip and self.chip.per_device


def named(name: str) -> Topology:
    """The topology of a name.

    `v5e:4x4`: a TPU slice of that generation, in chips along each axis. `cuda:1x2x8`: H100 SXM, slices x hosts x GPUs.
    `cpu:8`: that many of this process's CPU devices. For TPUs this sets environment variables that libtpu reads when it
    is loaded, those of a machine without a TPU: a process that is to use its TPU should do so first.

    Raises:
      TopologyError: an unknown name, or a compiler that is not installed.

    Examples:
      >>> named("v5e:3x3")
      Traceback (most recent call last):
      ...
      train.topology.TopologyError: v5e:3x3 is no slice of v5e; the nearest are v5e:2x4, v5e:4x4
    """
    generation, _, shape = name.partition(":")
    count = size(name)
    if generation == "cpu":
        return cpu(count)
    return _cuda(name, shape) if generation == "cuda" else _tpu(name, generation, shape)


def size(name: str) -> int:
    """How many chips a name asks for, whether there is such a topology or not.

    Raises:
      TopologyError: it is no name, or asks for too many.

    Examples:
      >>> size("v5e:4x4")
      16
    """
    generation, _, shape = name.partition(":")
    axes = r"[1-9]\d{0,8}" if generation == "cpu" else r"[1-9]\d{0,8}(x[1-9]\d{0,8}){0,2}"
    if not re.fullmatch(axes, shape) or generation not in (*SHAPES, "cuda", "cpu"):
        known = ", ".join(f"{each}:{shapes[-1]}" for each, shapes in SHAPES.items())
        raise TopologyError(
            f"{name!r} is no topology; expected a generation and a shape like {known}, cuda:1x1x8, cpu:8"
        )
    if (chips := math.prod(map(int, shape.split("x")))) > MOST:
        raise TopologyError(f"{name}: asks for {chips:,} chips; expected at most {MOST:,}")
    return chips


def cpu(count: int) -> Topology:
    """CPU devices of this process; several are simulated with `--xla_force_host_platform_device_count` in XLA_FLAGS."""
    devices = jax.devices("cpu")
    if count > len(devices):
        raise TopologyError(
            f"cpu:{count}: this process has {len(devices)} CPU devices; "
            f"set XLA_FLAGS=--xla_force_host_platform_device_count={count} before it starts"
        )
    return Topology(f"cpu:{count}", "cpu", tuple(devices[:count]), None)


def _tpu(name: str, generation: str, shape: str) -> Topology:
    if shape not in SHAPES[generation]:
        chips = math.prod(map(int, shape.split("x")))
        near = sorted(SHAPES[generation], key=lambda each: abs(math.log(math.prod(map(int, each.split("x"))) / chips)))
        nearest = ", ".join(f"{generation}:{each}" for each in SHAPES[generation] if each in near[:2])
        raise TopologyError(f"{name} is no slice of {generation}; the nearest are {nearest}")
    if importlib.util.find_spec("libtpu") is None:
        raise TopologyError(f"{name}: the TPU's compiler is not installed: pip install 'jaxpeft[plan]'")
    for variable, value in _WITHOUT_TPU.items():
        os.environ.setdefault(variable, value)
    # A host has four chips or more, except that of a slice of one.
    options = {"chips_per_host_bounds": (1, 1, 1)} if shape == "1x1" else {}
    found = topologies.get_topology_desc(name, platform="tpu", **options)
    return Topology(name, "tpu", tuple(found.devices), CHIPS[generation])


def _cuda(name: str, shape: str) -> Topology:
    if shape.count("x") != 2:
        raise TopologyError(f"{name!r}: expected slices x hosts x GPUs, as in cuda:1x1x8")
    if not any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)):
        raise TopologyError(f"{name}: the GPU's compiler is not installed: pip install 'jax[cuda13]'")
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")  # the plugin's, of the driver that is not there
    try:
        found = topologies.get_topology_desc(platform="cuda", target_config=_H100, topology=shape)
    except NotImplementedError as error:  # The plugin failed earlier, when JAX looked for a GPU.
        raise TopologyError(
            f"{name}: the GPU's compiler was not loaded; without a GPU, set JAX_PLATFORMS=cpu"
        ) from error
    return Topology(name, "cuda", tuple(found.devices), CHIPS["H100 SXM"])


def mesh(topology: Topology, axes: dict[str, int]) -> Mesh:
    """A mesh of all devices of a topology; on TPUs, axes follow the torus where they can.

    Raises:
      TopologyError: the sizes do not multiply to the number of devices.

    Examples:
      >>> dict(mesh(cpu(1), {"data": 1, "model": 1}).shape)
      {'data': 1, 'model': 1}
    """
    sizes, count = tuple(axes.values()), len(topology.devices)
    if math.prod(sizes) != count:
        product = " x ".join(f"{axis}={size}" for axis, size in axes.items())
        raise TopologyError(f"the mesh {product} has {math.prod(sizes)} devices, {topology.name} has {count}")
    # JAX lays a v4's devices out on the torus only where both cores of a chip are one device.
    if topology.platform == "tpu" and not topology.name.startswith("v4:"):
        devices = mesh_utils.create_device_mesh(sizes, list(topology.devices), allow_split_physical_axes=True)
    else:
        devices = np.array(topology.devices).reshape(sizes)
    return Mesh(devices, tuple(axes), axis_types=(AxisType.Auto,) * len(axes))


@dataclass(frozen=True)
class Program:
    """A compiled program, as `jax.stages.Compiled`, and the seconds that tracing, lowering and compiling took."""

    compiled: Any
    seconds: float


@dataclass(frozen=True)
class Allocation:
    """An array among the largest of a program that does not fit: its size, what it is, and where it comes from."""

    bytes: float
    shape: str
    op_name: str


class OutOfMemory(Exception):
    """A program needs more memory than a device has, by the TPU's compiler.

    Attributes:
      used: bytes it needs; of a program that does not come near fitting, the compiler stops at a lower bound.
      available: bytes a device has for it.
      allocations: the largest arrays; the compiler lists them only where the program nearly fits.
    """

    def __init__(self, used: float, available: float, allocations: tuple[Allocation, ...] = ()):
        super().__init__(f"out of memory: {used / 2**30:.2f} GiB needed, {available / 2**30:.2f} GiB available")
        self.used, self.available, self.allocations = used, available, allocations

    @classmethod
    def parse(cls, message: str) -> "OutOfMemory | None":
        """What XLA's message says; None if it is about something else."""
        if "RESOURCE_EXHAUSTED" not in message:
            return None
        found = re.search(r"\(([\d.]+\w)\) exceeds available HBM \(([\d.]+\w)\)", message) or re.search(
            r"Used ([\d.]+\w) of ([\d.]+\w) hbm", message
        )
        if found is None:
            return None
        listed = message.partition("Largest program allocations in hbm")[2].split("==========================")
        return cls(*map(_bytes, found.groups()), tuple(filter(None, map(_allocation, listed))))


def _bytes(text: str) -> float:
    """`15.75G`; XLA's units are binary."""
    number, unit = re.fullmatch(r"([\d.]+)(\w)", text).groups()
    return float(number) * 1024 ** "BKMGT".index(unit)


def _allocation(text: str) -> Allocation | None:
    size = re.search(r"Size: ([\d.]+\w)", text)
    if size is None:
        return None
    shape, operator = re.search(r"Shape: (\S+)", text), re.search(r'op_name="([^"]*)"', text)
    return Allocation(_bytes(size[1]), shape[1] if shape else "", operator[1] if operator else "")


@contextlib.contextmanager
def _no_cache() -> Iterator[None]:
    """Keeps programs out of the persistent cache, which cannot read those again whose devices are not there."""
    name = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, name)
    jax.config.update(name, math.inf)
    try:
        yield
    finally:
        jax.config.update(name, before)


def compile(function: Callable, *args: Any, topology: Topology, effort: str = "quick") -> Program:
    """Compiles a jitted function for a topology.

    A GPU's compiler does not say that a program does not fit: compare `memory_analysis().peak_memory_in_bytes`.

    Args:
      function: what `jax.jit` returns.
      *args: trees of `jax.ShapeDtypeStruct` with shardings over a `mesh` of the topology.
      topology: which devices.
      effort: one of `EFFORTS`; only TPUs' compilers know the difference.

    Raises:
      OutOfMemory: on TPUs, a device has not enough.
    """
    start = time.perf_counter()
    lowered = function.trace(*args).lower(lowering_platforms=(topology.platform,))
    try:
        with contextlib.nullcontext() if topology.platform == "cpu" else _no_cache():
            compiled = lowered.compile(compiler_options=EFFORTS[effort] if topology.platform == "tpu" else None)
    except jax.errors.JaxRuntimeError as error:
        if (exhausted := OutOfMemory.parse(str(error))) is None:
            raise
        raise exhausted from error
    return Program(compiled, time.perf_counter() - start)
