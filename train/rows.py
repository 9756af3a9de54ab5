"""Where rows come from: files, the hub, and what the columns of conversations are called."""

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grain

from train import builtin
from train.config import Data

PROMPTS = ("prompt", "instruction", "question")
RESPONSES = ("response", "output", "answer", "completion")
ROLES = ("system", "user", "assistant", "tool")


class DataError(ValueError):
    """Data that cannot be used; the message names the file and the line."""


@dataclass(frozen=True)
class Row:
    """One training example: a conversation, or plain text.

    Attributes:
      messages: `{"role": …, "content": …}` mappings in order; the assistant's are what is learned.
      text: plain text, learned whole; only where there are no messages.
    """

    messages: tuple[Mapping[str, str], ...] = ()
    text: str = ""

    @property
    def prompt(self) -> tuple[Mapping[str, str], ...]:
        """The messages before the last answer."""
        return self.messages[:-1]

    @property
    def answer(self) -> str:
        """The last answer."""
        return self.messages[-1]["content"] if self.messages else ""


def load(data: Data) -> tuple[list[Row], list[Row]]:
    """The training rows and the held-out rows that `data` asks for, always the same and in the same order.

    Raises:
      DataError: the source does not exist, is damaged, has no usable columns or too few rows.
    """
    if data.source in builtin.SOURCES:
        pairs = builtin.SOURCES[data.source](data.seed, data.train_rows, data.held_out_rows)
        train, held_out = ([_conversation(prompt, answer) for prompt, answer in part] for part in pairs)
        return train[: data.train_rows], held_out[: data.held_out_rows]
    return split(data, lambda source, split: read(source, data.columns, split))


def split(data: Data, read: Callable[[str, str], list]) -> tuple[list, list]:
    """Training rows and held-out rows of a source that is not built in.

    Args:
      data: with a held-out source of its own, or the number of rows to set aside.
      read: (source, split of the hub) -> all rows.

    Raises:
      DataError: there are too few rows to set some aside.
    """
    train = read(data.source, "train")
    if data.held_out:
        hub = data.source.startswith("hub:")
        held_out = read(data.source if hub else data.held_out, data.held_out)
    else:
        if len(train) <= data.held_out_rows:
            raise DataError(
                f"{data.source}: has {len(train)} rows, too few to set data.held_out_rows={data.held_out_rows} aside"
            )
        order = list(grain.MapDataset.range(len(train)).seed(data.seed).shuffle())
        held_out = [train[i] for i in order[: data.held_out_rows]]
        train = [train[i] for i in sorted(order[data.held_out_rows :])]
    return train[: data.train_rows], held_out[: data.held_out_rows]


def read(source: str | Path, columns: Mapping[str, str] | None = None, split: str = "train") -> list[Row]:
    """All conversations of a .jsonl, .json, .csv or .parquet file, or of a split of a data set on the hub.

    Args:
      source: the file, whose ending decides how it is read, or `hub:owner/name`.
      columns: our name -> the file's name, for any of `messages`, `prompt`, `input`, `response`, `text`.
      split: of a data set on the hub.

    Raises:
      DataError: naming file and line.
    """
    return [_row(record, place, columns or {}) for place, record in records(source, split)]


def records(source: str | Path, split: str = "train") -> list[tuple[str, Any]]:
    """(place for messages, record) of everything that a file or a data set on the hub holds.

    Raises:
      DataError: naming file and line.
    """
    if str(source).startswith("hub:"):
        return _hub(str(source).removeprefix("hub:"), split)
    path = Path(source)
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path}: neither a built-in data set ({', '.join(builtin.SOURCES)}) nor {', '.join(READERS)}")
    try:
        found = list(reader(path))
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None
    if not found:
        raise DataError(f"{path}: the file holds no rows")
    return found


def _jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                place = f"{path}:{number}"
                yield place, _characters(_json(_decoded(line, place), place), place)


def _json_array(path: Path) -> Iterator[tuple[str, Any]]:
    content = path.read_bytes()
    if not content.strip():
        return
    records = _json(_decoded(content, str(path)), str(path))
    if not isinstance(records, list):
        raise DataError(
            f"{path}: expected a JSON array of rows, found {type(records).__name__}; one row a line is .jsonl"
        )
    for number, record in enumerate(records, start=1):
        yield f"{path}: row {number}", _characters(record, f"{path}: row {number}")


def _csv(path: Path) -> Iterator[tuple[str, Any]]:
    reader = csv.DictReader(io.StringIO(_decoded(path.read_bytes(), str(path)), newline=""), strict=True)
    try:
        for record in reader:
            place = f"{path}:{reader.line_num}"
            if None in record or None in record.values():
                raise DataError(f"{place}: expected {len(reader.fieldnames or ())} fields as in the header")
            yield place, record
    except csv.Error as error:
        raise DataError(
            f"{path}: after line {reader.line_num}: not valid CSV ({error}); the file may be truncated"
        ) from None


def _parquet(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise DataError(f"{path}: reading Parquet needs pyarrow: pip install pyarrow") from None
    try:
        records = pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not valid Parquet ({error}); the file may be truncated") from None
    for number, record in enumerate(records, start=1):
        yield f"{path}: row {number}", record


READERS: dict[str, Callable[[Path], Iterable[tuple[str, Any]]]] = {
    ".jsonl": _jsonl,
    ".json": _json_array,
    ".csv": _csv,
    ".parquet": _parquet,
}


def _hub(name: str, split: str) -> list[tuple[str, Any]]:
    try:
        import datasets
    except ImportError:
        raise DataError(f"hub:{name}: needs the extra `hub`: pip install 'jaxpeft[hub]'") from None
    try:
        records = datasets.load_dataset(name, split=split)
    except Exception as error:  # the library raises a dozen unrelated types: offline, not found, gated, no such split
        raise DataError(f"hub:{name}: split {split!r} could not be loaded: {error}") from error
    return [(f"hub:{name}: {split} row {number}", record) for number, record in enumerate(records, start=1)]


def _decoded(content: bytes, place: str) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line, bad = content.count(b"\n", 0, error.start) + 1, content[error.start]
        raise DataError(f"{place}: not UTF-8: byte {bad:#04x} at offset {error.start}, line {line}") from None


def _json(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f" line {error.lineno}" if error.lineno > 1 else ""
        raise DataError(f"{place}:{where} not valid JSON ({error.msg}); the file may be truncated") from None
    except ValueError as error:  # a number of thousands of digits
        raise DataError(f"{place}: cannot be read as JSON: {error}") from None
    except RecursionError:
        raise DataError(f"{place}: brackets nested too deeply; expected rows of texts") from None


def _characters(record: Any, place: str) -> Any:
    """The record, whose texts are made of characters: JSON can escape half of one, which no tokenizer takes."""
    try:
        json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise DataError(f"{place}: found {half!r}, half of a surrogate pair; expected whole characters") from None
    return record


def _row(record: Any, place: str, columns: Mapping[str, str]) -> Row:
    """A record of a file as a `Row`: by `messages`, by a prompt and a response, or by `text`."""
    if not isinstance(record, Mapping):
        raise DataError(f"{place}: expected an object with named fields, found {type(record).__name__}")
    for name in columns.values():
        if name not in record:
            raise DataError(f"{place}: no column {name!r}; found {', '.join(map(str, record))}")

    def column(*names: str) -> str | None:
        wanted = (columns[names[0]],) if names[0] in columns else names
        return next((name for name in wanted if name in record), None)

    def text(name: str) -> str:
        if not isinstance(record[name], str):
            raise DataError(f"{place}: {name} should be text, found {type(record[name]).__name__}")
        return record[name]

    messages, prompt, response, plain = column("messages"), column(*PROMPTS), column(*RESPONSES), column("text")
    if messages:
        return _messages(record[messages], f"{place}: {messages}")
    if prompt and response:
        extra = column("input")
        given = text(extra) if extra not in (None, prompt, response) and record[extra] else ""
        return _conversation(f"{text(prompt)}\n{given}" if given else text(prompt), text(response))
    if plain:
        return Row(text=text(plain))
    raise DataError(
        f"{place}: expected messages, or one of {'/'.join(PROMPTS)} with one of {'/'.join(RESPONSES)}, or text; "
        f"found {', '.join(map(str, record)) or 'no fields'}. data.columns can name others"
    )


def _messages(value: Any, place: str) -> Row:
    if not isinstance(value, list) or not value:
        raise DataError(f"{place}: expected a list of messages")
    for number, message in enumerate(value, start=1):
        if not isinstance(message, Mapping) or not isinstance(message.get("content"), str):
            raise DataError(f"{place}: message {number} should be {{role: …, content: text}}")
        if message.get("role") not in ROLES:
            raise DataError(f"{place}: message {number} has role {message.get('role')!r}; expected {', '.join(ROLES)}")
    if value[-1]["role"] != "assistant":
        raise DataError(f"{place}: the last message should be the assistant's, found {value[-1]['role']!r}")
    return Row(tuple({"role": message["role"], "content": message["content"]} for message in value))


def _conversation(prompt: str, answer: str) -> Row:
    return Row(({"role": "user", "content": prompt}, {"role": "assistant", "content": answer}))
