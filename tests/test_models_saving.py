"""Models as Hugging Face folders: what is written is what was there, merged where asked, one tensor at a time."""

import dataclasses
import json
import tracemalloc

import jax
import numpy as np
import pytest
import tiny
from jax.sharding import AxisType
from moved import moved
from safetensors.numpy import load_file
from test_models_decoder import TINY, VARIANTS

import jaxpeft
from jaxpeft import models
from jaxpeft.methods import full, lora, mos, surm_block
from jaxpeft.models import saving, shards


def same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.fixture(scope="module")
def lm():
    return models.random(VARIANTS["untied"], jax.random.key(0))


def adapted(lm, spec, selection="all-linear", seed=1, **options):
    sites = jaxpeft.find(lm.params, selection, **options)
    return moved(jaxpeft.init(jax.random.key(seed), spec, sites, lm.params), 0.1, seed)


# --- round trips ---

CONFIGS = VARIANTS | {
    "llama3 rope": dataclasses.replace(
        TINY, rope_scaling=models.RopeScaling(kind="llama3", factor=8.0, original_max_position_embeddings=64)
    ),
    "linear rope": dataclasses.replace(TINY, rope_scaling=models.RopeScaling(kind="linear", factor=2.0)),
    "windowed qwen3": dataclasses.replace(TINY, qk_norm=True, sliding_window=5),
}


@pytest.mark.parametrize("variant", CONFIGS)
def test_a_round_trip_changes_no_bit(tmp_path, variant):
    lm = models.random(CONFIGS[variant], jax.random.key(0))
    models.save(tmp_path / "model", lm)
    loaded = models.load(tmp_path / "model", tokenizer=False)
    assert loaded.config == lm.config
    same(loaded.params, lm.params)
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_other_dtypes_are_the_cast(tmp_path, lm, dtype):
    models.save(tmp_path / "low", lm, dtype=dtype)
    loaded = models.load(tmp_path / "low", tokenizer=False)
    assert loaded.config.param_dtype == dtype
    assert json.loads((tmp_path / "low" / "config.json").read_text())["dtype"] == dtype
    same(loaded.params, jax.tree.map(lambda leaf: leaf.astype(dtype), lm.params))
    models.save(tmp_path / "again", loaded)
    same(models.load(tmp_path / "again", tokenizer=False).params, loaded.params)


def test_shards(tmp_path, lm):
    models.save(tmp_path / "one", lm)
    models.save(tmp_path / "many", lm, max_shard_size="10KB")
    assert [path.name for path in (tmp_path / "one").glob("*safetensors*")] == ["model.safetensors"]
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    whole = load_file(tmp_path / "one" / "model.safetensors")
    assert index["weight_map"].keys() == whole.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())
    files = sorted(set(index["weight_map"].values()))
    assert files == [f"model-{n:05}-of-{len(files):05}.safetensors" for n in range(1, len(files) + 1)]
    for file in files:
        tensors = load_file(tmp_path / "many" / file)
        assert {name for name, at in index["weight_map"].items() if at == file} == tensors.keys()
        assert sum(tensor.nbytes for tensor in tensors.values()) <= 10_000
        for name, tensor in tensors.items():
            np.testing.assert_array_equal(tensor, whole[name])
    same(models.load(tmp_path / "many", tokenizer=False).params, lm.params)
    # Layer after layer, so that a file's layers lie together.
    layers = [int(name.split(".")[2]) for name in index["weight_map"] if "layers" in name]
    assert layers == sorted(layers)


def test_from_a_mesh(tmp_path, lm):
    mesh = jax.make_mesh((2, 4), ("tensor", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    models.save(tmp_path / "model", lm)
    spread = models.load(tmp_path / "model", tokenizer=False, mesh=mesh)
    adapter = adapted(lm, lora.Spec(rank=2))
    models.save(tmp_path / "merged", lm, adapter)
    models.save(tmp_path / "spread", spread, adapter)
    expected, found = (models.load(tmp_path / name, tokenizer=False).params for name in ("merged", "spread"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found, expected)


# --- merged ---

ADAPTERS = {
    "lora": (lora.Spec(rank=2), {}),
    "some layers": (lora.Spec(rank=2), {"layers": [1]}),
    "shared pool": (mos.Spec(rank=2, equivalent_rank=2, private_rank=1, shards_per_vector=2), {}),
    "dora": (lora.Spec(rank=2, dora=True), {}),
    "embedding and head": (lora.Spec(rank=2), {"selection": ["embed", "lm_head", "q_proj"]}),
    "norms": (full.Spec(), {"selection": r".*norm/scale|.*q_proj/kernel"}),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_merged_while_writing_is_merged_before(tmp_path, lm, name):
    spec, options = ADAPTERS[name]
    adapter = adapted(lm, spec, **options)
    models.save(tmp_path / "model", lm, adapter)
    found = models.load(tmp_path / "model", tokenizer=False).params
    expected = jaxpeft.merge(lm.params, adapter)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found, expected)
    changed = [
        path for path, a, b in zip(paths(found), leaves(found), leaves(lm.params), strict=True) if (a != b).any()
    ]
    assert changed == [path for path in paths(found) if path in {p for group in adapter.sites for p in group.paths}]


def paths(tree):
    return list(jaxpeft.sites.flatten(tree))


def leaves(tree):
    return list(jaxpeft.sites.flatten(tree).values())


def test_several_adapters_add_up(tmp_path, lm):
    two = [adapted(lm, lora.Spec(rank=2), "all-linear"), adapted(lm, lora.Spec(rank=1), ["q_proj"], seed=2)]
    models.save(tmp_path / "model", lm, two)
    found = models.load(tmp_path / "model", tokenizer=False).params
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found, jaxpeft.merge(lm.params, two))


def test_one_cast_from_float32(tmp_path, lm):
    adapter = adapted(lm, lora.Spec(rank=2))
    low = dataclasses.replace(lm, params=jax.tree.map(lambda leaf: leaf.astype("bfloat16"), lm.params))
    models.save(tmp_path / "wide", low, adapter, dtype="float32")
    wide = jax.tree.map(lambda leaf: leaf.astype("float32"), low.params)
    found = models.load(tmp_path / "wide", tokenizer=False).params
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found, jaxpeft.merge(wide, adapter))
    rounded = jaxpeft.merge(low.params, adapter)["layers"]["mlp"]["up_proj"]["kernel"]
    assert (found["layers"]["mlp"]["up_proj"]["kernel"] != rounded.astype("float32")).any()


def test_a_quantized_base_is_refused_unless_asked(tmp_path, lm):
    low = dataclasses.replace(lm, params=jaxpeft.quantize.quantize(lm.params, "int8", block=16))
    adapter = adapted(lm, lora.Spec(rank=2), ["q_proj"])
    with pytest.raises(ValueError, match=r"weights are in few bits \(int8\).*dequantize=True"):
        models.save(tmp_path / "model", low, adapter)
    assert not list(tmp_path.iterdir())
    models.save(tmp_path / "model", low, adapter, dequantize=True)
    floats = jaxpeft.quantize.dequantize(low.params)
    found = models.load(tmp_path / "model", tokenizer=False).params
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found, jaxpeft.merge(floats, adapter))


# --- what comes along ---


def test_configuration_tokenizer_and_generation_come_along(tmp_path):
    source = tiny.save_model(tmp_path / "tiny")
    (source / "generation_config.json").write_text('{"eos_token_id": [2, 0], "temperature": 0.6}')
    own = json.loads((source / "config.json").read_text()) | {"model_type": "mistral", "note": "kept"}
    (source / "config.json").write_text(json.dumps(own))
    loaded = models.load(source)
    models.save(tmp_path / "model", loaded)
    written = json.loads((tmp_path / "model" / "config.json").read_text())
    assert (written["model_type"], written["note"], written["dtype"]) == ("mistral", "kept", "float32")
    assert json.loads((tmp_path / "model" / "generation_config.json").read_text())["temperature"] == 0.6
    again = models.load(tmp_path / "model")
    assert (again.config, again.eos_ids) == (loaded.config, (2, 0))
    text = "a film\nrising"
    assert again.tokenizer(text)["input_ids"] == loaded.tokenizer(text)["input_ids"]
    assert again.tokenizer.chat_template == loaded.tokenizer.chat_template
    # A configuration that is no longer the model's is written anew.
    params = loaded.params | {"lm_head": {"kernel": loaded.params["embed"]["embedding"].T}}
    untied = dataclasses.replace(loaded.with_config(tie_word_embeddings=False), params=params)
    models.save(tmp_path / "untied", untied)
    assert models.load(tmp_path / "untied").config == untied.config
    assert json.loads((tmp_path / "untied" / "config.json").read_text())["eos_token_id"] == 2


# --- memory ---


def test_one_tensor_at_a_time(tmp_path, monkeypatch):
    config = dataclasses.replace(TINY, hidden_size=64, intermediate_size=256, num_hidden_layers=24, vocab_size=97)
    lm = models.random(config, jax.random.key(0))
    adapter = adapted(lm, lora.Spec(rank=1))
    largest = 4 * 64 * 256
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(lm.params))
    assert whole > 40 * largest
    models.save(tmp_path / "first", lm, adapter)  # compiles, and is not measured

    live, read = [], saving._read

    def watched(*args):
        values = read(*args)
        live.append(sum(array.nbytes for array in jax.live_arrays()))
        return values

    monkeypatch.setattr(saving, "_read", watched)
    before = sum(array.nbytes for array in jax.live_arrays())
    tracemalloc.start()
    models.save(tmp_path / "second", lm, adapter)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(live) > 24 * 9
    updates = sum(leaf.nbytes for leaf in jax.tree.leaves(adapter.params)) * 3
    assert max(live) - before < updates + 3 * largest
    assert peak < 2_000_000 + 3 * largest < whole

    kernel = lm.params["layers"]["mlp"]["up_proj"]["kernel"]
    group, updates = saving.changed(lm.params, adapter)["layers/mlp/up_proj/kernel"]
    lowered = saving._values.lower(group.layout, "float32", True, True, kernel, updates, 3)
    memory = lowered.compile().memory_analysis()
    assert memory.temp_size_in_bytes + memory.output_size_in_bytes <= 5 * largest


# --- what cannot be written ---


def test_a_folder_is_replaced_only_on_demand_and_only_a_model(tmp_path, lm):
    folder = tmp_path / "model"
    folder.mkdir()
    models.save(folder, lm)
    with pytest.raises(FileExistsError, match="already; choose another folder, or replace it: --overwrite on the"):
        models.save(folder, lm)
    other = models.random(TINY, jax.random.key(1))
    models.save(folder, other, overwrite=True)
    same(models.load(folder, tokenizer=False).params, other.params)
    (folder / "config.json").unlink()
    with pytest.raises(FileExistsError, match="files that are no model"):
        models.save(folder, lm, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_failure_leaves_what_was_there(tmp_path, lm, monkeypatch):
    models.save(tmp_path / "model", lm)
    before = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}

    def full(self, tensors, size):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shards, "write", full)
    for folder, overwrite in (("model", True), ("new", False)):
        with pytest.raises(OSError, match="No space left"):
            models.save(tmp_path / folder, lm, overwrite=overwrite)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()} == before


def test_bad_input_is_named_before_anything_is_written(tmp_path, lm):
    adapter = adapted(lm, lora.Spec(rank=2))
    folder = tmp_path / "model"
    with pytest.raises(ValueError, match="dtype 'float23' is not written; did you mean 'float32'"):
        models.save(folder, lm, dtype="float23")
    for size in ("5 apples", "0", -3, "5IB"):
        with pytest.raises(ValueError, match="expected a positive number of bytes"):
            models.save(folder, lm, max_shard_size=size)
    with pytest.raises(ValueError, match="shapes in place of parameters"):
        models.save(folder, models.shapes(lm.config))
    other = models.random(dataclasses.replace(TINY, hidden_size=40, num_attention_heads=4), jax.random.key(0))
    with pytest.raises(ValueError, match=r"has shape .* in this base; the adapter was made for"):
        models.save(folder, other, adapter)
    with pytest.raises(
        ValueError, match=r"parameters are not the configuration's:\n  embed/embedding: found \(61, 32\)"
    ):
        models.save(folder, dataclasses.replace(other, params=lm.params))
    impossible = models.random(dataclasses.replace(TINY, qk_norm=True, mlp_bias=True), jax.random.key(0))
    with pytest.raises(ValueError, match="none of llama, mistral, qwen2, qwen3 has the features of"):
        models.save(folder, impossible)
    on_output = adapted(lm, surm_block.Spec(kind="ldr", rank=1))
    with pytest.raises(ValueError, match="no W' to form or to merge"):
        models.save(folder, lm, on_output)
    assert not list(tmp_path.iterdir())
    large = jax.tree.map(lambda leaf: leaf, lm.params)
    large["norm"]["scale"] = large["norm"]["scale"].at[3].set(1e6)
    with pytest.raises(ValueError, match=r"model.norm.weight: float16 cannot hold it"):
        models.save(folder, dataclasses.replace(lm, params=large), dtype="float16")
    assert not list(tmp_path.iterdir())
