"""A byte-level tokenizer and a random Llama of some ten thousand parameters, as Hugging Face writes them."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from train.template import CHATML

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def tokenizer(template: str | None = CHATML) -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *alphabet])}
    # One merge across the border of a prompt and an answer: newline + r. It makes a prefix that is not a token prefix.
    vocabulary["Ċr"] = len(vocabulary)
    backend = Tokenizer(models.BPE(vocabulary, [("Ċ", "r")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|im_start|>", eos_token="<|im_end|>", unk_token="<|endoftext|>"
    )
    made.chat_template = template
    return made


def save_model(folder: Path, seed: int = 0, layers: int = 2, width: int = 32) -> Path:
    """Writes config.json, model.safetensors and the tokenizer's files."""
    folder.mkdir(parents=True)
    tokens = tokenizer()
    tokens.save_pretrained(folder)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(tokens),
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": width // 4,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "hidden_act": "silu",
        "torch_dtype": "float32",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    (folder / "config.json").write_text(json.dumps(config))
    random = np.random.default_rng(seed)

    def weight(*shape: int) -> np.ndarray:
        return (random.normal(size=shape) / np.sqrt(shape[-1])).astype(np.float32)

    tensors = {"model.embed_tokens.weight": weight(len(tokens), width), "model.norm.weight": np.ones(width, np.float32)}
    for i in range(layers):
        name = f"model.layers.{i}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{name}{norm}.weight"] = np.ones(width, np.float32)
        for linear, shape in {
            "self_attn.q_proj": (width, width),
            "self_attn.k_proj": (width // 2, width),
            "self_attn.v_proj": (width // 2, width),
            "self_attn.o_proj": (width, width),
            "mlp.gate_proj": (2 * width, width),
            "mlp.up_proj": (2 * width, width),
            "mlp.down_proj": (width, 2 * width),
        }.items():
            tensors[f"{name}{linear}.weight"] = weight(*shape)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
