"""How tokenised rows become batches: lengths, buckets, packing, order, and an iterator whose position can be saved."""

import hashlib
import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import grain
import numpy as np

from train.config import Data, Train
from train.rows import DataError, Row
from train.template import Example, Template

WINDOW = 32
"""Batches that are put together at a time: rows of similar length are looked for among so many batches' rows."""
MULTIPLE = 8
"""Lengths are rounded up to a multiple of this."""


@dataclass(frozen=True)
class Batch:
    """What a batch holds.

    Attributes:
      length: positions of every sequence, padding included.
      sequences: the numbers of the examples in each sequence: one, several when packed, none to fill up a batch.
    """

    length: int
    sequences: tuple[tuple[int, ...], ...]


def encode(rows: Sequence[Row], template: Template, data: Data) -> tuple[list[Row], list[Example], str]:
    """Tokenises rows within `data.max_length`.

    Returns:
      The rows kept, their examples, and a sentence on what was cut or dropped.

    Raises:
      DataError: nothing is left.
    """
    kept, examples, cut, dropped, empty = [], [], 0, 0, 0
    for row in rows:
        example = template.encode(row)
        if len(example) > data.max_length:
            if data.too_long == "drop":
                dropped += 1
                continue
            cut += 1
            example = Example(example.tokens[: data.max_length], example.learned[: data.max_length])
        if not example.learned[1:].any():
            empty += 1
            continue
        kept.append(row)
        examples.append(example)
    note = f"{len(kept)} of {len(rows)} rows"
    if cut or dropped:
        note += f"; {cut + dropped} longer than data.max_length={data.max_length} {'cut' if cut else 'dropped'}"
    if empty:
        note += f"; {empty} dropped because no answer token is left to learn"
    if not kept:
        raise DataError(f"no row can be used: {note}")
    return kept, examples, note


def bucket_lengths(lengths: Sequence[int], count: int, multiple: int = MULTIPLE) -> tuple[int, ...]:
    """At most `count` lengths, multiples of one number, such that padding each row to the next of them pads least.

    >>> bucket_lengths([3, 4, 5, 30, 31, 90], 2)
    (32, 96)
    """
    sizes, rows = np.unique(-(-np.asarray(lengths) // multiple) * multiple, return_counts=True)
    before = np.concatenate([[0], np.cumsum(rows)])
    # best[j] = (positions, lengths) when the j smallest sizes are covered; one more length is allowed each round.
    best: list[tuple[float, tuple[int, ...]]] = [(0, ())] + [(np.inf, ())] * len(sizes)
    for _ in range(min(count, len(sizes))):
        best = [best[0]] + [
            min(
                (best[i][0] + sizes[j - 1] * (before[j] - before[i]), (*best[i][1], int(sizes[j - 1])))
                for i in range(j)
            )
            for j in range(1, len(sizes) + 1)
        ]
    return best[-1][1]


def input_lengths(examples: Sequence[Any]) -> np.ndarray:
    """Positions each example takes, (n,)."""
    return np.array([example.positions for example in examples])


def plan(lengths: np.ndarray, data: Data, train: Train, multiple: int = MULTIPLE) -> list[Batch]:
    """Every batch of a training run, in order. The same arguments give the same plan.

    Rows come in a new random order every epoch. Batches are formed within windows of that order, so that a batch may
    hold rows of similar length or sequences may be packed; what does not fill a batch waits for the next window.
    """
    buckets = bucket_lengths(lengths, data.buckets if data.batching == "buckets" else 1, multiple)
    capacity = -(-(data.max_length - 1) // multiple) * multiple if data.batching == "pack" else max(buckets)
    order = iter(grain.MapDataset.range(len(lengths)).seed(data.seed).shuffle().repeat(train.epochs))
    batches: list[Batch] = []
    waiting: list[tuple[int, ...]] = []
    mixer = random.Random(data.seed)
    while train.steps is None or len(batches) < train.steps:
        window = list(itertools.islice(order, WINDOW * train.batch_size))
        if data.batching == "pack":
            sequences = waiting + first_fit(window, lengths, capacity)
        else:
            # Stable: rows of equal length stay in their random order.
            sequences = [(row,) for row in sorted(window, key=lambda row: lengths[row])]
        groups = [tuple(sequences[i : i + train.batch_size]) for i in range(0, len(sequences), train.batch_size)]
        last = len(window) < WINDOW * train.batch_size
        if not last and data.batching == "pack":
            waiting = list(groups.pop()) if len(groups[-1]) < train.batch_size else []
        mixer.shuffle(groups)
        for group in groups:
            longest = max(sum(lengths[row] for row in sequence) for sequence in group)
            length = capacity if data.batching == "pack" else next(b for b in buckets if b >= longest)
            batches.append(Batch(length, group + ((),) * (train.batch_size - len(group))))
        if last:
            break
    return batches[: train.steps]


def first_fit(rows: Sequence[int], lengths: np.ndarray, capacity: int) -> list[tuple[int, ...]]:
    """Packs rows into sequences of at most `capacity` positions: each row into the first sequence with room for it.

    >>> first_fit([0, 1, 2, 3], np.array([6, 5, 4, 3]), capacity=10)
    [(0, 2), (1, 3)]
    """
    sequences: list[list[int]] = []
    room: list[int] = []
    for row in rows:
        need = lengths[row]
        place = next((i for i, free in enumerate(room) if free >= need), len(sequences))
        if place == len(sequences):
            sequences.append([])
            room.append(capacity)
        sequences[place].append(row)
        room[place] -= need
    return [tuple(sequence) for sequence in sequences]


def fixed_batches(lengths: np.ndarray, batch_size: int, buckets: int) -> list[Batch]:
    """Every example once, in batches of few shapes, shortest first; empty sequences fill up the last batch."""
    sizes = bucket_lengths(lengths, buckets)
    order = [int(row) for row in np.argsort(lengths, kind="stable")]
    batches = []
    for i in range(0, len(order), batch_size):
        rows = order[i : i + batch_size]
        length = next(size for size in sizes if size >= lengths[rows[-1]])
        batches.append(Batch(length, tuple((row,) for row in rows) + ((),) * (batch_size - len(rows))))
    return batches


def collate(
    batch: Batch, examples: Sequence[Example], packed: bool = False, rows: Sequence[int] | None = None
) -> dict[str, np.ndarray]:
    """The arrays of a batch, or of some of its sequences, each (sequences, length).

    Args:
      batch: which examples.
      examples: all of them.
      packed: whether a sequence may hold several.
      rows: the numbers of the sequences wanted, for instance those of this process; all by default.

    Returns:
      `tokens`, `targets` (int32) and `weights` (float32, 1 where a target is learned); when packed also `positions`
      (from 0 in each row) and `segment_ids` (from 1; 0 is padding). Unpacked rows are padded on the right, where
      causal attention never looks, and need neither.
    """
    sequences = batch.sequences if rows is None else [batch.sequences[row] for row in rows]
    shape = (len(sequences), batch.length)
    arrays = {
        "tokens": np.zeros(shape, np.int32),
        "targets": np.zeros(shape, np.int32),
        "weights": np.zeros(shape, np.float32),
    }
    if packed:
        arrays |= {"positions": np.zeros(shape, np.int32), "segment_ids": np.zeros(shape, np.int32)}
    for i, sequence in enumerate(sequences):
        start = 0
        for segment, row in enumerate(sequence, start=1):
            example = examples[row]
            place = (i, slice(start, start + len(example) - 1))
            arrays["tokens"][place] = example.tokens[:-1]
            arrays["targets"][place] = example.tokens[1:]
            arrays["weights"][place] = example.learned[1:]
            if packed:
                arrays["positions"][place] = np.arange(len(example) - 1)
                arrays["segment_ids"][place] = segment
            start += len(example) - 1
    return arrays


def iterate(batches: Sequence[Batch], collate: Callable[[Batch], dict[str, np.ndarray]]) -> grain.DatasetIterator:
    """The collated batches; `get_state()` and `set_state()` of the iterator carry its position, a JSON-able dict."""
    source = grain.MapDataset.source(batches).map(collate)
    return iter(source.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)))


def fingerprint(examples: Sequence[Any]) -> str:
    """Checksum of the examples' content: a run goes on only with the data it began with."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(example.content)
    return digest.hexdigest()


def padding(batches: Sequence[Batch], lengths: np.ndarray) -> float:
    """Fraction of all positions that is padding."""
    positions = sum(batch.length * len(batch.sequences) for batch in batches)
    return 1 - sum(tokens(batch, lengths) for batch in batches) / positions


def tokens(batch: Batch, lengths: np.ndarray) -> int:
    """Positions of a batch that are not padding."""
    return int(sum(lengths[row] for sequence in batch.sequences for row in sequence))


def shapes(batches: Sequence[Batch]) -> Iterator[tuple[int, int]]:
    """The distinct (sequences, length) of the batches, in order of length."""
    yield from sorted({(len(batch.sequences), batch.length) for batch in batches})
