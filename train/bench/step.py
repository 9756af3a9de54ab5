"""What does a training step cost? The library's adapters, other libraries and what bounds them, in turn.

A step is forward pass, gradient and AdamW update, in float32, from the same weights on the same random tokens. Each row
runs in a process of its own, one file a library: `step_jaxpeft`, `step_torch`, `step_handwritten`, `step_qwix`.
"""

import argparse
import contextlib
import importlib.util
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from jaxpeft import models
from jaxpeft.spec import nearest
from train.bench.figures import Column, Figures, ratio, spread
from train.bench.specs import LORA, MOS, SPECS, decoder, misfit
from train.bench.workers import TORCH, Entry, peak_mib, rounds, started
from train.config import ConfigError
from train.run import RunError

FROZEN, FROZEN_TORCH = "frozen bound", "frozen bound, torch"
PEFT = "PEFT lora r=16 (torch)"
QWIX, HANDWRITTEN = "qwix lora r=16 (JAX)", "hand-written JAX lora r=16"

COLUMNS = (
    Column("row", "step"),
    Column("trained", "trained parameters", ","),
    Column("median_seconds", "median s", ".3f"),
    Column("spread", "spread s"),
    Column("times_frozen", "x frozen", ".3f"),
    Column("tokens_per_second", "tokens/s", ".0f"),
    Column("peak_mib", "peak MiB", ".0f"),
    Column("compile_seconds", "compile s", ".1f"),
    Column("gflop", "GFLOP", ".1f"),
    Column("flop_share", "FLOP over bound", ".1%"),
)


@dataclass(frozen=True)
class Row:
    """What a worker is asked to do.

    Attributes:
      entry, arguments: of the worker, beside the folder, the batch and the length.
      needs: packages that may be missing.
      plain: whether it is written for a Llama without further features.
      bound: the row that its FLOPs are compared with, counted the same way.
    """

    entry: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    needs: Sequence[str] = ()
    plain: bool = False
    bound: str = FROZEN


def rows(eager: bool) -> dict[str, Row]:
    """{name: row}, in the order of the table."""
    torch = {"needs": ("torch",), "bound": FROZEN_TORCH}
    return {
        FROZEN: Row("step_jaxpeft:frozen"),
        "full fine-tuning": Row("step_jaxpeft:full"),
        **{name: Row("step_jaxpeft:adapter", {"spec": spec.to_dict()}) for name, spec in SPECS.items()},
        FROZEN_TORCH: Row("step_torch:frozen", {"compile": not eager}, **torch),
        PEFT: Row("step_torch:lora", {"rank": 16, "compile": not eager}, **torch | {"needs": ("torch", "peft")}),
        QWIX: Row("step_qwix:lora", {"rank": 16}, needs=("qwix",), plain=True),
        HANDWRITTEN: Row("step_handwritten:lora", {"rank": 16}, plain=True),
    }


def measure(options: argparse.Namespace, console: Console) -> Figures:
    """Times the rows in turn.

    Raises:
      ConfigError: a bad option, an encoder, or an adapter that does not fit the model.
      RunError: a worker failed, or the rows do not compute the same loss.
    """
    asked, left_out = _checked(options)
    remarks = [*left_out, *busy()]
    if tunables := os.environ.get("GLIBC_TUNABLES"):
        remarks.append(f"GLIBC_TUNABLES={tunables} for all rows but torch's")
    for line in remarks:
        console.print(line, highlight=False, markup=False)
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as stack:
        folder = Path(scratch) / "model"
        models.save(folder, models.pretrained(options.model), dtype="float32")
        arguments = {"folder": str(folder), "batch": options.batch, "length": options.length}
        environment = {
            "JAX_ENABLE_COMPILATION_CACHE": "false",
            "TF_CPP_MIN_LOG_LEVEL": "3",
            "TORCHINDUCTOR_CACHE_DIR": str(Path(scratch) / "inductor"),
        }
        entries = {
            name: Entry(
                f"train.bench.{row.entry}",
                {**arguments, **row.arguments},
                {**environment, **(TORCH if "torch" in row.needs else {})},
            )
            for name, row in asked.items()
        }
        workers = started(stack, entries, console)
        check_losses({worker.name: worker.facts["first_loss"] for worker in workers})
        found = rounds(workers, options.rounds)
    tokens = options.batch * options.length
    made = compared([_figures(worker.name, worker.facts, found[worker.name], tokens) for worker in workers])
    return Figures(
        "step",
        f"A training step of {options.model}: {options.batch} x {options.length} tokens, float32, AdamW; median of "
        f"{options.rounds} rounds, each row in a process of its own, in turn, after a step that is not measured",
        COLUMNS,
        made,
        "median_seconds",
        [*notes(made), *remarks],
    )


def compared(made: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with their ratios to the bounds."""
    named, bounds = {row["row"]: row for row in made}, rows(eager=False)
    frozen = named[FROZEN]
    found = []
    for row in made:
        bound = named.get(bounds[row["row"]].bound, {}).get("gflop")
        share = row["gflop"] / bound - 1 if row["gflop"] and bound else None
        found.append({**row, "times_frozen": ratio(row["seconds"], frozen["seconds"]), "flop_share": share})
    return found


def notes(made: Sequence[dict[str, Any]]) -> list[str]:
    """The aims as ratios of this run, and what the other libraries were set to; of what `compared` returns."""
    named = {row["row"]: row for row in made}
    found = []
    for name in SPECS:
        if name in named and named[name]["flop_share"] is not None:
            times, share = named[name]["times_frozen"], named[name]["flop_share"]
            allowed = 1.05 + share
            found.append(f"{name}: {times:.3f} x frozen; allowed 1.05 + its FLOPs' share {share:.3f} = {allowed:.3f}")

    def over(of: str, to: str) -> float | None:
        return ratio(named[of]["seconds"], named[to]["seconds"]) if of in named and to in named else None

    ratios = {"mos / lora of the same materialised rank, seconds (aim 1.03)": over(MOS, LORA)}
    for other, aim in ((PEFT, " (aim 1.2)"), (QWIX, ""), (HANDWRITTEN, "")):
        ratios[f"{LORA} / {other}, tokens/s{aim}"] = over(other, LORA)
    peaks = [named.get(name, {}).get("peak_mib") for name in (LORA, PEFT)]
    if all(peaks):
        ratios[f"{LORA} / {PEFT}, peak memory (aim 1)"] = peaks[0] / peaks[1]
    found += [f"{name}: {value:.3f}" for name, value in ratios.items() if value is not None]
    return found + [f"{name}: {row['settings']}" for name, row in named.items() if row.get("settings")]


def _figures(name: str, facts: Mapping[str, Any], answers: Sequence[Mapping[str, Any]], tokens: int) -> dict[str, Any]:
    seconds = [answer["seconds"] for answer in answers]
    found = {"row": name, **facts, "seconds": seconds, **spread(seconds)}
    return {
        **found,
        "spread": f"{min(seconds):.3f}-{max(seconds):.3f}",
        "tokens_per_second": tokens / found["median_seconds"],
        "peak_mib": peak_mib(answers),
        "losses": [answer["result"] for answer in answers],
    }


def _checked(options: argparse.Namespace) -> tuple[dict[str, Row], list[str]]:
    """The rows to measure, and a line for each that is left out; nothing long has begun."""
    known = rows(options.eager)
    only = options.only or list(known)
    problems = too_small(options)
    problems += [f"--only: unknown row {name!r}; {nearest(name, known)}" for name in only if name not in known]
    if problems:
        raise ConfigError(problems, "bench step")
    model = decoder(options.model, "bench step")
    asked = {name: row for name, row in known.items() if name == FROZEN or name in only}
    missing = {name: reason for name, row in asked.items() if (reason := _missing(row, model.config, options.length))}
    if options.only and missing:
        raise ConfigError([f"--only {name!r}: {reason}" for name, reason in missing.items()], "bench step")
    asked = {name: row for name, row in asked.items() if name not in missing}
    if problems := [problem for name in asked if name in SPECS and (problem := misfit(name, model))]:
        problems.append(f"--only: names the rows to measure, of {', '.join(known)}")
        raise ConfigError(problems, "bench step")
    return asked, [f"left out: {name}: {reason}" for name, reason in missing.items()]


def _missing(row: Row, config: models.Config, length: int) -> str:
    """Why a row cannot be measured; empty if it can."""
    if absent := [name for name in row.needs if importlib.util.find_spec(name) is None]:
        return f"{', '.join(absent)} not installed (pip install 'jaxpeft[parity]')"
    features = ["attention_bias", "attention_out_bias", "mlp_bias", "qk_norm", "rope_scaling"]
    if (config.sliding_window or length) < length:
        features.append("sliding_window")
    if row.plain and (found := [name for name in features if getattr(config, name)]):
        return f"written for a plain Llama, and this model has {', '.join(found)}"
    return ""


def too_small(options: argparse.Namespace) -> list[str]:
    """What is wrong with the size of the batch."""
    sizes = {name: getattr(options, name) for name in ("batch", "length")}
    return [f"--{name}: at least 1, found {size}" for name, size in sizes.items() if size < 1]


def busy() -> list[str]:
    """A line if other processes have work, which the figures would show."""
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    if load < 0.5 * cores:
        return []
    return [f"the machine was busy before: load {load:.1f} on {cores} cores; these figures are not to be relied on"]


def check_losses(first: Mapping[str, float]) -> None:
    """Raises RunError if a row's first loss is not that of the first row."""
    (name, expected), *others = first.items()
    for other, found in others:
        if not abs(found - expected) <= 1e-3 * abs(expected):  # Nor is it where one of them is no number.
            raise RunError(
                f"the rows compute different things: the first loss of {name} is {expected}, of {other} {found}; all "
                "start from the same weights and read the same tokens"
            )
