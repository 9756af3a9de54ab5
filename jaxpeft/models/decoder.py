"""How does a decoder of the Llama family compute? As Flax NNX modules over stacked layers."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, PartitionSpec

from jaxpeft.models.attention import attention, blocks_of
from jaxpeft.models.config import Config
from jaxpeft.models.encoder_config import EncoderConfig
from jaxpeft.sharding import BATCH

# What attends: (queries (B, S, N, H), keys (B, T, K, H), values (B, T, K, H)) -> (B, S, N, H).
Attend = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]

POLICIES = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


LOGICAL_AXES = {"batch": BATCH, "length": ("sequence",), "heads": ("tensor",), "features": ("tensor",)}
"""Which mesh axes split an axis of the activations, where the context has a mesh (`jax.set_mesh`) of automatic axes."""


def split_over(axis: str | None, size: int) -> dict[str, int]:
    """{mesh axis: its size} of the context's mesh, over which an axis of an activation is split; empty for none.

    Mesh axes that are explicit or manual are left out, and so are all where they do not divide the axis.
    """
    mesh = jax.sharding.get_abstract_mesh()
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    found = {name: mesh.shape[name] for name in LOGICAL_AXES.get(axis or "", ()) if kinds.get(name) == AxisType.Auto}
    return {} if size % math.prod(found.values()) else found


def laid_out(x: jax.Array, *axes: str | None) -> jax.Array:
    """An activation, laid out on the mesh of the context by what its axes are; as it is where there is no mesh."""
    names = [tuple(split_over(axis, size)) or None for axis, size in zip(axes, x.shape, strict=True)]
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*names)) if any(names) else x


class Cache(NamedTuple):
    """Keys and values of earlier tokens: two arrays (L, B, T, K, H), T slots a row."""

    keys: jax.Array
    values: jax.Array


def rotary_table(config: Config, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines of ``positions * frequency``, each (B, S, 1, head_dim / 2) float32.

    Frequency i is ``rope_theta ** (-2 i / head_dim)``, stretched as `Config.rope_scaling` says.
    """
    frequencies = config.rope_theta ** (-np.arange(0, config.head_dim, 2) / config.head_dim)
    scaling = config.rope_scaling
    if scaling is not None and scaling.kind == "linear":
        frequencies = frequencies / scaling.factor
    elif scaling is not None:
        turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
        kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
        kept = np.clip(kept, 0.0, 1.0)
        frequencies = frequencies * (kept + (1 - kept) / scaling.factor)
    angles = positions[:, :, None, None] * jnp.asarray(frequencies, jnp.float32)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, table: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates (B, S, heads, H) by position: feature i of a head pairs with feature i + H / 2."""
    cos, sin = table
    left, right = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1).astype(x.dtype)


def attention_mask(config: Config, length: int, segment_ids: jax.Array | None) -> jax.Array | None:
    """Which of the tokens before it each one sees, (1 or B, 1, S, S) bool; None for all of them."""
    window = config.sliding_window or length
    near = None
    if window < length:
        positions = jnp.arange(length)
        near = (positions[:, None] - positions[None, :] < window)[None, None]
    if segment_ids is None:
        return near
    same = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]
    return same if near is None else same & near


def segment_positions(segment_ids: jax.Array) -> jax.Array:
    """Positions (B, S) that start anew at every change of ``segment_ids`` (B, S).

    >>> segment_positions(jnp.array([[1, 1, 1, 2, 2, 0]]))
    Array([[0, 1, 2, 0, 1, 0]], dtype=int32)
    """
    index = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)[None]
    begins = jnp.diff(segment_ids, axis=1, prepend=segment_ids[:, :1] - 1) != 0
    return index - jax.lax.cummax(jnp.where(begins, index, 0), axis=1)


# Elementwise work and attention scores are recomputed in the backward pass rather than kept, whatever `Config.remat`
# says: on an accelerator they cost memory, on a CPU the traffic to and from it costs more than the arithmetic (2 x 256
# tokens through SmolLM2-135M: 947 MiB kept without this, 336 with it, and a faster step). No kernel is involved. The
# barriers against common subexpressions are not needed: in a scan the two passes are two loops.
recomputed = functools.partial(jax.checkpoint, prevent_cse=False)


# The same for what a linear layer reads, where it is cheaper to make than to keep: the gradients of an adapter's first
# factor need it. What other products gave, such as x aᵀ between the factors, is kept if a gradient needs it.
inputs_recomputed = functools.partial(recomputed, policy=jax.checkpoint_policies.dots_saveable)


def attend_before(mask: jax.Array | None, length: int) -> Attend:
    """Causal attention within rows of `length` tokens, and within `mask` (1 or B, 1, S, S) bool if there is one."""
    # A row that is split over devices has its queries side by side, not one run after the other.
    split = math.prod(split_over("length", length).values()) > 1
    blocks = 1 if split else blocks_of(length)
    return recomputed(functools.partial(attention, mask=mask, causal=True, blocks=blocks))


@recomputed
def rms_norm(x: jax.Array, scale: jax.Array, eps: float | jax.Array) -> jax.Array:
    """``x / sqrt(mean(x²) + eps) * scale`` over the last axis, in float32, returned in the dtype of `x`."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + eps)
    return (y * scale.astype(jnp.float32)).astype(x.dtype)


@recomputed
def swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    """``silu(gate) * up``."""
    return jax.nn.silu(gate) * up


class RMSNorm(nnx.Module):
    """`rms_norm` with its scale."""

    def __init__(self, size: int, config: Config):
        self.scale = nnx.Param(jnp.ones(size, config.param_dtype))
        self.eps = config.rms_norm_eps

    def __call__(self, x: jax.Array) -> jax.Array:
        """Of `x` (…, size)."""
        return rms_norm(x, self.scale[...], self.eps)


def linear(
    config: Config | EncoderConfig, inputs: int, outputs: int, *, bias: bool = True, rngs: nnx.Rngs
) -> nnx.Linear:
    """A dense layer of the configuration's types."""
    return nnx.Linear(
        inputs,
        outputs,
        use_bias=bias,
        dtype=jnp.dtype(config.dtype),
        param_dtype=jnp.dtype(config.param_dtype),
        kernel_init=nnx.initializers.normal(0.02),
        rngs=rngs,
    )


class Attention(nnx.Module):
    """Rotary grouped-query self-attention; whom a token sees is the caller's."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.head_dim = config.head_dim
        hidden = config.hidden_size
        queries = config.num_attention_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        self.q_proj = linear(config, hidden, queries, bias=config.attention_bias, rngs=rngs)
        self.k_proj = linear(config, hidden, keys, bias=config.attention_bias, rngs=rngs)
        self.v_proj = linear(config, hidden, keys, bias=config.attention_bias, rngs=rngs)
        self.o_proj = linear(config, queries, hidden, bias=config.attention_out_bias, rngs=rngs)
        self.qk_norm = config.qk_norm
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, config)
            self.k_norm = RMSNorm(config.head_dim, config)

    def heads(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries, keys and values (B, S, heads, head_dim) of `x` (B, S, hidden_size)."""
        shape = (*x.shape[:2], -1, self.head_dim)
        return self.q_proj(x).reshape(shape), self.k_proj(x).reshape(shape), self.v_proj(x).reshape(shape)

    def __call__(
        self, heads: tuple[jax.Array, jax.Array, jax.Array], rotary: tuple[jax.Array, jax.Array], attend: Attend
    ) -> jax.Array:
        """What the queries of `heads` take from the tokens they see, (B, S, hidden_size)."""
        query, key, value = heads
        if self.qk_norm:
            query, key = self.q_norm(query), self.k_norm(key)
        query = laid_out(query, "batch", "length", "heads", None)
        # Every query sees the keys of the whole row, so they are gathered where rows are split.
        key, value = (laid_out(x, "batch", None, "heads", None) for x in (key, value))
        attended = attend(rotate(query, rotary), rotate(key, rotary), value)
        return self.o_proj(attended.reshape(*attended.shape[:2], -1))


class MLP(nnx.Module):
    """``down(silu(gate(x)) * up(x))``."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        hidden, wide = config.hidden_size, config.intermediate_size
        self.gate_proj = linear(config, hidden, wide, bias=config.mlp_bias, rngs=rngs)
        self.up_proj = linear(config, hidden, wide, bias=config.mlp_bias, rngs=rngs)
        self.down_proj = linear(config, wide, hidden, bias=config.mlp_bias, rngs=rngs)

    def widened(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Gate and up (B, S, intermediate_size) of `x` (B, S, hidden_size)."""
        gate, up = (laid_out(proj(x), "batch", "length", "features") for proj in (self.gate_proj, self.up_proj))
        return gate, up

    def __call__(self, gate: jax.Array, up: jax.Array) -> jax.Array:
        """(B, S, hidden_size) of what `widened` gives."""
        return self.down_proj(swiglu(gate, up))


class Layer(nnx.Module):
    """Attention and MLP, each behind a norm and beside a residual."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.self_attn = Attention(config, rngs)
        self.mlp = MLP(config, rngs)
        self.input_norm = RMSNorm(config.hidden_size, config)
        self.post_attention_norm = RMSNorm(config.hidden_size, config)
        self.inputs = inputs_recomputed if config.remat == "none" else lambda function: function

    def __call__(self, x: jax.Array, rotary: tuple[jax.Array, jax.Array], attend: Attend) -> jax.Array:
        """The residual stream (B, S, hidden_size) after this layer."""
        heads = self.inputs(lambda x: self.self_attn.heads(self.input_norm(x)))(x)
        x = laid_out(x + self.self_attn(heads, rotary, attend), "batch", "length", None)
        wide = self.inputs(lambda x: self.mlp.widened(self.post_attention_norm(x)))(x)
        return laid_out(x + self.inputs(self.mlp)(*wide), "batch", "length", None)


class Decoder(nnx.Module):
    """Tokens in, next-token logits out.

    Every parameter below ``layers`` has a leading axis L = `Config.num_hidden_layers`, and one scan runs the layers.

    Args:
      config: architecture and numerics.
      rngs: for the initial parameters: normal of deviation 0.02, norms one, biases zero.

    >>> config = Config(vocab_size=64, hidden_size=32, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
    >>> decoder = Decoder(config, nnx.Rngs(0))
    >>> decoder.layers.self_attn.q_proj.kernel.shape
    (2, 32, 32)
    >>> decoder(jnp.zeros((1, 5), jnp.int32)).shape
    (1, 5, 64)
    """

    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.config = config
        init = nnx.initializers.normal(0.02)
        dtype = jnp.dtype(config.param_dtype)
        self.embed = nnx.Embed(config.vocab_size, config.hidden_size, param_dtype=dtype, embedding_init=init, rngs=rngs)
        self.layers = nnx.vmap(lambda rngs: Layer(config, rngs))(rngs.split(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config)
        if not config.tie_word_embeddings:
            self.lm_head = linear(config, config.hidden_size, config.vocab_size, bias=False, rngs=rngs)

    def __call__(
        self, tokens: jax.Array, *, positions: jax.Array | None = None, segment_ids: jax.Array | None = None
    ) -> jax.Array:
        """Logits (B, S, V) float32 of ``tokens`` (B, S); see `hidden`."""
        return self.logits(self.hidden(tokens, positions=positions, segment_ids=segment_ids))

    def hidden(
        self, tokens: jax.Array, *, positions: jax.Array | None = None, segment_ids: jax.Array | None = None
    ) -> jax.Array:
        """What the head reads, (B, S, hidden_size) of `Config.dtype`.

        Args:
          tokens: (B, S) int. A token outside the vocabulary gives NaN.
          positions: (B or 1, S) int. Default: 0, 1, … from the start of the row, or of the segment.
          segment_ids: (B, S) int. A token attends within its own segment only; tokens of one segment are adjacent.
        """
        if positions is None:
            positions = (
                jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
                if segment_ids is None
                else segment_positions(segment_ids)
            )
        # Made once, outside the scan over layers.
        rotary = rotary_table(self.config, positions)
        attend = attend_before(attention_mask(self.config, tokens.shape[1], segment_ids), tokens.shape[1])
        x = self._scan_layers(lambda layer, index, x: layer(x, rotary, attend), self._embed(tokens))
        return self.norm(x)

    def extend(
        self, tokens: jax.Array, cache: Cache, slot: jax.Array | int, *, positions: jax.Array, mask: jax.Array
    ) -> tuple[jax.Array, Cache]:
        """Reads S more tokens, after those in the cache.

        Args:
          tokens: (B, S) int.
          cache: slots for all tokens to come.
          slot: where in the cache the S tokens go.
          positions: (B, S) int.
          mask: (B, 1, S, T') bool: which of the cache's first T' slots each token sees.

        Returns:
          As `hidden`, and the cache with the tokens' keys and values written.
        """
        rotary = rotary_table(self.config, positions)
        attend_cached = recomputed(functools.partial(attention, mask=mask))
        seen = mask.shape[-1]

        def run(layer, index, carry):
            x, cache = carry

            def attend(query, key, value):
                nonlocal cache
                start = (index, 0, slot, 0, 0)
                cache = Cache(
                    jax.lax.dynamic_update_slice(cache.keys, key[None].astype(cache.keys.dtype), start),
                    jax.lax.dynamic_update_slice(cache.values, value[None].astype(cache.values.dtype), start),
                )
                return attend_cached(query, cache.keys[index, :, :seen], cache.values[index, :, :seen])

            return layer(x, rotary, attend), cache

        # The cache is carried whole, so that XLA writes into it instead of copying it for every token.
        x, cache = self._scan_layers(run, (self._embed(tokens), cache))
        return self.norm(x), cache

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Logits (…, V) float32 of ``hidden`` (…, hidden_size); a tied head is the embedding transposed."""
        if self.config.tie_word_embeddings:
            weight, contracted = self.embed.embedding[...], 1
        else:
            weight, contracted = self.lm_head.kernel[...], 0
        logits = jax.lax.dot_general(
            hidden,
            weight.astype(hidden.dtype),
            (((hidden.ndim - 1,), (contracted,)), ((), ())),
            preferred_element_type=jnp.float32,
        )
        return laid_out(logits, "batch", *["length"] * (logits.ndim - 2), "features")

    def empty_cache(self, batch: int, slots: int) -> Cache:
        """Zeros for ``slots`` tokens in each of ``batch`` rows."""
        config = self.config
        shape = (config.num_hidden_layers, batch, slots, config.num_key_value_heads, config.head_dim)
        return Cache(jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype))

    def _embed(self, tokens):
        # Rows first, then the cast: the table may be large and of another dtype.
        rows = jnp.take(self.embed.embedding[...], tokens, axis=0).astype(self.config.dtype)
        return laid_out(rows, "batch", "length", None)

    def _scan_layers(self, run: Callable[[Layer, jax.Array, Any], Any], carry: Any) -> Any:
        graph, stacked = nnx.split(self.layers)

        def step(carry, scanned):
            index, state = scanned
            return run(nnx.merge(graph, state), index, carry), None

        if self.config.remat != "none":
            step = recomputed(step, policy=POLICIES[self.config.remat])
        indices = jnp.arange(self.config.num_hidden_layers)
        return jax.lax.scan(step, carry, (indices, stacked))[0]
