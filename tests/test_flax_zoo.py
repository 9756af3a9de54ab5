"""Models of other libraries are adapted as docs/models.md says; those here that need nothing more than the tests do."""

import re

import flax_zoo
import pytest
from foreign import MODELS

import jaxpeft

HERE = [name for name, model in MODELS.items() if model.package not in ("transformers", "tunix", "haiku")]


@pytest.mark.parametrize("name", HERE)
def test_a_model_of_another_library(name) -> None:
    pytest.importorskip(
        MODELS[name].package, reason=f"{MODELS[name].package} is not installed: pip install -e '.[test]'"
    )
    made = flax_zoo.measure(MODELS[name])
    assert not any(made.materialized.values())
    assert max(made.merge_error.values()) < 1e-4
    assert made.trains, (made.losses, made.untouched)
    assert flax_zoo.row(name, MODELS[name], made) in flax_zoo.PAGE.read_text(encoding="utf-8")


def test_the_table_has_a_row_for_every_model_and_no_other() -> None:
    page = flax_zoo.PAGE.read_text(encoding="utf-8").split(flax_zoo.BEGIN)[1].split(flax_zoo.END)[0]
    rows = [line.split(" | ")[0].removeprefix("| ") for line in page.splitlines() if line.startswith("| ")]
    assert rows == [flax_zoo.HEADER[0], *MODELS]
    assert "**no**" not in page


def test_a_bad_answer_is_a_no() -> None:
    good = flax_zoo.Measured(
        jaxpeft.Sites(()), True, {"lora": ()}, {"lora": 1e-6}, {"lora": 0.5}, {"lora": (1.0, 0.5)}, {}
    )
    assert (good.fused, good.merges, good.trains) == (True, True, True)
    for field, value in {
        "materialized": {"lora": ("up/kernel",)},
        "merge_error": {"lora": 1e-2},
        "moved": {"lora": 0.0},
        "losses": {"lora": (1.0, 0.95)},
        "untouched": {"lora": ["a"]},
    }.items():
        bad = flax_zoo.Measured(**{**vars(good), field: value})
        assert [bad.fused, bad.merges, bad.trains].count(False) == 1, field


def test_the_page_prints_what_it_shows(capsys) -> None:
    page = flax_zoo.PAGE.read_text(encoding="utf-8")
    example, shown = re.search(r"```python\n(.*?)```\n\n```\n(.*?)```", page, re.DOTALL).groups()
    exec(compile(example, "models.md", "exec"), {})
    assert capsys.readouterr().out == shown
