"""What importing jaxpeft brings, and what a command keeps for the next time."""

import os
import subprocess
import sys

import tiny

HEAVY = ("flax", "matplotlib", "optax", "orbax", "pydantic", "scipy.stats", "tensorstore", "torch", "transformers")

CONFIG = """
model: {name: MODEL}
method: {name: lora, rank: 2}
data: {source: synthetic, held_out_rows: 8, max_length: 96, buckets: 1}
train: {steps: 1, batch_size: 8}
output: {folder: RUN}
"""


def python(*arguments, **environment):
    inherited = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    done = subprocess.run(
        [sys.executable, *arguments], env={**inherited, **environment}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_heavy_packages_are_imported_where_they_are_used() -> None:
    """Each of them takes a tenth of what importing JAX takes, or more."""
    loaded = python(
        "-c", "import sys, jax; before = set(sys.modules); import jaxpeft; print(*set(sys.modules) - before)"
    )
    packages = set(loaded.split())
    assert "jaxpeft.methods" in packages
    assert not [name for name in HEAVY if name in packages]
    used = "import jaxpeft; jaxpeft.allocate.ranks, jaxpeft.rite(1e-3), jaxpeft.scale_rates({'b': 2.0}); print('used')"
    assert python("-c", used) == "used\n"


def test_a_command_keeps_what_it_compiled(tmp_path) -> None:
    model = tiny.save_model(tmp_path / "model")
    text = CONFIG.replace("MODEL", str(model)).replace("RUN", str(tmp_path / "run"))
    (tmp_path / "config.yaml").write_text(text)
    command = ("-m", "train", "evaluate", str(tmp_path / "config.yaml"))
    everything = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    first = python(*command, JAXPEFT_CACHE=str(tmp_path / "cache"), **everything)
    kept = sorted(path.name for path in (tmp_path / "cache" / "compiled").iterdir())
    assert kept
    assert python(*command, JAXPEFT_CACHE=str(tmp_path / "cache"), **everything) == first
    assert sorted(path.name for path in (tmp_path / "cache" / "compiled").iterdir()) == kept
    own = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "own"), "JAXPEFT_CACHE": str(tmp_path / "other")}
    assert python(*command, **own, **everything) == first
    assert (tmp_path / "own").is_dir()
    assert not (tmp_path / "other" / "compiled").exists()
