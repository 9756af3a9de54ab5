"""What is the shape of a decoder, and in which numbers is it computed?"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

REMAT_POLICIES = ("none", "dots", "full")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Stretching of the rotary frequencies for contexts longer than the pretraining one.

    Attributes:
      kind: ``"linear"`` divides every frequency by `factor` (position interpolation); ``"llama3"`` divides only those
        whose wavelength exceeds ``original_max_position_embeddings / low_freq_factor``, leaves those below
        ``original_max_position_embeddings / high_freq_factor`` alone and interpolates between.
      factor: the stretch.
      low_freq_factor, high_freq_factor, original_max_position_embeddings: used by ``"llama3"`` only.
    """

    kind: Literal["linear", "llama3"]
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Architecture and numerics of a `Decoder`; the architecture's names are those of a Hugging Face ``config.json``.

    Attributes:
      num_key_value_heads: heads of keys and values, each shared by a group of query heads. Default: no sharing.
      head_dim: width of a head. Default: ``hidden_size // num_attention_heads``.
      sliding_window: a token attends to itself and the ``sliding_window - 1`` tokens before it. Default: to all before.
      attention_bias, attention_out_bias, mlp_bias: biases of the q, k, v projections, of o, and of the MLP.
      qk_norm: RMS norm of every query and key head before the rotation (Qwen3).
      dtype: of the activations and matrix products. Norms, softmax and logits are float32 in any case.
      param_dtype: of the parameters; they are cast to `dtype` layer by layer.
      remat: what the backward pass recomputes: ``"none"`` of a layer, all of it but its matrix products (``"dots"``),
        or all of it (``"full"``).

    Raises:
      ValueError: a value that no model can have, with the valid ones.

    >>> Config(vocab_size=64, hidden_size=32, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4).head_dim
    8
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int = 0
    head_dim: int = 0
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    sliding_window: int | None = None
    attention_bias: bool = False
    attention_out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tie_word_embeddings: bool = False
    dtype: str = "float32"
    param_dtype: str = "float32"
    remat: str = "none"

    def __post_init__(self):
        heads = self.num_attention_heads
        object.__setattr__(self, "num_key_value_heads", self.num_key_value_heads or heads)
        object.__setattr__(self, "head_dim", self.head_dim or self.hidden_size // heads)
        if heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads={heads} is no multiple of num_key_value_heads={self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even: the rotation acts on pairs")
        if self.remat not in REMAT_POLICIES:
            raise ValueError(f"remat={self.remat!r}: expected one of {', '.join(REMAT_POLICIES)}")

    @classmethod
    def from_hf(cls, config: Any, **numerics: str) -> Config:
        """Reads a `transformers` configuration.

        Args:
          config: a ``LlamaConfig``, ``MistralConfig``, ``Qwen2Config`` or ``Qwen3Config``.
          **numerics: `dtype`, `param_dtype`, `remat`.

        Raises:
          ValueError: an architecture or a feature that `Decoder` does not compute; ignoring it would load and be wrong.
        """
        family = config.model_type
        if family not in FAMILIES:
            raise ValueError(f"model_type {family!r} is not supported; supported: {', '.join(FAMILIES)}")
        if config.hidden_act != "silu":
            raise ValueError(f"{family}: hidden_act {config.hidden_act!r} is not supported; supported: 'silu'")
        declared_bias = bool(getattr(config, "attention_bias", False))
        return cls(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            head_dim=getattr(config, "head_dim", None) or 0,
            max_position_embeddings=config.max_position_embeddings,
            rms_norm_eps=config.rms_norm_eps,
            rope_theta=float(config.rope_parameters["rope_theta"]),
            rope_scaling=_rope_scaling(config),
            sliding_window=_sliding_window(config),
            # Qwen2 has biases on q, k and v and never on o, without a field that says so.
            attention_bias=declared_bias or family == "qwen2",
            attention_out_bias=declared_bias,
            mlp_bias=bool(getattr(config, "mlp_bias", False)),
            qk_norm=family == "qwen3",
            tie_word_embeddings=config.tie_word_embeddings,
            **numerics,
        )

    def to_hf(self) -> Any:
        """The `transformers` configuration that `from_hf` reads as this one.

        Raises:
          ValueError: no architecture there has this combination of features.

        >>> config = Config(vocab_size=64, hidden_size=32, intermediate_size=96, num_hidden_layers=2,
        ...                 num_attention_heads=4, qk_norm=True)
        >>> config.to_hf().model_type, Config.from_hf(config.to_hf()) == config
        ('qwen3', True)
        """
        from transformers import CONFIG_MAPPING

        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        for name in ("dtype", "param_dtype", "remat", "qk_norm", "attention_out_bias", "rope_theta", "rope_scaling"):
            fields.pop(name)
        fields["rope_parameters"] = _rope_parameters(self)
        fields["use_sliding_window"], fields["max_window_layers"] = self.sliding_window is not None, 0
        numerics = {"dtype": self.dtype, "param_dtype": self.param_dtype, "remat": self.remat}
        for family, own in FAMILIES.items():
            foreign = _PARTICULAR.difference(own)
            made = CONFIG_MAPPING[family](**{name: value for name, value in fields.items() if name not in foreign})
            if Config.from_hf(made, **numerics) == self:
                return made
        raise ValueError(f"none of {', '.join(FAMILIES)} has the features of {self}")


# The values of `model_type` whose mathematics `Decoder` computes, and the fields that not all of them have.
FAMILIES = {
    "llama": ("attention_bias", "mlp_bias"),
    "mistral": ("sliding_window",),
    "qwen2": ("sliding_window", "use_sliding_window", "max_window_layers"),
    "qwen3": ("attention_bias", "sliding_window", "use_sliding_window", "max_window_layers"),
}
_PARTICULAR = frozenset(field for fields in FAMILIES.values() for field in fields)


def _rope_parameters(config: Config) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_theta": config.rope_theta, "rope_type": "default"}
    scaling = config.rope_scaling
    if scaling is None:
        return rope
    fields = dataclasses.asdict(scaling)
    kind = fields.pop("kind")
    return rope | {"rope_type": kind} | (fields if kind == "llama3" else {"factor": scaling.factor})


def _rope_scaling(config) -> RopeScaling | None:
    rope = config.rope_parameters
    kind = rope.get("rope_type", "default")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"{config.model_type}: partial_rotary_factor {rope['partial_rotary_factor']} is not supported")
    if kind == "default":
        return None
    if kind == "linear":
        return RopeScaling(kind="linear", factor=rope["factor"])
    if kind == "llama3":
        return RopeScaling(
            kind="llama3",
            factor=rope["factor"],
            low_freq_factor=rope["low_freq_factor"],
            high_freq_factor=rope["high_freq_factor"],
            original_max_position_embeddings=rope["original_max_position_embeddings"],
        )
    raise ValueError(f"{config.model_type}: rope_type {kind!r} is not supported; supported: default, linear, llama3")


def _sliding_window(config) -> int | None:
    window = getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or ["sliding_attention"])
    if window is None or kinds == {"full_attention"}:
        return None
    if kinds != {"sliding_attention"}:
        # One scan runs all layers, so they share one mask.
        raise ValueError(f"{config.model_type}: layers of differing attention are not supported: {sorted(kinds)}")
    return window
