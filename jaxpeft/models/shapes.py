"""What shapes do a model's parameters have, and where would they lie? From its configuration alone."""

from __future__ import annotations

from typing import Any

from jax.sharding import Mesh

from jaxpeft import sharding
from jaxpeft.models import encoder_model, language_model
from jaxpeft.models.config import Config
from jaxpeft.models.encoder_config import EncoderConfig
from jaxpeft.models.encoder_model import ENCODER_RULES, EncoderModel
from jaxpeft.models.language_model import DEFAULT_RULES, LanguageModel
from jaxpeft.sharding import Rules


def abstract(config: Config | EncoderConfig) -> dict[str, Any]:
    """The parameter tree as `jax.ShapeDtypeStruct`, without memory.

    >>> from jaxpeft.models import Config
    >>> seven_billion = Config(vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
    ...                        num_attention_heads=32)
    >>> abstract(seven_billion)["layers"]["mlp"]["down_proj"]["kernel"].shape
    (32, 11008, 4096)
    """
    return language_model.abstract(config) if isinstance(config, Config) else encoder_model.abstract(config)


def placed(config: Config | EncoderConfig, mesh: Mesh, rules: Rules | None = None) -> Any:
    """Where the parameters lie on a mesh, a tree of `jax.sharding.NamedSharding`; arguments as in `load`."""
    default = DEFAULT_RULES if isinstance(config, Config) else ENCODER_RULES
    return sharding.from_rules(abstract(config), mesh, default if rules is None else rules, strict=rules is not None)


def shapes(
    config: Config | EncoderConfig, *, mesh: Mesh | None = None, rules: Rules | None = None, source: str = ""
) -> LanguageModel | EncoderModel:
    """A model of `jax.ShapeDtypeStruct`s, without memory: for counts and for compiling ahead of time.

    Args:
      config: architecture and numerics.
      mesh: where the parameters would lie, as in `jaxpeft.models.load`; nowhere by default.
      rules: as in `jaxpeft.models.load`.
      source: what to call it.

    >>> from jaxpeft.models import ARCHITECTURES
    >>> shapes(ARCHITECTURES["meta-llama/Llama-2-7b-hf"]).num_params
    6738415616
    >>> shapes(ARCHITECTURES["minilm-l6-v2"]).num_params
    22565376
    """
    params = abstract(config)
    if mesh is not None:
        params = sharding.shapes(params, placed(config, mesh, rules))
    if isinstance(config, Config):
        return LanguageModel(config, params, source=source)
    return EncoderModel(config, params, source=source)
