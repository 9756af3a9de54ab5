"""Work that mostly moves bytes: how long does it take beside a plain copy of as many, and how much memory on top?"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from rich.console import Console

from train.bench.figures import Column, Figures, ratio, spread
from train.bench.workers import Worker, rounds

COLUMNS = (
    Column("megabytes", "MB moved", ",.1f"),
    Column("median_seconds", "median s", ".3f"),
    Column("least_seconds", "least s", ".3f"),
    Column("gigabytes_per_second", "GB/s", ".2f"),
    Column("ratio", "x plain", ".2f"),
    Column("extra_megabytes", "peak MB on top", ",.0f"),
)
NOTES = (
    "each row is a process of its own, and they take turns; medians over the rounds",
    '"x plain": seconds for each byte moved, over those of the plain row in the same round',
    '"peak MB on top": the most memory that was resident meanwhile, less what was resident before',
)


def measure(
    name: str,
    title: str,
    entries: Mapping[str, tuple[str, Mapping[str, Any]]],
    plain: str,
    count: int,
    console: Console,
    notes: Sequence[str] = (),
) -> Figures:
    """Runs every entry in turn.

    Args:
      name: of the benchmark.
      title: what it measures.
      entries: {row: (``module:function``, its arguments)}. The function's `Work` has the fact ``bytes``, read and
        written together, and may have more, which go to the JSON.
      plain: the row that only moves bytes.
      count: rounds.
      console: says what is being prepared.
      notes: lines to read with the table, beside what its columns mean.
    """
    with ExitStack() as stack:
        workers = []
        for row, (entry, arguments) in entries.items():
            console.print(f"preparing {row} …", highlight=False)
            workers.append(stack.enter_context(Worker(row, entry, arguments)))
        answers = rounds(workers, count)
    per_byte = {
        worker.name: [answer["seconds"] / worker.facts["bytes"] for answer in answers[worker.name]]
        for worker in workers
    }
    rows = []
    for worker in workers:
        seconds = [answer["seconds"] for answer in answers[worker.name]]
        known = [one for one in answers[worker.name] if one["peak_bytes"] is not None]
        row: dict[str, Any] = {"name": worker.name, **worker.facts, "seconds": seconds, **spread(seconds)}
        row["megabytes"] = worker.facts["bytes"] / 1e6
        row["gigabytes_per_second"] = worker.facts["bytes"] / row["median_seconds"] / 1e9
        row["ratio"] = ratio(per_byte[worker.name], per_byte[plain])
        if known:
            row["extra_megabytes"] = max(one["peak_bytes"] - one["resident_bytes"] for one in known) / 1e6
        rows.append(row)
    return Figures(name, title, (Column("name", "what"), *COLUMNS), rows, "median_seconds", [*NOTES, *notes])
