"""What do saving and restoring a run's state cost beside writing its bytes?"""

import argparse
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from train.bench import movement
from train.bench.figures import Column, Figures
from train.bench.specs import LORA, MOS, SPECS, check, random_values
from train.bench.workers import Entry, Work

ROWS = (LORA, MOS, "full fine-tuning")
COLUMNS = (Column("blocking_seconds", "blocking s", ".3f"), Column("disk_megabytes", "MB on disk", ",.1f"))


def measure(options: argparse.Namespace, console: Console) -> Figures:
    """Times `jaxpeft.checkpoint.Checkpoints` with an adapter and its AdamW state."""
    check(options.model, "bench checkpoint", [row for row in ROWS if row in SPECS])
    with tempfile.TemporaryDirectory() as kept:
        entries: dict[str, Entry] = {}
        plain = {}
        for number, row in enumerate(ROWS):
            for what, name in (
                ("plain", f"{row}, its bytes"),
                ("saved", f"{row}, saved"),
                ("restored", f"{row}, read"),
            ):
                arguments = {"model": options.model, "row": row, "folder": f"{kept}/{what}{number}"}
                entries[name] = Entry(f"train.bench.checkpoint:{what}", arguments)
                if what != "plain":
                    plain[name] = f"{row}, its bytes"
        title = f"Checkpoints of adapters of {options.model} with their AdamW state, float32"
        notes = (
            "moved: the arrays of the adapter and of the optimizer, of random values, as those of a trained one hardly "
            "compress; files also hold checksums and metadata",
            "its bytes: as many random bytes written to one file, until they are on the disk (fsync)",
            "saved: until the step is complete, its files on the disk (fsync); blocking: of it, until `save` returns, "
            "which is what training waits for",
            "read: restored and compared with the checksums; its files were just written: the page cache, not a disk",
        )
        return movement.measure("checkpoint", title, entries, plain, options.rounds, console, notes, COLUMNS)


def plain(model: str, row: str, folder: str) -> Work:
    """One new file of as many bytes."""
    data = os.urandom(_size(state(model, row)))
    path = Path(folder)

    def run() -> None:
        with path.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())

    return Work(run, {"bytes": len(data)}, before=lambda: path.unlink(missing_ok=True))


def saved(model: str, row: str, folder: str) -> Work:
    """Saves one step into an empty folder."""
    from jaxpeft.checkpoint import Checkpoints

    adapter, optimizer = state(model, row)
    made: list[Checkpoints] = []

    def before() -> None:
        while made:
            made.pop().__exit__(None)
        shutil.rmtree(folder, ignore_errors=True)
        made.append(Checkpoints(folder))

    def run() -> dict[str, float]:
        start = time.perf_counter()
        made[0].save(1, adapter, state=optimizer)
        blocking = time.perf_counter() - start
        made[0].wait()
        return {"blocking_seconds": blocking}

    before()
    run()
    written = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
    return Work(run, {"bytes": _size((adapter, optimizer)), "disk_megabytes": written / 1e6}, before)


def restored(model: str, row: str, folder: str) -> Work:
    """Restores the step that was saved before."""
    import jax

    from jaxpeft.checkpoint import Checkpoints

    adapter, optimizer = state(model, row)
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(1, adapter, state=optimizer)
    size = _size((adapter, optimizer))
    adapter, optimizer = jax.tree.map(_shape, (adapter, optimizer))

    def run() -> None:
        with Checkpoints(folder, read_only=True) as checkpoints:
            jax.block_until_ready(checkpoints.restore(1, adapter, optimizer)[:2])

    return Work(run, {"bytes": size})


def state(model: str, row: str) -> tuple[Any, Any]:
    """The adapter of a row and its AdamW state, of random values."""
    import jax
    import optax

    import jaxpeft
    from jaxpeft import models
    from jaxpeft.methods import full

    base = models.pretrained(model, dtype="float32").params
    spec = SPECS.get(row) or full.Spec()
    adapter = jaxpeft.init(jax.random.key(0), spec, jaxpeft.find(base), weights=base)
    params, optimizer = random_values((adapter.params, optax.adamw(1e-3).init(adapter.params)))
    return adapter.replace(params=params), optimizer


def _shape(leaf: Any) -> Any:
    import jax

    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


def _size(tree: Any) -> int:
    import jax

    return sum(
        leaf.nbytes for leaf in jax.tree.leaves(tree) if not jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    )
