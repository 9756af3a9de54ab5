"""What an adapter is worth on held-out rows: loss, choice between answers, exact match of generated answers."""

import math
import re
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation
from typing import Any

import jax
import numpy as np

import jaxpeft
from jaxpeft.adapter import Adapter
from train import data, devices
from train.generate import Generator
from train.job import Job
from train.rows import DataError
from train.template import Example, choices

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
        self.batch_size = devices.whole_batches(self.config.batch_size)
        forward = jaxpeft.adapt(job.model.token_losses)

        def losses(base: Any, adapter: Adapter, batch: dict[str, jax.Array]) -> jax.Array:
            return forward(base, adapter, batch["tokens"], batch["targets"])

        self.losses = devices.Compiled(losses, out_shardings=devices.everywhere(job.mesh))
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
        own = list(self.job.held_out_examples)
        answers = self.config.choices
        options = [self.job.template.encode(option) for row in self.job.held_out for option in choices(row, answers)]
        found = self.score(adapter, own + options)
        results = _loss(found[: len(own)])
        if answers:
            # Without the end-of-turn token, which every answer ends with.
            totals = np.array([losses[:-1].sum() for losses in found[len(own) :]]).reshape(len(own), len(answers))
            chosen = [answers[i] for i in totals.argmin(1)]
            results["accuracy"] = float(
                np.mean([row.answer == c for row, c in zip(self.job.held_out, chosen, strict=True)])
            )
        if self.config.exact_match:
            held_out = self.job.held_out[: self.config.exact_match_rows]
            texts = self.generate(adapter, [self.job.template.prompt(row.prompt) for row in held_out])
            same = {"whole": whole_match, "number": number_match}[self.config.exact_match]
            results["exact_match"] = float(
                np.mean([same(t, row.answer) for t, row in zip(texts, held_out, strict=True)])
            )
        return results

    def loss(self, adapter: Adapter, rows: int | None = None) -> float:
        """Mean loss per learned token, in nats, of the first `rows` held-out rows."""
        return _loss(self.score(adapter, self.job.held_out_examples[:rows]))["eval_loss"]

    def score(self, adapter: Adapter, examples: Sequence[Example]) -> list[np.ndarray]:
        """The losses of each example's learned tokens, in nats. Equal examples are computed once."""
        distinct = {example.tokens.tobytes(): example for example in examples}
        place = {tokens: i for i, tokens in enumerate(distinct)}
        found = self._score(adapter, list(distinct.values()))
        return [found[place[example.tokens.tobytes()]] for example in examples]

    def _score(self, adapter: Adapter, examples: Sequence[Example]) -> list[np.ndarray]:
        found: list[Any] = [None] * len(examples)
        for batch in data.fixed_batches(data.input_lengths(examples), self.batch_size, self.job.config.data.buckets):
            arrays = devices.shard(data.collate(batch, examples), self.job.mesh)
            losses = np.asarray(self.losses(self.job.base, adapter, arrays))
            for row, line in zip(batch.sequences, losses, strict=True):
                for i in row:
                    found[i] = line[: len(examples[i]) - 1][examples[i].learned[1:]]
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
