"""Many adapters in one batch: what does it cost that every row has another adapter, and how much memory is one?"""

import argparse
import contextlib
import importlib.util
import statistics
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from jaxpeft import models
from train.bench.figures import Column, Figures, ratio
from train.bench.specs import LORA, MOS, check
from train.bench.workers import TORCH, Entry, peak_mib, rounds, started
from train.config import ConfigError

COLUMNS = (
    Column("name", "rows of the batch"),
    Column("prefill", "prompt tokens/s", ",.0f"),
    Column("prefill_ratio", "x one adapter", ".2f"),
    Column("decode", "new tokens/s", ",.1f"),
    Column("decode_ratio", "x one adapter", ".2f"),
    Column("train", "trained tokens/s", ",.0f"),
    Column("train_ratio", "x one adapter", ".2f"),
    Column("adapter_kib", "KiB of an adapter", ",.0f"),
    Column("per_gb", "adapters per GB", ",.0f"),
    Column("peak_mib", "peak MiB", ",.0f"),
)
METHODS = (LORA, MOS)
ONE = "one adapter: {}"
MANY = "an adapter each: {}"
MIXED = "an adapter each, two methods: {}"
PEFT = "lora r=16 (PEFT, torch)"


def entries(count: int, shape: Mapping[str, Any]) -> dict[str, Entry]:
    """{row: what it runs}, in the order of the table; `shape` is what all rows are told."""

    def ours(**own: Any) -> Entry:
        return Entry("train.bench.adapters_jaxpeft:work", {**shape, **own}, {"TF_CPP_MIN_LOG_LEVEL": "3"})

    def theirs(**own: Any) -> Entry:
        return Entry("train.bench.adapters_peft:work", {**shape, **own}, TORCH)

    found = {"no adapter": ours(methods=[])}
    for method in METHODS:
        found[ONE.format(method)] = ours(methods=[method])
        found[MANY.format(method)] = ours(methods=[method], adapters=count)
    found[MIXED.format(" and ".join(METHODS))] = ours(methods=list(METHODS), adapters=count)
    found[ONE.format(PEFT)] = theirs(adapters=1)
    found[MANY.format(PEFT)] = theirs(adapters=count)
    return found


def measure(options: argparse.Namespace, console: Console) -> Figures:
    """Reads prompts, writes, and trains with every row, in turn.

    Raises:
      ConfigError: a bad option, or an adapter that does not fit the model.
      RunError: a row failed.
    """
    problems = [f"--adapters: an even number, at least 2, found {options.adapters}"] if options.adapters % 2 else []
    for name, least in (("adapters", 2), ("prompt", 1), ("new", 2)):
        if getattr(options, name) < least:
            problems.append(f"--{name}: at least {least}, found {getattr(options, name)}")
    if problems:
        raise ConfigError(problems, "bench adapters")
    check(options.model, "bench adapters", METHODS)
    notes = []
    if missing := [name for name in ("torch", "peft") if importlib.util.find_spec(name) is None]:
        notes.append(f"left out: {PEFT}: {', '.join(missing)} not installed (pip install 'jaxpeft[parity]')")
        console.print(notes[0], markup=False)
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as stack:
        folder = str(Path(scratch) / "model")
        models.save(folder, models.pretrained(options.model), dtype="float32")
        shape = {"folder": folder, "rows": options.adapters, "prompt": options.prompt, "new": options.new}
        wanted = {
            name: entry for name, entry in entries(options.adapters, shape).items() if not (missing and PEFT in name)
        }
        workers = started(stack, wanted, console)
        answers = rounds(workers, options.rounds)
    rows = [_row(worker.name, worker.facts, answers, shape) for worker in workers]
    known = {row["name"]: row for row in rows}
    for method in (*METHODS, PEFT):
        if (many := known.get(MANY.format(method))) is not None:
            reached = ", ".join(f"{what} {many[f'{what}_ratio']:.3f}" for what in ("prefill", "decode"))
            notes.append(f"{options.adapters} adapters over one, {method}: {reached} (aim 0.9)")
    lora, mos = (known[MANY.format(method)]["adapter_bytes"] for method in METHODS)
    notes.append(f"{lora / mos:.2f} x as many adapters per GB of {MOS} as of {LORA} (aim 8)")
    for name, row in known.items():
        if "difference" in row:
            notes.append(
                f"{name}: logits differ from those of each adapter alone by {row['difference']:.1e} of the largest"
            )
    notes.append("every row of the batch reads its prompt, with its adapter's pools expanded first, and then writes")
    title = (
        f"{options.adapters} rows of {options.prompt} tokens, {options.new} new ones each, {options.model}, float32; "
        f"medians of {options.rounds} rounds, each line in a process of its own, in turn, "
        "after once that is not measured"
    )
    return Figures("adapters", title, COLUMNS, rows, "decode", notes)


def _row(name: str, facts: Mapping[str, Any], answers: Mapping[str, list], shape: Mapping[str, Any]) -> dict[str, Any]:
    row: dict[str, Any] = {"name": name, **facts}
    single = name.replace(MANY.format(""), ONE.format(""))
    tokens = {"prefill": shape["prompt"], "decode": shape["new"] - 1, "train": shape["prompt"]}
    for what, each in tokens.items():
        seconds = [one["result"][what] for one in answers[name] if what in one["result"]]
        if not seconds:
            continue
        row[f"{what}_seconds"] = seconds
        row[what] = shape["rows"] * each / statistics.median(seconds)
        if single in answers and name.startswith((ONE.format(""), MANY.format(""))):
            row[f"{what}_ratio"] = 1 / ratio(seconds, [one["result"][what] for one in answers[single]])
    if facts.get("adapter_bytes"):
        row["adapter_kib"], row["per_gb"] = facts["adapter_bytes"] / 1024, 1e9 / facts["adapter_bytes"]
    return {**row, "peak_mib": peak_mib(answers[name])}
