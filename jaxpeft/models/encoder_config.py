"""What is the shape of an encoder of text or images, and in which numbers is it computed?"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from jaxpeft.models.config import REMAT_POLICIES

ACTIVATIONS = ("gelu", "gelu_new", "gelu_pytorch_tanh", "relu")
POOLINGS = ("mean", "cls")

TEXT_FAMILIES = ("bert", "roberta", "distilbert")
VISION_FAMILIES = ("dinov2", "vit")
ENCODER_FAMILIES = TEXT_FAMILIES + VISION_FAMILIES
"""The values of `model_type` whose mathematics `Encoder` computes."""

_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """Architecture and numerics of an `Encoder`; the architecture's names are those of a Hugging Face ``config.json``.

    Attributes:
      family: one of `ENCODER_FAMILIES`. BERT's normalise after each residual sum and read tokens, ViT's normalise
        before each block and read patches.
      vocab_size, max_position_embeddings, type_vocab_size, position_offset: of text: tokens, positions, kinds of
        segments (0: none), and the number of the first position (2 in RoBERTa).
      image_size, patch_size, num_channels: of images: the resolution of the position grid, and of one patch.
      image_mean, image_std: what pixels in [0, 1] are normalised by, channel by channel.
      layer_scale: whether each block's output is scaled feature by feature before the sum (DINOv2).
      pooling: what stands for the whole input: the ``mean`` over its tokens, or the first one (``cls``). Padding, and
        the first token of an image, are not part of the mean.
      dtype: of the activations and matrix products. Norms, softmax and the head are float32 in any case.
      param_dtype: of the parameters; they are cast to `dtype` layer by layer.
      remat: what the backward pass recomputes, as in `Config`.

    Raises:
      ValueError: a value that no model can have, with the valid ones.

    >>> EncoderConfig(family="bert", vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
    ...               num_attention_heads=4, max_position_embeddings=16).positions
    16
    """

    family: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-12
    attention_bias: bool = True
    vocab_size: int = 0
    max_position_embeddings: int = 0
    type_vocab_size: int = 0
    position_offset: int = 0
    image_size: int = 0
    patch_size: int = 0
    num_channels: int = 3
    image_mean: tuple[float, ...] = _IMAGENET[0]
    image_std: tuple[float, ...] = _IMAGENET[1]
    layer_scale: bool = False
    pooling: Literal["mean", "cls"] = "mean"
    dtype: str = "float32"
    param_dtype: str = "float32"
    remat: str = "none"

    def __post_init__(self):
        for field, known in {
            "family": ENCODER_FAMILIES,
            "hidden_act": ACTIVATIONS,
            "pooling": POOLINGS,
            "remat": REMAT_POLICIES,
        }.items():
            if getattr(self, field) not in known:
                raise ValueError(f"{field}={getattr(self, field)!r}: expected one of {', '.join(known)}")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} is no multiple of num_attention_heads={self.num_attention_heads}"
            )
        if self.is_vision and (self.patch_size < 1 or self.image_size % self.patch_size):
            raise ValueError(f"image_size={self.image_size} is no multiple of patch_size={self.patch_size}")

    @property
    def is_vision(self) -> bool:
        """Whether it reads images."""
        return self.family in VISION_FAMILIES

    @property
    def positions(self) -> int:
        """Most tokens of one input; of an image's positions there are as many as patches, and one."""
        if self.is_vision:
            return (self.image_size // self.patch_size) ** 2 + 1
        return self.max_position_embeddings - self.position_offset

    @classmethod
    def from_hf(cls, config: Any, **numerics: Any) -> EncoderConfig:
        """Reads a `transformers` configuration.

        Args:
          config: a ``BertConfig``, ``RobertaConfig``, ``DistilBertConfig``, ``ViTConfig`` or ``Dinov2Config``.
          **numerics: `dtype`, `param_dtype`, `remat`.

        Raises:
          ValueError: an architecture or a feature that `Encoder` does not compute; ignoring it would load and be wrong.
        """
        family = config.model_type
        if family not in ENCODER_FAMILIES:
            raise ValueError(f"model_type {family!r} is not supported; supported: {', '.join(ENCODER_FAMILIES)}")
        read = _vision_fields if family in VISION_FAMILIES else _text_fields
        return cls(
            family=family,
            hidden_size=config.hidden_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            **read(config),
            **numerics,
        )


def _text_fields(config: Any) -> dict[str, Any]:
    family = config.model_type
    kind = getattr(config, "position_embedding_type", None) or "absolute"
    if kind != "absolute":
        raise ValueError(f"{family}: position_embedding_type {kind!r} is not supported; supported: 'absolute'")
    if getattr(config, "is_decoder", False):
        raise ValueError(f"{family}: is_decoder is not supported: this encoder attends in both directions")
    distil = family == "distilbert"
    return {
        "vocab_size": config.vocab_size,
        "intermediate_size": config.hidden_dim if distil else config.intermediate_size,
        "hidden_act": config.activation if distil else config.hidden_act,
        "layer_norm_eps": 1e-12 if distil else config.layer_norm_eps,
        "max_position_embeddings": config.max_position_embeddings,
        "type_vocab_size": 0 if distil else config.type_vocab_size,
        # RoBERTa counts positions from the number after its padding token's.
        "position_offset": config.pad_token_id + 1 if family == "roberta" else 0,
        "pooling": "mean",
    }


def _vision_fields(config: Any) -> dict[str, Any]:
    family = config.model_type
    if getattr(config, "use_swiglu_ffn", False):
        raise ValueError(f"{family}: use_swiglu_ffn is not supported; the giant models alone have it")
    dino = family == "dinov2"
    mean, std = _IMAGENET if dino else _HALF
    return {
        "intermediate_size": int(config.hidden_size * config.mlp_ratio) if dino else config.intermediate_size,
        "hidden_act": config.hidden_act,
        "layer_norm_eps": config.layer_norm_eps,
        "attention_bias": config.qkv_bias,
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "num_channels": config.num_channels,
        "image_mean": mean,
        "image_std": std,
        "layer_scale": dino,
        "pooling": "cls",
    }
