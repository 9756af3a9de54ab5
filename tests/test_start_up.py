"""What importing jaxpeft brings, and what a command keeps for the next time."""

import os
import subprocess
import sys

import pytest
import tiny

from train import pages

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


class TestLargePages:
    @pytest.mark.parametrize(
        ("given", "value"),
        [
            (None, "glibc.malloc.hugetlb=1"),
            ("", "glibc.malloc.hugetlb=1"),
            ("glibc.malloc.arena_max=1", "glibc.malloc.arena_max=1:glibc.malloc.hugetlb=1"),
            ("glibc.malloc.hugetlb=0", None),
        ],
    )
    def test_asked_for_once(self, tmp_path, given, value) -> None:
        (tmp_path / "enabled").write_text("always [madvise] never\n")
        assert pages.wanted({} if given is None else {"GLIBC_TUNABLES": given}, tmp_path / "enabled") == value

    @pytest.mark.parametrize("text", ["[always] madvise never", "always madvise [never]", None])
    def test_not_where_the_system_decides(self, tmp_path, text) -> None:
        if text is not None:
            (tmp_path / "enabled").write_text(text)
        assert pages.wanted({}, tmp_path / "enabled") is None

    def test_a_program_begins_again_with_its_arguments(self, tmp_path) -> None:
        (tmp_path / "enabled").write_text("always [madvise] never\n")
        program = tmp_path / "program.py"
        program.write_text(
            "import os, pathlib, sys\nfrom train import pages\n"
            "print('begun', os.environ.get('GLIBC_TUNABLES'), sys.flags.utf8_mode, *sys.argv[1:], flush=True)\n"
            "pages.wanted.__defaults__ = (pathlib.Path(sys.argv[1]),)\npages.begin_again()\nprint('on')\n"
        )
        said = python("-X", "utf8", str(program), str(tmp_path / "enabled"), "a b", PYTHONPATH=os.getcwd())
        begun = [line.split()[1:3] for line in said.splitlines() if line.startswith("begun")]
        assert begun[-1] == ["glibc.malloc.hugetlb=1", "1"]
        assert said.splitlines()[-2].endswith("a b")
        assert said.endswith("on\n")
