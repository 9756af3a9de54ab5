"""What an adapter is worth on held-out rows: loss, choice between answers, exact match of generated answers."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

import jaxpeft
from jaxpeft.adapter import Adapter
from train import data, devices
from train.generate import Generator
from train.rows import DataError
from train.template import Example, choices

if TYPE_CHECKING:
    from train.job import Job

NUMBER = re.compile(r"####\s*[^\d\s.-]?\s*(-?[\d,]*\.?\d+)")


class Evaluator:
    """Measures adapters on a job's held-out rows; compiled once, however often it is used.

    Args:
      job: its `config.evaluate` says what is measured.

    Raises:
      DataError: a held-out answer is not among `evaluate.choices`.
    """

    def __init__(self, job: Job):
        self.job = job
        self.config = job.config.evaluate
        self.batch_size = devices.whole_batches(self.config.batch_size, job.mesh)
        forward = jaxpeft.adapt(job.model.token_losses, shardings=job.shardings)

        def losses(base: Any, adapter: Adapter, tokens: jax.Array, targets: jax.Array) -> jax.Array:
            # Mapped over alternative targets only, so the model itself runs once.
            return jax.vmap(lambda targets: forward(base, adapter, tokens, targets), in_axes=1, out_axes=1)(targets)

        self.losses = devices.Compiled(losses, job.mesh, out_shardings=devices.everywhere(job.mesh))
        self.generate = Generator(
            job,
            batch_size=self.config.batch_size,
            max_new_tokens=self.config.max_new_tokens,
            buckets=job.config.data.buckets,
        )
        if self.config.choices:
            for row in job.held_out:
                if row.answer not in self.config.choices:
                    raise DataError(
                        f"a held-out answer is {row.answer!r}, not one of evaluate.choices {self.config.choices}"
                    )

    def __call__(self, adapter: Adapter) -> dict[str, float]:
        """`eval_loss` (nats per learned token), `perplexity`; where asked `accuracy`, `exact_match` (fractions)."""
        lines = [(own,) for own in self.job.held_out_examples]
        places = []  # of each option of each row: its line, and its number in it
        for i, row in enumerate(self.job.held_out):
            for option in choices(row, self.config.choices):
                encoded = self.job.template.encode(option)
                # Without the end-of-turn token, which every answer ends with.
                encoded = Example(encoded.tokens[:-1], encoded.learned[:-1])
                if np.array_equal(encoded.tokens[:-1], lines[i][0].tokens[: len(encoded) - 1]):
                    lines[i] += (encoded,)
                    places.append((i, len(lines[i]) - 1))
                else:
                    lines.append((encoded,))
                    places.append((len(lines) - 1, 0))
        found = self.score(adapter, lines)
        results = _loss([line[0] for line in found[: len(self.job.held_out)]])
        answers, held_out = self.config.choices, self.job.held_out
        if answers:
            totals = np.array([found[line][number].sum() for line, number in places]).reshape(-1, len(answers))
            chosen = [answers[i] for i in totals.argmin(1)]
            results["accuracy"] = float(np.mean([row.answer == c for row, c in zip(held_out, chosen, strict=True)]))
        if self.config.exact_match:
            held_out = held_out[: self.config.exact_match_rows]
            texts = self.generate(adapter, [self.job.template.prompt(row.prompt) for row in held_out])
            same = {"whole": whole_match, "number": number_match}[self.config.exact_match]
            results["exact_match"] = float(
                np.mean([same(t, row.answer) for t, row in zip(texts, held_out, strict=True)])
            )
        return results

    def loss(self, adapter: Adapter, rows: int | None = None) -> float:
        """Mean loss per learned token, in nats, of the first `rows` held-out rows."""
        found = self.score(adapter, [(own,) for own in self.job.held_out_examples[:rows]])
        return _loss([line[0] for line in found])["eval_loss"]

    def score(self, adapter: Adapter, lines: Sequence[tuple[Example, ...]]) -> list[list[np.ndarray]]:
        """The losses of each example's learned tokens, in nats.

        Args:
          adapter: what is measured.
          lines: examples that one pass serves: the inputs of the further ones begin those of the first, so that only
            the targets differ. For answers of one token that is a single pass for all choices.
        """
        found: list[Any] = [None] * len(lines)
        width = max(len(line) for line in lines)
        lengths = data.input_lengths([line[0] for line in lines])
        for batch in data.fixed_batches(lengths, self.batch_size, self.job.config.data.buckets):
            tokens = np.zeros((self.batch_size, batch.length), np.int32)
            targets = np.zeros((self.batch_size, width, batch.length), np.int32)
            rows = [row for sequence in batch.sequences for row in sequence]
            for i, row in enumerate(rows):
                tokens[i, : lengths[row]] = lines[row][0].tokens[:-1]
                for k, example in enumerate(lines[row]):
                    targets[i, k, : len(example) - 1] = example.tokens[1:]
            # Every process holds all rows, and gets all losses.
            inputs = devices.put((tokens, targets), self.job.mesh)
            losses = np.asarray(self.losses(self.job.base, adapter, *inputs))
            for i, row in enumerate(rows):
                found[row] = [losses[i, k, : len(e) - 1][e.learned[1:]] for k, e in enumerate(lines[row])]
        return found


def whole_match(answer: str, expected: str) -> bool:
    """Whether the answer is the expected text, apart from space around it."""
    return answer.strip() == expected.strip()


def number_match(answer: str, expected: str) -> bool:
    """Whether the last number after `####` is the expected one, as in GSM8K.

    >>> number_match("3 * 400 = 1200 #### 1,200", "#### 1200.0"), number_match("1200", "#### 1200")
    (True, False)
    """
    return final_number(answer) is not None and final_number(answer) == final_number(expected)


def final_number(text: str) -> Decimal | None:
    """The last number that stands after `####`; a currency sign and commas are skipped."""
    found = NUMBER.findall(text)
    try:
        return Decimal(found[-1].replace(",", "")) if found else None
    except InvalidOperation:
        return None


def _loss(losses: Sequence[np.ndarray]) -> dict[str, float]:
    mean = float(np.mean(np.concatenate(losses), dtype=np.float64))
    return {"eval_loss": mean, "perplexity": math.exp(min(mean, 700.0))}
