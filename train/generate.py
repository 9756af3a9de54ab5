"""Answers to prompts, with or without an adapter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax
import numpy as np

import jaxpeft
from jaxpeft.adapter import Adapter
from train import data, devices

if TYPE_CHECKING:
    from train.job import Subject


class Generator:
    """Generates with fixed shapes; compiled once a shape, however often it is used.

    Args:
      subject: model, base and tokenizer.
      batch_size: prompts at a time; rounded up to a multiple of the devices they are split over.
      max_new_tokens: the longest answer.
      buckets: how many lengths prompts are padded to.
      temperature: 0 takes the likeliest token.
    """

    def __init__(
        self, subject: Subject, *, batch_size: int, max_new_tokens: int, buckets: int = 1, temperature: float = 0.0
    ):
        self.subject = subject
        self.buckets = buckets
        self.batch_size = devices.whole_batches(batch_size, subject.mesh)
        end_ids = tuple(sorted(subject.template.end_ids))
        forward = jaxpeft.adapt(subject.model.generate, shardings=subject.shardings)

        def generate(base, adapter, tokens, lengths, seed, number):
            return forward(
                base,
                adapter,
                tokens,
                lengths,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                key=jax.random.fold_in(jax.random.key(seed), number),
                eos_ids=end_ids,
            )

        self.generate = devices.Compiled(generate, subject.mesh, out_shardings=devices.everywhere(subject.mesh))

    def __call__(self, adapter: Adapter, prompts: Sequence[np.ndarray], seed: int = 0) -> list[str]:
        """The answers to tokenised prompts, in their order."""
        answers = [""] * len(prompts)
        lengths = np.array([len(prompt) for prompt in prompts])
        for number, batch in enumerate(data.fixed_batches(lengths, self.batch_size, self.buckets)):
            tokens = np.zeros((self.batch_size, batch.length), np.int32)
            used = np.ones(self.batch_size, np.int32)  # a prompt has at least one token, also one that fills up
            for i, row in enumerate(batch.sequences):
                for prompt in row:
                    tokens[i, : lengths[prompt]] = prompts[prompt]
                    used[i] = lengths[prompt]
            # Every process holds all prompts, and gets all answers.
            inputs = devices.put((tokens, used), self.subject.mesh)
            random = np.uint32(seed), np.uint32(number)
            generated = np.asarray(self.generate(self.subject.base, adapter, *inputs, *random))
            for i, row in enumerate(batch.sequences):
                for prompt in row:
                    answers[prompt] = self.subject.template.decode(generated[i])
        return answers


def answers(subject: Subject, adapter: Adapter, prompts: Sequence[str], *, seed: int = 0, **settings) -> list[str]:
    """The answers to users' messages; `settings` are those of `Generator`."""
    tokens = [subject.template.prompt([{"role": "user", "content": prompt}]) for prompt in prompts]
    if not tokens:
        return []
    return Generator(subject, batch_size=min(len(tokens), 8), **settings)(adapter, tokens, seed)
