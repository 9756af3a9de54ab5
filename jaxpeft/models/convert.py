"""How does a GGUF file become a Hugging Face folder?"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from jaxpeft.models import gguf

_TENSORS = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_CONTROL_TOKEN = 3


def gguf_to_hf(source: str | os.PathLike, folder: str | os.PathLike) -> None:
    """Writes ``config.json``, ``model.safetensors`` (float32) and the tokenizer of a Llama model into `folder`.

    Quantized weights are expanded to the values they stand for; that does not bring back the weights before
    quantization.

    Args:
      source: a GGUF file of architecture ``llama`` with a ``smollm`` byte-level BPE tokenizer.
      folder: an existing folder.

    Raises:
      ValueError: another architecture, tokenizer or unknown tensor.
    """
    from safetensors.numpy import save_file

    file = gguf.read(source)
    config = _config(file)
    weights = {}
    for name, tensor in file.tensors.items():
        weight = tensor.dequantize()
        if ".attn_q." in name:
            weight = unpermute(weight, config["num_attention_heads"])
        elif ".attn_k." in name:
            weight = unpermute(weight, config["num_key_value_heads"])
        # save_file writes the buffer as it lies, so it must lie in order.
        weights[hf_tensor_name(name)] = np.ascontiguousarray(weight)
    folder = Path(folder)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    _write_tokenizer(file.metadata, folder)


def _config(file: gguf.File) -> dict[str, Any]:
    metadata = file.metadata
    architecture = metadata.get("general.architecture")
    if architecture != "llama":
        raise ValueError(f"GGUF architecture {architecture!r} is not supported; supported: llama")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(metadata["tokenizer.ggml.tokens"]),
        "hidden_size": metadata["llama.embedding_length"],
        "intermediate_size": metadata["llama.feed_forward_length"],
        "num_hidden_layers": metadata["llama.block_count"],
        "num_attention_heads": metadata["llama.attention.head_count"],
        "num_key_value_heads": metadata["llama.attention.head_count_kv"],
        "max_position_embeddings": metadata["llama.context_length"],
        # Stored as float32; 1e-5 there reads as 9.99999974e-06.
        "rms_norm_eps": float(f"{metadata['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        "rope_theta": metadata["llama.rope.freq_base"],
        "hidden_act": "silu",
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "bos_token_id": metadata["tokenizer.ggml.bos_token_id"],
        "eos_token_id": metadata["tokenizer.ggml.eos_token_id"],
        "pad_token_id": metadata["tokenizer.ggml.padding_token_id"],
        "dtype": "float32",
    }


def hf_tensor_name(name: str) -> str:
    """Hugging Face's name of a tensor.

    >>> hf_tensor_name("blk.3.attn_q.weight")
    'model.layers.3.self_attn.q_proj.weight'
    """
    *block, module, leaf = name.split(".")
    if module not in _TENSORS:
        raise ValueError(f"GGUF tensor {name!r} is not known; known modules: {', '.join(_TENSORS)}")
    layer = f"model.layers.{block[1]}." if block else ""
    return f"{layer}{_TENSORS[module]}.{leaf}"


def unpermute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a query or key projection (out, …) in Hugging Face's order."""
    # llama.cpp rotates neighbouring features of a head, Hugging Face the i-th with the (i + H / 2)-th: the rows of the
    # query and key projections are stored in the former's order.
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _write_tokenizer(metadata: dict[str, Any], folder: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    found = (metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre"))
    if found != ("gpt2", "smollm"):
        raise ValueError(f"GGUF tokenizer {found} is not supported; supported: ('gpt2', 'smollm')")
    tokens, kinds = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == _CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": metadata["llama.context_length"],
        "clean_up_tokenization_spaces": False,
        "chat_template": metadata.get("tokenizer.chat_template"),
    }
    for role, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown")):
        if (token := metadata.get(f"tokenizer.ggml.{key}_token_id")) is not None:
            settings[f"{role}_token"] = tokens[token]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
