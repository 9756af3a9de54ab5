"""Which settings are each valid, but not together?"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from train.config import Data, Evaluate, Mesh, Task, Train

BUILT_IN = {
    "generation": ("sst-like", "gsm_symbolic", "synthetic"),
    "classification": ("sst-like", "synthetic"),
    "regression": ("sst-like", "synthetic"),
    "image-classification": ("cifar10", "digits", "synthetic"),
}
"""The data sources that need no files of the user's, by kind of task."""


def problems(
    data: Data | None = None,
    train: Train | None = None,
    evaluate: Evaluate | None = None,
    mesh: Mesh | None = None,
    task: Task | None = None,
    **_: Any,
) -> Iterator[str]:
    """One line for each combination that is impossible, `path: what is wrong`."""
    if task:
        yield from _of_task(task, data, evaluate, mesh)
    if mesh and [*dataclasses.astuple(mesh)].count(-1) > 1:
        yield "mesh: only one size may be -1"
    if mesh and 0 in dataclasses.astuple(mesh):
        yield "mesh: a size is at least 1, or -1 for what the others leave"
    if train and train.steps is not None and train.epochs is not None:
        yield "train.steps: give either steps or epochs, not both"
    if train and train.steps is None and train.epochs is None:
        yield "train.steps: missing; give steps or epochs"
    if train and train.batch_size % train.accumulate:
        yield f"train.accumulate: {train.accumulate} does not divide train.batch_size {train.batch_size}"
    if evaluate and len(evaluate.choices) == 1:
        yield "evaluate.choices: give at least two answers to choose between"
    if evaluate and len(set(evaluate.choices)) < len(evaluate.choices):
        yield "evaluate.choices: the same answer is given twice"
    if evaluate and evaluate.exact_match_rows and evaluate.exact_match is None:
        yield "evaluate.exact_match_rows: has no effect without evaluate.exact_match (whole or number)"
    if data and data.source in BUILT_IN[task.kind if task else "generation"]:
        if data.held_out:
            yield f"data.held_out: {data.source} brings its own held-out rows"
        if data.columns:
            yield f"data.columns: {data.source} needs no column names"


def _of_task(task: Task, data: Data | None, evaluate: Evaluate | None, mesh: Mesh | None) -> Iterator[str]:
    """What a kind of task has no use for."""
    kind = task.kind
    if task.labels and kind not in ("classification", "image-classification"):
        yield f"task.labels: has no effect with task.kind {kind}"
    if len(task.labels) == 1:
        yield "task.labels: give at least two classes"
    if len(set(task.labels)) < len(task.labels):
        yield "task.labels: the same class is given twice"
    if task.image_size and kind != "image-classification":
        yield f"task.image_size: has no effect with task.kind {kind}"
    others = {name for names in BUILT_IN.values() for name in names} - set(BUILT_IN[kind])
    if data and data.source in others:
        known = ", ".join(BUILT_IN[kind])
        yield f"data.source: {data.source} is no data set of task.kind {kind}; built in for it: {known}"
    if kind == "generation":
        if task.pooling:
            yield "task.pooling: has no effect with task.kind generation"
        return
    if data and data.batching == "pack":
        yield f"data.batching: pack has no use with task.kind {kind}; choose buckets or pad"
    if mesh and mesh.sequence != 1:
        yield f"mesh.sequence: must be 1 with task.kind {kind}: an encoder's sequences are not split"
    if evaluate and (evaluate.choices or evaluate.exact_match):
        name = "choices" if evaluate.choices else "exact_match"
        yield f"evaluate.{name}: is for task.kind generation, found {kind}"
