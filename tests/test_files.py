"""A file or a folder appears whole, and what it cannot replace stays."""

from pathlib import Path

import pytest

from jaxpeft.files import whole


def test_what_cannot_be_replaced_stays(tmp_path, monkeypatch) -> None:
    target = tmp_path / "model"
    target.mkdir()
    (target / "old").touch()
    rename = Path.rename

    def refuse(path, to):
        if path.name == "partial":
            raise PermissionError("the folder is read-only")
        return rename(path, to)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(PermissionError), whole(target, replace=True) as partial:
        partial.mkdir()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert (target / "old").exists()
