import struct

import ml_dtypes
import numpy as np
import pytest

from jaxpeft.models import gguf
from jaxpeft.models.convert import gguf_to_hf

# Metadata types of the format, as the tests need them.
UINT32, FLOAT32, BOOL, STRING, ARRAY = 4, 6, 7, 8, 9


def text(value):
    raw = value.encode()
    return struct.pack("<Q", len(raw)) + raw


def entry(key, value):
    def encode(value):
        if isinstance(value, bool):
            return BOOL, struct.pack("<?", value)
        if isinstance(value, int):
            return UINT32, struct.pack("<I", value)
        if isinstance(value, float):
            return FLOAT32, struct.pack("<f", value)
        if isinstance(value, str):
            return STRING, text(value)
        kinds, items = zip(*map(encode, value), strict=True)
        return ARRAY, struct.pack("<IQ", kinds[0], len(items)) + b"".join(items)

    kind, raw = encode(value)
    return text(key) + struct.pack("<I", kind) + raw


def write(path, metadata, tensors, *, version=3):
    """A GGUF file; `tensors` is {name: (shape, type number, bytes)}."""
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(metadata))
    head += b"".join(entry(key, value) for key, value in metadata.items())
    data = b""
    for name, (shape, number, raw) in tensors.items():
        head += text(name) + struct.pack("<I", len(shape)) + struct.pack(f"<{len(shape)}Q", *shape[::-1])
        head += struct.pack("<IQ", number, len(data))
        data += raw + bytes(-len(raw) % 32)
    path.write_bytes(head + bytes(-len(head) % 32) + data)


def f32(array):
    return array.shape, 0, array.astype("<f4").tobytes()


def blocks_of(number, rng, count):
    """Random blocks and, weight by weight from the format's description, what they stand for."""
    raw, expected = b"", []
    for _ in range(count):
        scale, least = rng.normal(size=2).astype(np.float16)
        d, m = float(np.float32(scale)), float(np.float32(least))
        codes = [int(code) for code in rng.integers(0, {2: 16, 3: 16, 6: 32, 7: 32, 8: 256}[number], 32)]
        low = bytes((codes[i] & 15) | (codes[i + 16] & 15) << 4 for i in range(16))
        high = sum((code >> 4) << i for i, code in enumerate(codes)) if number in (6, 7) else 0
        if number == 2:
            raw += scale.tobytes() + low
            expected += [d * (code - 8) for code in codes]
        elif number == 3:
            raw += scale.tobytes() + least.tobytes() + low
            expected += [d * code + m for code in codes]
        elif number == 6:
            raw += scale.tobytes() + struct.pack("<I", high) + low
            expected += [d * (code - 16) for code in codes]
        elif number == 7:
            raw += scale.tobytes() + least.tobytes() + struct.pack("<I", high) + low
            expected += [d * code + m for code in codes]
        else:
            raw += scale.tobytes() + bytes(codes)
            expected += [d * (code - 256 if code > 127 else code) for code in codes]
    return raw, np.array(expected)


@pytest.mark.parametrize("number", [2, 3, 6, 7, 8], ids=lambda number: gguf.BLOCK_TYPES[number].name)
def test_quantized_blocks(tmp_path, number):
    raw, expected = blocks_of(number, np.random.default_rng(number), 6)
    write(tmp_path / "w.gguf", {}, {"first": f32(np.ones(3)), "w": ((3, 64), number, raw)})
    found = gguf.read(tmp_path / "w.gguf").tensors["w"].dequantize()
    assert (found.shape, found.dtype) == ((3, 64), np.float32)
    np.testing.assert_allclose(found.ravel(), expected, rtol=1e-6, atol=1e-6)


def test_plain_floats(tmp_path):
    values = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)
    tensors = {
        "f32": f32(values),
        "f16": (values.shape, 1, values.astype("<f2").tobytes()),
        "bf16": (values.shape, 30, values.astype(ml_dtypes.bfloat16).tobytes()),
    }
    write(tmp_path / "w.gguf", {}, tensors)
    found = gguf.read(tmp_path / "w.gguf").tensors
    np.testing.assert_array_equal(found["f32"].dequantize(), values)
    np.testing.assert_array_equal(found["f16"].dequantize(), values.astype(np.float16))
    np.testing.assert_array_equal(found["bf16"].dequantize(), values.astype(ml_dtypes.bfloat16))


def test_metadata(tmp_path):
    metadata = {"name": "Übung", "count": 7, "rate": 0.5, "flag": True, "words": ["a", "bc"], "grid": [[1, 2], [3]]}
    write(tmp_path / "w.gguf", metadata, {})
    assert gguf.read(tmp_path / "w.gguf").metadata == metadata


def test_damaged_files(tmp_path):
    path = tmp_path / "w.gguf"
    write(path, {"name": "x"}, {"w": f32(np.ones((4, 8)))})
    whole = path.read_bytes()
    path.write_bytes(b"PK" + whole)
    with pytest.raises(ValueError, match="not a GGUF file"):
        gguf.read(path)
    path.write_bytes(whole[:40])
    with pytest.raises(ValueError, match="truncated in its header at 40 bytes"):
        gguf.read(path)
    path.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match="truncated: w ends at byte"):
        gguf.read(path)
    write(path, {}, {}, version=9)
    with pytest.raises(ValueError, match="version 9 is not supported"):
        gguf.read(path)
    write(path, {}, {"w": ((256,), 12, bytes(144))})
    with pytest.raises(ValueError, match="w has ggml type 12, which is not supported; supported: F32, F16, Q4_0"):
        gguf.read(path)


def tiny_llama():
    """Metadata and tensors of a Llama of one layer over a byte alphabet, as llama.cpp's converter writes them."""
    from tokenizers import pre_tokenizers

    alphabet = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "he"]
    metadata = {
        "general.architecture": "llama",
        "llama.block_count": 1,
        "llama.context_length": 128,
        "llama.embedding_length": 8,
        "llama.feed_forward_length": 16,
        "llama.attention.head_count": 2,
        "llama.attention.head_count_kv": 1,
        "llama.rope.freq_base": 10000.0,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": alphabet,
        "tokenizer.ggml.token_type": [3, 3, 3] + [1] * 257,
        "tokenizer.ggml.merges": ["h e"],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.chat_template": "{% for m in messages %}{{ m['content'] }}{% endfor %}",
    }
    shapes = {
        "token_embd": (260, 8),
        "output_norm": (8,),
        "blk.0.attn_norm": (8,),
        "blk.0.attn_q": (8, 8),
        "blk.0.attn_k": (4, 8),
        "blk.0.attn_v": (4, 8),
        "blk.0.attn_output": (8, 8),
        "blk.0.ffn_norm": (8,),
        "blk.0.ffn_gate": (16, 8),
        "blk.0.ffn_up": (16, 8),
        "blk.0.ffn_down": (8, 16),
    }
    rng = np.random.default_rng(0)
    return metadata, {f"{name}.weight": f32(rng.normal(size=shape)) for name, shape in shapes.items()}


def test_conversion(tmp_path):
    from jaxpeft import models

    metadata, tensors = tiny_llama()
    write(tmp_path / "m.gguf", metadata, tensors)
    gguf_to_hf(tmp_path / "m.gguf", tmp_path)
    lm = models.load(tmp_path)
    assert lm.config.tie_word_embeddings
    assert lm.config.rms_norm_eps == 1e-5
    assert lm.tokenizer.decode(lm.tokenizer("he said 12")["input_ids"]) == "he said 12"
    assert lm.tokenizer("he")["input_ids"] == [259]
    assert (lm.tokenizer.eos_token, lm.tokenizer.pad_token) == ("<|im_end|>", "<|im_end|>")
    assert lm.tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"
    stored = np.frombuffer(tensors["blk.0.attn_q.weight"][2], np.float32).reshape(8, 8)
    # Head 0 has rows 0 to 3: in the file in the order of pairs (0, 2), (1, 3).
    found = np.asarray(lm.params["layers"]["self_attn"]["q_proj"]["kernel"][0]).T
    np.testing.assert_array_equal(found[[0, 2, 1, 3]], stored[:4])


def test_blocks_kept_as_they_are(tmp_path):
    """Q4_1 and Q8_0 parameters stand for the very floats that the expanded file holds; other types become floats."""
    import jax

    import jaxpeft
    from jaxpeft import models, quantize
    from jaxpeft.models.gguf_blocks import quantized_params

    metadata, _ = tiny_llama()
    metadata |= {"llama.block_count": 2, "llama.embedding_length": 64, "llama.feed_forward_length": 96}
    rng = np.random.default_rng(0)
    tensors = {"output_norm.weight": f32(np.ones(64))}

    def add(name, number, shape):
        tensors[f"{name}.weight"] = (shape, number, blocks_of(number, rng, np.prod(shape) // 32)[0])

    add("token_embd", 8, (260, 64))
    for layer in range(2):
        for norm in ("attn_norm", "ffn_norm"):
            tensors[f"blk.{layer}.{norm}.weight"] = f32(rng.normal(size=64))
        add(f"blk.{layer}.attn_q", 3, (64, 64))
        add(f"blk.{layer}.attn_k", 8, (32, 64))
        add(f"blk.{layer}.attn_v", 2, (32, 64))
        add(f"blk.{layer}.attn_output", 3, (64, 64))
        add(f"blk.{layer}.ffn_gate", 3, (96, 64))
        add(f"blk.{layer}.ffn_up", 3 if layer else 8, (96, 64))
        add(f"blk.{layer}.ffn_down", 3, (64, 96))
    write(tmp_path / "m.gguf", metadata, tensors)
    gguf_to_hf(tmp_path / "m.gguf", tmp_path)
    lm, like = models.load(tmp_path), models.load(tmp_path, weights=False)
    params = quantized_params(tmp_path / "m.gguf", like.config, like.params)
    kinds = {path: getattr(leaf, "kind", None) for path, leaf in jaxpeft.sites.paths_and_leaves(params)}
    assert kinds["embed/embedding"] == kinds["layers/self_attn/k_proj/kernel"] == "q8_0"
    assert kinds["layers/self_attn/q_proj/kernel"] == kinds["layers/mlp/down_proj/kernel"] == "q4_1"
    assert kinds["layers/self_attn/v_proj/kernel"] is kinds["layers/mlp/up_proj/kernel"] is None
    jax.tree.map(np.testing.assert_array_equal, quantize.dequantize(params), lm.params)
    shapes = quantized_params(tmp_path / "m.gguf", like.config, like.params, weights=False)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), shapes) == jax.tree.map(lambda a: (a.shape, a.dtype), params)
    tokens = np.arange(12).reshape(2, 6)
    np.testing.assert_allclose(
        jaxpeft.adapt(lm.logits)(params, [], tokens), lm.logits(lm.params, tokens), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"general.architecture": "gemma"}, "architecture 'gemma' is not supported"),
        ({"tokenizer.ggml.pre": "qwen2"}, "tokenizer .*'qwen2'.* is not supported"),
    ],
)
def test_conversion_of_other_models(tmp_path, change, message):
    metadata, tensors = tiny_llama()
    write(tmp_path / "m.gguf", metadata | change, tensors)
    with pytest.raises(ValueError, match=message):
        gguf_to_hf(tmp_path / "m.gguf", tmp_path)
