"""What do saving and restoring a run's state cost beside writing its bytes?"""

import argparse
import os
import shutil
import tempfile
from typing import Any

from rich.console import Console

from train.bench import movement
from train.bench.figures import Figures
from train.bench.specs import SPECS, check
from train.bench.workers import Work

PLAIN = "plain write and fsync of as many bytes as lora's state"
ROWS = ("lora r=16", "mos r=16 e=2", "full fine-tuning")


def measure(options: argparse.Namespace, console: Console) -> Figures:
    """Times `jaxpeft.checkpoint.Checkpoints` with an adapter and its AdamW state."""
    check(options.model, "bench checkpoint", ["lora r=16", "mos r=16 e=2"])
    with tempfile.TemporaryDirectory() as kept:
        here = "train.bench.checkpoint"
        entries: dict[str, tuple[str, dict[str, str]]] = {
            PLAIN: (f"{here}:plain", {"model": options.model, "folder": f"{kept}/plain"})
        }
        for number, row in enumerate(ROWS):
            for what in ("saved", "restored"):
                arguments = {"model": options.model, "row": row, "folder": f"{kept}/{what}{number}"}
                entries[f"{row}, {what}"] = (f"{here}:{what}", arguments)
        title = f"Checkpoints of adapters of {options.model} with their AdamW state, float32"
        notes = (
            "moved: the arrays of the adapter and of the optimizer; files also hold checksums and metadata",
            "saved: until the files are complete on disk; the JSON has the part that training waits for (blocking)",
        )
        return movement.measure("checkpoint", title, entries, PLAIN, options.rounds, console, notes)


def plain(model: str, folder: str) -> Work:
    """One file."""
    data = os.urandom(_size(_state(model, "lora r=16")))

    def run() -> None:
        with open(folder, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())

    return Work(run, {"bytes": len(data)})


def saved(model: str, row: str, folder: str) -> Work:
    """Saves one step into an empty folder."""
    import time

    from jaxpeft.checkpoint import Checkpoints

    adapter, optimizer = _state(model, row)

    def run() -> dict[str, float]:
        shutil.rmtree(folder, ignore_errors=True)
        with Checkpoints(folder) as checkpoints:
            start = time.perf_counter()
            checkpoints.save(1, adapter, state=optimizer)
            blocking = time.perf_counter() - start
            checkpoints.wait()
        return {"blocking_seconds": blocking}

    return Work(run, {"bytes": _size((adapter, optimizer))})


def restored(model: str, row: str, folder: str) -> Work:
    """Restores the step that was saved before."""
    import jax

    from jaxpeft.checkpoint import Checkpoints

    adapter, optimizer = _state(model, row)
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(1, adapter, state=optimizer)

    def run() -> None:
        with Checkpoints(folder, read_only=True) as checkpoints:
            jax.block_until_ready(checkpoints.restore(1, adapter, optimizer)[:2])

    return Work(run, {"bytes": _size((adapter, optimizer))})


def _state(model: str, row: str) -> tuple[Any, Any]:
    import jax
    import optax

    import jaxpeft
    from jaxpeft import models
    from jaxpeft.methods import full

    base = models.pretrained(model, dtype="float32").params
    spec = SPECS.get(row) or full.Spec()
    adapter = jaxpeft.init(jax.random.key(0), spec, jaxpeft.find(base), weights=base)
    return adapter, optax.adamw(1e-3).init(adapter.params)


def _size(tree: Any) -> int:
    import jax

    return sum(
        leaf.nbytes for leaf in jax.tree.leaves(tree) if not jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    )
