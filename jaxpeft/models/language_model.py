"""What does one do with a decoder? Logits, losses and text, as pure functions of its parameters."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from jaxpeft.models import generate as generation
from jaxpeft.models.config import Config
from jaxpeft.models.decoder import Decoder, split_over
from jaxpeft.sharding import Rules

# The mesh axes of the parameters. Products alternate between splitting the output and the input over "tensor", so that
# one reduction follows each pair.
DEFAULT_RULES: Rules = (
    (r"embed/embedding", PartitionSpec("tensor", "fsdp")),
    (r"lm_head/kernel", PartitionSpec("fsdp", "tensor")),
    (r"(q|k|v|gate|up)_proj/kernel", PartitionSpec(None, "fsdp", "tensor")),
    (r"(o|down)_proj/kernel", PartitionSpec(None, "tensor", "fsdp")),
    (r"(q|k|v|gate|up)_proj/bias", PartitionSpec(None, "tensor")),
    (r"", PartitionSpec()),
)

# Above this many bytes of float32 logits, "auto" cuts the loss into pieces and computes the logits a second time in the
# backward pass.
_LOGITS_BYTES = 512 * 2**20


@functools.lru_cache(maxsize=32)
def _skeleton(config: Config) -> tuple[Any, Any]:
    return nnx.split(nnx.eval_shape(lambda: Decoder(config, nnx.Rngs(0))))


def abstract(config: Config) -> dict[str, Any]:
    """The parameter tree as `jax.ShapeDtypeStruct`, without memory."""
    return nnx.to_pure_dict(_skeleton(config)[1])


def random(config: Config, key: jax.Array) -> LanguageModel:
    """A model of random parameters (normal of deviation 0.02), without a tokenizer.

    >>> from jaxpeft.models import Config
    >>> lm = random(Config(vocab_size=64, hidden_size=32, intermediate_size=96, num_hidden_layers=2,
    ...                    num_attention_heads=4, num_key_value_heads=2), jax.random.key(0))
    >>> lm.logits(lm.params, jnp.zeros((1, 5), jnp.int32)).shape
    (1, 5, 64)
    """

    @jax.jit
    def init(key):
        return nnx.to_pure_dict(nnx.state(Decoder(config, nnx.Rngs(key))))

    return LanguageModel(config, init(key), source="random")


# Compared by identity, so that jax.jit takes the bound methods.
@dataclasses.dataclass(frozen=True, eq=False)
class LanguageModel:
    """A decoder, parameters for it, and the tokenizer they were trained with.

    The methods are pure functions of the parameters given, ``params`` of this model or others of the same structure,
    and work under `jax.jit`, `jax.grad`, `jax.vmap` and `jaxpeft.adapt`.

    Attributes:
      config: architecture and numerics; `with_config` changes the latter.
      params: nested dict of arrays, for instance ``params["layers"]["self_attn"]["q_proj"]["kernel"]`` (L, in, out).
      tokenizer: a `transformers` tokenizer, or None.
      source: where the parameters come from.
      eos_ids: tokens that end a text, beside the tokenizer's own.
    """

    config: Config
    params: dict[str, Any] = dataclasses.field(repr=False)
    tokenizer: Any = dataclasses.field(default=None, repr=False)
    source: str = ""
    eos_ids: tuple[int, ...] = ()

    def with_config(self, **changes: Any) -> LanguageModel:
        """The same model with other numerics, for instance ``lm.with_config(remat="full")``."""
        return dataclasses.replace(self, config=dataclasses.replace(self.config, **changes))

    @property
    def num_params(self) -> int:
        """Number of parameters."""
        return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract(self.config)))

    def logits(
        self,
        params: Any,
        tokens: jax.Array,
        *,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
    ) -> jax.Array:
        """Next-token logits.

        Args:
          params: tree of the structure of `LanguageModel.params`.
          tokens: (B, S) int. Padding belongs on the right, or in a segment of its own.
          positions: (B or 1, S) int. Default: from 0 along the row, or along each segment.
          segment_ids: (B, S) int; a token attends within its own segment only (packed sequences).

        Returns:
          (B, S, V) float32.
        """
        return self._decoder(params)(tokens, positions=positions, segment_ids=segment_ids)

    def token_losses(
        self,
        params: Any,
        tokens: jax.Array,
        targets: jax.Array,
        *,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        chunk: int | Literal["auto"] | None = "auto",
    ) -> jax.Array:
        """Negative log-likelihood of every target, ``-log softmax(logits)[target]``; weighting is the caller's.

        Args:
          params: as in `logits`.
          tokens: as in `logits`.
          targets: (B, S) int, as a rule ``tokens`` shifted left by one.
          positions: as in `logits`.
          segment_ids: as in `logits`.
          chunk: positions of a row whose logits exist at one time; the backward pass computes them once more. None
            holds all logits and computes them once. ``"auto"`` is None up to 512 MiB of logits on a device, and beyond
            that the chunk that takes so much. Rows are not cut, so a batch sharded over a mesh stays as it is.

        Returns:
          (B, S) float32.
        """
        decoder = self._decoder(params)
        hidden = decoder.hidden(tokens, positions=positions, segment_ids=segment_ids)
        batch, length = tokens.shape
        if chunk == "auto":
            shards = split_over("batch", batch) | split_over("features", self.config.vocab_size)
            chunk = max(1, _LOGITS_BYTES * math.prod(shards.values()) // (4 * self.config.vocab_size * batch))
        pieces = 1 if chunk is None else -(-length // chunk)
        if pieces == 1:
            return _negative_log_likelihood(decoder.logits(hidden), targets)

        size = -(-length // pieces)
        padding = pieces * size - length
        hidden = jnp.pad(hidden, ((0, 0), (0, padding), (0, 0))).reshape(batch, pieces, size, -1)
        targets = jnp.pad(targets, ((0, 0), (0, padding))).reshape(batch, pieces, size)

        @functools.partial(jax.checkpoint, prevent_cse=False)
        def piece(_, scanned):
            hidden, targets = scanned
            return None, _negative_log_likelihood(decoder.logits(hidden), targets)

        _, losses = jax.lax.scan(piece, None, (hidden.swapaxes(0, 1), targets.swapaxes(0, 1)))
        return losses.swapaxes(0, 1).reshape(batch, -1)[:, :length]

    def generate(
        self,
        params: Any,
        tokens: jax.Array,
        lengths: jax.Array,
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        key: jax.Array | None = None,
        eos_ids: Sequence[int] | None = None,
        pad_id: int | None = None,
        padding_side: Literal["right", "left"] = "right",
    ) -> jax.Array:
        """Continues prompts.

        Args:
          params: as in `logits`.
          tokens: (B, P) int prompts, padded on `padding_side` with anything.
          lengths: (B,) int: true lengths, at least 1.
          max_new_tokens: N. Stops earlier when every row has ended.
          temperature: 0 takes the likeliest token; otherwise samples from ``softmax(logits / temperature)``.
          top_k: samples among the k likeliest only.
          top_p: samples among the fewest likeliest tokens whose probabilities sum to at least this.
          key: PRNG key, needed when sampling.
          eos_ids: tokens that end a row. Default: the model's, and the tokenizer's end of sequence if there is one.
          pad_id: what follows the end of a row. Default: the tokenizer's padding token, else 0.
          padding_side: "right" or "left".

        Returns:
          (B, N) int32: the new tokens only, the ending one included, then `pad_id`.

        Raises:
          ValueError: sampling without a key, or an argument out of range.
        """
        own = getattr(self.tokenizer, "eos_token_id", None)
        default = self.eos_ids if own is None else tuple(sorted({*self.eos_ids, own}))
        pad = getattr(self.tokenizer, "pad_token_id", None)
        sampling = generation.Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
        return generation.generate(
            self._decoder(params),
            tokens,
            lengths,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            key=key,
            eos_ids=default if eos_ids is None else tuple(eos_ids),
            pad_id=pad_id if pad_id is not None else pad or 0,
            padding_side=padding_side,
        )

    def _decoder(self, params: Any) -> Decoder:
        return nnx.merge(_skeleton(self.config)[0], params)


def _negative_log_likelihood(logits: jax.Array, targets: jax.Array) -> jax.Array:
    # A comparison instead of a gather: its derivative fuses with that of the softmax, where a gather's is a scatter
    # into zeros of the size of the logits; and a vocabulary sharded over devices stays sharded.
    vocabulary = jax.lax.broadcasted_iota(targets.dtype, logits.shape, logits.ndim - 1)
    picked = jnp.sum(jnp.where(vocabulary == targets[..., None], logits, 0.0), axis=-1)
    return jax.nn.logsumexp(logits, axis=-1) - picked
