"""The run folder: whose it is, whether it can be written, and how files get into it whole.

A run folder holds
    config.yaml     the configuration, every default written out
    metrics.jsonl   one line a step
    tensorboard/    the same
    checkpoints/    training state, to resume from
    before.json     held-out measurements before training
    adapter/        the trained adapter, `jaxpeft.load` reads it
    summary.json, report.md, loss.png
    tasks.json      what `evaluate --tasks` found last
    README.md       the model card
"""

import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax

from train import config as configuration
from train.config import Config

# Where a run is computed, where it may write and how it goes on do not change what it computes.
FREE = ("mesh", "output.folder", "output.resume")


class RunError(RuntimeError):
    """A run folder that cannot be used."""


def open_folder(config: Config) -> Path:
    """Makes the run folder that `config.output` names, or enters the one of the same run, before anything is loaded.

    Raises:
      RunError: the folder belongs to another run, or cannot be written.
    """
    folder = Path(config.output.folder).absolute()
    if jax.process_index() > 0:
        return folder
    stored = folder / "config.yaml"
    with writing(folder):
        occupied = folder.is_dir() and any(folder.iterdir())
        if occupied and config.output.resume == "never":
            raise RunError(f"{folder}: not empty, and output.resume is never; choose another output.folder")
        if occupied and not stored.exists():
            raise RunError(f"{folder}: not empty, and not a run folder (no config.yaml); choose another output.folder")
        if occupied:
            differences = list(_differences(json_of(stored), configuration.as_dict(config)))
            if differences:
                raise RunError(
                    f"{folder}: holds a run with another configuration; choose another output.folder, or go back to\n"
                    + "\n".join(f"  {line}" for line in differences)
                )
        folder.mkdir(parents=True, exist_ok=True)
        write(folder / ".writable", "")
        (folder / ".writable").unlink()
    return folder


def claim(folder: Path, config: Config, size: int) -> None:
    """Writes the configuration into the folder, which from now on belongs to this run.

    First `size` bytes are written and removed again: a full disk shows before training, not at the first checkpoint.

    Raises:
      RunError: there is no room for them.
    """
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            # Really allocates the blocks, so it sees quotas that a look at the free space would not.
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
            else:
                file.write(bytes(size))
        write(folder / "config.yaml", configuration.dump(config))
    except OSError as error:
        raise RunError(
            f"{folder}: the run's {size / 1e6:.0f} MB cannot be written: {error.strerror or error}"
        ) from None


def check_tokenizer(path: Path, extra: Mapping[str, Any], found: str) -> None:
    """Compares the tokenizer's fingerprint with what a checkpoint notes of the one it was trained with.

    Raises:
      RunError: it is another: the same text would reach the model as other tokens.
    """
    if (expected := extra.get("tokenizer", found)) != found:
        raise RunError(
            f"{path}: was trained with another tokenizer ({expected}) than the model's now ({found}); put the model's "
            "own tokenizer files back, or train again in another output.folder"
        )


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Names the file that cannot be written: a file that is open does not say so itself."""
    try:
        yield
    except OSError as error:
        raise RunError(f"{path}: cannot be written: {error.strerror or error}") from None


def write(path: Path, content: str | bytes) -> None:
    """Writes a file so that a reader, or a run killed now, finds the old content or the new, never a part.

    Raises:
      RunError: it cannot be written.
    """
    data = content.encode() if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with writing(path):
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """`write`, as indented JSON; NaN is refused."""
    write(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def json_of(path: Path) -> Any:
    """The content of a .json or .yaml file of a run folder."""
    try:
        if path.suffix == ".yaml":
            return configuration.as_dict(configuration.load(path))
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunError(f"{path}: damaged, or written by another version: {error}") from None


def _differences(old: Any, new: Any, path: str = "") -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in dict.fromkeys([*old, *new]):
            yield from _differences(old.get(key), new.get(key), f"{path}.{key}" if path else key)
    elif old != new and not path.startswith(FREE):
        yield f"{path}: {old!r}, now {new!r}"
