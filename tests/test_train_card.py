"""The model card and the merged model of a finished run."""

import json
import re
import shutil

import jax
import numpy as np
import pytest
import tiny
import yaml
from runs import CONFIG

import jaxpeft
from jaxpeft import models
from jaxpeft.methods import mos
from train import card
from train.__main__ import main
from train.run import RunError


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.save_model(tmp_path_factory.mktemp("model") / "tiny")


def fit(model, folder, *overrides):
    path = folder.parent / f"{folder.name}.yaml"
    path.write_text(CONFIG.replace("MODEL", str(model)).replace("FOLDER", str(folder)))
    assert main(["fit", str(path), "train.steps=2", "evaluate.exact_match=null", *overrides]) == 0
    return folder


@pytest.fixture(scope="module")
def finished(model, tmp_path_factory):
    return fit(model, tmp_path_factory.mktemp("runs") / "finished", "evaluate.exact_match_rows=null")


def test_the_card_says_what_the_run_measured(finished, model):
    text = (finished / "README.md").read_text(encoding="utf-8")
    summary = json.loads((finished / "summary.json").read_text())
    _, front, body = text.split("---\n", 2)
    front = yaml.safe_load(front)
    assert front == {
        "base_model": "tiny",
        "library_name": "jaxpeft",
        "tags": ["jaxpeft", "jax", "flax", "adapter", "mos"],
        "datasets": ["synthetic"],
        "metrics": ["eval_loss", "perplexity", "accuracy"],
    }
    rows = re.findall(r"^\| (\w+) \| ([\d.]+) \| ([\d.]+) \|$", body, re.MULTILINE)
    assert [name for name, _, _ in rows] == front["metrics"]
    for name, before, after in rows:
        assert float(before) == pytest.approx(summary[f"{name}_before"], abs=5e-5)
        assert float(after) == pytest.approx(summary[f"{name}_after"], abs=5e-5)
    assert f"{summary['trainable_parameters']:,} trained parameters" in body
    assert mos.CARD.formula in body
    assert str(jaxpeft.load(finished / "adapter").sites) in body
    (settings,) = re.findall(r"```yaml\n(.*?)```", body, re.DOTALL)
    assert yaml.safe_load(settings) == {section: summary["config"][section] for section in card.SETTINGS}
    assert str(model.parent) not in text, "where files lay on the machine is nobody's business"
    (finished / "README.md").unlink()
    assert main(["report", str(finished)]) == 0
    assert (finished / "README.md").read_text(encoding="utf-8") == text


def test_its_code_runs(finished, model, monkeypatch):
    text = (finished / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    monkeypatch.chdir(finished)
    names: dict = {}
    exec(compile(code.replace('"tiny"', repr(str(model))), "README.md", "exec"), names)
    assert names["logits"].shape[0] == 1
    assert (
        jaxpeft.count(names["adapter"]) == json.loads((finished / "summary.json").read_text())["trainable_parameters"]
    )


def test_an_unfinished_run_has_no_card(tmp_path):
    with pytest.raises(RunError, match="the run is not finished"):
        card.write(tmp_path)
    (tmp_path / "summary.json").write_text("{}")
    with pytest.raises(RunError, match="of an older version"):
        card.write(tmp_path)


@pytest.mark.parametrize(
    ("command", "place", "said"),
    [
        ("evaluate", "model", "{}: Hugging Face model; expected the folder of a training run, which has a config.yaml"),
        ("generate", "model", "{}: Hugging Face model; expected"),
        ("export", "model", "{}: Hugging Face model; expected"),
        ("evaluate", "run/adapter", "{}: adapter of jaxpeft; expected .*; the run is .*finished$"),
        ("report", "bare", "{}: training run without its configuration; expected"),
        ("report", "nowhere", "{}: no such folder"),
        ("export", "nowhere", "{}: no such folder"),
        ("chat", "empty", "{} holds neither an adapter of jaxpeft .*; it holds nothing"),
    ],
)
def test_what_is_no_run_folder_is_said(finished, model, tmp_path, capsys, command, place, said):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "adapter").symlink_to(finished / "adapter")
    path = {"model": model, "run/adapter": finished / "adapter"}.get(place, tmp_path / place)
    assert main([command, str(path), *([str(tmp_path / "out")] if command == "export" else [])]) == 1
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert re.match("error: " + said.format(re.escape(str(path))), err)


def test_export_writes_the_merged_model(finished, model, tmp_path, capsys):
    folder = tmp_path / "exported"
    assert main(["export", str(finished), str(folder), "--max-shard-size", "20KB"]) == 0
    assert str(folder) in capsys.readouterr().out.replace("\n", "")
    assert len(list(folder.glob("*.safetensors"))) > 1
    base, found = models.load(model), models.load(folder)
    expected = jaxpeft.merge(base.params, jaxpeft.load(finished / "adapter"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found.params, expected)
    assert found.tokenizer.chat_template == base.tokenizer.chat_template
    assert main(["export", str(finished), str(folder)]) == 1
    assert "error: " in (said := capsys.readouterr().err)
    assert "holds something already; choose another folder, or replace it: --overwrite" in said
    assert main(["export", str(finished), str(folder), "--overwrite", "--dtype", "bfloat16"]) == 0
    assert models.load(folder).config.param_dtype == "bfloat16"


def test_export_of_a_quantized_base(tmp_path, capsys):
    model = tiny.save_model(tmp_path / "wide", width=64)
    run = fit(model, tmp_path / "int8", "evaluate.exact_match_rows=null", "model.quantize=int8", "evaluate.choices=[]")
    assert 'jaxpeft.quantize.quantize(lm.params, "int8")' in (run / "README.md").read_text(encoding="utf-8")
    assert main(["export", str(run), str(tmp_path / "out")]) == 1
    assert "dequantize=True" in capsys.readouterr().err
    assert main(["export", str(run), str(tmp_path / "out"), "--dequantize"]) == 0
    assert models.load(tmp_path / "out").config.param_dtype == "float32"
    shutil.rmtree(tmp_path / "int8" / "adapter")
    assert main(["export", str(run), str(tmp_path / "other")]) == 1
    assert "no trained adapter yet" in capsys.readouterr().err
