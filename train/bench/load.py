"""What does loading weights cost beside reading their bytes?"""

import argparse
import tempfile
from pathlib import Path

from rich.console import Console

from train.bench import movement
from train.bench.figures import Figures
from train.bench.specs import SPECS, check
from train.bench.workers import Work

PLAIN = "plain read of the safetensors files"


def measure(options: argparse.Namespace, console: Console) -> Figures:
    """Times `models.pretrained` of a model and its folders, and `jaxpeft.load` of an adapter."""
    import jax

    import jaxpeft
    from jaxpeft import models

    check(options.model, "bench load", ["mos r=16 e=2"])
    with tempfile.TemporaryDirectory() as kept:
        console.print("writing folders …")
        model = models.pretrained(options.model, dtype="float32")
        folders = {dtype: f"{kept}/{dtype}" for dtype in ("float32", "bfloat16")}
        for dtype, folder in folders.items():
            models.save(folder, model, dtype=dtype)
        spec = SPECS["mos r=16 e=2"]
        jaxpeft.save(f"{kept}/adapter", jaxpeft.init(jax.random.key(0), spec, jaxpeft.find(model.params)))
        del model
        here = "train.bench.load"
        entries: dict[str, tuple[str, dict[str, str]]] = {
            PLAIN: (f"{here}:plain", {"folder": folders["float32"]}),
            f"{options.model}, as it is packaged": (f"{here}:model", {"name": options.model, "dtype": "float32"}),
            "a folder in float32": (f"{here}:model", {"name": folders["float32"], "dtype": "float32"}),
            "a folder in bfloat16": (f"{here}:model", {"name": folders["bfloat16"], "dtype": "bfloat16"}),
            "a folder in bfloat16, to float32": (f"{here}:model", {"name": folders["bfloat16"], "dtype": "float32"}),
            "an adapter (mos r=16 e=2), checked and restored": (f"{here}:adapter", {"folder": f"{kept}/adapter"}),
        }
        title = f"Loading {options.model}"
        notes = (
            "moved: the bytes of the files; for the packaged model those of the arrays it becomes",
            "the files were read before: this is the page cache, not a disk",
        )
        return movement.measure("load", title, entries, PLAIN, options.rounds, console, notes)


def plain(folder: str) -> Work:
    """The files of a folder, each into one buffer."""
    files = sorted(Path(folder).glob("*.safetensors"))
    return Work(lambda: sum(len(path.read_bytes()) for path in files), {"bytes": _size(folder)})


def model(name: str, dtype: str) -> Work:
    """A model, into memory."""
    import jax

    from jaxpeft import models

    def run() -> None:
        jax.block_until_ready(models.pretrained(name, dtype=dtype).params)

    leaves = jax.tree.leaves(models.pretrained(name, dtype=dtype, weights=False).params)
    arrays = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    return Work(run, {"bytes": _size(name) if Path(name).is_dir() else arrays})


def adapter(folder: str) -> Work:
    """An adapter, into memory."""
    import jax

    import jaxpeft

    size = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
    return Work(lambda: jax.block_until_ready(jaxpeft.load(folder).params) and None, {"bytes": size})


def _size(folder: str) -> int:
    return sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
