"""Eight simulated CPU devices for every test, and quick compilation; set before jax reads its environment."""

import os
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
# Level 0 spares LLVM's optimiser: the tests are bound by compilation, and XLA's own passes still run.
flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()
# Many tests compile the same programs; the cache also serves the next run.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".pytest_cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.05")
