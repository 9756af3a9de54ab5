"""What is written down while training: metrics.jsonl, TensorBoard, a progress bar."""

import json
import os
import socket
import time
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


class Metrics:
    """Writes one record a step. Only the first process writes.

    After a resume every step is in metrics.jsonl exactly once: `flush` comes before a checkpoint, so no step up to the
    checkpoint is missing; and the steps after it, written before the run was killed, are taken out here.

    Args:
      folder: the run folder.
      done: steps that the checkpoint to go on from has seen; 0 for a new run.
      steps: steps of the whole run.

    Raises:
      RunError: here and in every method: the files cannot be written, for instance because the disk is full.
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
            run.write(self.path, "".join(json.dumps(record) + "\n" for record in kept))
            with run.writing(self.path):
                self.file = self.path.open("a", encoding="utf-8")
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
    """The records of metrics.jsonl; a last line cut off by a kill is left out."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records
