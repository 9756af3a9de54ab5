"""Where texts with a label or a score come from, and how they become tokens."""

import functools
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from train import builtin, rows
from train.config import Config, ConfigError, Data
from train.rows import DataError
from train.template import check_tokens, tokenizer_fingerprint

NAMES = {
    "text": ("text", "sentence", "sentence1"),
    "pair": ("pair", "text_pair", "sentence2"),
    "label": ("label",),
    "score": ("score", "label"),
}
"""What columns are called, where data.columns says nothing."""


@dataclass(frozen=True)
class Row:
    """A text, or two, and what an encoder should say of it: the name of a class, or a number."""

    text: str
    target: str | float
    pair: str | None = None


@dataclass(frozen=True)
class Example:
    """A tokenised row.

    Attributes:
      tokens: (n,) int32, special tokens included.
      types: (n,) int32, which of two texts a token belongs to.
      target: the class's number, or the value.
    """

    tokens: np.ndarray
    types: np.ndarray
    target: float

    @property
    def positions(self) -> int:
        """How many tokens it has."""
        return len(self.tokens)

    @property
    def content(self) -> bytes:
        """What tells it from other examples."""
        sizes = np.int64(len(self.tokens)).tobytes() + np.float64(self.target).tobytes()
        return sizes + self.tokens.tobytes() + self.types.tobytes()


@dataclass(frozen=True)
class Reader:
    """A tokenizer and the limits of its model.

    Attributes:
      tokenizer: a Hugging Face tokenizer.
      embedded: how many tokens the model knows.
      positions: how many tokens a row may have at most.
      typed: whether the model tells two texts apart.
    """

    tokenizer: PreTrainedTokenizerBase
    embedded: int
    positions: int
    typed: bool

    @functools.cached_property
    def fingerprint(self) -> str:
        """What tells the tokenizer from others."""
        return tokenizer_fingerprint(self.tokenizer)

    def tokens(self, row: Row, most: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """The tokens of a row and which text they belong to, cut to `most` if it is given."""
        cut = {"truncation": True, "max_length": most} if most else {"truncation": False}
        found = self.tokenizer(row.text, row.pair, padding=False, return_token_type_ids=True, verbose=False, **cut)
        tokens = check_tokens(self.tokenizer, found["input_ids"], self.embedded)
        types = found["token_type_ids"] if self.typed else [0] * len(tokens)
        return np.asarray(tokens, np.int32), np.asarray(types, np.int32)


def load(config: Config) -> tuple[list[Row], list[Row]]:
    """The training rows and the held-out rows, always the same and in the same order.

    Raises:
      DataError: the source does not exist, is damaged, or has no text, label or score.
    """
    data, kind = config.data, config.task.kind
    if data.source == "sst-like":
        found = [
            Row(text, rating if kind == "regression" else "positive" if rating > 0 else "negative")
            for text, rating in builtin.sst_ratings()
        ]
        parts = found[builtin.SST_HELD_OUT :], found[: builtin.SST_HELD_OUT]
    elif data.source == "synthetic":
        made = synthetic(data, kind)
        parts = made[data.held_out_rows :], made[: data.held_out_rows]
    else:
        return rows.split(data, lambda source, split: read(source, data.columns, kind, split))
    return parts[0][: data.train_rows], parts[1][: data.held_out_rows]


def synthetic(data: Data, kind: str) -> list[Row]:
    """Numbers as text: whether they rise or fall, or the first one of them. For tests; needs no download."""
    generator = random.Random(data.seed)
    made = []
    for _ in range((data.train_rows or 512) + data.held_out_rows):
        numbers = sorted(generator.sample(range(10), generator.randint(2, 6)))
        rising = generator.random() < 0.5
        numbers = numbers if rising else numbers[::-1]
        text = " ".join(map(str, numbers))
        made.append(Row(text, numbers[0] / 10 if kind == "regression" else "rising" if rising else "falling"))
    return made


def read(source: str, columns: Mapping[str, str], kind: str, split: str = "train") -> list[Row]:
    """All rows of a file or of a split of a data set on the hub.

    Args:
      source: as `rows.records` takes it.
      columns: our name -> the file's name, for any of `text`, `pair`, `label`, `score`.
      kind: of task; `regression` reads scores, others labels.
      split: of a data set on the hub.

    Raises:
      DataError: naming the file, the line, what was found and what was expected.
    """
    return [_row(record, place, columns, kind) for place, record in rows.records(source, split)]


def _row(record: Any, place: str, columns: Mapping[str, str], kind: str) -> Row:
    if not isinstance(record, Mapping):
        raise DataError(f"{place}: expected an object with named fields, found {type(record).__name__}")

    def column(name: str) -> str | None:
        if name in columns and columns[name] not in record:
            raise DataError(f"{place}: no column {columns[name]!r}; found {', '.join(map(str, record))}")
        return columns.get(name) or next((known for known in NAMES[name] if known in record), None)

    wanted = "score" if kind == "regression" else "label"
    text, pair, target = column("text"), column("pair"), column(wanted)
    if text is None or target is None:
        missing = wanted if text else "text"
        raise DataError(
            f"{place}: expected a column {'/'.join(NAMES[missing])}, found {', '.join(map(str, record)) or 'no fields'}"
            f". data.columns can name another, for instance {{{missing}: …}}"
        )
    for name in (text, pair):
        if name is not None and not isinstance(record[name], str):
            raise DataError(f"{place}: {name} should be text, found {type(record[name]).__name__}")
    value = record[target]
    if kind == "regression":
        try:
            value = float(value)
        except (TypeError, ValueError):
            value = math.nan
        if not math.isfinite(value):
            raise DataError(f"{place}: {target} should be a finite number, found {record[target]!r}")
    elif not isinstance(value, str | int) or value == "":
        raise DataError(f"{place}: {target} should be the name or number of a class, found {value!r}")
    else:
        value = str(value)
    return Row(record[text], value, record[pair] if pair else None)


def labels(config: Config, train: Sequence[Any] | None) -> tuple[str, ...]:
    """The names of the classes: those that the configuration gives, else those of the training rows, sorted.

    Raises:
      ConfigError: no rows are read, and the configuration gives none.
      DataError: there is one class only.
    """
    if config.task.labels:
        return config.task.labels
    if train is None:
        raise ConfigError(["task.labels: give the classes; here no data is read to find them in"])
    found = {str(row.target) for row in train}
    if len(found) < 2:
        raise DataError(f"{config.data.source}: all training rows are {found.pop()!r}; expected two classes or more")
    # Numbers by value: 10 comes after 9.
    return tuple(sorted(found, key=lambda name: (not name.isdigit(), int(name) if name.isdigit() else 0, name)))


def number(target: str, names: Sequence[str]) -> int:
    """The number of a class.

    Raises:
      DataError: it is none of the classes.
    """
    if target not in names:
        raise DataError(f"a row is labelled {target!r}; the classes are {', '.join(names)} (task.labels)")
    return names.index(target)


def encode(
    found: Sequence[Row], reader: Reader, config: Config, names: Sequence[str]
) -> tuple[list[Row], list[Example], str]:
    """Tokenises rows within `data.max_length` and what the model has positions for.

    Returns:
      The rows kept, their examples, and a sentence on what was cut or dropped.

    Raises:
      DataError: nothing is left, or a label is none of the classes.
    """
    kept, examples, cut, dropped = [], [], 0, 0
    most = min(config.data.max_length, reader.positions)
    for row in found:
        tokens, types = reader.tokens(row)
        if len(tokens) > most:
            if config.data.too_long == "drop":
                dropped += 1
                continue
            cut += 1
            tokens, types = reader.tokens(row, most)
        target = row.target if config.task.kind == "regression" else number(str(row.target), names)
        kept.append(row)
        examples.append(Example(tokens, types, float(target)))
    note = f"{len(kept)} of {len(found)} rows"
    if cut or dropped:
        note += f"; {cut + dropped} longer than {most} tokens {'cut' if cut else 'dropped'}"
    if not kept:
        raise DataError(f"no row can be used: {note}")
    return kept, examples, note
