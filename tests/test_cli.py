"""The command line on files: what it says, what it writes, and how it ends."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from moved import moved

import jaxpeft
from jaxpeft import models
from jaxpeft.checkpoint import Checkpoints
from jaxpeft.cli import main
from jaxpeft.fingerprint import fingerprint
from jaxpeft.methods import ia3, lora, mos

MOS = mos.Spec(rank=3, equivalent_rank=2, private_rank=1, shards_per_vector=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Adapters of one tiny model, as files: mos, other (a second one), ia3, run (a run folder)."""
    folder = tmp_path_factory.mktemp("files")
    lm = models.load(tiny.save_model(folder / "model"))
    for name, spec, seed in (("mos", MOS, 1), ("other", lora.Spec(rank=2), 2), ("ia3", ia3.Spec(), 3)):
        sites = jaxpeft.find(lm.params, ["q_proj", "down_proj"])
        adapter = moved(jaxpeft.init(jax.random.key(seed), spec, sites), 0.1, seed)
        jaxpeft.save(folder / name, adapter, base=lm.params, extra={"epoch": seed})
        if name == "mos":
            jaxpeft.save(folder / "run" / "adapter", adapter, base=lm.params)
            (folder / "run" / "summary.json").write_text('{"loss_before": 2.0, "loss_after": 1.0, "steps": 5}')
    return folder


@pytest.fixture(scope="module")
def lm(folder):
    return models.load(folder / "model")


def call(capsys, *arguments, code=0):
    """What a command prints with --json, after its exit code."""
    assert main([*map(str, arguments), "--json"]) == code
    out, err = capsys.readouterr()
    assert not err
    return json.loads(out)


def refused(capsys, *arguments):
    """The one line of an error."""
    assert main([*map(str, arguments)]) == 2
    out, err = capsys.readouterr()
    assert not out
    assert err.startswith(f"jaxpeft {arguments[0]}: error: ")
    assert err.count("\n") == 1
    return err


def deltas(folder, lm):
    return jaxpeft.delta(jaxpeft.load(folder, base=lm.params), lm.params)


def close(found, expected):
    assert found.keys() == expected.keys()
    for path, delta in expected.items():
        np.testing.assert_allclose(found[path], delta, atol=1e-5)


# --- inspect ---


def test_inspect_an_adapter(capsys, folder, lm):
    found = call(capsys, "inspect", folder / "mos")
    adapter = jaxpeft.load(folder / "mos")
    assert (found["kind"], found["method"], found["steps"]) == ("adapter", "mos", [0])
    assert found["spec"] == MOS.to_dict()
    assert found["parameters"] == jaxpeft.count(adapter)
    assert found["bytes"] == jaxpeft.summary(adapter).stored_bytes
    assert found["base"] == fingerprint(lm.params)
    assert found["extra"] == {"epoch": 1}
    assert [(site["group"], site["in"], site["out"]) for site in found["sites"]] == [
        ("layers/mlp/down_proj/kernel", 64, 32),
        ("layers/self_attn/q_proj/kernel", 32, 32),
    ]
    assert "arrays" not in found
    arrays = call(capsys, "inspect", folder / "mos", "--arrays")["arrays"]
    name, leaf = "layers/mlp/down_proj/kernel", adapter.params["layers/mlp/down_proj/kernel"]["a"]
    assert arrays[f"params/{name}/a"] == {
        "shape": list(leaf.shape),
        "dtype": "float32",
        "norm": pytest.approx(float(np.linalg.norm(leaf))),
    }
    assert arrays[f"constants/{name}/a_index"]["dtype"] == "int32"
    assert main(["inspect", str(folder / "mos"), "--arrays"]) == 0
    text = capsys.readouterr().out
    assert str(jaxpeft.summary(adapter)) in text
    assert f"params/{name}/a" in text


def test_inspect_a_run_and_its_checkpoints(capsys, folder, tmp_path):
    found = call(capsys, "inspect", folder / "run")
    assert (found["kind"], found["adapter"]) == ("run", str(folder / "run" / "adapter"))
    assert found["measured"] == {"loss_before": 2.0, "loss_after": 1.0}
    adapter = jaxpeft.load(folder / "mos")
    with Checkpoints(tmp_path / "checkpoints", asynchronous=False) as checkpoints:
        for step in (2, 4):
            checkpoints.save(step, adapter, metrics={"loss": 1.5})
    unfinished = call(capsys, "inspect", tmp_path)
    assert (unfinished["kind"], unfinished["steps"], unfinished["base"]) == ("run", [2, 4], None)
    assert unfinished["metrics"] == {"loss": 1.5}
    said = refused(capsys, "inspect", tmp_path / "checkpoints" / "4")
    assert f"the adapter is {tmp_path / 'checkpoints'}" in said


def test_inspect_a_model(capsys, folder, lm):
    found = call(capsys, "inspect", folder / "model")
    assert (found["kind"], found["architecture"], found["dtype"]) == ("model", "llama", "float32")
    assert found["parameters"] == lm.num_params
    assert found["bytes"] == (folder / "model" / "model.safetensors").stat().st_size
    assert len(found["sites"]) == 7
    arrays = call(capsys, "inspect", folder / "model", "--arrays")
    assert arrays["fingerprint"] == fingerprint(lm.params)
    norm = arrays["arrays"]["embed/embedding"]["norm"]
    assert norm == pytest.approx(float(np.linalg.norm(lm.params["embed"]["embedding"])), rel=1e-5)


# --- merge ---


def test_merge(capsys, folder, lm, tmp_path):
    found = call(capsys, "merge", folder / "model", folder / "run", tmp_path / "out", "--max-shard-size", "30KB")
    assert "model.safetensors.index.json" in found["files"]
    merged = models.load(tmp_path / "out")
    expected = jaxpeft.merge(lm.params, jaxpeft.load(folder / "mos"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), merged.params, expected)
    assert merged.tokenizer.chat_template == lm.tokenizer.chat_template
    assert "holds something already" in refused(capsys, "merge", folder / "model", folder / "mos", tmp_path / "out")
    call(capsys, "merge", folder / "model", folder / "mos", tmp_path / "out", "--overwrite", "--dtype", "bfloat16")
    assert models.load(tmp_path / "out").config.param_dtype == "bfloat16"
    other = tiny.save_model(tmp_path / "stranger", seed=9)
    assert "of another base" in refused(capsys, "merge", other, folder / "mos", tmp_path / "new")
    assert "is a model; expected an adapter" in refused(capsys, "merge", other, other, tmp_path / "new")
    assert not (tmp_path / "new").exists()


# --- convert ---


def test_convert_to_lora(capsys, folder, lm, tmp_path):
    found = call(capsys, "convert", folder / "mos", tmp_path / "lora", "--to", "lora")
    assert (found["spec"]["method"], found["spec"]["rank"]) == ("lora", 3)
    close(deltas(tmp_path / "lora", lm), deltas(folder / "mos", lm))
    cut = call(capsys, "convert", folder / "mos", tmp_path / "cut", "--to", "lora", "--rank", "1")
    assert "relative error up to" in cut["report"]
    assert jaxpeft.load(tmp_path / "cut").spec.rank == 1
    said = refused(capsys, "convert", folder / "ia3", tmp_path / "ia3", "--to", "lora", "--rank", "4")
    assert "depends on the weight it changes" in said
    call(
        capsys, "convert", folder / "ia3", tmp_path / "ia3", "--to", "lora", "--rank", "32", "--model", folder / "model"
    )
    close(deltas(tmp_path / "ia3", lm), deltas(folder / "ia3", lm))
    said = refused(capsys, "convert", folder / "mos", tmp_path / "cut", "--to", "lora")
    assert "holds something already; choose another folder, or replace it: --overwrite" in said
    call(capsys, "convert", folder / "mos", tmp_path / "cut", "--to", "jaxpeft", "--overwrite")
    assert jaxpeft.load(tmp_path / "cut").spec == MOS


def test_convert_to_peft_and_back(capsys, folder, lm, tmp_path):
    found = call(capsys, "convert", folder / "mos", tmp_path / "peft", "--to", "peft", "--model", folder / "model")
    assert "lossless" in found["report"]
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["base_model_name_or_path"]) == ("LORA", str(folder / "model"))
    inspected = call(capsys, "inspect", tmp_path / "peft", "--arrays")
    assert (inspected["kind"], inspected["method"], inspected["spec"]) == ("peft", "LORA", config)
    assert inspected["parameters"] == sum(int(np.prod(row["shape"])) for row in inspected["arrays"].values())
    assert all(row["norm"] > 0 for row in inspected["arrays"].values())
    assert "pass --model" in refused(capsys, "convert", tmp_path / "peft", tmp_path / "back", "--to", "jaxpeft")
    call(capsys, "convert", tmp_path / "peft", tmp_path / "back", "--to", "jaxpeft", "--model", folder / "model")
    close(deltas(tmp_path / "back", lm), deltas(folder / "mos", lm))
    call(capsys, "convert", folder / "mos", tmp_path / "named", "--to", "peft", "--base-model", "owner/name")
    assert "owner/name" in (tmp_path / "named" / "adapter_config.json").read_text()
    same = call(capsys, "diff", folder / "mos", tmp_path / "peft", "--model", folder / "model")
    assert same["same"] is True
    (tmp_path / "peft" / "adapter_model.safetensors").write_bytes(b"short")
    assert "damaged or incomplete (5 bytes)" in refused(capsys, "inspect", tmp_path / "peft")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--to", "peft"], "pass --model, or --base-model"),
        (["--to", "jaxpeft", "--rank", "2"], "--rank and --energy cut to LoRA"),
        (["--to", "lora", "--dtype", "bfloat16"], "are of PEFT's files"),
        (["--to", "lora", "--rank", "2", "--energy", "0.9"], "give one of the two"),
        (["--to", "lora", "--energy", "2"], "expected a share"),
    ],
)
def test_convert_refuses(capsys, folder, tmp_path, options, message):
    assert message in refused(capsys, "convert", folder / "mos", tmp_path / "out", *options)
    assert not list(tmp_path.iterdir())


# --- combine ---


def test_combine(capsys, folder, lm, tmp_path):
    pair = [folder / "mos", folder / "other"]
    found = call(capsys, "combine", tmp_path / "both", *pair, "--weights", "0.75,-0.5")
    assert found["spec"]["method"] == "lora"
    one, two = (deltas(path, lm) for path in pair)
    close(deltas(tmp_path / "both", lm), {path: 0.75 * one[path] - 0.5 * two[path] for path in one})
    for method in ("dare_ties", "magnitude_prune"):
        options = ["--method", method, "--density", "0.5", "--seed", "3", "--rank", "4"]
        call(capsys, "combine", tmp_path / method, *pair, *options)
        again = call(capsys, "combine", tmp_path / method, *pair, *options, "--overwrite")
        assert again["spec"]["rank"] == 4
    assert "3 weights for 2 adapters" in refused(capsys, "combine", tmp_path / "x", *pair, "--weights", "1,1,1")
    assert "density" in refused(capsys, "combine", tmp_path / "x", *pair, "--method", "ties")
    stranger = jaxpeft.load(folder / "other")
    jaxpeft.save(tmp_path / "stranger", stranger, base_fingerprint="f" * 32)
    said = refused(capsys, "combine", tmp_path / "x", folder / "mos", tmp_path / "stranger")
    assert "different bases" in said
    assert fingerprint(lm.params) in said
    assert not (tmp_path / "x").exists()


# --- diff ---


def test_diff(capsys, folder, lm, tmp_path):
    assert call(capsys, "diff", folder / "mos", folder / "run")["same"] is True
    found = call(capsys, "diff", folder / "mos", folder / "other", code=1)
    one, two = (deltas(folder / name, lm) for name in ("mos", "other"))
    for row in found["groups"]:
        x, y = (np.asarray(tree[row["name"]], np.float64).ravel() for tree in (one, two))
        assert row["weights"] == 2
        assert row["relative"] == pytest.approx(np.linalg.norm(x - y) / np.linalg.norm(x), rel=1e-4)
        assert row["cosine"] == pytest.approx(x @ y / np.linalg.norm(x) / np.linalg.norm(y), abs=1e-5)
    assert found["spec"]["method"] == ["mos", "lora"]
    assert found["only_in_a"] == found["only_in_b"] == {}
    near = jaxpeft.load(folder / "mos")
    jaxpeft.save(tmp_path / "near", near.replace(params=jax.tree.map(lambda leaf: leaf * 1.001, near.params)))
    assert main(["diff", str(folder / "mos"), str(tmp_path / "near")]) == 1
    assert capsys.readouterr().out.endswith("different within 1e-06\n")
    assert main(["diff", str(folder / "mos"), str(tmp_path / "near"), "--tolerance", "0.01"]) == 0
    assert capsys.readouterr().out.endswith("same within 0.01\n")


def test_diff_of_other_sites(capsys, folder, lm, tmp_path):
    sites = jaxpeft.find(lm.params, ["q_proj", "v_proj"], layers=[1])
    jaxpeft.save(tmp_path / "fewer", moved(jaxpeft.init(jax.random.key(0), lora.Spec(rank=2), sites), 0.1))
    jaxpeft.save(tmp_path / "zero", jaxpeft.init(jax.random.key(0), lora.Spec(rank=2), sites))
    found = call(capsys, "diff", folder / "other", tmp_path / "fewer", code=1)
    assert found["only_in_a"] == {"layers/mlp/down_proj/kernel": 2, "layers/self_attn/q_proj/kernel": 1}
    assert found["only_in_b"] == {"layers/self_attn/v_proj/kernel": 1}
    assert [(row["name"], row["weights"]) for row in found["groups"]] == [("layers/self_attn/q_proj/kernel", 1)]
    found = call(capsys, "diff", tmp_path / "zero", tmp_path / "fewer", code=1)
    assert [(row["relative"], row["cosine"]) for row in found["groups"]] == [(None, None)] * 2
    assert call(capsys, "diff", tmp_path / "zero", tmp_path / "zero")["same"] is True
    assert "pass base=" in refused(capsys, "diff", folder / "ia3", folder / "mos")
    assert call(capsys, "diff", folder / "ia3", folder / "ia3", "--model", folder / "model")["same"] is True


# --- the shell ---


def test_what_is_no_adapter_is_said_in_one_line(capsys, folder, tmp_path):
    assert "no such folder" in refused(capsys, "inspect", tmp_path / "nowhere")
    (tmp_path / "notes.txt").write_text("")
    assert "it holds notes.txt" in refused(capsys, "inspect", tmp_path)
    shutil.copytree(folder / "mos", tmp_path / "damaged")
    shutil.rmtree(tmp_path / "damaged" / "0" / "params")
    assert "damaged" in refused(capsys, "inspect", tmp_path / "damaged")
    said = refused(capsys, "merge", "smollm2-135m-instrukt", folder / "mos", tmp_path / "out")
    assert "did you mean 'smollm2-135m-instruct'?" in said


@pytest.mark.parametrize("command", ["inspect", "merge", "convert", "combine", "diff"])
def test_help_shows_an_example(capsys, command):
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    assert f"example:\n  jaxpeft {command} " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("", "jaxpeft: error: the following arguments are required: command; see jaxpeft --help"),
        ("merg", "jaxpeft: error: argument command: unknown 'merg'; did you mean 'merge'? known: inspect, merge, "),
        ("diff one", "jaxpeft diff: error: the following arguments are required: B; see jaxpeft diff --help"),
        ("diff one two --tolerence 1", "jaxpeft: error: unrecognized arguments: --tolerence 1; see jaxpeft --help"),
        ("combine o a --weights 1,x", "jaxpeft combine: error: argument --weights: '1,x': expected numbers"),
        ("combine o a --method tyes", "argument --method: unknown 'tyes'; did you mean 'ties'? known: linear, "),
        ("convert a o --to pft", "argument --to: unknown 'pft'; did you mean 'peft'? known: peft, jaxpeft, lora; see"),
        ("merge m a o --dtype int8", "argument --dtype: unknown 'int8'; known: "),
    ],
)
def test_mistakes_in_the_command(capsys, arguments, said):
    with pytest.raises(SystemExit) as ended:
        main(arguments.split())
    assert ended.value.code == 2
    out, err = capsys.readouterr()
    assert said in err
    assert (out, err.count("\n")) == ("", 1)


def test_from_a_shell(folder, tmp_path):
    def shell(*arguments):
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
        run = subprocess.run(
            [sys.executable, "-m", "jaxpeft", *arguments], cwd=folder, env=environment, capture_output=True, text=True
        )
        return run.returncode, run.stdout, run.stderr

    code, out, err = shell("diff", "mos", "run", "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["same"] is True
    assert shell("diff", "mos", "other")[0] == 1
    code, out, err = shell("inspect", "nothing")
    assert (code, out, err) == (2, "", "jaxpeft inspect: error: nothing: no such folder\n")
