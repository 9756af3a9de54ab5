"""What does one do with an encoder? Features, predictions and losses, as pure functions of its parameters."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from jaxpeft.models.encoder import Encoder
from jaxpeft.models.encoder_config import EncoderConfig
from jaxpeft.models.names import encoder_name
from jaxpeft.sharding import Rules

HEAD = "classifier"
"""Where `EncoderModel.with_head` puts the head; `jaxpeft.find` leaves modules of this name out of "all-linear"."""

ENCODER_RULES: Rules = (
    (r"embed/tokens/embedding", PartitionSpec("tensor", "fsdp")),
    (r"(query|key|value|up)/kernel", PartitionSpec(None, "fsdp", "tensor")),
    (r"(out|down)/kernel", PartitionSpec(None, "tensor", "fsdp")),
    (r"(query|key|value|up)/bias", PartitionSpec(None, "tensor")),
    (r"", PartitionSpec()),
)
"""As `DEFAULT_RULES` for decoders."""


@functools.lru_cache(maxsize=32)
def _skeleton(config: EncoderConfig) -> tuple[Any, Any]:
    return nnx.split(nnx.eval_shape(lambda: Encoder(config, nnx.Rngs(0))))


def abstract(config: EncoderConfig) -> dict[str, Any]:
    """The parameter tree as `jax.ShapeDtypeStruct`, without memory and without a head."""
    return nnx.to_pure_dict(_skeleton(config)[1])


def random(config: EncoderConfig, key: jax.Array) -> EncoderModel:
    """An encoder of random parameters (normal of deviation 0.02), without a tokenizer.

    >>> config = EncoderConfig(family="bert", vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
    ...                        num_attention_heads=4, max_position_embeddings=16, type_vocab_size=2)
    >>> model = random(config, jax.random.key(0))
    >>> model.features(model.params, tokens=jnp.zeros((3, 5), jnp.int32), mask=jnp.ones((3, 5))).shape
    (3, 32)
    """

    @jax.jit
    def init(key: jax.Array) -> Any:
        return nnx.to_pure_dict(nnx.state(Encoder(config, nnx.Rngs(key))))

    return EncoderModel(config, init(key), source="random")


# Compared by identity, so that jax.jit takes the bound methods.
@dataclasses.dataclass(frozen=True, eq=False)
class EncoderModel:
    """An encoder of text or images, parameters for it, and the tokenizer they were trained with.

    The methods are pure functions of the parameters given, and work under `jax.jit`, `jax.grad` and `jaxpeft.adapt`.
    Their inputs are, by name, those of a text (`tokens` (B, S) int; `mask` (B, S), 0 at padding; optionally
    `token_types` (B, S) int) or of an image (`images` (B, height, width, channels) float, normalised by
    `EncoderConfig.image_mean` and `image_std`).

    Attributes:
      config: architecture and numerics; `with_config` changes the latter.
      params: nested dict of arrays, for instance ``params["layers"]["attention"]["query"]["kernel"]`` (L, in, out).
      tokenizer: a `transformers` tokenizer, or None.
      source: where the parameters come from.
      hf_config: what the folder it was loaded from says in ``config.json``.
    """

    config: EncoderConfig
    params: dict[str, Any] = dataclasses.field(repr=False)
    tokenizer: Any = dataclasses.field(default=None, repr=False)
    source: str = ""
    hf_config: dict[str, Any] = dataclasses.field(default_factory=dict, repr=False)

    def with_config(self, **changes: Any) -> EncoderModel:
        """The same encoder with other numerics or pooling, for instance ``model.with_config(remat="full")``."""
        return dataclasses.replace(self, config=dataclasses.replace(self.config, **changes))

    def with_head(self, outputs: int) -> EncoderModel:
        """The same encoder with a linear head, ``classifier/kernel`` (hidden_size, outputs) and ``classifier/bias``.

        The head is zero, so it is the same whoever makes it, and its base's checksum too. To train it beside an
        adapter, adapt it whole: ``mixed.Spec(default=…, overrides={"classifier/.*": full.Spec()})``.

        >>> config = EncoderConfig(family="vit", hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        ...                        num_attention_heads=4, image_size=16, patch_size=8)
        >>> model = random(config, jax.random.key(0)).with_head(10)
        >>> model.predict(model.params, images=jnp.zeros((3, 16, 16, 3))).shape
        (3, 10)
        """
        like = self.params["layers"]["attention_norm"]["scale"]
        placed = getattr(like, "sharding", None)
        if isinstance(placed, NamedSharding):
            placed = NamedSharding(placed.mesh, PartitionSpec())

        def zeros(*shape: int) -> Any:
            if isinstance(like, jax.ShapeDtypeStruct):
                return jax.ShapeDtypeStruct(shape, like.dtype, sharding=placed)
            return jnp.zeros(shape, like.dtype, device=placed)

        head = {"kernel": zeros(self.config.hidden_size, outputs), "bias": zeros(outputs)}
        return dataclasses.replace(self, params={**self.params, HEAD: head})

    @property
    def num_params(self) -> int:
        """Number of parameters, of a head too if there is one."""
        head = jax.tree.leaves(self.params.get(HEAD, {}))
        return sum(math.prod(leaf.shape) for leaf in [*jax.tree.leaves(abstract(self.config)), *head])

    def torch_name(self, path: str) -> str | None:
        """The torch module of an array, ``{}`` for its layer: `names` of `jaxpeft.to_peft` and `from_peft`.

        >>> config = EncoderConfig(family="bert", hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        ...                        num_attention_heads=1)
        >>> random(config, jax.random.key(0)).torch_name("layers/mlp/up/kernel")
        'encoder.layer.{}.intermediate.dense'
        """
        return None if path.startswith(HEAD) else encoder_name(path, self.config).rpartition(".")[0]

    def hidden(self, params: Any, **inputs: jax.Array) -> jax.Array:
        """One vector a token or patch, (B, S, hidden_size) of `EncoderConfig.dtype`; an image's first is its own."""
        encoder = nnx.merge(_skeleton(self.config)[0], {name: tree for name, tree in params.items() if name != HEAD})
        return (encoder.images if self.config.is_vision else encoder.text)(**inputs)

    def features(self, params: Any, **inputs: jax.Array) -> jax.Array:
        """One vector an input, (B, hidden_size) float32, as `EncoderConfig.pooling` says."""
        hidden = self.hidden(params, **inputs).astype(jnp.float32)
        if self.config.pooling == "cls":
            return hidden[:, 0]
        if self.config.is_vision:
            return jnp.mean(hidden[:, 1:], axis=1)
        mask = (inputs["mask"] > 0).astype(jnp.float32)
        # A row of padding alone fills up a batch.
        return jnp.einsum("bsd,bs->bd", hidden, mask) / jnp.maximum(jnp.sum(mask, axis=1), 1.0)[:, None]

    def predict(self, params: Any, **inputs: jax.Array) -> jax.Array:
        """What the head makes of `features`, (B, outputs) float32: logits of classes, or values."""
        if HEAD not in params:
            raise ValueError(f"these parameters have no head ({HEAD}); make one with `with_head`")
        head = {name: params[HEAD][name].astype(jnp.float32) for name in ("kernel", "bias")}
        return self.features(params, **inputs) @ head["kernel"] + head["bias"]

    def class_losses(self, params: Any, *, targets: jax.Array, **inputs: jax.Array) -> jax.Array:
        """Cross-entropy of every input, (B,) float32, in nats; `targets` (B,) int are the classes' numbers."""
        logits = jax.nn.log_softmax(self.predict(params, **inputs))
        return -jnp.take_along_axis(logits, targets[:, None], axis=1)[:, 0]

    def squared_errors(self, params: Any, *, targets: jax.Array, **inputs: jax.Array) -> jax.Array:
        """Squared error of every input, (B,) float32; `targets` (B,) float."""
        return jnp.square(self.predict(params, **inputs)[:, 0] - targets)
