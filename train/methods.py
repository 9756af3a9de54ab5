"""The table of methods: what each costs on a model at one budget, and a page of documentation for each."""

import dataclasses
import inspect
import itertools
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import jaxpeft
from jaxpeft import models
from jaxpeft.methods import METHODS, TYPICAL
from jaxpeft.spec import Card, Spec, nearest
from jaxpeft.table import table
from train.config import ConfigError

DEFAULT = "meta-llama/Llama-2-7b-hf"
"""The model of the table when none is named: the one that most of the papers fine-tune."""

WIDTH = 135
"""Of the lines of a list in a page."""


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
            *_markdown(spec),
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


def _markdown(spec: type[Spec]) -> Iterator[str]:
    """The docstring of a Spec as Markdown: attributes as lists, those of its bases too, and the example as code."""
    sections = _sections(spec)
    yield from (line.replace("``", "`") for line in sections.pop("", []))
    sections.pop("Attributes", None)
    bases = [base for base in spec.__mro__ if issubclass(base, Spec) and base is not Spec]
    own = {name: text for base in reversed(bases) for name, text in _entries(_sections(base).get("Attributes", []))}
    common = {name: text for name, text in _entries(_sections(Spec)["Attributes"]) if name not in own}
    for heading, entries in (("Attributes", own), ("Attributes of every method", common)):
        if entries:
            yield from (f"## {heading}", "", *_items(entries, spec), "")
    for heading, lines in sections.items():
        yield from (f"## {heading}", "")
        if heading == "Examples":
            yield from ("```pycon", *(line.removeprefix("    ") for line in lines if line.strip()), "```")
        else:
            yield from _items(dict(_entries(lines)), spec)


def _sections(spec: type[Spec]) -> dict[str, list[str]]:
    """{heading: lines} of a docstring; what stands before the first heading is under an empty one."""
    sections, heading = {"": []}, ""
    for line in (inspect.getdoc(spec) or "").splitlines():
        if found := re.fullmatch(r"(Attributes|Examples|Raises|Returns|Args):", line):
            heading = found[1]
            sections[heading] = []
        else:
            sections[heading].append(line)
    return {heading: lines[:-1] if heading and not lines[-1] else lines for heading, lines in sections.items()}


def _entries(lines: Sequence[str]) -> Iterator[tuple[str, str]]:
    """(name, text) of the lines ``name: text``, each with those that go on with it."""
    starts = [at for at, line in enumerate(lines) if re.match(r"    \w+: ", line)]
    for at, end in itertools.pairwise([*starts, len(lines)]):
        name, text = " ".join(line.strip() for line in lines[at:end]).split(": ", 1)
        yield name, text.replace("``", "`")


def _items(entries: Mapping[str, str], spec: type[Spec]) -> Iterator[str]:
    """A list, with what a field of the Spec may be and what it is unless it is given."""
    fields = {field.name: field for field in dataclasses.fields(spec)}
    for name, text in entries.items():
        says = f" ({_says(fields[name])})" if name in fields else ""
        yield textwrap.fill(
            f"- `{name}`{says}: {text}", WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
        )


def _says(field: dataclasses.Field) -> str:
    """The values of a field, and its default or that it is required."""
    given = "required" if field.default is dataclasses.MISSING else f"default `{field.default!r}`"
    *first, last = _values(field.type) or [""]
    return f"{', '.join(first)} or {last}; {given}" if first else f"{last}; {given}".removeprefix("; ")


def _values(kind: Any) -> list[str]:
    """The values of an annotation: those of a Literal one by one, types by their name."""
    if get_origin(kind) is Literal:
        return [f"`{value!r}`" for value in get_args(kind)]
    if get_origin(kind) in (Union, UnionType):
        return [value for part in get_args(kind) for value in _values(part)]
    if kind is Any:
        return []
    return ["`None`" if kind is NoneType else f"`{kind.__name__ if get_origin(kind) is None else kind}`"]
