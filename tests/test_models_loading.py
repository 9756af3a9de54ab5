import dataclasses
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tiny
from jax.sharding import AxisType, PartitionSpec
from safetensors.numpy import save_file
from test_models_decoder import TINY, VARIANTS, leaves

from jaxpeft import models

HF_FIELDS = {
    field: getattr(TINY, field)
    for field in (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "rms_norm_eps",
    )
}


def hf_tensors(params):
    """The parameters under Hugging Face's names and in torch's layout, layer by layer."""
    tensors = {}
    for path, leaf in leaves(params).items():
        leaf, name = np.asarray(leaf), models.hf_name(path)
        for layer in range(leaf.shape[0]) if "{}" in name else [None]:
            tensor = leaf if layer is None else leaf[layer]
            tensor = tensor.T if path.endswith("kernel") else tensor
            tensors[name.format(layer)] = np.ascontiguousarray(tensor)
    return tensors


def write(folder, tensors, *, shards=1, **fields):
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]} | HF_FIELDS | fields
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return
    names = list(tensors)
    files = {name: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, name in enumerate(names)}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in names if files[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))


@pytest.fixture(scope="module")
def lm():
    return models.random(VARIANTS["untied"], jax.random.key(0))


@pytest.fixture(scope="module")
def tensors(lm):
    return hf_tensors(lm.params)


@pytest.mark.parametrize("shards", [1, 3])
def test_loads_what_was_saved(tmp_path, lm, tensors, shards):
    write(tmp_path, tensors, shards=shards)
    loaded = models.load(tmp_path, tokenizer=False)
    assert loaded.config == dataclasses.replace(lm.config, max_position_embeddings=2048)
    assert jax.tree.structure(loaded.params) == jax.tree.structure(lm.params)
    jax.tree.map(np.testing.assert_array_equal, loaded.params, lm.params)
    assert loaded.tokenizer is None


def test_tied_head_and_derived_tensors_are_ignored(tmp_path):
    lm = models.random(TINY, jax.random.key(0))
    tensors = hf_tensors(lm.params)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    write(tmp_path, tensors, tie_word_embeddings=True)
    loaded = models.load(tmp_path, tokenizer=False)
    jax.tree.map(np.testing.assert_array_equal, loaded.params, lm.params)


def test_dtypes(tmp_path, tensors):
    low = {name: tensor.astype(ml_dtypes.bfloat16) for name, tensor in tensors.items()}
    write(tmp_path, low)
    loaded = models.load(tmp_path, tokenizer=False)
    assert (loaded.config.dtype, loaded.config.param_dtype) == ("bfloat16", "bfloat16")
    kernel = loaded.params["layers"]["mlp"]["up_proj"]["kernel"]
    assert kernel.dtype == jnp.bfloat16
    np.testing.assert_array_equal(kernel[1], low["model.layers.1.mlp.up_proj.weight"].T)
    wide = models.load(tmp_path, tokenizer=False, dtype="float32")
    assert {leaf.dtype for leaf in jax.tree.leaves(wide.params)} == {jnp.dtype("float32")}
    mixed = models.load(tmp_path, tokenizer=False, dtype="bfloat16", param_dtype="float32")
    assert (mixed.config.dtype, mixed.params["norm"]["scale"].dtype) == ("bfloat16", jnp.float32)


def test_onto_a_mesh(tmp_path, lm, tensors):
    write(tmp_path, tensors, shards=2)
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    loaded = models.load(tmp_path, tokenizer=False, mesh=mesh)
    jax.tree.map(np.testing.assert_array_equal, loaded.params, lm.params)
    kernel = loaded.params["layers"]["mlp"]["down_proj"]["kernel"]
    assert kernel.sharding.spec == PartitionSpec(None, "tensor", "fsdp")
    assert kernel.addressable_shards[0].data.shape == (2, 24, 16)
    # The vocabulary of 61 does not divide by two: that axis stays whole.
    assert loaded.params["embed"]["embedding"].sharding.spec == PartitionSpec(None, "fsdp")
    tokens = jnp.arange(12).reshape(2, 6)
    np.testing.assert_allclose(
        jax.jit(loaded.logits)(loaded.params, tokens), jax.jit(lm.logits)(lm.params, tokens), atol=1e-5
    )


def test_a_layout_that_does_not_divide(tmp_path, tensors):
    write(tmp_path, tensors)
    mesh = jax.make_mesh((8,), ("tensor",), axis_types=(AxisType.Auto,))
    with pytest.raises(ValueError, match=r"embed/embedding: axis 0 of shape \(61, 32\) cannot be split into 8 parts"):
        models.load(tmp_path, tokenizer=False, mesh=mesh, rules=models.DEFAULT_RULES)


def test_axes_a_mesh_lacks_stay_whole(tmp_path, tensors):
    write(tmp_path, tensors)
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))
    loaded = models.load(tmp_path, tokenizer=False, mesh=mesh)
    assert loaded.params["embed"]["embedding"].sharding.spec == PartitionSpec(None, "fsdp")


def test_tokenizer(tmp_path, tensors):
    write(tmp_path, tensors)
    with pytest.raises(FileNotFoundError, match=r"no tokenizer\.json; pass tokenizer=False"):
        models.load(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    loaded = models.load(tmp_path)
    assert loaded.tokenizer.decode(loaded.tokenizer("a film")["input_ids"]) == "a film"


def test_shapes_without_weights(tmp_path, lm, tensors):
    write(tmp_path, tensors)
    (tmp_path / "model.safetensors").unlink()
    shapes = models.load(tmp_path, dtype="bfloat16", tokenizer=False, weights=False).params
    assert jax.tree.map(lambda leaf: leaf.shape, shapes) == jax.tree.map(lambda leaf: leaf.shape, lm.params)
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype("bfloat16")}
    with pytest.raises(FileNotFoundError, match="weights missing"):
        models.load(tmp_path, tokenizer=False, weights=False)


def test_tokens_that_end_a_text(tmp_path, tensors):
    write(tmp_path, tensors)
    assert models.load(tmp_path, tokenizer=False).eos_ids == ()
    write(tmp_path, tensors, eos_token_id=2)
    assert models.load(tmp_path, tokenizer=False).eos_ids == (2,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    assert models.load(tmp_path, tokenizer=False).eos_ids == (2, 7)


def test_all_that_does_not_fit_is_listed_at_once(tmp_path, tensors):
    bad = dict(tensors)
    del bad["model.layers.1.mlp.up_proj.weight"]
    bad["model.layers.0.mlp.gate_proj.weight"] = np.zeros((48, 31), np.float32)
    bad["model.layers.0.self_attn.q_proj.bias"] = np.zeros(32, np.float32)
    write(tmp_path, bad)
    with pytest.raises(ValueError, match="3 tensors do not fit") as error:
        models.load(tmp_path, tokenizer=False)
    assert "missing: model.layers.1.mlp.up_proj.weight (48, 32)" in str(error.value)
    assert "model.layers.0.mlp.gate_proj.weight is (48, 31) in the file and (48, 32)" in str(error.value)
    assert "unexpected: model.layers.0.self_attn.q_proj.bias (32,)" in str(error.value)


def test_missing_files(tmp_path, tensors):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        models.load(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"weights missing: model\.safetensors; only safetensors"):
        models.load(tmp_path)
    write(tmp_path, tensors, shards=3)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="weights missing: model-00002-of-00003"):
        models.load(tmp_path)
    write(tmp_path, tensors, shards=3)
    (tmp_path / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        models.load(tmp_path)


@pytest.mark.parametrize("size", [0, 5, 300, -4])
def test_truncated_weights(tmp_path, tensors, size):
    write(tmp_path, tensors)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"model\.safetensors: damaged or incomplete \(\d+ bytes\)"):
        models.load(tmp_path, tokenizer=False)


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
def test_weights_that_are_no_plain_floats(tmp_path, tensors, dtype):
    write(tmp_path, tensors)
    # What a quantizer writes: numbers that mean nothing without its scales.
    header = {
        "model.norm.weight": {"dtype": {"int8": "I8"}.get(dtype, "F8_E4M3"), "shape": [32], "data_offsets": [0, 32]}
    }
    encoded = json.dumps(header).encode()
    (tmp_path / "model.safetensors").write_bytes(len(encoded).to_bytes(8, "little") + encoded + bytes(32))
    with pytest.raises(ValueError, match="are not supported; supported: float32"):
        models.load(tmp_path, tokenizer=False)
