"""The README's example runs as printed."""

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
