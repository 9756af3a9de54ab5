"""How does a decoder write? One pass over the prompts, then a token at a time with cached keys and values."""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxpeft.models.decoder import Cache, Decoder, laid_out

SMALLEST_BUCKET = 32
"""The shortest length that prompts are padded to."""


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; see `LanguageModel.generate`."""

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self):
        if self.temperature < 0:
            raise ValueError(f"temperature={self.temperature} must not be negative; 0 takes the likeliest token")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k={self.top_k} must be at least 1")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must be above 0 and at most 1")
        if self.temperature == 0 and (self.top_k is not None or self.top_p is not None):
            raise ValueError("top_k and top_p choose what is sampled, and temperature=0 samples nothing")

    def key(self, given: jax.Array | None) -> jax.Array:
        """The key given; any where nothing is sampled.

        Raises:
          ValueError: sampling without a key.
        """
        if self.temperature > 0 and given is None:
            raise ValueError(f"temperature={self.temperature} samples, so it needs key=jax.random.key(…)")
        return jax.random.key(0) if given is None else given

    def choose(self, key: jax.Array, logits: jax.Array) -> jax.Array:
        """Tokens (B,) int32 for ``logits`` (B, V).

        >>> Sampling().choose(jax.random.key(0), jnp.array([[0.0, 2.0, 1.0]]))
        Array([1], dtype=int32)
        """
        if self.temperature == 0:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        logits = logits / self.temperature
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            smallest = jax.lax.top_k(logits, self.top_k)[0][:, -1:]
            logits = jnp.where(logits < smallest, -jnp.inf, logits)
        if self.top_p is not None:
            logits = _nucleus(logits, self.top_p)
        return jax.random.categorical(key, logits).astype(jnp.int32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RowSampling:
    """`Sampling` as arrays: every row has its own, and other values compile nothing again.

    Attributes:
      temperature: (B,) float32; 0 takes the likeliest token.
      top_p: (B,) float32, above 0; 1 samples among all tokens.
      drawn: () bool, whether any row samples. Where none does, nothing is sorted and nothing drawn.
    """

    temperature: jax.Array
    top_p: jax.Array
    drawn: jax.Array

    def key(self, given: jax.Array | None) -> jax.Array:
        """The key given.

        Raises:
          ValueError: there is none.
        """
        if given is None:
            raise ValueError("rows that may sample need key=jax.random.key(…)")
        return given

    def choose(self, key: jax.Array, logits: jax.Array) -> jax.Array:
        """As `Sampling.choose`.

        >>> sampling = RowSampling(jnp.array([0.0, 1.0]), jnp.array([1.0, 0.1]), jnp.array(True))
        >>> sampling.choose(jax.random.key(0), jnp.array([[0.0, 2.0, 1.0], [3.0, 2.0, 1.0]]))
        Array([1, 0], dtype=int32)
        """

        def draw(logits: jax.Array) -> jax.Array:
            heated = logits / jnp.where(self.temperature > 0, self.temperature, 1.0)[:, None]
            drawn = jax.random.categorical(key, _nucleus(heated, self.top_p[:, None])).astype(jnp.int32)
            return jnp.where(self.temperature > 0, drawn, likeliest(logits))

        def likeliest(logits: jax.Array) -> jax.Array:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)

        return jax.lax.cond(self.drawn, draw, likeliest, logits)


def _nucleus(logits: jax.Array, top_p: jax.Array | float) -> jax.Array:
    """The logits (B, V), minus infinity beyond the fewest likeliest tokens whose probabilities sum to `top_p`."""
    ordered = jnp.flip(jnp.sort(logits, axis=-1), axis=-1)
    probabilities = jax.nn.softmax(ordered, axis=-1)
    # A token stays if those before it do not reach top_p yet; so the likeliest always does.
    kept = jnp.cumsum(probabilities, axis=-1) - probabilities < top_p
    smallest = jnp.min(jnp.where(kept, ordered, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits < smallest, -jnp.inf, logits)


class Writing(NamedTuple):
    """Texts in the making: what `prefill` returns, and what `write` takes and returns.

    Attributes:
      token: (B,) int32, each row's newest token, which is not in the cache yet.
      ended: (B,) bool, rows that have written an ending token. The caller may end more.
      step: () int32, tokens written so far.
      begins: (B, 1) int32, the slot of each row's first token.
      slot: () int32, where in the cache `token` goes.
      cache: keys and values of all tokens before.
    """

    token: jax.Array
    ended: jax.Array
    step: jax.Array
    begins: jax.Array
    slot: jax.Array
    cache: Cache


def bucket(length: int, largest: int) -> int:
    """The length that a row is padded to, so that few lengths are compiled: the next of 32, 48, 64, 96, 128, …

    Args:
      length: of the row.
      largest: the last bucket, where the row may be no longer.

    >>> [bucket(length, largest=500) for length in (1, 33, 49, 100, 400)]
    [32, 48, 64, 128, 500]
    """
    if not 0 < length <= largest:
        raise ValueError(f"expected a length of 1 to {largest}, found {length}")
    size = SMALLEST_BUCKET
    while size < length:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return min(size, largest)


def align(tokens: jax.Array, lengths: jax.Array, padding_side: str) -> jax.Array:
    """The prompts with their ends aligned, so that every row writes to the same slot of the cache."""
    if padding_side not in ("right", "left"):
        raise ValueError(f"padding_side={padding_side!r}: expected 'right' or 'left'")
    if tokens.ndim != 2 or lengths.shape != tokens.shape[:1]:
        raise ValueError(f"expected tokens (B, P) and lengths (B,), found {tokens.shape} and {lengths.shape}")
    if padding_side == "left":
        return tokens
    width = tokens.shape[1]
    source = (jnp.arange(width)[None] + lengths[:, None]) % width
    return jnp.take_along_axis(tokens, source, axis=1)


def generate(
    decoder: Decoder,
    tokens: jax.Array,
    lengths: jax.Array,
    *,
    max_new_tokens: int,
    sampling: Sampling,
    key: jax.Array | None,
    eos_ids: tuple[int, ...],
    pad_id: int,
    padding_side: str,
) -> jax.Array:
    """New tokens (B, max_new_tokens) int32; see `LanguageModel.generate`."""
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 1")
    key = sampling.key(key)
    lengths = jnp.asarray(lengths)
    tokens = align(jnp.asarray(tokens), lengths, padding_side)
    graph, params = nnx.split(decoder)
    return _generate(graph, params, tokens, lengths, key, max_new_tokens, sampling, eos_ids, pad_id)


# `graph` is the decoder without its parameters: static, hashable and equal for equal configurations.
@functools.partial(jax.jit, static_argnums=(0, 5, 6, 7))
def _generate(graph, params, tokens, lengths, key, max_new_tokens, sampling, eos_ids, pad_id):
    decoder = nnx.merge(graph, params)
    slots = tokens.shape[1] + max_new_tokens
    writing = prefill(decoder, tokens, lengths, slots=slots, sampling=sampling, key=key, eos_ids=eos_ids)
    written = jnp.full((len(tokens), max_new_tokens), pad_id, jnp.int32).at[:, 0].set(writing.token)
    return _write(decoder, writing, written, 1, sampling=sampling, key=key, eos_ids=eos_ids, pad_id=pad_id)[0]


def prefill(
    decoder: Decoder,
    tokens: jax.Array,
    lengths: jax.Array,
    *,
    slots: int,
    sampling: Sampling | RowSampling,
    key: jax.Array,
    eos_ids: tuple[int, ...],
) -> Writing:
    """Reads prompts (B, P) whose ends are aligned, and chooses the first token; see `LanguageModel.prefill`."""
    batch, width = tokens.shape
    begins = (width - lengths)[:, None].astype(jnp.int32)
    prompt = jnp.arange(width)
    # A token of the padding would give NaN where it lies outside the vocabulary.
    tokens = jnp.where(prompt[None] >= begins, tokens, 0)
    hidden, cache = decoder.extend(
        tokens,
        decoder.empty_cache(batch, slots),
        0,
        positions=jnp.maximum(prompt[None] - begins, 0),
        mask=_visible(decoder, begins, prompt, width),
    )
    token = sampling.choose(jax.random.fold_in(key, 0), decoder.logits(hidden[:, -1]))
    return Writing(token, _ends(token, eos_ids), jnp.int32(1), begins, jnp.int32(width), _laid_out(cache))


def write(
    decoder: Decoder,
    writing: Writing,
    *,
    count: int,
    sampling: Sampling,
    key: jax.Array,
    eos_ids: tuple[int, ...],
    pad_id: int,
) -> tuple[jax.Array, Writing]:
    """The next tokens (B, count) int32; see `LanguageModel.write`."""
    written = jnp.full((len(writing.token), count), pad_id, jnp.int32)
    return _write(decoder, writing, written, 0, sampling=sampling, key=key, eos_ids=eos_ids, pad_id=pad_id)


def step(
    decoder: Decoder,
    writing: Writing,
    *,
    sampling: Sampling | RowSampling,
    key: jax.Array,
    eos_ids: tuple[int, ...],
    pad_id: int,
) -> Writing:
    """One more token in every row; see `LanguageModel.step`."""
    # The newest token is read into its slot, and the next one chosen.
    hidden, cache = decoder.extend(
        writing.token[:, None],
        writing.cache,
        writing.slot,
        positions=writing.slot - writing.begins,
        mask=_visible(decoder, writing.begins, writing.slot[None], writing.cache.keys.shape[2]),
    )
    token = sampling.choose(jax.random.fold_in(key, writing.step), decoder.logits(hidden[:, -1]))
    token = jnp.where(writing.ended, pad_id, token).astype(jnp.int32)
    ended = writing.ended | _ends(token, eos_ids)
    return Writing(token, ended, writing.step + 1, writing.begins, writing.slot + 1, _laid_out(cache))


def _write(decoder, writing, written, filled, *, sampling, key, eos_ids, pad_id):
    """Fills the columns of `written` from the one numbered `filled` on, until every row has ended."""

    def unfinished(state):
        column, _, writing = state
        return (column < written.shape[1]) & ~jnp.all(writing.ended)

    def one(state):
        column, written, writing = state
        writing = step(decoder, writing, sampling=sampling, key=key, eos_ids=eos_ids, pad_id=pad_id)
        return column + 1, jax.lax.dynamic_update_slice(written, writing.token[:, None], (0, column)), writing

    _, written, writing = jax.lax.while_loop(unfinished, one, (jnp.int32(filled), written, writing))
    return written, writing


def _visible(decoder: Decoder, begins: jax.Array, query_slots: jax.Array, seen: int) -> jax.Array:
    """Which of the first `seen` slots the tokens in `query_slots` (S,) see: (B, 1, S, seen) bool."""
    window = decoder.config.sliding_window
    query, slot = query_slots[None, None, :, None], jnp.arange(seen)[None, None, None, :]
    mask = (slot <= query) & (slot >= begins[:, :, None, None])
    return mask if window is None else mask & (query - slot < window)


def _ends(token: jax.Array, eos_ids: tuple[int, ...]) -> jax.Array:
    return jnp.any(token[:, None] == jnp.asarray(eos_ids, jnp.int32), axis=1)


def _laid_out(cache: Cache) -> Cache:
    return Cache(*(laid_out(array, None, "batch", None, "heads", None) for array in cache))
