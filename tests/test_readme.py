"""The code in the documents runs as printed."""

import re
from pathlib import Path

import pytest


@pytest.mark.filterwarnings("error")
def test_the_api_example(tmp_path, monkeypatch, capsys) -> None:
    text = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile(example, "README.md", "exec"), names)
    printed = capsys.readouterr().out
    assert "layers/self_attn/q_proj/kernel" in printed
    assert "materialised" not in printed
    assert names["value"] < 5.0
    assert (names["again"].params["layers/mlp/up_proj/kernel"]["b"] != 0).any()


def test_meshes(tmp_path, monkeypatch) -> None:
    text = (Path(__file__).parents[1] / "docs" / "meshes.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile("\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL)), "meshes.md", "exec"), names)
    assert names["value"] < 7.0
    pool = names["params"]["layers/mlp/up_proj/kernel"]["b"]
    assert len(pool.sharding.device_set) == names["count"] == 8
    assert (pool != 0).any()
    by_replica = names["gradients"]["layers/mlp/up_proj/kernel"]["b"]
    assert len(by_replica) == 8
    assert (by_replica == by_replica[0]).all()
    assert (by_replica != 0).any()


def test_peft(tmp_path, monkeypatch, capsys) -> None:
    text = (Path(__file__).parents[1] / "docs" / "peft.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile("\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL)), "peft.md", "exec"), names)
    printed = capsys.readouterr().out.splitlines()
    assert f"print(report)  # {printed[0]}\n" in text
    assert 0 < float(printed[1]) <= (1 - 0.9) ** 0.5
    assert names["adapter"].spec.rank == 8
    assert names["stacked"].params["encoder/up/kernel"]["a"].shape == (12, 4, 8)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "stacked", "wide"]
