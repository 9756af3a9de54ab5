"""Grouped-query attention by plain products, causal attention without the half that sees nothing."""

import jax
import jax.numpy as jnp
from jax import Array

BLOCK = 64
MOST_BLOCKS = 4


def blocks_of(length: int) -> int:
    """Into how many runs of queries causal attention over so many tokens is cut.

    With n runs it computes (n + 1) / 2n of the scores, and a run's scores stay in a cache. More than four runs gain
    little and make the program longer; runs of less than 64 tokens cost more than they save.

    >>> blocks_of(1), blocks_of(65), blocks_of(4096)
    (1, 2, 4)
    """
    return min(MOST_BLOCKS, -(-length // BLOCK))


def attention(
    query: Array, key: Array, value: Array, *, mask: Array | None = None, causal: bool = False, blocks: int = 1
) -> Array:
    """Softmax attention; scores, their softmax and all sums are float32.

    On the CPU, 4 x 256 tokens with 9 heads of 64 over 3 keys, forward and backward take 17 ms with four blocks, where
    `jax.nn.dot_product_attention` takes 34.

    Args:
      query: (B, S, N, H).
      key: (B, T, K, H), K a divisor of N: a key serves N / K queries.
      value: (B, T, K, H).
      mask: bool (1 or B, 1, S, T): which slots each token sees; None for all.
      causal: token i sees slots 0 … i only, and T = S.
      blocks: runs of queries that are computed one after the other, each with the keys that it may see. Useful with
        `causal` alone.

    Returns:
      (B, S, N, H), of the dtype of `query`.
    """
    batch, length, heads, size = query.shape
    # Laid out for the products once, with the queries of a key side by side.
    query = query.reshape(batch, length, key.shape[2], -1, size).transpose(0, 2, 3, 1, 4)
    key, value = key.swapaxes(1, 2), value.swapaxes(1, 2)
    run = -(-length // blocks)
    parts = []
    for start in range(0, length, run):
        end = min(start + run, length)
        seen = end if causal else key.shape[2]
        bias = jnp.zeros((1, 1, 1, 1), jnp.float32)
        if causal:
            bias += _hidden(jnp.arange(seen) <= jnp.arange(start, end)[:, None])
        if mask is not None:
            bias += _hidden(mask[:, :, start:end, :seen])
        parts.append(_part(query[:, :, :, start:end], key[:, :, :seen], value[:, :, :seen], bias[:, :, None]))
    attended = parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=3)
    return attended.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, size)


def _hidden(mask: Array) -> Array:
    """What is added to a score: 0 where it is seen, otherwise so little that two of it do not overflow."""
    return jnp.where(mask, 0.0, -0.25 * jnp.finfo(jnp.float32).max)


def _part(query: Array, key: Array, value: Array, bias: Array) -> Array:
    """Of queries (B, K, G, S, H), keys and values (B, K, T, H), with `bias` (1 or B, 1, 1, 1 or S, 1 or T)."""
    batch, keys, groups, length, size = query.shape
    side_by_side = query.reshape(batch, keys, groups * length, size)
    scores = jnp.einsum("bkqh,bkth->bkqt", side_by_side, key, preferred_element_type=jnp.float32)
    scores = scores.reshape(batch, keys, groups, length, -1) * size**-0.5 + bias
    # Less the largest, for the range; divided by their sum only behind the second product, which is smaller.
    weights = jnp.exp(scores - jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True)))
    sums = jnp.sum(weights, axis=-1, keepdims=True)
    weights = weights.reshape(batch, keys, groups * length, -1).astype(value.dtype)
    attended = jnp.einsum("bkqt,bkth->bkqh", weights, value, preferred_element_type=jnp.float32)
    return (attended.reshape(query.shape) / sums).astype(query.dtype)
