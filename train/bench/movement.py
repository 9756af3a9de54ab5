"""Work that mostly moves bytes: how long does it take beside moving them plainly, and how much memory on top?"""

import statistics
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from rich.console import Console

from train.bench.figures import Column, Figures, ratio, spread
from train.bench.workers import Entry, rounds, started

COLUMNS = (
    Column("megabytes", "MB moved", ",.1f"),
    Column("median_seconds", "median s", ".3f"),
    Column("least_seconds", "least s", ".3f"),
    Column("greatest_seconds", "greatest s", ".3f"),
    Column("gigabytes_per_second", "GB/s", ".2f"),
    Column("ratio", "x plain", ".2f"),
    Column("extra_megabytes", "peak MB on top", ",.0f"),
)
NOTES = (
    "each row is a process of its own, and they take turns; medians over the rounds",
    '"x plain": seconds over those of its plain row in the same round',
    '"peak MB on top": the most memory that was resident meanwhile, less what was resident before',
)


def measure(
    name: str,
    title: str,
    entries: Mapping[str, Entry],
    plain: Mapping[str, str],
    count: int,
    console: Console,
    notes: Sequence[str] = (),
    columns: Sequence[Column] = (),
) -> Figures:
    """Runs every entry in turn.

    Args:
      name: of the benchmark.
      title: what it measures.
      entries: {row: what it runs}. The function's `Work` has the fact ``bytes``, read and
        written together, and may have more, which become part of the row, as do the medians of what it returns: a dict
        of numbers, or nothing.
      plain: {row: the row that it is compared with}; a row that only moves bytes is not in it.
      count: rounds.
      console: says what is being prepared.
      notes: lines to read with the table, beside what its columns mean.
      columns: of what rows have beyond `COLUMNS`.
    """
    with ExitStack() as stack:
        workers = started(stack, entries, console)
        answers = rounds(workers, count)
    seconds = {row: [answer["seconds"] for answer in found] for row, found in answers.items()}
    rows = []
    for worker in workers:
        found, size = answers[worker.name], worker.facts["bytes"]
        row: dict[str, Any] = {"name": worker.name, **worker.facts, "seconds": seconds[worker.name]}
        row |= spread(seconds[worker.name])
        for key in found[0]["result"] or ():
            row[key] = statistics.median(answer["result"][key] for answer in found)
        row["megabytes"] = size / 1e6
        row["gigabytes_per_second"] = size / row["median_seconds"] / 1e9
        row["ratio"] = ratio(seconds[worker.name], seconds[plain.get(worker.name, worker.name)])
        if known := [one for one in found if one["peak_bytes"] is not None]:
            row["extra_megabytes"] = max(one["peak_bytes"] - one["resident_bytes"] for one in known) / 1e6
        rows.append(row)
    shown = (Column("name", "what"), *COLUMNS, *columns)
    return Figures(name, title, shown, rows, "median_seconds", [*NOTES, *notes])
