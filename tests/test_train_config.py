"""Configurations: every mistake at once, overrides, and a round trip."""

import re

import pytest

from train import config

VALID = """
model: {name: m}
method: {name: lora, rank: 2}
data: {source: synthetic}
train: {steps: 2}
output: {folder: runs/x}
"""


def problems(text, overrides=()):
    with pytest.raises(config.ConfigError) as error:
        config.parse(text, overrides)
    return error.value.problems


def test_valid_configuration_round_trips():
    parsed = config.parse(
        VALID, ["optimizer.learning_rate=2e-3", "sites.select=[a/kernel, b/kernel]", "sites.layers=[0, 2]"]
    )
    assert parsed.optimizer.learning_rate == 2e-3
    assert parsed.sites.select == ("a/kernel", "b/kernel")
    assert parsed.sites.layers == (0, 2)
    again = config.parse(config.dump(parsed))
    assert again == parsed
    assert config.as_dict(again) == config.as_dict(parsed)


def test_all_mistakes_are_listed_at_once_with_their_path():
    found = problems(
        """
        modle: {}
        model: {name: 3, dtyp: float32, dtype: float16}
        method: {name: mos, ranks: 3, alpha: x}
        data: {source: sst-like, max_length: "8", held_out_rows: true, batching: packs, columns: {promt: x}}
        train: {epochs: 2, steps: 3, batch_size: 7, accumulate: 2}
        optimizer: {learning_rate: 2e-3, schedule: foo, clip: -1}
        sites: {layers: [1, a], select: 3}
        evaluate: {choices: [a, a], exact_match_rows: 3}
        output:
        """,
        ["nonsense"],
    )
    text = "\n".join(found)
    for expected in (
        "nonsense: an override is written key=value",
        "modle: unknown section; did you mean model?",
        "model.name: expected a valid string, found 3",
        "model.dtyp: unknown key; did you mean dtype?",
        "model.dtype: expected 'float32' or 'bfloat16', found 'float16'",
        "method.ranks: unknown key; did you mean rank?",
        "method.alpha: expected a valid number, found 'x'",
        "method.rank: missing",
        "data.max_length: expected a valid integer, found '8'",
        "data.held_out_rows: expected a valid integer, found True",
        "data.batching: expected 'buckets', 'pad' or 'pack', found 'packs'",
        "data.columns: expected 'messages'",
        "train.steps: give either steps or epochs, not both",
        "train.accumulate: 2 does not divide train.batch_size 7",
        "optimizer.schedule: expected 'linear', 'cosine' or 'constant', found 'foo'",
        "optimizer.clip: expected greater than or equal to 0, found -1",
        "sites.layers: expected a valid integer",
        "evaluate.choices: the same answer is given twice",
        "evaluate.exact_match_rows: has no effect",
        "output.folder: missing",
    ):
        assert expected in text
    assert len(found) == len(set(found))


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        (
            "{name: lora, rank: 0, naem: 1}",
            ["method.naem: unknown key; did you mean name?", "method: lora.Spec: rank=0, expected at least 1"],
        ),
        ("{name: lora, rank: 2, xyz: 1}", ["method.xyz: unknown key; expected one of alpha, .*, rank, name$"]),
        # What a misspelt key says is not known, so neither is whether the others go with it.
        (
            "{name: mos, rank: 8, equivalent_rank: 1, private_rnak: 0}",
            ["method.private_rnak: unknown key; did you mean private_rank?"],
        ),
    ],
)
def test_values_of_a_method_are_checked_beside_unknown_keys(method, expected):
    found = problems(VALID.replace("{name: lora, rank: 2}", method))
    assert len(found) == len(expected)
    assert all(re.match(line.replace("?", r"\?"), problem) for line, problem in zip(expected, found, strict=True))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("- 1", "expected a mapping of sections, found list"),
        ("model: {", "not valid YAML"),
        ("model: {name: a, name: b}", "'name' is given twice"),
        (VALID.replace("lora", "lroa"), "method.name: unknown method 'lroa'; did you mean lora?"),
        (VALID.replace("{name: lora, rank: 2}", "{rank: 2}"), "method.name: missing; one of "),
        (VALID.replace("steps: 2", "batch_size: 2"), "train.steps: missing; give steps or epochs"),
        (VALID.replace("rank: 2", "rank: -2"), "rank=-2"),
        (VALID.replace("output: {folder: runs/x}", ""), "output: missing section"),
        (VALID.replace("{steps: 2}", "7"), "train: expected a mapping, found 7"),
    ],
)
def test_single_mistakes(text, expected):
    assert expected in "\n".join(problems(text))


def test_overrides_are_typed_as_yaml():
    parsed = config.parse(
        VALID, ["data.train_rows=null", "evaluate.choices=[right, wrong]", "train.seed=3", "output.folder=a=b"]
    )
    assert parsed.data.train_rows is None
    assert parsed.train.seed == 3
    assert parsed.output.folder == "a=b"


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.steps", "written key=value"),
        ("train.steps=[", "train.steps: '[' is not valid YAML"),
        ("train.steps.x=1", "train.steps.x: steps is not a section"),
        ("train.stpes=1", "train.stpes: unknown key; did you mean steps?"),
    ],
)
def test_wrong_overrides(override, expected):
    assert expected in "\n".join(problems(VALID, [override]))


def test_unreadable_file(tmp_path):
    with pytest.raises(config.ConfigError, match="cannot read the file"):
        config.load(tmp_path / "missing.yaml")
