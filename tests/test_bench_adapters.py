"""The benchmark of many adapters in one batch, at toy size."""

import json

import pytest
import tiny

from train.__main__ import main
from train.bench import adapters

MOS, LORA = "mos r=16 e=2", "lora r=16"


@pytest.mark.slow
def test_an_adapter_each(tmp_path, capsys) -> None:
    model = tiny.save_model(tmp_path / "model", layers=16)
    options = ["--adapters", "4", "--prompt", "6", "--new", "3", "--rounds", "1", "--out", str(tmp_path)]
    assert main(["bench", "adapters", "--model", str(model), *options]) == 0
    printed = capsys.readouterr().out
    found = json.loads((tmp_path / "adapters.json").read_text())
    rows = {row["name"]: row for row in found["rows"]}
    assert [name for name in adapters.entries(4, {}) if "torch" not in name] == [n for n in rows if "torch" not in n]
    for method in (LORA, MOS):
        many = rows[adapters.MANY.format(method)]
        assert many["difference"] <= 1e-5
        assert {len(many[f"{what}_seconds"]) for what in ("prefill", "decode", "train")} == {1}
        assert f"| {adapters.MANY.format(method)} |" in printed
    ins_and_outs = sum((32 + 32, 32 + 16, 32 + 16, 32 + 32, 32 + 64, 32 + 64, 64 + 32))
    assert rows[adapters.MANY.format(LORA)]["adapter_bytes"] == 4 * 16 * 16 * ins_and_outs + 7 * 16 * 4
    tables = 7 * 2 * 16 * 16 * 4 * 4  # groups, sides, layers, ranks, shards, int32
    assert rows[adapters.MANY.format(MOS)]["adapter_bytes"] == 4 * 16 * 2 * ins_and_outs + tables + 7 * 16 * 4
    mixed = rows[adapters.MIXED.format(f"{LORA} and {MOS}")]
    assert mixed["difference"] <= 1e-5
    assert (tmp_path / "adapters.png").read_bytes().startswith(b"\x89PNG")
    assert "(aim 0.9)" in (tmp_path / "adapters.md").read_text()


def test_mistakes(capsys) -> None:
    assert main(["bench", "adapters", "--adapters", "3", "--new", "1"]) == 2
    printed = capsys.readouterr().err
    assert "--adapters: an even number, at least 2, found 3" in printed
    assert "--new: at least 2, found 1" in printed
