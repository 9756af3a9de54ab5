"""The library's rows of the adapters benchmark."""

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxpeft
from jaxpeft import batch, models
from jaxpeft.adapter import Adapter
from train.bench.specs import SPECS, random_values
from train.bench.step_tokens import tokens as random_tokens
from train.bench.workers import Work


def work(folder: str, rows: int, prompt: int, new: int, methods: Sequence[str], adapters: int = 0) -> Work:
    """Prompts read, tokens written, and one gradient of the adapters' parameters.

    Args:
      folder: of the model.
      rows: of the batch.
      prompt: tokens of each.
      new: tokens that each writes.
      methods: rows of `SPECS`; of several, as many adapters each.
      adapters: how many there are, a row each; 0 for one that serves all rows.
    """
    lm = models.load(folder, tokenizer=False)
    assert isinstance(lm, models.LanguageModel)
    tokens, _ = random_tokens(lm.config.vocab_size, rows, prompt)
    lengths, ids = np.full(rows, prompt, np.int32), np.arange(rows, dtype=np.int32)
    stacks = [batch.stack(_made(lm, method, max(1, adapters // len(methods)))) for method in methods]
    expand, reader, writer = _batched(lm, prompt, new) if adapters else _together(lm, prompt, new)
    train = _gradient(lm, bool(adapters))

    def run() -> dict[str, float]:
        start = time.perf_counter()
        own = expand(stacks, ids)
        writing = jax.block_until_ready(reader(lm.params, own, tokens, lengths))
        middle = time.perf_counter()
        jax.block_until_ready(writer(lm.params, own, writing))
        found = {"prefill": middle - start, "decode": time.perf_counter() - middle}
        del writing, own
        if len(stacks) == 1:
            start = time.perf_counter()
            jax.block_until_ready(train(stacks[0], lm.params, ids, tokens))
            found["train"] = time.perf_counter() - start
        return found

    facts: dict[str, Any] = {}
    if len(stacks) == 1:
        facts["adapter_bytes"] = adapter_bytes(batch.member(stacks[0], 0))
    if adapters:
        facts["difference"] = difference(lm, stacks, ids, tokens)
    return Work(run, facts, steady=True)


def adapter_bytes(adapter: Adapter) -> int:
    """Of one resident adapter: its trained arrays and its tables."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves((adapter.params, adapter.constants)))


def difference(lm: models.LanguageModel, stacks: Sequence[Adapter], ids: np.ndarray, tokens: np.ndarray) -> float:
    """The largest difference of logits from each adapter alone, over a few rows, relative to the largest logit."""
    together = jax.jit(batch.batched(lm.logits))(lm.params, stacks, ids, tokens)
    alone, worst, before = jax.jit(jaxpeft.adapt(lm.logits)), 0.0, 0
    for one in stacks:
        for number in sorted({0, batch.size(one) // 2, batch.size(one) - 1}):
            row = before + number
            expected = alone(lm.params, batch.member(one, number), tokens[row : row + 1])[0]
            worst = max(worst, float(jnp.abs(together[row] - expected).max() / jnp.abs(expected).max()))
        before += batch.size(one)
    return worst


def _made(lm: models.LanguageModel, method: str, count: int) -> list[Adapter]:
    """Adapters that change the model: no array is zero."""
    sites = jaxpeft.find(lm.params)

    def one(number: int) -> Adapter:
        made = jaxpeft.init(jax.random.key(number), SPECS[method], sites)
        noise = random_values(made.params, jax.random.key(number))
        return made.replace(params=jax.tree.map(lambda leaf, noise: leaf + 0.01 * noise, made.params, noise))

    return [one(number) for number in range(count)]


def _first(stacks: Sequence[Any]) -> list[Any]:
    return [jax.tree.map(lambda leaf: leaf[0], one) for one in stacks]


def _together(lm: models.LanguageModel, prompt: int, new: int) -> tuple[Callable, Callable, Callable]:
    """All rows as one batch of one adapter, or of none."""
    read = jaxpeft.adapt(partial(lm.prefill, slots=prompt + new, eos_ids=()))
    write = jaxpeft.adapt(partial(lm.write, count=new - 1, eos_ids=()))
    return jax.jit(lambda stacks, ids: [batch.expand(one) for one in _first(stacks)]), jax.jit(read), jax.jit(write)


def _batched(lm: models.LanguageModel, prompt: int, new: int) -> tuple[Callable, Callable, Callable]:
    """Every row as a batch of one with its own adapter, as the server has them."""

    def read(base: Any, tokens: Any, lengths: Any) -> Any:
        own = lm.prefill(base, tokens, lengths, slots=prompt + new, eos_ids=())
        return jax.tree.map(lambda leaf: leaf[None], own)

    def step(base: Any, writing: Any) -> Any:
        own = lm.step(base, jax.tree.map(lambda leaf: leaf[0], writing), eos_ids=())
        return jax.tree.map(lambda leaf: leaf[None], own)

    def writer(base: Any, own: Any, writing: Any) -> Any:
        def one(writing: Any, _: None) -> tuple[Any, Any]:
            writing = batch.batched(step)(base, own, None, writing)
            return writing, writing.token[:, 0]

        return jax.lax.scan(one, writing, length=new - 1)

    def reader(base: Any, own: Any, tokens: Any, lengths: Any) -> Any:
        return batch.batched(read)(base, own, None, tokens, lengths)

    return jax.jit(batch.rows), jax.jit(reader), jax.jit(writer)


def _gradient(lm: models.LanguageModel, each: bool) -> Callable:
    """The gradient with respect to the parameters of one adapter for all rows, or of one for each."""

    def losses(base: Any, tokens: Any) -> Any:
        return lm.token_losses(base, tokens, jnp.roll(tokens, -1, axis=1))

    def gradient(stacked: Adapter, base: Any, ids: Any, tokens: Any) -> Any:
        def loss(params: Any) -> Any:
            one = stacked.replace(params=params)
            if each:
                return batch.batched(losses)(base, one, ids, tokens).mean()
            return jaxpeft.adapt(losses)(base, _first([one]), tokens).mean()

        return jax.grad(loss)(stacked.params)

    return jax.jit(gradient)
