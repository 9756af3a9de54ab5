"""What a run leaves to read: summary.json, report.md and loss.png."""

import importlib.metadata
import io
import json
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from pydantic import TypeAdapter, ValidationError

from jaxpeft.sites import Sites
from train import config as configuration
from train import metrics, run

PACKAGES = ("jaxpeft", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "transformers", "numpy")


@dataclass(frozen=True)
class _Summary:
    """What of summary.json is written out; its measures, each before and after, are besides."""

    config: dict[str, Any]
    versions: dict[str, str]
    devices: str
    eval_loss_before: float
    eval_loss_after: float
    trainable_parameters: int
    adapter_bytes: int
    steps: int
    tokens: int
    train_seconds: float
    tokens_per_second: float
    compile_seconds: float
    peak_memory_bytes: int
    head_parameters: int = 0


def summary(folder: Path, results: dict[str, Any]) -> dict[str, Any]:
    """Puts the run's results together with what its metrics, configuration and surroundings say.

    Args:
      folder: the run folder.
      results: measurements by name, for instance `eval_loss_before`.
    """
    records = metrics.read(folder / "metrics.jsonl")
    seconds = sum(record["seconds"] for record in records)
    return {
        **results,
        "steps": len(records),
        "tokens": sum(record["tokens"] for record in records),
        "train_seconds": seconds,
        "tokens_per_second": sum(record["tokens"] for record in records) / seconds,
        "compile_seconds": sum(record.get("compile_seconds", 0.0) for record in records),
        "config": run.json_of(folder / "config.yaml"),
        "versions": versions(),
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
    }


def versions() -> dict[str, str]:
    """Of Python and of every package that the numbers depend on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def write(folder: Path) -> Path:
    """Writes report.md and loss.png from a finished run's summary.json and metrics.jsonl.

    Raises:
      RunError: the run is not finished, or one of the two files is damaged.
    """
    if not (folder / "summary.json").exists():
        raise run.RunError(f"{folder}: no summary.json; the run is not finished, start it again to go on")
    summary, records = _read(folder / "summary.json"), metrics.read(folder / "metrics.jsonl")
    if not records:
        raise run.RunError(
            f"{folder / 'metrics.jsonl'}: holds no records, expected one of each of the run's {summary['steps']} steps"
        )
    run.write(folder / "loss.png", _plot(records, summary))
    run.write(folder / "report.md", _markdown(summary))
    return folder / "report.md"


def _read(path: Path) -> dict[str, Any]:
    """A summary.json that can be written out.

    Raises:
      RunError: it is damaged.
    """
    text = metrics.content(path)
    try:
        TypeAdapter(_Summary).validate_json(text, strict=True)
        found = json.loads(text)
        configuration.parse(json.dumps(found["config"]), origin="config")
        Sites.from_dict(found.get("sites", {"groups": []}))
        ends = [name.removesuffix("_after") for name in found if name.endswith("_after")]
        TypeAdapter(dict[str, float]).validate_python(
            {f"{name}_{end}": found.get(f"{name}_{end}") for name in ends for end in ("before", "after")}, strict=True
        )
        return found
    except ValidationError as error:
        wrong = [f"{'.'.join(map(str, one['loc']))}: {one['msg']}".removeprefix(": ") for one in error.errors()]
    except (AttributeError, KeyError, TypeError) as error:
        wrong = [f"sites: {error!r}"]
    except ValueError as error:
        wrong = [" ".join(str(error).split())]
    raise run.RunError(f"{path}: damaged, or written by another version: {'; '.join(wrong)}")


def table(summary: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(measure, before, after) of everything measured twice; a bare result of one evaluation has no second column."""
    names = [name.removesuffix("_after") for name in summary if name.endswith("_after")]
    return [(name, f"{summary[f'{name}_before']:.4f}", f"{summary[f'{name}_after']:.4f}") for name in names]


def _markdown(summary: dict[str, Any]) -> str:
    config = summary["config"]
    method = ", ".join(f"{key} {value}" for key, value in config["method"].items() if key != "name")
    lines = [
        f"# {config['method']['name']} on {config['data']['source']}",
        "",
        f"`{config['model']['name']}`, {config['method']['name']} ({method}), sites `{config['sites']['select']}`.",
        "",
        "| held out | before | after |",
        "| --- | ---: | ---: |",
        *(f"| {name} | {before} | {after} |" for name, before, after in table(summary)),
        "",
        "| | |",
        "| --- | ---: |",
        f"| trained parameters | {summary['trainable_parameters']:,} |",
        *([f"| of which the head | {head:,} |"] if (head := summary.get("head_parameters")) else []),
        f"| adapter on disk | {summary['adapter_bytes'] / 1e6:.2f} MB |",
        f"| steps | {summary['steps']} |",
        f"| tokens (without padding) | {summary['tokens']:,} |",
        f"| training | {summary['train_seconds']:.0f} s, {summary['tokens_per_second']:.0f} tokens/s |",
        f"| compilation | {summary['compile_seconds']:.0f} s |",
        f"| peak memory | {summary['peak_memory_bytes'] / 1e9:.2f} GB |",
        f"| devices | {summary['devices']} |",
        "",
        "![loss](loss.png)",
        "",
        ", ".join(f"{name} {version}" for name, version in summary["versions"].items()),
        "",
    ]
    return "\n".join(lines)


def _plot(records: list[dict[str, float]], summary: dict[str, Any]) -> bytes:
    # A Figure of its own: pyplot would choose a window system and keep the figure in a global table.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    kind = summary["config"].get("task", {}).get("kind", "generation")
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot([r["step"] for r in records], [r["loss"] for r in records], label="training", linewidth=1)
    held_out = [record for record in records if "held_out_loss" in record]
    if held_out:
        rows = summary["config"]["train"]["evaluate_rows"]
        label = f"first {rows} held-out rows"
        axes.plot([r["step"] for r in held_out], [r["held_out_loss"] for r in held_out], ".-", label=label)
    ends = [summary["eval_loss_before"], summary["eval_loss_after"]]
    axes.plot([0, records[-1]["step"]], ends, "o", label="all held-out rows")
    unit = {"generation": "nats per token", "regression": "squared error"}.get(kind, "nats")
    axes.set(xlabel="step", ylabel=f"loss ({unit})")
    axes.grid(alpha=0.3)
    axes.legend()
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120)
    return image.getvalue()
