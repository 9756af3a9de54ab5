"""How does a decoder write? One pass over the prompts, then a token at a time with cached keys and values."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx

from jaxpeft.models.decoder import Decoder


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
            ordered = jnp.flip(jnp.sort(logits, axis=-1), axis=-1)
            probabilities = jax.nn.softmax(ordered, axis=-1)
            # A token stays if those before it do not reach top_p yet; so the likeliest always does.
            kept = jnp.cumsum(probabilities, axis=-1) - probabilities < self.top_p
            smallest = jnp.min(jnp.where(kept, ordered, jnp.inf), axis=-1, keepdims=True)
            logits = jnp.where(logits < smallest, -jnp.inf, logits)
        return jax.random.categorical(key, logits).astype(jnp.int32)


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
    if sampling.temperature > 0 and key is None:
        raise ValueError(f"temperature={sampling.temperature} samples, so it needs key=jax.random.key(…)")
    if padding_side not in ("right", "left"):
        raise ValueError(f"padding_side={padding_side!r}: expected 'right' or 'left'")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 1")
    tokens, lengths = jnp.asarray(tokens), jnp.asarray(lengths)
    if tokens.ndim != 2 or lengths.shape != tokens.shape[:1]:
        raise ValueError(f"expected tokens (B, P) and lengths (B,), found {tokens.shape} and {lengths.shape}")
    if padding_side == "right":
        # With the prompts' ends aligned, every row writes to the same slot of the cache.
        width = tokens.shape[1]
        source = (jnp.arange(width)[None] + lengths[:, None]) % width
        tokens = jnp.take_along_axis(tokens, source, axis=1)
    graph, params = nnx.split(decoder)
    key = jax.random.key(0) if key is None else key
    return _generate(graph, params, tokens, lengths, key, max_new_tokens, sampling, eos_ids, pad_id)


# `graph` is the decoder without its parameters: static, hashable and equal for equal configurations.
@functools.partial(jax.jit, static_argnums=(0, 5, 6, 7))
def _generate(graph, params, tokens, lengths, key, max_new_tokens, sampling, eos_ids, pad_id):
    decoder = nnx.merge(graph, params)
    batch, width = tokens.shape
    slots = jnp.arange(width + max_new_tokens)
    begins = (width - lengths)[:, None]
    endings = jnp.asarray(eos_ids, jnp.int32)
    window = decoder.config.sliding_window

    def visible(query_slots: jax.Array, seen: int) -> jax.Array:
        query, slot = query_slots[None, None, :, None], slots[None, None, None, :seen]
        mask = (slot <= query) & (slot >= begins[:, :, None, None])
        return mask if window is None else mask & (query - slot < window)

    prompt = slots[:width]
    # A token of the padding would give NaN where it lies outside the vocabulary.
    tokens = jnp.where(prompt[None] >= begins, tokens, 0)
    hidden, cache = decoder.extend(
        tokens,
        decoder.empty_cache(batch, width + max_new_tokens),
        0,
        positions=jnp.maximum(prompt[None] - begins, 0),
        mask=visible(prompt, width),
    )

    def record(step, hidden, written, ended):
        token = sampling.choose(jax.random.fold_in(key, step), decoder.logits(hidden[:, -1]))
        token = jnp.where(ended, pad_id, token).astype(jnp.int32)
        written = jax.lax.dynamic_update_slice(written, token[:, None], (0, step))
        return token, written, ended | jnp.any(token[:, None] == endings, axis=1)

    def unfinished(state):
        step, _, _, ended, _ = state
        return (step < max_new_tokens) & ~jnp.all(ended)

    def write(state):
        step, token, written, ended, cache = state
        # The token chosen at step - 1 is read into its slot, and the next one chosen.
        slot = width + step - 1
        hidden, cache = decoder.extend(
            token[:, None], cache, slot, positions=slot - begins, mask=visible(slot[None], width + max_new_tokens)
        )
        token, written, ended = record(step, hidden, written, ended)
        return step + 1, token, written, ended, cache

    written = jnp.full((batch, max_new_tokens), pad_id, jnp.int32)
    token, written, ended = record(0, hidden, written, jnp.zeros(batch, bool))
    state = jax.lax.while_loop(unfinished, write, (jnp.int32(1), token, written, ended, cache))
    return state[2]
