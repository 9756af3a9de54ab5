"""What a benchmark found: a table for people, JSON for programs, a chart, and where and when it was measured."""

import datetime
import io
import platform
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train import report, run
from train.bench.workers import cores


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
      key: of the value in each row; a row may lack it.
      title: the heading, with the unit.
      format: of the value, as in `format`.
    """

    key: str
    title: str
    format: str = ""

    def cell(self, row: dict[str, Any]) -> str:
        """The value of a row as text, empty where there is none."""
        value = row.get(self.key)
        return "" if value is None else format(value, self.format)


@dataclass(frozen=True)
class Figures:
    """The result of one benchmark.

    Attributes:
      name: of the benchmark, and of the files that `write` makes.
      title: what was measured, in one line.
      columns: what the table shows; the first is what a row is.
      rows: {key: value} each; JSON holds all of it, the table what has a column.
      chart: the key that the chart shows, as one bar a row.
      notes: lines to read with the table.
    """

    name: str
    title: str
    columns: Sequence[Column]
    rows: Sequence[dict[str, Any]]
    chart: str
    notes: Sequence[str] = ()

    def table(self) -> str:
        """The rows as a Markdown table."""
        rule = ["---", *["---:"] * (len(self.columns) - 1)]
        lines = [[column.title for column in self.columns], rule]
        lines += [[column.cell(row) for column in self.columns] for row in self.rows]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)

    def markdown(self) -> str:
        """The table with its title, its notes, and where and when it was measured."""
        found = surroundings()
        versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
        where = f"{found['machine']}, {found['cores']} cores; {versions}; {found['date']}"
        notes = "".join(f"- {note}\n" for note in self.notes)
        return f"{self.title}\n\n{self.table()}\n\n{notes}\n{where}\n"

    def to_dict(self) -> dict[str, Any]:
        """Everything, JSON-able."""
        return {
            "benchmark": self.name,
            "title": self.title,
            "rows": list(self.rows),
            "notes": list(self.notes),
            **surroundings(),
        }

    def png(self) -> bytes:
        """The chart."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        first, shown = self.columns[0], next(column for column in self.columns if column.key == self.chart)
        rows = [row for row in self.rows if row.get(self.chart) is not None][::-1]
        figure = Figure(figsize=(8, 1.2 + 0.32 * len(rows)), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        bars = axes.barh([first.cell(row) for row in rows], [row[self.chart] for row in rows])
        axes.bar_label(bars, [shown.cell(row) for row in rows], padding=3)
        axes.margins(x=0.12)
        axes.set_xlabel(shown.title)
        axes.set_title(self.title, fontsize="medium", wrap=True)
        image = io.BytesIO()
        figure.savefig(image, format="png", dpi=120)
        return image.getvalue()

    def write(self, folder: Path) -> None:
        """Writes ``name.md``, ``name.json`` and ``name.png``."""
        run.write(folder / f"{self.name}.md", self.markdown())
        run.write_json(folder / f"{self.name}.json", self.to_dict())
        run.write(folder / f"{self.name}.png", self.png())


def surroundings() -> dict[str, Any]:
    """The machine, the versions and the date."""
    return {
        "machine": _processor(),
        "cores": cores(),
        "versions": report.versions(),
        "date": datetime.date.today().isoformat(),
    }


def spread(seconds: Sequence[float]) -> dict[str, float]:
    """Median, least and greatest of repeated measurements, as parts of a row."""
    return {
        "median_seconds": statistics.median(seconds),
        "least_seconds": min(seconds),
        "greatest_seconds": max(seconds),
    }


def ratio(of: Sequence[float], to: Sequence[float]) -> float:
    """Median over the rounds of the ratio of two measurements that were taken in turn."""
    return statistics.median(a / b for a, b in zip(of, to, strict=True))


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    flags = next((line for line in lines if line.startswith("flags")), "").split()
    widest = next((flag.upper() for flag in ("avx512f", "avx2", "avx") if flag in flags), platform.machine())
    return f"{names[0] if names else platform.machine()} ({widest})"
