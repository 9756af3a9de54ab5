"""What does the model card beside a PEFT adapter say?"""

import json
from collections.abc import Mapping
from typing import Any

import jaxpeft.spec as base
from jaxpeft.adapter import Adapter


def text(adapter: Adapter, report: Any, config: Mapping[str, Any]) -> str:
    """The ``README.md``: method, sites, rank, base, how to load it, and what was lost.

    Args:
        adapter: what was exported.
        report: what `jaxpeft.to_peft` returns.
        config: what went into ``adapter_config.json``.
    """
    model, kept = config["base_model_name_or_path"], {"native": "in PEFT's own form", "lossless": "without loss"}
    title = base.method_of(adapter.spec).CARD.title
    how = kept.get(report.how, f"as the nearest low-rank update, with a relative error up to {report.error:.2%}")
    lines = [
        "---",
        f"base_model: {json.dumps(model)}",
        "library_name: peft",
        "tags:",
        f"- {report.peft_type.lower()}",
        "- jaxpeft",
        "---",
        "",
        f"# {title} adapter for {model}",
        "",
        f"Trained with jaxpeft as {title}, written as {report.peft_type} {how}.",
        "",
        f"- base model: `{model}`",
        f"- adapted modules: {len(report.modules)}, {', '.join(f'`{name}`' for name in _ends(report.modules))}",
    ]
    if "r" in config:
        varied = " (others in `rank_pattern`)" if config.get("rank_pattern") else ""
        lines.append(f"- rank: {config['r']}{varied}")
    if report.whole:
        lines.append(f"- trained whole: {', '.join(f'`{name}`' for name in _ends(report.whole))}")
    lines.append(f"- numbers in the file: {report.parameters:,}")
    lines.append(f"- hyper-parameters: `{json.dumps(adapter.spec.to_dict())}`")
    if report.errors:
        lines += ["", "Relative error of each group, ‖ΔW − written‖ / ‖ΔW‖, the largest over its layers:", ""]
        lines += [f"- `{path}`: {error:.3g}" for path, error in report.errors.items()]
    lines += [
        "",
        "In PEFT:",
        "",
        "```python",
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM",
        "",
        f"model = AutoModelForCausalLM.from_pretrained({model!r})",
        "model = PeftModel.from_pretrained(model, FOLDER)",
        "```",
        "",
        "In jaxpeft, `params` being the base model's parameters:",
        "",
        "```python",
        "import jaxpeft",
        "",
        "adapter = jaxpeft.from_peft(FOLDER, params)",
        "```",
        "",
    ]
    return "\n".join(lines)


def _ends(names: tuple[str, ...]) -> list[str]:
    """Names with their layers' numbers as ``*``, each once."""
    folded = (".".join("*" if step.isdigit() else step for step in name.split(".")) for name in names)
    return list(dict.fromkeys(folded))
