"""What is written down while training: metrics.jsonl, TensorBoard, a progress bar."""

import json
import math
import os
import socket
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tensorboardX import RecordWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar

from train import run

STEP = ("step", "loss", "tokens", "seconds")
"""What the record of a step has at least."""


class Metrics:
    """Writes one record a step. Only the first process writes.

    After a resume every step is in metrics.jsonl exactly once: `flush` comes before a checkpoint, so no step up to the
    checkpoint is missing; and the steps after it, written before the run was killed, are taken out here.

    Args:
      folder: the run folder.
      done: steps that the checkpoint to go on from has seen; 0 for a new run.
      steps: steps of the whole run.

    Raises:
      RunError: metrics.jsonl is damaged; here and in every method: the files cannot be written, for instance because
        the disk is full.
    """

    def __init__(self, folder: Path, done: int, steps: int):
        self.writes = jax.process_index() == 0
        self.console = Console(quiet=not self.writes, soft_wrap=True)
        self.progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("loss {task.fields[loss]:.4f}  {task.fields[speed]:.0f} tokens/s  ETA"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not (self.writes and self.console.is_terminal),
        )
        self.task = self.progress.add_task("", total=steps, completed=done, loss=float("nan"), speed=0.0)
        self.steps = steps
        if self.writes:
            self.path = folder / "metrics.jsonl"
            kept = [record for record in read(self.path) if record["step"] <= done]
            if [record["step"] for record in kept] != list(range(1, done + 1)):
                # Somebody has changed the file. That is no reason to give up what was trained.
                self.console.print(
                    f"{self.path} holds {len(kept)} records of the checkpoint's {done} steps, expected one of each: "
                    "the report will show those"
                )
            run.write(self.path, "".join(json.dumps(record) + "\n" for record in kept))
            with run.writing(self.path):
                self.file = self.path.open("a", encoding="utf-8")
            with run.writing(folder / "tensorboard"):
                self.board = _Board(folder / "tensorboard", done)

    def __enter__(self) -> "Metrics":
        self.progress.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.progress.stop()
        if self.writes:
            # Both are closed whatever the other says.
            with run.writing(self.path), closing(self.board.records), self.file:
                self.flush()

    def write(self, records: list[dict[str, float]]) -> None:
        """Appends the records of consecutive steps, each with `step`, `loss`, `tokens`, `seconds` and more."""
        last = records[-1]
        speed = sum(record["tokens"] for record in records) / sum(record["seconds"] for record in records)
        self.progress.update(self.task, completed=last["step"], loss=last["loss"], speed=speed)
        if not self.console.is_terminal:
            held_out = f"  held-out {last['held_out_loss']:.4f}" if "held_out_loss" in last else ""
            self.console.print(
                f"step {last['step']}/{self.steps}  loss {last['loss']:.4f}{held_out}  {speed:.0f} tokens/s"
            )
        if not self.writes:
            return
        with run.writing(self.path):
            for record in records:
                self.file.write(json.dumps(record, allow_nan=False) + "\n")
                for name, value in record.items():
                    if name != "step":
                        self.board.add(step=record["step"], summary=scalar(name, value))

    def flush(self) -> None:
        """Puts every record on disk."""
        if self.writes:
            with run.writing(self.path):
                self.file.flush()
                os.fsync(self.file.fileno())
                self.board.records.flush()


class _Board:
    """TensorBoard's file. tensorboardX writes it in a thread of its own, and hangs when the disk is full."""

    def __init__(self, folder: Path, done: int):
        folder.mkdir(exist_ok=True)
        self.records = RecordWriter(str(folder / f"events.out.tfevents.{time.time():.3f}.{socket.gethostname()}"))
        self.add(file_version="brain.Event:2")
        # TensorBoard forgets later steps of earlier files.
        self.add(step=done + 1, session_log=SessionLog(status=SessionLog.START))

    def add(self, **fields: Any) -> None:
        self.records.write(Event(wall_time=time.time(), **fields).SerializeToString())


def read(path: Path) -> list[dict[str, float]]:
    """The records of metrics.jsonl; a last line cut off by a kill is left out.

    Raises:
      RunError: it cannot be read, or another line is damaged.
    """
    if not path.exists():
        return []
    *lines, last = content(path).split(b"\n")
    records = [numbers(line, f"{path}:{number}", STEP) for number, line in enumerate(lines, start=1)]
    try:
        return [*records, numbers(last, str(path), STEP)]
    except run.RunError:
        return records


def content(path: Path) -> bytes:
    """The bytes of a file of a run folder.

    Raises:
      RunError: it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise run.RunError(f"{path}: cannot be read: {error.strerror or error}") from None


def numbers(text: bytes, place: str, names: Sequence[str]) -> dict[str, float]:
    """A JSON object of finite numbers.

    Args:
      text: the JSON.
      place: for the message: the file, and the line if there are several.
      names: which numbers there must be.

    Raises:
      RunError: it is something else.
    """
    try:
        found = json.loads(text)
        if set(names) <= found.keys() and all(type(n) in (int, float) and abs(n) < math.inf for n in found.values()):
            return found
    except (AttributeError, ValueError, RecursionError):  # no object; no JSON
        pass
    start = f"{text[:60]!r}".removeprefix("b")
    raise run.RunError(
        f"{place}: damaged, or written by another version: expected a JSON object of numbers with {', '.join(names)}, "
        f"found {start}{' …' if len(text) > 60 else ''}"
    )
