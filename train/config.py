"""What can be configured: one YAML file becomes one frozen `Config`, or every mistake in it is listed at once."""

import dataclasses
import difflib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, TypeAdapter, ValidationError

from jaxpeft.methods import METHODS
from train import combinations

Positive = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
Rate = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Size = Annotated[int, Field(ge=-1)]
Fraction = Annotated[float, Field(ge=0, lt=1)]


@dataclass(frozen=True)
class Model:
    """The frozen base model."""

    name: str
    """A built-in name (`smollm2-135m-instruct`), a local Hugging Face folder, or a hub name."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """The type the weights are held and multiplied in."""
    quantize: Literal["nf4", "int8", "int4", "gguf"] | None = None
    """Holds the linear weights in few bits; see `jaxpeft.quantize`. `gguf`: a built-in model's own blocks."""
    quantize_block: Positive | None = None
    """How many neighbouring weights share a scale. Default: 64."""
    quantize_exclude: str | tuple[str, ...] | None = None
    """Weights that stay floats, as in `sites.exclude`."""
    remat: Literal["none", "dots", "full"] = "none"
    """What the backward pass computes again instead of keeping: nothing of a layer, all but its products, all."""

    def __post_init__(self) -> None:
        """Refuses settings of blocks where there are none to set."""
        for name in ("quantize_block", "quantize_exclude"):
            if getattr(self, name) is not None and self.quantize in (None, "gguf"):
                raise ValueError(f"{name} has no effect with quantize={self.quantize}; expected nf4, int8 or int4")


@dataclass(frozen=True)
class Task:
    """What is learned: to write text (a language model), or what a head on an encoder says of a text or an image."""

    kind: Literal["generation", "classification", "regression", "image-classification"] = "generation"
    labels: tuple[str, ...] = ()
    """Names of the classes, in their order; without them those of the training rows, sorted."""
    pooling: Literal["mean", "cls"] | None = None
    """What the head reads: the mean over the tokens, or the first. Default: the mean of a text, an image's first."""
    image_size: Positive | None = None
    """Pixels a side that images are resized to. Default: the resolution of the model's positions."""


@dataclass(frozen=True)
class Sites:
    """Which weights are adapted; see `jaxpeft.find`."""

    select: str | tuple[str, ...] = "all-linear"
    """`all-linear`, one regular expression, or a list of names."""
    exclude: str | tuple[str, ...] | None = None
    layers: tuple[Count, ...] | None = None
    """Only these layers (numbered from 0)."""


@dataclass(frozen=True)
class Data:
    """Where the rows come from and how they become batches."""

    source: str
    """`sst-like`, `gsm_symbolic`, `synthetic`, a file (.jsonl .json .csv .parquet), or `hub:owner/name`. Of images:
    `cifar10`, `digits`, `synthetic`, a folder with a folder of images for each class, or a .npz file."""
    held_out: str | None = None
    """File or hub split of the held-out rows; without it `held_out_rows` rows are set aside from the source."""
    train_rows: Positive | None = None
    """Use only this many training rows."""
    held_out_rows: Positive = 300
    """How many held-out rows every evaluation uses."""
    seed: Count = 0
    """Decides the held-out split and the order of the training rows."""
    columns: dict[Literal["messages", "prompt", "input", "response", "text", "pair", "label", "score"], str] = field(
        default_factory=dict
    )
    """Names of the columns of your file, for instance `{prompt: question, response: solution}`."""
    template: Literal["chat", "chatml", "plain"] = "chat"
    """`chat`: the tokenizer's own; `chatml`: ChatML, no default system message; `plain`: prompt, newline, answer."""
    max_length: Annotated[int, Field(gt=1)] = 512
    """Most tokens a row may have, prompt and answer together."""
    too_long: Literal["cut", "drop"] = "drop"
    """Longer rows are cut at the end, or dropped; how many is reported."""
    batching: Literal["buckets", "pad", "pack"] = "buckets"
    """`buckets`: similar rows, padded to one of a few lengths; `pad`: one length; `pack`: several rows a sequence."""
    buckets: Positive = 3
    """How many lengths, in training and in evaluation; each is one compilation."""


@dataclass(frozen=True)
class Optimizer:
    """AdamW on the adapter's parameters alone."""

    learning_rate: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 2e-4
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """Shape of the decay to zero, after the warm-up."""
    warmup: Fraction = 0.03
    """Fraction of the steps in which the rate rises linearly."""
    clip: Rate = 0.3
    """Largest global norm of the adapter's gradient; 0 switches clipping off."""
    weight_decay: Rate = 0.0
    b1: Fraction = 0.9
    b2: Fraction = 0.999
    eps: Annotated[float, Field(gt=0)] = 1e-8
    rates: dict[str, Rate] = field(default_factory=dict)
    """Factors of the learning rate by the name of the trained array; `{b: 16}` is LoRA+, `{a: 0}` freezes a."""
    allocator: dict[str, float | int] = field(default_factory=dict)
    """Settings of the rule of a method that chooses its ranks while it trains; see `jaxpeft.allocate`."""
    orthogonality: Rate = 0.0
    """Weight of the orthogonality loss of AdaLoRA and IncreLoRA (their authors: 0.1 to 0.3)."""


@dataclass(frozen=True)
class Mesh:
    """How the devices of all processes are arranged: their number is the product of the four sizes.

    A batch is split over data and fsdp, the weights over fsdp and tensor, the sequences over sequence. One size may be
    -1: it takes what the others leave.
    """

    data: Size = 1
    fsdp: Size = -1
    tensor: Size = 1
    sequence: Size = 1


@dataclass(frozen=True)
class Train:
    """How long, and how much at a time."""

    steps: Positive | None = None
    """Optimizer steps. Give either this or `epochs`."""
    epochs: Positive | None = None
    batch_size: Positive = 8
    """Sequences of one optimizer step, over all devices and processes."""
    accumulate: Positive = 1
    """Split a batch into this many parts, run one after the other: same result, less memory."""
    seed: Count = 0
    """Decides the adapter's initial values and the dropout."""
    log_every: Positive = 10
    """Steps between fetches of the loss from the device (every step's loss is written either way)."""
    evaluate_every: Count = 0
    """Steps between held-out losses; 0: only before and after training."""
    evaluate_rows: Positive = 64
    """Those losses are of the first this many held-out rows."""
    checkpoint_every: Positive = 100
    keep: Positive = 2
    """How many checkpoints stay on disk."""


@dataclass(frozen=True)
class Evaluate:
    """What is measured on the held-out rows, before and after training.

    Classifications give `accuracy`, and of two classes `matthews` and `f1` (of the second); regressions `pearson` and
    `spearman`. What is below `batch_size` is for generation.
    """

    batch_size: Positive = 16
    choices: tuple[str, ...] = ()
    """Answers to choose between by total log-probability; gives `accuracy`."""
    exact_match: Literal["whole", "number"] | None = None
    """Greedy generation compared with the answer: the whole text, or the number after `####`."""
    exact_match_rows: Positive | None = None
    """Generate for only the first this many held-out rows."""
    max_new_tokens: Positive = 32


@dataclass(frozen=True)
class Output:
    """The run folder."""

    folder: str
    resume: Literal["auto", "never"] = "auto"
    """`auto`: go on from the newest checkpoint, if there is one. `never`: the folder must be empty."""


@dataclass(frozen=True)
class Config:
    """A whole run. `method` is the Spec of the method named `method.name` in the file."""

    model: Model
    method: Any
    data: Data
    train: Train
    output: Output
    task: Task = field(default_factory=Task)
    sites: Sites = field(default_factory=Sites)
    mesh: Mesh = field(default_factory=Mesh)
    optimizer: Optimizer = field(default_factory=Optimizer)
    evaluate: Evaluate = field(default_factory=Evaluate)


SECTIONS = {
    "model": Model,
    "task": Task,
    "sites": Sites,
    "data": Data,
    "mesh": Mesh,
    "optimizer": Optimizer,
    "train": Train,
    "evaluate": Evaluate,
    "output": Output,
}
REQUIRED = ("model", "method", "data", "train", "output")


class ConfigError(ValueError):
    """Every mistake of a configuration, one line each, `path: what is wrong`."""

    def __init__(self, problems: Sequence[str], origin: str = "configuration"):
        self.problems = tuple(problems)
        plural = "" if len(self.problems) == 1 else "s"
        super().__init__(f"{origin}: {len(self.problems)} error{plural}\n" + "\n".join(f"  {p}" for p in self.problems))


class _Loader(yaml.SafeLoader):
    """YAML as people write it: `2e-3` is a number, and a key given twice is a mistake."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [key.value for key, _ in node.value]
        for twice in {key for key in keys if keys.count(key) > 1}:
            raise yaml.constructor.ConstructorError(None, None, f"key {twice!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


# YAML 1.1 wants a dot in every float, so PyYAML reads `2e-3` as text; YAML 1.2 does not.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def parse(text: str, overrides: Sequence[str] = (), origin: str = "configuration") -> Config:
    """The `Config` of YAML text after `key=value` overrides.

    Args:
      text: one YAML mapping with the sections of `Config`.
      overrides: dotted paths and YAML values, for instance `train.steps=20` or `data.columns={prompt: question}`.
      origin: the name errors start with, usually the file.

    Raises:
      ConfigError: with all unknown keys, wrong types and impossible combinations.
    """
    try:
        tree = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ConfigError([f"not valid YAML: {error}".replace("\n", " ")], origin) from None
    if not isinstance(tree, dict):
        raise ConfigError([f"expected a mapping of sections, found {type(tree).__name__}"], origin)
    problems = [problem for override in overrides for problem in _override(tree, override)]

    sections: dict[str, Any] = {}
    for name in tree:
        if name not in SECTIONS and name != "method":
            problems.append(f"{name}: unknown section{_nearest(name, [*SECTIONS, 'method'])}")
    for name in REQUIRED:
        if name not in tree:
            problems.append(f"{name}: missing section")
    for name, kind in SECTIONS.items():
        if name in tree or name not in REQUIRED:
            sections[name], found = _section(kind, name, tree.get(name))
            problems += found
    if "method" in tree:
        sections["method"], found = _method(tree["method"])
        problems += found
    valid = {name: section for name, section in sections.items() if section is not None}
    problems += combinations.problems(**valid)
    if problems:
        raise ConfigError(problems, origin)
    return Config(**sections)


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The `Config` of a YAML file; see `parse`."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([f"cannot read the file: {error}"], str(path)) from None
    return parse(text, overrides, str(path))


def as_dict(config: Config) -> dict:
    """Plain dicts, lists and scalars; `dump` writes them and `parse` reads them back to the same `Config`.

    >>> text = "{model: {name: m}, method: {name: lora, rank: 2}, data: {source: synthetic}, train: {steps: 2}"
    >>> config = parse(text + ", output: {folder: runs/x}}")
    >>> parse(dump(config)) == config
    True
    """
    tree = {f.name: dataclasses.asdict(getattr(config, f.name)) for f in dataclasses.fields(config)}
    method = config.method.to_dict()
    tree["method"] = {"name": method.pop("method"), **method}
    return json.loads(json.dumps(tree))


def dump(config: Config) -> str:
    """The configuration as YAML, with every default written out."""
    return yaml.safe_dump(as_dict(config), sort_keys=False, allow_unicode=True)


def _override(tree: dict, override: str) -> Iterator[str]:
    """Sets one `a.b=value` in the tree; yields what is wrong with it."""
    path, equals, text = override.partition("=")
    *parents, leaf = path.strip().split(".")
    if not equals or not leaf:
        yield f"{override}: an override is written key=value, for instance train.steps=20"
        return
    try:
        value = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        yield f"{path}: {text!r} is not valid YAML: {error}".replace("\n", " ")
        return
    for parent in parents:
        if tree.get(parent) is None:
            tree[parent] = {}
        tree = tree[parent]
        if not isinstance(tree, dict):
            yield f"{path}: {parent} is not a section"
            return
    tree[leaf] = value


def _section(kind: type, name: str, value: Any, others: Sequence[str] = ()) -> tuple[Any, list[str]]:
    """A section's dataclass (None if invalid) and its problems; `others` are keys that were read before."""
    if value is None:
        value = {}
    if not isinstance(value, Mapping):
        return None, [f"{name}: expected a mapping, found {value!r}"]
    try:
        # Through JSON: there pydantic's strict mode (no "8" for 8, no true for 1) takes lists for tuples.
        return TypeAdapter(kind).validate_json(json.dumps(value, default=str), strict=True, extra="forbid"), []
    except ValidationError as error:
        names = [f.name for f in dataclasses.fields(kind)]
        problems = [_explain(name, [*names, *others], value, detail) for detail in error.errors()]
        # A dataclass checks its values together only if all keys are known. Without those that are not it does, unless
        # one of them is a known one misspelt, whose default could be what is wrong.
        known = {key: v for key, v in value.items() if key in names}
        unknown = [key for key in value if key not in names]
        if unknown and len(unknown) == len(problems) and not any(_close(key, names) for key in unknown):
            problems += _section(kind, name, known)[1]
        return None, list(dict.fromkeys(problems))


def _explain(name: str, names: list[str], value: Mapping, detail: Mapping) -> str:
    """One line for one of pydantic's errors."""
    # Below the field every alternative below the field; the field is what the user wrote.
    place = [name, *(str(part) for part in detail["loc"][:1])]
    path, key = ".".join(place), place[-1]
    if detail["type"] == "unexpected_keyword_argument":
        return f"{path}: unknown key{_nearest(key, names)}"
    if detail["type"] in ("missing", "missing_argument"):
        return f"{path}: missing"
    message = detail["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    if len(place) == 1:
        return f"{path}: {message}"
    expected = message if detail["type"] == "value_error" else f"expected {message}"
    return f"{path}: {expected}, found {value.get(key)!r}"


def _method(value: Any) -> tuple[Any, list[str]]:
    """The Spec of the named method (None if invalid) and its problems."""
    if not isinstance(value, Mapping) or "name" not in value:
        return None, [f"method.name: missing; one of {', '.join(METHODS)}"]
    name = value["name"]
    if name not in METHODS:
        return None, [f"method.name: unknown method {name!r}{_nearest(str(name), list(METHODS))}"]
    return _section(METHODS[name].Spec, "method", {key: v for key, v in value.items() if key != "name"}, ["name"])


def _nearest(name: str, choices: Sequence[str]) -> str:
    match = _close(name, choices)
    return f"; did you mean {match[0]}?" if match else f"; expected one of {', '.join(choices)}"


def _close(name: str, choices: Sequence[str]) -> list[str]:
    return difflib.get_close_matches(str(name), choices, n=1, cutoff=0.5)
