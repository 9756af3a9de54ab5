"""Whole runs on a base in few bits."""

import json

import jax
import pytest
import tiny

from jaxpeft import quantize
from jaxpeft.blocks import is_quantized
from train import config, job
from train.__main__ import main

CONFIG = """
model: {name: MODEL, quantize: nf4}
method: {name: lora, rank: 2}
data: {source: synthetic, held_out_rows: 8, max_length: 128, buckets: 1}
optimizer: {learning_rate: 2e-2}
train: {steps: 4, batch_size: 8, evaluate_rows: 8, checkpoint_every: 2}
evaluate: {batch_size: 8, exact_match: whole, exact_match_rows: 8, max_new_tokens: 2}
output: {folder: FOLDER}
"""


@pytest.fixture
def path(tmp_path):
    model = tiny.save_model(tmp_path / "model", width=64)
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG.replace("MODEL", str(model)).replace("FOLDER", str(tmp_path / "run")))
    return path


def test_a_run_and_its_continuation(path, tmp_path, capsys) -> None:
    """Trains, generates, saves, is refused on the floats, and goes on from a checkpoint on the same base."""
    assert main(["fit", str(path), "train.steps=2"]) == 0
    run = tmp_path / "run"
    summary = json.loads((run / "summary.json").read_text())
    assert summary["eval_loss_after"] < summary["eval_loss_before"]
    capsys.readouterr()
    assert main(["evaluate", str(run)]) == 0
    assert f"eval_loss    {summary['eval_loss_after']:.4f}" in capsys.readouterr().out
    assert main(["evaluate", str(run), "model.quantize=null"]) == 1
    assert "another base" in capsys.readouterr().err


def test_shapes_are_those_of_the_few_bits(path, capsys) -> None:
    """So a dry run and a plan count the bytes that there will be."""
    kinds = ("nf4", "int8", "null")
    made = [job.subject(config.load(path, [f"model.quantize={kind}"]), weights=False).base for kind in kinds]
    sizes = [quantize.nbytes(base) for base in made]
    assert sizes == sorted(set(sizes))
    assert main(["fit", str(path), "--dry-run"]) == 0
    assert "memory per device" in capsys.readouterr().out


def test_mistakes(path, tmp_path, capsys) -> None:
    assert main(["fit", str(path), "model.quantize=nf5"]) == 2
    assert "model.quantize: " in capsys.readouterr().err
    assert main(["fit", str(path), "model.quantize=gguf"]) == 2
    assert "model.name: keep_blocks: " in capsys.readouterr().err
    narrow = tiny.save_model(tmp_path / "narrow", width=32)
    assert main(["fit", str(path), f"model.name={narrow}"]) == 2
    errors = capsys.readouterr().err
    assert "model.quantize: layers/mlp/gate_proj/kernel: block=64, expected" in errors
    assert "nearest: block=32, or exclude it (model.quantize_block, model.quantize_exclude)" in errors
    # The advice can be followed.
    settings = [f"model.name={narrow}", "model.quantize_block=32"]
    assert main(["fit", str(path), *settings, "--dry-run"]) == 0
    wide = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"]
    made = job.subject(config.load(path, [settings[0], f"model.quantize_exclude={wide}"]), weights=False).base
    assert {str(leaf.kind) for leaf in jax.tree.leaves(made, is_leaf=is_quantized) if is_quantized(leaf)} == {"nf4"}
    assert main(["fit", str(path), "model.quantize_block=7"]) == 2
    assert "block=7, expected an even divisor of the axis" in capsys.readouterr().err
    assert main(["fit", str(path), "model.quantize_exclude=nothing"]) == 2
    assert "model.quantize: " in capsys.readouterr().err
    for kind in ("null", "gguf"):
        assert main(["fit", str(path), f"model.quantize={kind}", "model.quantize_block=32"]) == 2
        assert "model: quantize_block has no effect with quantize=" in capsys.readouterr().err
