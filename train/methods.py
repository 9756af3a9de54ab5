"""The table of methods: what each costs on a model at one budget, and a page of documentation for each."""

import dataclasses
import inspect
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jaxpeft
from jaxpeft import models
from jaxpeft.methods import METHODS, TYPICAL
from jaxpeft.spec import Card, nearest
from jaxpeft.table import table
from train.config import ConfigError

DEFAULT = "meta-llama/Llama-2-7b-hf"
"""The model of the table when none is named: the one that most of the papers fine-tune."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One method on one model.

    Attributes:
        name: its key in `jaxpeft.methods.METHODS`.
        card: what it says of itself.
        setting: the hyper-parameter that was chosen for the budget, or why there is none.
        parameters: what it then trains; None where no setting fits.
    """

    name: str
    card: Card
    setting: str
    parameters: int | None


def sites(name: str) -> jaxpeft.Sites:
    """The linear weights of a model, from shapes alone; those in `models.ARCHITECTURES` need no files."""
    if name in models.ARCHITECTURES:
        params = models.abstract(models.ARCHITECTURES[name])
    else:
        try:
            params = models.pretrained(name, dtype="float32", weights=False).params
        except ValueError as error:
            known = ", ".join(models.ARCHITECTURES)
            raise ConfigError([f"--model: {error}; by their shapes alone: {known}"]) from None
    return jaxpeft.find(params)


def rows(found: jaxpeft.Sites, parameters: int, names: Sequence[str] = ()) -> Iterator[Row]:
    """Every method, or the named ones, at the budget that comes closest to `parameters`."""
    for name in names or METHODS:
        if name not in METHODS:
            raise ConfigError([f"--method: unknown method {name!r}; {nearest(name, METHODS)}"])
        card, spec = METHODS[name].CARD, TYPICAL[name]
        if not card.budget:
            yield Row(name, card, "", None)
            continue
        try:
            budget = jaxpeft.fit_budget(spec, found, parameters)
        except ValueError as error:
            yield Row(name, card, str(error), None)
        else:
            yield Row(name, card, f"{card.budget}={getattr(budget.spec, card.budget)}", budget.parameters)


def text(made: Sequence[Row], found: jaxpeft.Sites, parameters: int) -> str:
    """The rows as a table."""
    lines: list[tuple[str, ...]] = [
        ("method", "formula", "setting", "trained", "of budget", "mergeable", "zero start", "shared", "source")
    ]
    for row in made:
        trained = "" if row.parameters is None else f"{row.parameters:,}"
        share = "" if row.parameters is None else f"{row.parameters / parameters:.1%}"
        flags = (_yes(row.card.mergeable), _yes(row.card.zero_start), row.card.shared or "no")
        lines.append((row.name, row.card.formula, row.setting, trained, share, *flags, row.card.source))
    return "\n".join([*table(lines), f"{found.size:,} base parameters at {len(found)} kinds of weights"])


def page(name: str) -> str:
    """A method's page: its card, and what its docstring says."""
    method = METHODS[name]
    card, spec = method.CARD, method.Spec
    facts = {
        "ΔW of one (in, out) weight": card.formula,
        "Trained parameters": card.parameters,
        "Shared": card.shared or "nothing",
        "Starts as the base model": _yes(card.zero_start),
        "Mergeable": _yes(card.mergeable),
        "Hyper-parameter of a budget": f"`{card.budget}`" if card.budget else "none",
        "Source": card.source,
    }
    return "\n".join(
        [
            f"# {card.title}",
            "",
            f"`jaxpeft.methods.{name}`. {inspect.getdoc(method)}".replace("\n", " "),
            "",
            "| | |",
            "|---|---|",
            *(f"| {fact} | {value.replace('|', chr(92) + '|')} |" for fact, value in facts.items()),
            "",
            *_markdown(inspect.getdoc(spec) or ""),
            "",
        ]
    )


def pages(folder: Path) -> None:
    """Writes every method's page, and takes away those of methods that are gone."""
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob("*.md"):
        if stale.stem not in (*METHODS, "index"):
            stale.unlink()
    for name in METHODS:
        (folder / f"{name}.md").write_text(page(name), encoding="utf-8")


def _yes(value: Any) -> str:
    return "yes" if value else "no"


def _markdown(docstring: str) -> Iterator[str]:
    """A docstring's sections as Markdown: attributes as a list, the example as code."""
    section = ""
    for line in docstring.splitlines():
        if heading := re.fullmatch(r"(Attributes|Examples|Raises|Returns|Args):", line):
            if section == "Examples":
                yield "```"
            section = heading[1]
            yield f"## {section}"
            yield ""
            if section == "Examples":
                yield "```pycon"
        elif section == "Examples":
            if line.strip():
                yield line.removeprefix("    ")
        elif section and (item := re.fullmatch(r"    (\w[\w, ]*): (.*)", line)):
            yield f"- `{item[1]}`: {item[2]}"
        elif section:
            yield f"  {line.strip()}" if line.strip() else ""
        else:
            yield line.replace("``", "`")
    if section == "Examples":
        yield "```"
