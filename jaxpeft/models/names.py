"""What are a model's parameters called in Hugging Face's files?"""

from __future__ import annotations

import re

from jaxpeft.models.config import Config
from jaxpeft.models.encoder_config import EncoderConfig


def hf_name(path: str) -> str:
    """Name of a decoder's parameter in a Hugging Face file; ``{}`` stands for the layer's number.

    >>> hf_name("layers/self_attn/q_proj/kernel"), hf_name("embed/embedding")
    ('model.layers.{}.self_attn.q_proj.weight', 'model.embed_tokens.weight')
    """
    module, leaf = path.rsplit("/", 1)
    module = module.replace("input_norm", "input_layernorm").replace("attention_norm", "attention_layernorm")
    module = {"embed": "model.embed_tokens", "norm": "model.norm"}.get(module, module)
    module = module.replace("layers/", "model.layers.{}.").replace("/", ".")
    return f"{module}.{'bias' if leaf == 'bias' else 'weight'}"


_BERT = {
    "embed/tokens": "embeddings.word_embeddings",
    "embed/positions": "embeddings.position_embeddings",
    "embed/types": "embeddings.token_type_embeddings",
    "embed/norm": "embeddings.LayerNorm",
    "layers/attention/query": "encoder.layer.{}.attention.self.query",
    "layers/attention/key": "encoder.layer.{}.attention.self.key",
    "layers/attention/value": "encoder.layer.{}.attention.self.value",
    "layers/attention/out": "encoder.layer.{}.attention.output.dense",
    "layers/attention_norm": "encoder.layer.{}.attention.output.LayerNorm",
    "layers/mlp/up": "encoder.layer.{}.intermediate.dense",
    "layers/mlp/down": "encoder.layer.{}.output.dense",
    "layers/mlp_norm": "encoder.layer.{}.output.LayerNorm",
}
_DISTILBERT = {
    **{name: hf for name, hf in _BERT.items() if name.startswith("embed/")},
    "layers/attention/query": "transformer.layer.{}.attention.q_lin",
    "layers/attention/key": "transformer.layer.{}.attention.k_lin",
    "layers/attention/value": "transformer.layer.{}.attention.v_lin",
    "layers/attention/out": "transformer.layer.{}.attention.out_lin",
    "layers/attention_norm": "transformer.layer.{}.sa_layer_norm",
    "layers/mlp/up": "transformer.layer.{}.ffn.lin1",
    "layers/mlp/down": "transformer.layer.{}.ffn.lin2",
    "layers/mlp_norm": "transformer.layer.{}.output_layer_norm",
}
_VIT = {
    "embed/patches": "embeddings.patch_embeddings.projection",
    "layers/attention/query": "encoder.layer.{}.attention.attention.query",
    "layers/attention/key": "encoder.layer.{}.attention.attention.key",
    "layers/attention/value": "encoder.layer.{}.attention.attention.value",
    "layers/attention/out": "encoder.layer.{}.attention.output.dense",
    "layers/attention_norm": "encoder.layer.{}.layernorm_before",
    "layers/mlp/up": "encoder.layer.{}.intermediate.dense",
    "layers/mlp/down": "encoder.layer.{}.output.dense",
    "layers/mlp_norm": "encoder.layer.{}.layernorm_after",
    "norm": "layernorm",
}
_DINOV2 = {
    **_VIT,
    "layers/attention_norm": "encoder.layer.{}.norm1",
    "layers/attention_scale": "encoder.layer.{}.layer_scale1",
    "layers/mlp/up": "encoder.layer.{}.mlp.fc1",
    "layers/mlp/down": "encoder.layer.{}.mlp.fc2",
    "layers/mlp_norm": "encoder.layer.{}.norm2",
    "layers/mlp_scale": "encoder.layer.{}.layer_scale2",
}
_MODULES = {"bert": _BERT, "roberta": _BERT, "distilbert": _DISTILBERT, "vit": _VIT, "dinov2": _DINOV2}
_ARRAYS = {"embed/cls": "embeddings.cls_token", "embed/positions": "embeddings.position_embeddings"}

# Written by older versions of transformers and computed from the configuration here; an encoder's file may also hold
# heads of pretraining or of another task, and a pooler that feeds them.
_LEFT_OUT = {
    "decoder": r"rotary_emb\.inv_freq$|masked_bias$|attn\.bias$",
    "encoder": r"^(pooler|cls|lm_head|classifier|pre_classifier|qa_outputs|vocab_\w+)\.|position_ids$|mask_token$",
}


def encoder_name(path: str, config: EncoderConfig) -> str:
    """Name of an encoder's parameter in a Hugging Face file, without the prefix of models that have a head.

    >>> config = EncoderConfig(family="bert", hidden_size=8, intermediate_size=8, num_hidden_layers=1,
    ...                        num_attention_heads=1)
    >>> encoder_name("layers/mlp/up/kernel", config)
    'encoder.layer.{}.intermediate.dense.weight'
    """
    if config.is_vision and path in _ARRAYS:
        return _ARRAYS[path]
    module, leaf = path.rsplit("/", 1)
    if module.endswith("_scale"):
        return f"{_MODULES[config.family][module]}.lambda1"
    return f"{_MODULES[config.family][module]}.{'bias' if leaf == 'bias' else 'weight'}"


def file_name(path: str, config: Config | EncoderConfig) -> str:
    """Name of a parameter of any model."""
    return hf_name(path) if isinstance(config, Config) else encoder_name(path, config)


def known_name(name: str, config: Config | EncoderConfig) -> str:
    """A name as found in a file, in its canonical form: without an encoder's prefix, norms' leaves by today's names.

    >>> config = EncoderConfig(family="bert", hidden_size=8, intermediate_size=8, num_hidden_layers=1,
    ...                        num_attention_heads=1)
    >>> known_name("bert.embeddings.LayerNorm.gamma", config)
    'embeddings.LayerNorm.weight'
    """
    if isinstance(config, Config):
        return name
    name = name.removeprefix(f"{config.family}.")
    return re.sub(r"(LayerNorm)\.gamma$", r"\1.weight", re.sub(r"(LayerNorm)\.beta$", r"\1.bias", name))


def left_out(name: str, config: Config | EncoderConfig) -> bool:
    """Whether a tensor of a file, by its canonical name, is none of the model's parameters and rightly so."""
    if isinstance(config, Config):
        tied_copy = config.tie_word_embeddings and name == "lm_head.weight"
        return tied_copy or re.search(_LEFT_OUT["decoder"], name) is not None
    return re.search(_LEFT_OUT["encoder"], name) is not None


def is_kernel(path: str) -> bool:
    """Whether a parameter's axes stand in reverse order in a file: (in, out) here, (out, in) there."""
    return path.endswith("/kernel")
