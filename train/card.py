"""The model card of a finished run: README.md in Hugging Face's format, for whoever gets the run folder."""

from pathlib import Path
from typing import Any

import yaml

from jaxpeft.methods import METHODS
from jaxpeft.sites import Sites
from train import report, run

SETTINGS = ("method", "sites", "data", "optimizer", "train")
"""The sections of the configuration that the result depends on."""


def write(folder: Path) -> Path:
    """Writes README.md from a finished run's summary.json.

    Raises:
      RunError: the run is not finished, or the file cannot be written.
    """
    if not (folder / "summary.json").exists():
        raise run.RunError(f"{folder}: no summary.json; the run is not finished, start it again to go on")
    run.write(folder / "README.md", _card(run.json_of(folder / "summary.json")))
    return folder / "README.md"


def _card(summary: dict[str, Any]) -> str:
    config = summary["config"]
    name, base = config["method"]["name"], _base(config)
    card, measured = METHODS[name].CARD, report.table(summary)
    # What a file or a folder is called is the reader's business, where it lay is not.
    source = config["data"]["source"].removeprefix("hub:")
    source = source if config["data"]["source"].startswith("hub:") else Path(source).name
    front = {
        "base_model": base,
        "library_name": "jaxpeft",
        "tags": ["jaxpeft", "jax", "flax", "adapter", name],
        "datasets": [source],
        "metrics": [measure for measure, _, _ in measured],
    }
    settings = {section: config[section] for section in SETTINGS}
    sites = Sites.from_dict(summary["sites"])
    share = summary["trainable_parameters"] / sites.size
    lines = [
        "---",
        _yaml(front),
        "---",
        "",
        f"# {card.title} adapter of {base} on {source}",
        "",
        f"An adapter for `{base}`, trained with [jaxpeft](https://pypi.org/project/jaxpeft/) on `{source}`.",
        "",
        "## Method",
        "",
        f"{card.title}: {card.source}. ΔW of one (in, out) weight:",
        "",
        "```text",
        card.formula,
        "```",
        "",
        f"{summary['trainable_parameters']:,} trained parameters, {share:.3%} of the weights it adapts; "
        f"{summary['adapter_bytes'] / 1e6:.2f} MB on disk. It adapts:",
        "",
        "```text",
        str(sites),
        "```",
        "",
        "## Measured",
        "",
        f"On {config['data']['held_out_rows']} held-out rows, before and after training:",
        "",
        "| held out | before | after |",
        "| --- | ---: | ---: |",
        *(f"| {measure} | {before} | {after} |" for measure, before, after in measured),
        "",
        "One run of one seed. Figures in full are in `summary.json`, the losses of all steps in `metrics.jsonl`.",
        "",
        "## Training",
        "",
        f"{summary['steps']} steps, {summary['tokens']:,} tokens, {summary['train_seconds']:.0f} s on "
        f"{summary['devices']}. Settings:",
        "",
        "```yaml",
        _yaml(settings),
        "```",
        "",
        "## Use",
        "",
        "```python",
        *_use(config["model"], base),
        "```",
        "",
        ", ".join(f"{package} {version}" for package, version in summary["versions"].items()),
        "",
    ]
    return "\n".join(lines)


def _base(config: dict[str, Any]) -> str:
    """The base's name, or of a folder its last part."""
    name = config["model"]["name"]
    return Path(name).name if Path(name).expanduser().is_dir() else name


def _use(model: dict[str, Any], base: str) -> list[str]:
    """How the adapter is loaded, for a base held as it was in training."""
    kept = ", keep_blocks=True" if model["quantize"] == "gguf" else ""
    lines = [
        "import jaxpeft",
        "from jaxpeft import models",
        "",
        f'lm = models.pretrained("{base}", dtype="{model["dtype"]}"{kept})',
    ]
    params = "lm.params"
    if model["quantize"] not in (None, "gguf"):
        params = f'jaxpeft.quantize.quantize(lm.params, "{model["quantize"]}")'
    return [
        *lines,
        f"params = {params}",
        'adapter = jaxpeft.load("adapter", base=params)  # the folder beside this page',
        'tokens = lm.tokenizer("…", return_tensors="np")["input_ids"]',
        "logits = jaxpeft.adapt(lm.logits)(params, adapter, tokens)",
    ]


def _yaml(tree: Any) -> str:
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True).rstrip()
