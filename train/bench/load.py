"""What does loading weights cost beside reading their bytes?"""

import argparse
import shutil
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console

from train.bench import movement
from train.bench.figures import Figures
from train.bench.specs import MOS, SPECS, check, random_values
from train.bench.workers import Entry, Work

NOTES = (
    "moved: the bytes of the files; plain: the same files, each read into memory as it is",
    "the files were read before: this is the page cache, not a disk",
    "on top: files that are mapped into memory count while their pages are there, beside the arrays made of them",
)
GGUF_NOTE = (
    "GGUF: its checksum is verified each time; the first load also writes its values as float32 safetensors, the later "
    "ones read those"
)


def measure(options: argparse.Namespace, console: Console) -> Figures:
    """Times `models.pretrained` of a model's GGUF file and of folders, and `jaxpeft.load` of an adapter."""
    import jax

    import jaxpeft
    from jaxpeft import models

    check(options.model, "bench load", [MOS])
    with tempfile.TemporaryDirectory() as kept:
        console.print("writing folders …")
        model = models.pretrained(options.model, dtype="float32")
        for dtype in ("float32", "bfloat16"):
            models.save(f"{kept}/{dtype}", model, dtype=dtype)
        adapter = jaxpeft.init(jax.random.key(0), SPECS[MOS], jaxpeft.find(model.params))
        jaxpeft.save(f"{kept}/adapter", adapter.replace(params=random_values(adapter.params)))
        del model, adapter
        found, plain = entries(options.model, Path(kept))
        notes = (*NOTES, GGUF_NOTE) if options.model in gguf_models() else NOTES
        return movement.measure("load", f"Loading {options.model}", found, plain, options.rounds, console, notes)


def entries(name: str, kept: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """The rows of a model whose folders are in `kept`, and {row: its plain row}."""
    found: dict[str, Entry] = {}
    plain: dict[str, str] = {}

    def add(what: str, path: Path, **ways: Entry) -> None:
        found[f"{what}, its bytes"] = Entry("train.bench.load:plain", {"path": str(path)})
        for way, entry in ways.items():
            row = f"{what}, {way.replace('_', ' ')}"
            found[row], plain[row] = entry, f"{what}, its bytes"

    def folder(dtype: str, to: str) -> Entry:
        return Entry("train.bench.load:folder", {"path": str(kept / dtype), "dtype": to})

    if name in gguf_models():
        from jaxpeft.models.pretrained import packaged_file

        path = packaged_file(name)
        blocks = Entry("train.bench.load:gguf_blocks", {"name": name, "path": str(path)})
        first = Entry("train.bench.load:gguf_first", {"name": name, "path": str(path), "cache": str(kept / "cache")})
        add("GGUF", path, the_first_load=first, its_blocks_kept=blocks)
    add("float32 safetensors", kept / "float32", loaded=folder("float32", "float32"))
    bfloat16 = {"loaded": folder("bfloat16", "bfloat16"), "loaded_as_float32": folder("bfloat16", "float32")}
    add("bfloat16 safetensors", kept / "bfloat16", **bfloat16)
    add(f"adapter ({MOS})", kept / "adapter", loaded=Entry("train.bench.load:adapter", {"path": str(kept / "adapter")}))
    return found, plain


def gguf_models() -> list[str]:
    """Models of packages that hold a GGUF file."""
    from jaxpeft.models import PACKAGED

    return [name for name, model in PACKAGED.items() if model.member.endswith(".gguf")]


def plain(path: str) -> Work:
    """A file, or all files of weights or of an adapter in a folder, into memory."""
    paths = _files(path)

    def run() -> None:
        for each in paths:
            buffer = bytearray(each.stat().st_size)
            with each.open("rb") as file:
                file.readinto(buffer)

    return Work(run, {"bytes": _size(path)})


def folder(path: str, dtype: str) -> Work:
    """A model from its folder."""
    return _model(path, _size(path), dtype=dtype)


def gguf_blocks(name: str, path: str) -> Work:
    """A model in the blocks of its GGUF file."""
    return _model(name, _size(path), keep_blocks=True, dtype="float32")


def gguf_first(name: str, path: str, cache: str) -> Work:
    """A model from its GGUF file alone, as if nothing were in the cache."""
    kept = Path(cache)
    kept.mkdir()
    (kept / Path(path).name).symlink_to(path)

    def before() -> None:
        for made in kept.iterdir():
            if made.is_dir():
                shutil.rmtree(made)

    return _model(name, _size(path), before, dtype="float32", cache_dir=cache)


def adapter(path: str) -> Work:
    """An adapter, its checksums compared."""
    import jax

    import jaxpeft

    def run() -> None:
        jax.block_until_ready(jaxpeft.load(path).params)

    return Work(run, {"bytes": _size(path)})


def _model(name: str, size: int, before: Any = lambda: None, **how: Any) -> Work:
    import jax

    from jaxpeft import models

    def run() -> None:
        jax.block_until_ready(models.pretrained(name, **how).params)

    return Work(run, {"bytes": size}, before)


def _files(path: str) -> list[Path]:
    """The file itself; of a folder, its files of weights, or all if it has none."""
    if not Path(path).is_dir():
        return [Path(path)]
    return sorted(Path(path).glob("*.safetensors")) or sorted(file for file in Path(path).rglob("*") if file.is_file())


def _size(path: str) -> int:
    return sum(file.stat().st_size for file in _files(path))
