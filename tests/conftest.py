"""Eight simulated CPU devices for every test, and quick compilation; set before jax reads its environment."""

import gc
import os
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest

os.environ["JAX_PLATFORMS"] = "cpu"
# The tests are bound by compilation: level 0 spares LLVM's optimiser, and fusions are emitted the quicker way.
flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
if version("jaxlib").startswith("0.10."):  # Later ones have no other way.
    flags += " --xla_cpu_use_fusion_emitters=false"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()
# Many tests compile the same programs; the cache also serves the next run.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".pytest_cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.05")

import jax  # noqa: E402, it reads the environment

# Each compiled program takes memory maps, and beyond the 65,530 that Linux allows XLA crashes. Between files, as far as
# it goes: what is compiled for one file's tests stays compiled, which some of them assert.
MAPS_OF_A_FILE, MAPS_OF_A_TEST = 25_000, 50_000


def free_programs(allowed: int) -> None:
    maps = Path("/proc/self/maps")
    if maps.exists() and len(maps.read_bytes().splitlines()) > allowed:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(autouse=True, scope="module")
def room_for_programs() -> None:
    free_programs(MAPS_OF_A_FILE)


@pytest.fixture(autouse=True)
def room_for_a_test() -> Iterator[None]:
    yield
    free_programs(MAPS_OF_A_TEST)
