"""How does an encoder of the BERT or the ViT family compute? As Flax NNX modules over stacked layers."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxpeft.models.attention import attention
from jaxpeft.models.decoder import POLICIES, laid_out, linear, recomputed
from jaxpeft.models.encoder_config import EncoderConfig

_ACTIVATIONS = {
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_new": functools.partial(jax.nn.gelu, approximate=True),
    "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}


@recomputed
def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array, eps: float | jax.Array) -> jax.Array:
    """``(x - mean) / sqrt(var + eps) * scale + bias`` over the last axis, in float32, returned in the dtype of `x`."""
    y = x.astype(jnp.float32)
    y = y - jnp.mean(y, axis=-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + eps)
    return (y * scale.astype(jnp.float32) + bias.astype(jnp.float32)).astype(x.dtype)


@recomputed
def attend(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Attention of (B, S, N, H) each in both directions; `mask` (B, 1, 1, S) bool says which tokens are seen."""
    return attention(query, key, value, mask=mask)


class LayerNorm(nnx.Module):
    """`layer_norm` with its scale and bias."""

    def __init__(self, config: EncoderConfig):
        self.scale = nnx.Param(jnp.ones(config.hidden_size, config.param_dtype))
        self.bias = nnx.Param(jnp.zeros(config.hidden_size, config.param_dtype))
        self.eps = config.layer_norm_eps

    def __call__(self, x: jax.Array) -> jax.Array:
        """Of `x` (…, hidden_size)."""
        return layer_norm(x, self.scale[...], self.bias[...], self.eps)


class LayerScale(nnx.Module):
    """One factor a feature."""

    def __init__(self, config: EncoderConfig):
        self.scale = nnx.Param(jnp.ones(config.hidden_size, config.param_dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Of `x` (…, hidden_size)."""
        return x * self.scale[...].astype(x.dtype)


class Attention(nnx.Module):
    """Self-attention in both directions."""

    def __init__(self, config: EncoderConfig, rngs: nnx.Rngs):
        self.heads = config.num_attention_heads
        size, bias = config.hidden_size, config.attention_bias
        self.query = linear(config, size, size, bias=bias, rngs=rngs)
        self.key = linear(config, size, size, bias=bias, rngs=rngs)
        self.value = linear(config, size, size, bias=bias, rngs=rngs)
        self.out = linear(config, size, size, rngs=rngs)

    def __call__(self, x: jax.Array, mask: jax.Array | None) -> jax.Array:
        """What `x` (B, S, hidden_size) takes from the tokens it sees."""
        heads = (*x.shape[:2], self.heads, -1)
        query, key, value = (
            laid_out(proj(x).reshape(heads), "batch", None, "heads", None)
            for proj in (self.query, self.key, self.value)
        )
        return self.out(attend(query, key, value, mask).reshape(x.shape))


class MLP(nnx.Module):
    """``down(act(up(x)))``."""

    def __init__(self, config: EncoderConfig, rngs: nnx.Rngs):
        self.act = config.hidden_act
        self.up = linear(config, config.hidden_size, config.intermediate_size, rngs=rngs)
        self.down = linear(config, config.intermediate_size, config.hidden_size, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Of `x` (B, S, hidden_size)."""
        return self.down(recomputed(_ACTIVATIONS[self.act])(laid_out(self.up(x), "batch", None, "features")))


class Layer(nnx.Module):
    """Attention and MLP beside a residual, normalised before (ViT) or after the sum (BERT)."""

    def __init__(self, config: EncoderConfig, rngs: nnx.Rngs):
        self.norm_first = config.is_vision
        self.attention = Attention(config, rngs)
        self.attention_norm = LayerNorm(config)
        self.mlp = MLP(config, rngs)
        self.mlp_norm = LayerNorm(config)
        self.layer_scale = config.layer_scale
        if config.layer_scale:
            self.attention_scale = LayerScale(config)
            self.mlp_scale = LayerScale(config)

    def __call__(self, x: jax.Array, mask: jax.Array | None) -> jax.Array:
        """The residual stream (B, S, hidden_size) after this layer."""
        if not self.norm_first:
            x = laid_out(self.attention_norm(x + self.attention(x, mask)), "batch", None, None)
            return laid_out(self.mlp_norm(x + self.mlp(x)), "batch", None, None)
        attended = self.attention(self.attention_norm(x), mask)
        x = laid_out(x + (self.attention_scale(attended) if self.layer_scale else attended), "batch", None, None)
        changed = self.mlp(self.mlp_norm(x))
        return laid_out(x + (self.mlp_scale(changed) if self.layer_scale else changed), "batch", None, None)


class TextEmbedding(nnx.Module):
    """Tokens, their positions and the segment they belong to, summed and normalised."""

    def __init__(self, config: EncoderConfig, rngs: nnx.Rngs):
        def table(rows: int) -> nnx.Embed:
            dtype, init = jnp.dtype(config.param_dtype), nnx.initializers.normal(0.02)
            return nnx.Embed(rows, config.hidden_size, param_dtype=dtype, embedding_init=init, rngs=rngs)

        self.config = config
        self.tokens = table(config.vocab_size)
        self.positions = table(config.max_position_embeddings)
        if config.type_vocab_size:
            self.types = table(config.type_vocab_size)
        self.norm = LayerNorm(config)

    def __call__(self, tokens: jax.Array, token_types: jax.Array | None) -> jax.Array:
        """(B, S, hidden_size) of (B, S) int each."""
        config = self.config
        start, length = config.position_offset, tokens.shape[1]
        if length > config.positions:
            raise ValueError(f"{length} tokens a row, but the model has {config.positions} positions")
        x = jnp.take(self.tokens.embedding[...], tokens, axis=0).astype(config.dtype)
        x += self.positions.embedding[...][start : start + length].astype(config.dtype)
        if config.type_vocab_size:
            kinds = self.types.embedding[...].astype(config.dtype)
            x += kinds[0] if token_types is None else jnp.take(kinds, token_types, axis=0)
        return self.norm(x)


class ImageEmbedding(nnx.Module):
    """Patches and their positions, behind one token that stands for the image."""

    def __init__(self, config: EncoderConfig, rngs: nnx.Rngs):
        self.config = config
        patch, size, dtype = config.patch_size, config.hidden_size, jnp.dtype(config.param_dtype)
        init = nnx.initializers.normal(0.02)
        # (columns, rows, channels, out): a convolution's kernel in Hugging Face's files, read from the last axis.
        self.patches = nnx.Dict(
            kernel=nnx.Param(init(rngs.params(), (patch, patch, config.num_channels, size), dtype)),
            bias=nnx.Param(jnp.zeros(size, dtype)),
        )
        self.cls = nnx.Param(init(rngs.params(), (1, 1, size), dtype))
        self.positions = nnx.Param(init(rngs.params(), (1, config.positions, size), dtype))

    def __call__(self, images: jax.Array) -> jax.Array:
        """(B, 1 + patches, hidden_size) of (B, height, width, channels) float; sides are multiples of the patch's."""
        config, patch = self.config, self.config.patch_size
        batch, height, width, channels = images.shape
        if height % patch or width % patch:
            raise ValueError(f"images of {height} x {width} pixels: expected multiples of the patch size {patch}")
        rows, columns = height // patch, width // patch
        cut = images.astype(config.dtype).reshape(batch, rows, patch, columns, patch, channels)
        kernel, bias = (self.patches[name][...].astype(config.dtype) for name in ("kernel", "bias"))
        x = jnp.einsum("brpcqn,qpno->brco", cut, kernel).reshape(batch, rows * columns, -1) + bias
        first = jnp.broadcast_to(self.cls[...].astype(config.dtype), (batch, 1, config.hidden_size))
        return jnp.concatenate([first, x], axis=1) + self._at(rows, columns).astype(config.dtype)

    def _at(self, rows: int, columns: int) -> jax.Array:
        """The positions of a grid of patches, resampled from the grid of pretraining (bicubic, as torch does)."""
        known = self.positions[...]
        side = self.config.image_size // self.config.patch_size
        if (rows, columns) == (side, side):
            return known
        grid = known[:, 1:].reshape(side, side, -1).astype(jnp.float32)
        grid = jnp.einsum("rs,ct,sto->rco", cubic(side, rows), cubic(side, columns), grid)
        return jnp.concatenate([known[:, :1].astype(jnp.float32), grid.reshape(1, rows * columns, -1)], axis=1)


def cubic(size: int, new: int) -> np.ndarray:
    """The matrix (new, size) float32 that resamples `size` points as `new`: cubic convolution with a = -0.75.

    Borders repeat and nothing is smoothed, as in torch's ``interpolate(mode="bicubic", align_corners=False)``.

    >>> cubic(4, 4).round(3).tolist() == np.eye(4).tolist()
    True
    """
    a = -0.75
    center = (np.arange(new) + 0.5) * size / new - 0.5
    whole = np.floor(center).astype(int)
    matrix = np.zeros((new, size))
    for tap in range(-1, 3):
        distance = np.abs(center - whole - tap)
        near = ((a + 2) * distance - (a + 3)) * distance**2 + 1
        far = ((distance - 5) * distance + 8) * distance * a - 4 * a
        weight = np.where(distance <= 1, near, np.where(distance < 2, far, 0.0))
        np.add.at(matrix, (np.arange(new), np.clip(whole + tap, 0, size - 1)), weight)
    return matrix.astype(np.float32)


class Encoder(nnx.Module):
    """Tokens or pixels in, one vector a token or patch out.

    Every parameter below ``layers`` has a leading axis L = `EncoderConfig.num_hidden_layers`; one scan runs the layers.

    Args:
      config: architecture and numerics.
      rngs: for the initial parameters: normal of deviation 0.02, norms one, biases zero.

    >>> config = EncoderConfig(family="vit", hidden_size=32, intermediate_size=64, num_hidden_layers=2,
    ...                        num_attention_heads=4, image_size=16, patch_size=8)
    >>> encoder = Encoder(config, nnx.Rngs(0))
    >>> encoder.layers.attention.query.kernel.shape
    (2, 32, 32)
    >>> encoder.images(jnp.zeros((1, 16, 24, 3))).shape
    (1, 7, 32)
    """

    def __init__(self, config: EncoderConfig, rngs: nnx.Rngs):
        self.config = config
        self.embed: Any = ImageEmbedding(config, rngs) if config.is_vision else TextEmbedding(config, rngs)
        self.layers = nnx.vmap(lambda rngs: Layer(config, rngs))(rngs.split(config.num_hidden_layers))
        if config.is_vision:
            self.norm = LayerNorm(config)

    def text(self, tokens: jax.Array, mask: jax.Array, token_types: jax.Array | None = None) -> jax.Array:
        """(B, S, hidden_size) of `tokens` (B, S) int; those where `mask` (B, S) is 0 are not seen by others."""
        seen = (mask > 0)[:, None, None, :]
        return self._run(self.embed(tokens, token_types), seen)

    def images(self, images: jax.Array) -> jax.Array:
        """(B, 1 + patches, hidden_size) of normalised pixels (B, height, width, channels)."""
        return self.norm(self._run(self.embed(images), None))

    def _run(self, x: jax.Array, mask: jax.Array | None) -> jax.Array:
        graph, stacked = nnx.split(self.layers)
        x = laid_out(x, "batch", None, None)

        def step(x, state):
            return nnx.merge(graph, state)(x, mask), None

        if self.config.remat != "none":
            step = recomputed(step, policy=POLICIES[self.config.remat])
        return jax.lax.scan(step, x, stacked)[0]
