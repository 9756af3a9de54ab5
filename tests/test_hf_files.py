"""Adapters as PEFT's files and back: every method, patterns, and every kind of damage or doubt."""

import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zoo
from moved import moved
from safetensors.numpy import load_file, save_file
from specs import SPECS, STRUCTURES

import jaxpeft
from jaxpeft import hf
from jaxpeft.methods import METHODS, full, hira, ia3, lora, mixed, mos, surm, surm_block, vera
from jaxpeft.spec import method_of

MODEL = zoo.MODELS["plain scanned"]()
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
NATIVE = {"boft", "c3a", "hira", "ia3", "loha", "lokr", "lora", "miss", "oft", "vblora", "vera"}


def adapter_of(spec, model=MODEL, selection=None, size=0.1) -> jaxpeft.Adapter:
    sites = jaxpeft.find(model.params, selection or model.pattern, layouts=dict(model.layouts) or None)
    return moved(jaxpeft.init(jax.random.key(0), spec, sites, model.params), size)


def written(folder, spec, **options) -> jaxpeft.Adapter:
    adapter = adapter_of(spec)
    jaxpeft.to_peft(folder, adapter, base_model="some/model", base=MODEL.params, **options)
    return adapter


def config_of(folder: Path) -> dict:
    return json.loads((folder / CONFIG).read_text())


def change(folder: Path, **fields) -> None:
    (folder / CONFIG).write_text(json.dumps(config_of(folder) | fields))


def assert_same_update(found, expected, base=MODEL.params, tolerance=1e-5) -> None:
    ours, theirs = jaxpeft.delta(expected, base), jaxpeft.delta(found, base)
    assert ours.keys() == theirs.keys()
    for path, delta in ours.items():
        size = float(jnp.abs(delta).max())
        assert size > 1e-4
        np.testing.assert_allclose(theirs[path], delta, atol=tolerance * max(1, size), rtol=0, err_msg=path)


def cases():
    for name, spec in SPECS.items():
        if method_of(spec).CARD.mergeable:
            main = name in METHODS or name in STRUCTURES
            yield pytest.param(name, marks=() if main else pytest.mark.slow)


@pytest.mark.parametrize("name", list(cases()))
def test_round_trip(name, tmp_path) -> None:
    """Natively, or losslessly as LoRA; an update of full rank with all its singular values."""
    adapter, options = adapter_of(SPECS[name]), {"base_model": "m", "base": MODEL.params}
    factors = all(hf.settings.factors_of(u) is not None for u in adapter.updates().values())
    native = method_of(SPECS[name]).__name__.rpartition(".")[2] in NATIVE or name == "randlora peft"
    if not factors and not native and "mixed" not in name:
        with pytest.raises(ValueError, match=r"rank=.*energy="):
            jaxpeft.to_peft(tmp_path / "a", adapter, **options)
        assert not list(tmp_path.iterdir())
        options["rank"] = 12
    report = jaxpeft.to_peft(tmp_path / "a", adapter, **options)
    assert report.error < 1e-6
    assert (report.how == "native") == (native and SPECS[name].start == "method")
    found = jaxpeft.from_peft(tmp_path / "a", MODEL.params)
    assert_same_update(found, adapter)
    if report.how == "native" and adapter.spec.rslora is False:
        assert found.spec == adapter.spec or "zero" in name or "path" in str(adapter.spec)
        assert jaxpeft.count(found) == jaxpeft.count(adapter)


@pytest.mark.parametrize("model", ["plain unrolled", "linen scanned", "linen unrolled", "nnx scanned"])
def test_other_trees(model, tmp_path) -> None:
    model = zoo.MODELS[model]()
    adapter = adapter_of(SPECS["mos"], model)
    jaxpeft.to_peft(tmp_path / "a", adapter, base_model="m")
    found = jaxpeft.from_peft(tmp_path / "a", model.params)
    assert found.sites == adapter.sites
    assert_same_update(found, adapter, model.params)


def test_the_files(tmp_path) -> None:
    adapter = written(tmp_path / "a", mos.Spec(rank=5, equivalent_rank=2, private_rank=1, shards_per_vector=3))
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["README.md", CONFIG, WEIGHTS]
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    config = config_of(tmp_path / "a")
    assert config["target_modules"] == ["down", "out", "query", "up"]
    assert (config["r"], config["lora_alpha"], config["task_type"]) == (5, adapter.spec.alpha, "CAUSAL_LM")
    tensors = load_file(tmp_path / "a" / WEIGHTS)
    assert tensors["base_model.model.layers.3.up.lora_A.weight"].shape == (5, 12)
    assert tensors["base_model.model.layers.3.up.lora_B.weight"].shape == (18, 5)
    card = (tmp_path / "a" / "README.md").read_text()
    for text in ('base_model: "some/model"', "without loss", "- rank: 5", "`layers.*.up`", "from_peft"):
        assert text in card


def test_a_truncated_update_says_its_error(tmp_path) -> None:
    adapter = adapter_of(surm.Spec(path="dense"))
    report = jaxpeft.to_peft(tmp_path / "a", adapter, base_model="m", rank=4)
    assert 0.1 < report.error < 1
    assert f"{report.error:.2%}" in str(report)
    assert f"relative error up to {report.error:.2%}" in (tmp_path / "a" / "README.md").read_text()
    ours, found = jaxpeft.delta(adapter), jaxpeft.delta(jaxpeft.from_peft(tmp_path / "a", MODEL.params))
    errors = [
        float(jnp.linalg.norm(one - other) / jnp.linalg.norm(one))
        for path in ours
        for one, other in zip(ours[path], found[path], strict=True)
    ]
    assert max(errors) == pytest.approx(report.error, rel=1e-4)
    near = jaxpeft.to_peft(tmp_path / "b", adapter, base_model="m", energy=0.999)
    assert near.error <= (1 - 0.999) ** 0.5 + 1e-6


def test_a_rank_asks_for_lora(tmp_path) -> None:
    written(tmp_path / "a", vera.Spec(rank=5), rank=3)
    assert config_of(tmp_path / "a")["peft_type"] == "LORA"
    assert config_of(tmp_path / "a")["r"] == 3


def test_dtype(tmp_path) -> None:
    adapter = written(tmp_path / "a", lora.Spec(rank=3), dtype="bfloat16")
    found = jaxpeft.from_peft(tmp_path / "a", MODEL.params)
    leaf = adapter.params["layers/up/kernel"]["a"]
    np.testing.assert_array_equal(found.params["layers/up/kernel"]["a"], leaf.astype(jnp.bfloat16).astype(jnp.float32))
    with pytest.raises(ValueError, match="dtype='int8': expected one of float32"):
        written(tmp_path / "b", lora.Spec(rank=3), dtype="int8")


def test_alpha_is_what_the_adapter_has(tmp_path) -> None:
    adapter = adapter_of(lora.Spec(rank=5, alpha=3)).with_alpha(7)
    jaxpeft.to_peft(tmp_path / "a", adapter, base_model="m")
    assert config_of(tmp_path / "a")["lora_alpha"] == 7
    assert_same_update(jaxpeft.from_peft(tmp_path / "a", MODEL.params), adapter)


def test_numbers_that_a_dtype_cannot_hold(tmp_path) -> None:
    adapter = adapter_of(lora.Spec(rank=3))
    huge = adapter.replace(params=jax.tree.map(lambda leaf: leaf * 1e6, adapter.params))
    with pytest.raises(ValueError, match=r"lora_A\.weight has values up to .*, which float16 cannot hold"):
        jaxpeft.to_peft(tmp_path / "a", huge, base_model="m", dtype="float16")
    broken = adapter.replace(params=jax.tree.map(lambda leaf: leaf * jnp.nan, adapter.params))
    with pytest.raises(ValueError, match="values up to nan"):
        jaxpeft.to_peft(tmp_path / "a", broken, base_model="m")
    assert not list(tmp_path.iterdir())


def test_scales_that_are_no_alpha(tmp_path) -> None:
    """A negated update, as of a combination with a negative weight."""
    adapter = adapter_of(lora.Spec(rank=3))
    negated = {name: {**own, "scale": -own["scale"]} for name, own in adapter.constants.items()}
    adapter = adapter.replace(constants=negated)
    jaxpeft.to_peft(tmp_path / "a", adapter, base_model="m")
    assert_same_update(jaxpeft.from_peft(tmp_path / "a", MODEL.params), adapter)


def test_dora_on_an_embedding(tmp_path) -> None:
    adapter = adapter_of(lora.Spec(rank=3, dora=True), selection="embed/embedding|.*/up/kernel")
    with pytest.raises(ValueError, match="DoRA on an embedding is not written; pass rank="):
        jaxpeft.to_peft(tmp_path / "a", adapter, base_model="m", base=MODEL.params)
    jaxpeft.to_peft(tmp_path / "a", adapter, base_model="m", base=MODEL.params, rank=12)
    assert_same_update(jaxpeft.from_peft(tmp_path / "a", MODEL.params), adapter)


def test_ranks_within_a_group(tmp_path) -> None:
    """Layers of other ranks and alphas; those of the smaller rank stay of that rank under training."""
    adapter = written(tmp_path / "a", lora.Spec(rank=4, alpha=8))
    tensors, cut = load_file(tmp_path / "a" / WEIGHTS), "base_model.model.layers.1.up.lora_"
    tensors[f"{cut}A.weight"], tensors[f"{cut}B.weight"] = (
        tensors[f"{cut}A.weight"][:2],
        tensors[f"{cut}B.weight"][:, :2],
    )
    save_file({name: np.ascontiguousarray(array) for name, array in tensors.items()}, tmp_path / "a" / WEIGHTS)
    change(tmp_path / "a", rank_pattern={r"layers\.1\.up": 2}, alpha_pattern={"1.up": 5, "3.down": 12})
    found = jaxpeft.from_peft(tmp_path / "a", MODEL.params)
    assert found.spec.rank == 4
    up = adapter.params["layers/up/kernel"]
    expected = dict(jaxpeft.delta(adapter))
    expected["layers/up/kernel"] = expected["layers/up/kernel"].at[1].set(2.5 * up["a"][1, :2].T @ up["b"][1, :2])
    expected["layers/down/kernel"] = expected["layers/down/kernel"].at[3].multiply(12 / 8)
    for path, delta in jaxpeft.delta(found).items():
        np.testing.assert_allclose(delta, expected[path], atol=1e-5)
    gradients = jax.grad(lambda params: sum(map(jnp.sum, jaxpeft.delta(found.replace(params=params)).values())))
    assert not gradients(found.params)["layers/up/kernel"]["a"][1, 2:].any()
    assert gradients(found.params)["layers/up/kernel"]["a"][0, 2:].all()
    jaxpeft.to_peft(tmp_path / "b", found, base_model="m", base=MODEL.params)
    assert config_of(tmp_path / "b")["alpha_pattern"] == {"1.up": 10, "3.down": 12}
    assert_same_update(jaxpeft.from_peft(tmp_path / "b", MODEL.params), found)


def test_patterns_by_group(tmp_path) -> None:
    spec = mixed.Spec(default=lora.Spec(rank=4), overrides={r".*/up/kernel": {"rank": 2, "alpha": 5.0}})
    adapter = written(tmp_path / "a", spec)
    config = config_of(tmp_path / "a")
    assert (config["rank_pattern"], config["alpha_pattern"]) == ({"up": 2}, {"up": 5})
    found = jaxpeft.from_peft(tmp_path / "a", MODEL.params)
    assert {type(found.spec), type(adapter.spec)} == {mixed.Spec}
    assert found.params["layers/up/kernel"]["a"].shape == (4, 2, 12)
    assert_same_update(found, adapter)


def test_dora_in_part_needs_the_base(tmp_path) -> None:
    adapter = adapter_of(mixed.Spec(default=lora.Spec(rank=3), overrides={".*/up/kernel": {"dora": True}}))
    with pytest.raises(ValueError, match="pass base="):
        jaxpeft.to_peft(tmp_path / "a", adapter, base_model="m")
    jaxpeft.to_peft(tmp_path / "a", adapter, base_model="m", base=MODEL.params)
    found = jaxpeft.from_peft(tmp_path / "a", MODEL.params)
    assert found.spec.dora
    assert_same_update(found, adapter)


def test_some_layers(tmp_path) -> None:
    sites = jaxpeft.find(MODEL.params, MODEL.pattern, layers=[0, 3])
    adapter = moved(jaxpeft.init(jax.random.key(0), vera.Spec(rank=5), sites), 0.1)
    jaxpeft.to_peft(tmp_path / "a", adapter, base_model="m", base=MODEL.params)
    expected = {f"{layer}.{name}" for layer in (0, 3) for name in ("up", "down", "query", "out")}
    assert set(config_of(tmp_path / "a")["target_modules"]) == expected
    found = jaxpeft.from_peft(tmp_path / "a", MODEL.params)
    assert found.sites == adapter.sites
    assert_same_update(found, adapter)


def test_names(tmp_path) -> None:
    """A mapping for what it lists and a function; both ways."""
    adapter = adapter_of(lora.Spec(rank=3))
    mapping = {"layers/up/kernel": "transformer.h.{}.mlp.c_fc"}
    jaxpeft.to_peft(tmp_path / "a", adapter, base_model="m", names=mapping)
    tensors = load_file(tmp_path / "a" / WEIGHTS)
    assert "base_model.model.transformer.h.2.mlp.c_fc.lora_A.weight" in tensors
    assert "base_model.model.layers.2.down.lora_A.weight" in tensors
    assert_same_update(jaxpeft.from_peft(tmp_path / "a", MODEL.params, names=mapping.get), adapter)
    with pytest.raises(ValueError, match=r"tensors of transformer\.h\.0\.mlp\.c_fc, which is no module of the base"):
        jaxpeft.from_peft(tmp_path / "a", MODEL.params)
    with pytest.raises(ValueError, match="1 axes, but the torch name 'up' has 0 places"):
        jaxpeft.to_peft(tmp_path / "b", adapter, base_model="m", names={"layers/up/kernel": "up"})


def test_a_stack_without_a_name(tmp_path) -> None:
    params = {"experts": {"w": jnp.ones((3, 12, 6))}}
    adapter = jaxpeft.init(jax.random.key(0), lora.Spec(rank=2), jaxpeft.find(params, ".*", layouts={".*": "lio"}))
    with pytest.raises(ValueError, match=r"experts/w go\? Pass names="):
        jaxpeft.to_peft(tmp_path / "a", adapter, base_model="m")


def test_starts_are_computed_again(tmp_path) -> None:
    """PEFT's PiSSA files change the base as they load; the base here stays, and the start is a constant."""
    adapter = adapter_of(lora.Spec(rank=3))
    jaxpeft.to_peft(tmp_path / "a", adapter, base_model="m")
    change(tmp_path / "a", init_lora_weights="pissa")
    found = jaxpeft.from_peft(tmp_path / "a", MODEL.params)
    assert found.spec.start == "pissa"
    at_start = jaxpeft.init(jax.random.key(0), found.spec, found.sites, MODEL.params)
    for group, leaves in at_start.params.items():
        start = jnp.einsum("lri,lro->lio", leaves["a"], leaves["b"]) * at_start.constants[group]["scale"][:, None, None]
        expected = (jaxpeft.delta(adapter)[group].reshape(start.shape) - start).reshape(found.sites[group].shape)
        np.testing.assert_allclose(jaxpeft.delta(found)[group], expected, atol=1e-4)
    change(tmp_path / "a", alpha_pattern={"1.up": 3})
    with pytest.raises(ValueError, match="layers have different settings"):
        jaxpeft.from_peft(tmp_path / "a", MODEL.params)


def test_a_head_and_a_norm(tmp_path) -> None:
    overrides = {r"embed/embedding|layers/norm/scale": full.Spec()}
    adapter = adapter_of(
        mixed.Spec(default=vera.Spec(rank=5), overrides=overrides),
        selection=r".*/(up|down)/kernel|embed/embedding|layers/norm/scale",
    )
    with pytest.raises(ValueError, match=r"embed/embedding.*pass base="):
        jaxpeft.to_peft(tmp_path / "a", adapter, base_model="m")
    report = jaxpeft.to_peft(tmp_path / "a", adapter, base_model="m", base=MODEL.params)
    assert report.peft_type == "VERA"
    assert config_of(tmp_path / "a")["modules_to_save"] == ["embed", *(f"layers.{i}.norm" for i in range(4))]
    tensors = load_file(tmp_path / "a" / WEIGHTS)
    assert tensors["base_model.model.embed.weight"].shape == (zoo.VOCAB, zoo.EMBED)
    assert_same_update(jaxpeft.from_peft(tmp_path / "a", MODEL.params), adapter)


def test_conv1d(tmp_path) -> None:
    """GPT-2's kernels are (out, in) in Flax and (in, out) in torch's Conv1D."""
    kernel = jax.random.normal(jax.random.key(0), (18, 12))
    params = {"h": {str(i): {"c_fc": {"kernel": kernel + i, "bias": jnp.ones(18)}} for i in range(2)}}
    layouts = {".*kernel": "oi"}
    spec = mixed.Spec(default=lora.Spec(rank=3), overrides={"h/./c_fc/bias": full.Spec()})
    adapter = jaxpeft.init(jax.random.key(0), spec, jaxpeft.find(params, ".*", layouts=layouts))
    adapter = moved(adapter, 0.1)
    jaxpeft.to_peft(tmp_path / "a", adapter, base_model="gpt2", base=params)
    config = config_of(tmp_path / "a")
    assert (config["fan_in_fan_out"], config["bias"], config["target_modules"]) == (True, "all", ["c_fc"])
    assert_same_update(jaxpeft.from_peft(tmp_path / "a", params, layouts=layouts), adapter, params)
    jaxpeft.to_peft(tmp_path / "b", adapter_oft := _oft(params, layouts), base_model="gpt2", base=params, rank=12)
    assert_same_update(jaxpeft.from_peft(tmp_path / "b", params, layouts=layouts), adapter_oft, params)


def _oft(params, layouts) -> jaxpeft.Adapter:
    """An adapter whose form in PEFT knows no Conv1D."""
    sites = jaxpeft.find(params, ".*kernel", layouts=layouts)
    return moved(jaxpeft.init(jax.random.key(0), SPECS["oft"], sites), 0.1)


def test_overwriting(tmp_path) -> None:
    written(tmp_path / "a", lora.Spec(rank=3))
    with pytest.raises(FileExistsError, match="overwrite=True"):
        written(tmp_path / "a", lora.Spec(rank=2))
    assert config_of(tmp_path / "a")["r"] == 3
    written(tmp_path / "a", lora.Spec(rank=2), overwrite=True)
    assert config_of(tmp_path / "a")["r"] == 2
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="no PEFT adapter"):
        written(tmp_path / "b", lora.Spec(rank=2), overwrite=True)
    assert (tmp_path / "b" / "notes.txt").read_text() == "mine"


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch) -> None:
    def fails(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.numpy.save_file", fails)
    with pytest.raises(OSError, match="No space left"):
        written(tmp_path / "a", lora.Spec(rank=2))
    assert not list(tmp_path.iterdir())


BIASES = {
    "up": {"kernel": jnp.ones((4, 6)), "bias": jnp.ones(6)},
    "down": {"kernel": jnp.ones((6, 4)), "bias": jnp.ones(4)},
}


@pytest.mark.parametrize(
    ("selection", "bias", "saved"),
    [
        (".*/kernel|.*/bias", "all", None),
        ("up/kernel|up/bias", "lora_only", None),
        ("up/kernel|down/bias", None, ["down"]),
        ("up/kernel|.*/bias", "all", None),
    ],
)
def test_biases(selection, bias, saved, tmp_path) -> None:
    spec = mixed.Spec(default=lora.Spec(rank=2), overrides={".*/bias": full.Spec()})
    adapter = moved(jaxpeft.init(jax.random.key(0), spec, jaxpeft.find(BIASES, selection)), 0.1)
    jaxpeft.to_peft(tmp_path / "a", adapter, base_model="m", base=BIASES)
    config = config_of(tmp_path / "a")
    assert (config.get("bias"), config["modules_to_save"]) == (bias, saved)
    found = jaxpeft.from_peft(tmp_path / "a", BIASES)
    theirs = jaxpeft.delta(found)
    for path, delta in jaxpeft.delta(adapter).items():
        np.testing.assert_allclose(theirs.pop(path), delta, atol=1e-6)
    assert not any(delta.any() for delta in theirs.values())


@pytest.mark.parametrize(
    ("spec", "selection", "message"),
    [
        (full.Spec(), ".*", "at least one adapted module"),
        (surm_block.Spec(path="dense"), ".*/kernel", "changes what a layer gives out|no product of two factors"),
        (
            mixed.Spec(default=lora.Spec(rank=2), overrides={"up/bias": full.Spec()}),
            ".*/kernel|up/bias",
            "1 of the 2 biases of adapted modules are trained",
        ),
        (
            mixed.Spec(default=hira.Spec(rank=2), overrides={".*/bias": full.Spec()}),
            ".*/kernel|.*/bias",
            "HIRA trains no biases",
        ),
        (ia3.Spec(), ".*/kernel", "pass rank= or energy="),  # PEFT's IA3 would rescale the biases too
    ],
)
def test_what_peft_cannot_say(spec, selection, message, tmp_path) -> None:
    params = {name: module | {"kernel": jnp.ones((6, 6)), "bias": jnp.ones(6)} for name, module in BIASES.items()}
    adapter = moved(jaxpeft.init(jax.random.key(0), spec, jaxpeft.find(params, selection)), 0.1)
    with pytest.raises(ValueError, match=message):
        jaxpeft.to_peft(tmp_path / "a", adapter, base_model="m", base=params)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layer_replication": [[0, 2]]}, r"not supported: layer_replication=\[\[0, 2\]\]"),
        ({"use_qalora": True, "lora_bias": True}, "lora_bias=True; use_qalora=True|use_qalora=True; lora_bias=True"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
        ({"target_parameters": ["experts.w"]}, "target_parameters"),
        ({"megatron_config": {"a": 1}}, "megatron_config"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices"),
        ({"a_field_of_tomorrow": True}, "a_field_of_tomorrow=True"),
        ({"init_lora_weights": "loftq"}, "it changed the base weights"),
        ({"init_lora_weights": "pissa_niter_4"}, "path_initial_model_for_weight_conversion"),
        ({"peft_type": "LOR"}, "did you mean 'LORA'"),
        ({"peft_type": "PREFIX_TUNING"}, "peft_type='PREFIX_TUNING' is not read; .*VERA"),
        (
            {"target_modules": ["up", "query", "down"]},
            r"4 problems.*(?s:.)*layers\.0\.out, which target_modules does not",
        ),
        ({"target_modules": r".*\.\w+"}, None),
        ({"r": 4}, r"shape: base_model\.model\.layers\.0\.down\.lora_A\.weight is \(3, 18\), expected \(4, 18\)"),
        ({"use_dora": True}, r"missing: base_model\.model\.layers\.0\.down\.lora_magnitude_vector"),
        ({"modules_to_save": ["embed"]}, r"missing: base_model\.model\.embed\.weight"),
        ({"bias": "all"}, None),
        ({"r": "3"}, "rank='3', expected an integer"),
        ({"r": 0}, "rank=0, expected at least 1"),
        ({"bias": "some"}, "bias='some' .only 'none', 'all' and 'lora_only'"),
    ],
)
def test_strict_about_the_config(fields, message, tmp_path) -> None:
    adapter = written(tmp_path / "a", lora.Spec(rank=3))
    change(tmp_path / "a", **fields)
    if message is None:
        assert_same_update(jaxpeft.from_peft(tmp_path / "a", MODEL.params), adapter)
    else:
        with pytest.raises(ValueError, match=message):
            jaxpeft.from_peft(tmp_path / "a", MODEL.params)


def test_strict_about_the_tensors(tmp_path) -> None:
    """All that is missing and all that is unexpected is said at once."""
    written(tmp_path / "a", vera.Spec(rank=3))
    tensors = load_file(tmp_path / "a" / WEIGHTS)
    del tensors["base_model.model.layers.2.up.vera_lambda_d"], tensors["base_model.model.layers.2.up.vera_lambda_b"]
    del tensors["base_model.vera_A"]
    tensors |= {"base_model.model.layers.9.up.vera_lambda_d": np.ones(3, np.float32), "stray": np.ones(1, np.float32)}
    save_file(tensors, tmp_path / "a" / WEIGHTS)
    with pytest.raises(ValueError, match="problems") as error:
        jaxpeft.from_peft(tmp_path / "a", MODEL.params)
    for text in ("layers.2.up", "base_model.vera_A", "layers.9.up", "unexpected: stray"):
        assert text in str(error.value)
    change(tmp_path / "a", save_projection=False)
    with pytest.raises(ValueError, match=r"save_projection=False \(only True\)"):
        jaxpeft.from_peft(tmp_path / "a", MODEL.params)


def test_each_of_the_two_readers_names_the_other(tmp_path) -> None:
    adapter = written(tmp_path / "peft", lora.Spec(rank=3))
    with pytest.raises(jaxpeft.CheckpointError, match=r"adapter of Hugging Face PEFT, which jaxpeft\.from_peft reads"):
        jaxpeft.load(tmp_path / "peft")
    jaxpeft.save(tmp_path / "own", adapter)
    with pytest.raises(FileNotFoundError, match=r"adapter of jaxpeft, which jaxpeft\.load reads"):
        jaxpeft.from_peft(tmp_path / "own", MODEL.params)


def test_files_that_are_not_there_or_damaged(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="no such folder"):
        jaxpeft.from_peft(tmp_path / "a", MODEL.params)
    written(tmp_path / "a", lora.Spec(rank=3))
    weights = (tmp_path / "a" / WEIGHTS).read_bytes()
    (tmp_path / "a" / WEIGHTS).write_bytes(weights[:-7])
    with pytest.raises(ValueError, match="damaged or incomplete"):
        jaxpeft.from_peft(tmp_path / "a", MODEL.params)
    (tmp_path / "a" / WEIGHTS).rename(tmp_path / "a" / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"pickle, which may run any code.*safe_serialization=True"):
        jaxpeft.from_peft(tmp_path / "a", MODEL.params)
    (tmp_path / "a" / "adapter_model.bin").unlink()
    with pytest.raises(FileNotFoundError, match=re.escape(WEIGHTS)):
        jaxpeft.from_peft(tmp_path / "a", MODEL.params)
    (tmp_path / "a" / CONFIG).write_text("{")
    (tmp_path / "a" / WEIGHTS).write_bytes(weights)
    with pytest.raises(ValueError, match=r"adapter_config\.json is damaged"):
        jaxpeft.from_peft(tmp_path / "a", MODEL.params)
