"""The benchmark of training steps, at toy size."""

import json

import tiny

from train.__main__ import main

CONFIG = """
model: {name: MODEL}
method: {name: lora, rank: 2}
data: {source: synthetic, held_out_rows: 8, max_length: 128, buckets: 1}
train: {steps: 2, batch_size: 8}
output: {folder: unused}
"""


def test_steps_side_by_side(tmp_path, capsys) -> None:
    model = tiny.save_model(tmp_path / "model")
    (tmp_path / "config.yaml").write_text(CONFIG.replace("MODEL", str(model)))
    figures = tmp_path / "figures.json"
    options = ["--rounds", "3", "--only", "lora r=2", "--json", str(figures)]
    assert main(["bench", "step", str(tmp_path / "config.yaml"), *options]) == 0
    printed = capsys.readouterr().out
    assert "frozen bound" in printed
    assert "x frozen" in printed
    rows = {row["name"]: row for row in json.loads(figures.read_text())["rows"]}
    assert rows.keys() == {"frozen bound", "lora r=2"}
    assert rows["frozen bound"]["trained_parameters"] == 0
    assert all(len(row["seconds"]) == 3 and row["tokens_per_second"] > 0 for row in rows.values())
    assert rows["lora r=2"]["gflops_by_xla"] > rows["frozen bound"]["gflops_by_xla"]


def test_an_unknown_adapter(tmp_path, capsys) -> None:
    (tmp_path / "config.yaml").write_text(CONFIG)
    assert main(["bench", "step", str(tmp_path / "config.yaml"), "--only", "lora r=3"]) == 2
    assert "--only: unknown adapter 'lora r=3'; expected one of lora r=2" in capsys.readouterr().err
