"""Every method from a configuration; the table of methods, and its pages."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import tiny
from rich.console import Console

import jaxpeft
from jaxpeft.methods import METHODS, TYPICAL
from train import config as configuration
from train import fit, job, methods
from train.__main__ import main

ROOT = Path(__file__).parents[1]
CONFIG = """
model: {name: MODEL}
method: METHOD
sites: {select: [q_proj, down_proj, norm/scale]}
data: {source: synthetic, held_out_rows: 12, max_length: 128, buckets: 1}
optimizer: {learning_rate: 2e-2}
train: {steps: 5, batch_size: 16}
output: {folder: FOLDER}
"""
ADALORA = "{name: adalora, rank: 3, target_rank: 1}"
MIXED = f"{{name: mixed, default: {ADALORA}, overrides: {{norm/scale: {{name: full}}}}}}"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.save_model(tmp_path_factory.mktemp("model") / "tiny")


def parse(model, folder, method, *overrides):
    text = CONFIG.replace("MODEL", str(model)).replace("FOLDER", str(folder)).replace("METHOD", method)
    return configuration.parse(text, overrides)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_configured_and_written_back(name) -> None:
    fields = TYPICAL[name].to_dict()
    fields["name"] = fields.pop("method")
    config = parse("m", "runs/x", json.dumps(fields))
    assert config.method == TYPICAL[name]
    assert configuration.parse(configuration.dump(config)) == config


@pytest.fixture(scope="module")
def trained(model, tmp_path_factory):
    """A run in which AdaLoRA chooses its ranks while a norm is trained whole."""
    folder = tmp_path_factory.mktemp("run") / "mixed"
    settings = ("optimizer.allocator={initial_steps: 1, final_steps: 2}", "optimizer.orthogonality=0.1")
    config = parse(model, folder, MIXED, *settings, "optimizer.rates={b: 4, w: 0.5}")
    return jaxpeft.load(fit.fit(config, Console(quiet=True)) / "adapter")


def test_ranks_are_chosen_in_the_step_and_a_norm_is_trained_next_to_them(trained) -> None:
    live = jaxpeft.allocate.ranks(trained)
    weights = sum(group.layers for group in trained.sites if "i" in group.layout)
    assert sum(int(ranks.sum()) for ranks in live.values()) == weights
    assert bool(trained.params["norm/scale"]["w"].any())


@pytest.mark.parametrize(
    ("method", "override", "problem"),
    [
        ("{name: lora, rank: 2}", "optimizer.rates={bb: 4}", "optimizer: no trained array is called 'bb'"),
        ("{name: lora, rank: 2}", "optimizer.orthogonality=0.1", "optimizer: "),
        ("{name: sora, rank: 2}", "train.steps=5", "optimizer.allocator: .*threshold"),
        (ADALORA, "optimizer.allocator={evry: 2}", "optimizer.allocator: .*evry"),
        ("{name: rows, indices: [4000]}", "train.steps=5", "method: rows.Spec: indices"),
        ("{name: mixed, default: {name: lora, rnak: 2}, overrides: {}}", "train.steps=5", "method: .*'rnak'"),
    ],
)
def test_mistakes(model, tmp_path, method, override, problem) -> None:
    with pytest.raises(configuration.ConfigError, match=problem):
        job.assemble(parse(model, tmp_path, method, "sites.select=[q_proj]", override))


def test_the_table(model, capsys) -> None:
    assert main(["methods", "--model", str(model), "--parameters", "2000", "--method", "mos", "--method", "ia3"]) == 0
    head, mos, ia3, total = capsys.readouterr().out.splitlines()
    assert head.split()[:3] == ["method", "formula", "setting"]
    assert "equivalent_rank=" in mos
    assert "arXiv 2410.00938" in mos
    assert ia3.startswith("ia3 ")
    assert "base parameters at 7 kinds of weights" in total
    assert main(["methods", "--model", str(model), "--method", "moss"]) == 2
    assert "unknown method 'moss'; did you mean 'mos'? known: " in capsys.readouterr().err


@pytest.mark.parametrize("name", METHODS)
def test_the_pages_are_those_of_the_docstrings(name) -> None:
    page = ROOT / "docs" / "methods" / f"{name}.md"
    assert page.read_text(encoding="utf-8") == methods.page(name), "run: python -m train methods --pages docs/methods"


@pytest.mark.parametrize("name", METHODS)
def test_a_page_has_every_field_once(name) -> None:
    listed = re.findall(r"^- `(\w+)` \(.*?(?:required|default `)", methods.page(name), re.MULTILINE)
    assert sorted(listed) == sorted(field.name for field in dataclasses.fields(METHODS[name].Spec))


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("lora", "- `rank` (`int`; required): r."),
        ("lora", "- `alpha` (`float`; default `16.0`): the update"),
        ("fourierft", "- `alpha` (`float`; default `300.0`): the paper's scaling"),  # its own words for it
        ("mos", "- `rank` (`int` or `None`; required): r, the rank"),
        ("mos", "- `scaling` (`'none'`, `'frozen'` or `'trained'`; default `'none'`): a vector"),
        ("sora", "- `rank` (`int`; required): r, the ranks"),  # of the class that it shares with others
        ("surm_block", "- `product` (`'hadamard'`, `'matmul'`, `'single'` or `None`; default `None`): of the first"),
        ("superlora", "- `groups` (`int` or `'weight'`; required): G"),
        ("mixed", "- `default` (required): the spec"),
    ],
)
def test_a_page_says_what_a_field_may_be(name, line) -> None:
    assert f"\n{line}" in methods.page(name)


def test_the_table_of_methods_names_every_one() -> None:
    page = (ROOT / "docs" / "methods" / "index.md").read_text(encoding="utf-8")
    assert [name for name in METHODS if f"[`{name}`]({name}.md)" not in page] == []
