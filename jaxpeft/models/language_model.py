"""What does one do with a decoder? Logits, losses and text, as pure functions of its parameters."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from jaxpeft.models import generate as generation
from jaxpeft.models.config import Config
from jaxpeft.models.decoder import Decoder, split_over
from jaxpeft.models.generate import RowSampling, Sampling, Writing
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


class Scores(NamedTuple):
    """What `LanguageModel.scores` returns.

    Attributes:
      following: (B, S) float32, the log-probability of the token after each; no meaning from the last token on.
      likeliest: (B, S) int32, the likeliest token after each.
      last: (B, V) float32, the log-probability of every token after the last.
    """

    following: jax.Array
    likeliest: jax.Array
    last: jax.Array


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
      hf_config, generation_config: what the folder it was loaded from says in ``config.json`` and
        ``generation_config.json``; `jaxpeft.models.save` passes it on.
    """

    config: Config
    params: dict[str, Any] = dataclasses.field(repr=False)
    tokenizer: Any = dataclasses.field(default=None, repr=False)
    source: str = ""
    eos_ids: tuple[int, ...] = ()
    hf_config: dict[str, Any] = dataclasses.field(default_factory=dict, repr=False)
    generation_config: dict[str, Any] = dataclasses.field(default_factory=dict, repr=False)

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
        if chunk == "auto":
            chunk = self._chunk(tokens.shape[0])
        return _in_pieces(
            lambda hidden, targets: _negative_log_likelihood(decoder.logits(hidden), targets), hidden, targets, chunk
        )

    def scores(self, params: Any, tokens: jax.Array, lengths: jax.Array) -> Scores:
        """How likely a text is, token by token, and what could have stood in its place.

        Args:
          params: as in `logits`.
          tokens: (B, S) int, padded on the right.
          lengths: (B,) int: true lengths, at least 1.

        >>> from jaxpeft.models import Config
        >>> lm = random(Config(vocab_size=64, hidden_size=32, intermediate_size=96, num_hidden_layers=2,
        ...                    num_attention_heads=4, num_key_value_heads=2), jax.random.key(0))
        >>> scores = lm.scores(lm.params, jnp.array([[5, 9, 2, 0]]), jnp.array([3]))
        >>> scores.following.shape, scores.likeliest.shape, scores.last.shape
        ((1, 4), (1, 4), (1, 64))
        """
        decoder = self._decoder(params)
        hidden = decoder.hidden(tokens)

        def piece(hidden, targets):
            logits = decoder.logits(hidden)
            return -_negative_log_likelihood(logits, targets), jnp.argmax(logits, axis=-1).astype(jnp.int32)

        targets = jnp.roll(tokens, -1, axis=1)
        following, likeliest = _in_pieces(piece, hidden, targets, self._chunk(tokens.shape[0]))
        ends = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
        return Scores(following, likeliest, jax.nn.log_softmax(decoder.logits(ends)))

    def _chunk(self, batch: int) -> int:
        """Positions of a row whose logits take `_LOGITS_BYTES` on a device."""
        shards = split_over("batch", batch) | split_over("features", self.config.vocab_size)
        return max(1, _LOGITS_BYTES * math.prod(shards.values()) // (4 * self.config.vocab_size * batch))

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
        return generation.generate(
            self._decoder(params),
            tokens,
            lengths,
            max_new_tokens=max_new_tokens,
            sampling=Sampling(temperature=temperature, top_k=top_k, top_p=top_p),
            key=key,
            eos_ids=self.end_ids if eos_ids is None else tuple(eos_ids),
            pad_id=self.pad_id if pad_id is None else pad_id,
            padding_side=padding_side,
        )

    def prefill(
        self,
        params: Any,
        tokens: jax.Array,
        lengths: jax.Array,
        *,
        slots: int,
        sampling: Sampling | RowSampling = Sampling(),  # noqa: B008, frozen
        key: jax.Array | None = None,
        eos_ids: Sequence[int] | None = None,
        padding_side: Literal["right", "left"] = "right",
    ) -> Writing:
        """Reads prompts and writes the first token of each; `write` goes on from there.

        `generate` is the two of them in one, for who needs no token before the last.

        Args:
          params: as in `logits`.
          tokens: as in `generate`.
          lengths: as in `generate`.
          slots: room for keys and values of prompt and answer together: P and the tokens to be written.
          sampling: how tokens are chosen.
          key: as in `generate`.
          eos_ids: as in `generate`.
          padding_side: as in `generate`.

        Raises:
          ValueError: no room for an answer, or as in `generate`.
        """
        lengths, tokens = jnp.asarray(lengths), jnp.asarray(tokens)
        aligned = generation.align(tokens, lengths, padding_side)
        if slots <= tokens.shape[1]:
            raise ValueError(f"slots={slots} leave no room after prompts of {tokens.shape[1]} tokens")
        return generation.prefill(
            self._decoder(params),
            aligned,
            lengths,
            slots=slots,
            sampling=sampling,
            key=sampling.key(key),
            eos_ids=self.end_ids if eos_ids is None else tuple(eos_ids),
        )

    def write(
        self,
        params: Any,
        writing: Writing,
        *,
        count: int,
        sampling: Sampling = Sampling(),  # noqa: B008, frozen
        key: jax.Array | None = None,
        eos_ids: Sequence[int] | None = None,
        pad_id: int | None = None,
    ) -> tuple[jax.Array, Writing]:
        """Writes up to `count` more tokens in every row; stops earlier when every row has ended.

        Args:
          params: as in `logits`.
          writing: from `prefill` or an earlier `write`, with `count` slots left. Donate it: its cache is written to.
          count: N.
          sampling: how tokens are chosen.
          key: as in `generate`.
          eos_ids: as in `generate`.
          pad_id: as in `generate`.

        Returns:
          (B, N) int32, `pad_id` after the end of a row; and where the texts stand now.

        >>> import functools
        >>> from jaxpeft.models import Config
        >>> lm = random(Config(vocab_size=64, hidden_size=32, intermediate_size=96, num_hidden_layers=2,
        ...                    num_attention_heads=4, num_key_value_heads=2), jax.random.key(0))
        >>> prompt, lengths = jnp.array([[5, 9, 2]]), jnp.array([3])
        >>> writing = jax.jit(functools.partial(lm.prefill, slots=8))(lm.params, prompt, lengths)
        >>> more, writing = jax.jit(functools.partial(lm.write, count=4))(lm.params, writing)
        >>> whole = lm.generate(lm.params, prompt, lengths, max_new_tokens=5)
        >>> bool(jnp.all(whole[:, 1:] == more)), int(writing.step)
        (True, 5)
        """
        return generation.write(
            self._decoder(params),
            writing,
            count=count,
            sampling=sampling,
            key=sampling.key(key),
            eos_ids=self.end_ids if eos_ids is None else tuple(eos_ids),
            pad_id=self.pad_id if pad_id is None else pad_id,
        )

    def step(
        self,
        params: Any,
        writing: Writing,
        *,
        sampling: Sampling | RowSampling = Sampling(),  # noqa: B008, frozen
        key: jax.Array | None = None,
        eos_ids: Sequence[int] | None = None,
        pad_id: int | None = None,
    ) -> Writing:
        """Writes one more token in every row: the body of `write`'s loop, for loops that end otherwise.

        Arguments are those of `write`. The new tokens are the result's ``token``, `pad_id` in rows that had ended; such
        a row may go on past its last slot, which stays within its own cache.

        >>> from jaxpeft.models import Config
        >>> lm = random(Config(vocab_size=64, hidden_size=32, intermediate_size=96, num_hidden_layers=2,
        ...                    num_attention_heads=4, num_key_value_heads=2), jax.random.key(0))
        >>> writing = lm.prefill(lm.params, jnp.array([[5, 9, 2]]), jnp.array([3]), slots=8)
        >>> more, _ = lm.write(lm.params, writing, count=1)
        >>> bool(jnp.all(lm.step(lm.params, writing).token == more[:, 0]))
        True
        """
        return generation.step(
            self._decoder(params),
            writing,
            sampling=sampling,
            key=sampling.key(key),
            eos_ids=self.end_ids if eos_ids is None else tuple(eos_ids),
            pad_id=self.pad_id if pad_id is None else pad_id,
        )

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Tokens that end a text: the model's, and the tokenizer's end of sequence if there is one."""
        own = getattr(self.tokenizer, "eos_token_id", None)
        return self.eos_ids if own is None else tuple(sorted({*self.eos_ids, own}))

    @property
    def pad_id(self) -> int:
        """The tokenizer's padding token, else 0."""
        return getattr(self.tokenizer, "pad_token_id", None) or 0

    def _decoder(self, params: Any) -> Decoder:
        return nnx.merge(_skeleton(self.config)[0], params)


def _in_pieces(of: Callable, hidden: jax.Array, targets: jax.Array, chunk: int | None) -> Any:
    """``of(hidden, targets)``, arrays (B, S), by at most `chunk` positions of a row at a time."""
    batch, length = targets.shape
    pieces = 1 if chunk is None else -(-length // chunk)
    if pieces == 1:
        return of(hidden, targets)
    size = -(-length // pieces)
    padding = pieces * size - length
    hidden = jnp.pad(hidden, ((0, 0), (0, padding), (0, 0))).reshape(batch, pieces, size, -1)
    targets = jnp.pad(targets, ((0, 0), (0, padding))).reshape(batch, pieces, size)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def piece(_, scanned):
        return None, of(*scanned)

    _, found = jax.lax.scan(piece, None, (hidden.swapaxes(0, 1), targets.swapaxes(0, 1)))
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(batch, -1)[:, :length], found)


def _negative_log_likelihood(logits: jax.Array, targets: jax.Array) -> jax.Array:
    # A comparison instead of a gather: its derivative fuses with that of the softmax, where a gather's is a scatter
    # into zeros of the size of the logits; and a vocabulary sharded over devices stays sharded.
    vocabulary = jax.lax.broadcasted_iota(targets.dtype, logits.shape, logits.ndim - 1)
    picked = jnp.sum(jnp.where(vocabulary == targets[..., None], logits, 0.0), axis=-1)
    return jax.nn.logsumexp(logits, axis=-1) - picked
