"""Plans: memory, arithmetic and links of the real step, from shapes, for machines that are not there."""

import importlib.util
import json
import os
import re
from pathlib import Path

import jax
import pytest
import tiny

from jaxpeft import models
from train import config as configuration
from train import job, plan, plan_text, topology
from train.__main__ import main

CONFIGS = Path(__file__).parents[1] / "configs"
KEYS = "fits peak_bytes argument_bytes temporary_bytes flops ici_bytes roofline_seconds compile_seconds"
MORE = "collectives memory_bytes trained mesh buffers remedies bound tokens_per_second"
CONFIG = """
model: {name: MODEL, remat: full}
method: {name: mos, rank: 3, equivalent_rank: 2, private_rank: 1, shards_per_vector: 2}
data: {source: synthetic, max_length: 65}
train: {steps: 6, batch_size: 16}
output: {folder: unused}
"""

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: pip install 'jaxpeft[plan]'"
)


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """The command prepares the environment for JAX, which in this process has its devices; others should not see it."""
    jax.devices()
    for name in ("JAX_PLATFORMS", "XLA_FLAGS"):
        monkeypatch.setenv(name, os.environ[name])


@pytest.fixture
def path(tmp_path):
    """A configuration of a tiny model."""
    model = tiny.save_model(tmp_path / "tiny")
    (tmp_path / "config.yaml").write_text(CONFIG.replace("MODEL", str(model)))
    return tmp_path / "config.yaml"


def big():
    """The quickstart's model with a batch of rows of 2049 tokens; no files are read."""
    text = CONFIG.replace("MODEL", "smollm2-135m-instruct").replace("remat: full", "dtype: bfloat16")
    return configuration.parse(text, ["data.max_length=2049", "train.batch_size=32"])


def test_a_plan_of_simulated_devices(path, capsys):
    assert main(["plan", str(path), "mesh.tensor=2", "--cpu", "8", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found.keys() >= set(f"{KEYS} {MORE}".split())
    assert found["mesh"] == {"data": 1, "fsdp": 4, "sequence": 1, "tensor": 2}
    assert found["fits"]
    assert found["roofline_seconds"] is None
    assert 0 < found["temporary_bytes"] < found["peak_bytes"] + found["temporary_bytes"]
    assert found["ici_bytes"] == sum(found["collectives"].values()) > 0
    # The devices share the work evenly.
    assert main(["plan", str(path), "mesh.tensor=1", "--cpu", "1", "--json"]) == 0
    assert 8 * found["flops"] == pytest.approx(json.loads(capsys.readouterr().out)["flops"], rel=0.05)


def test_a_plan_holds_what_a_dry_run_says(path, capsys):
    """The same step: the arguments of a plan are those of a run on the same devices."""
    assert main(["plan", str(path), "--cpu", "8"]) == 0
    text = capsys.readouterr().out
    assert "fsdp 8" in text
    assert re.search(r"peak +0\.0\d GiB of .* fits", text)


def test_a_table_over_methods(path, capsys):
    assert main(["plan", str(path), "--cpu", "2", "--methods", "mos,lora,full"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("|")[3].strip() for line in lines[2:]] == ["mos", "lora", "full"]
    assert all(" yes " in line for line in lines[2:])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["mesh.tensor=3", "--cpu", "8"], "mesh: data 1 x fsdp -1 x sequence 1 x tensor 3 does not fit 8 devices"),
        (["mesh.tensor=3", "--cpu", "8"], "that are not -1 must divide 8 (the nearest that does: 2)"),
        (["mesh.fsdp=3", "--cpu", "8"], "does not fit 8 devices; the product of the sizes must be 8; one of them may"),
        ([f"mesh.tensor={10**20}", "--cpu", "8"], "must divide 8 (the nearest that does: 8)"),
        ([f"mesh.fsdp={10**20}", "--cpu", "8"], "the product of the sizes must be 8; one of them may be -1"),
        (["train.batch_size=3", "--cpu", "8"], "train.batch_size: 3 sequences at a time"),
        (["--topology", "v5e:3x3"], "v5e:3x3 is no slice of v5e; the nearest are v5e:2x4, v5e:4x4"),
        (["--cpu", "8", "--methods", "mos,mosh"], "--methods: unknown method 'mosh'; did you mean 'mos'"),
        (["--cpu", "8", "--topology", "v5e:2x2"], "give --topology or --cpu"),
        (["--cpu", "5000"], "--cpu: cpu:5000: asks for 5,000 chips; expected at most 4,096"),
        (["--topology", "cpu:0"], "--topology: 'cpu:0' is no topology"),
        (["--topology", "cuda:1x1x0"], "--topology: 'cuda:1x1x0' is no topology"),
        (["--topology", "v5e:999999x99999"], "--topology: v5e:999999x99999: asks for 99,998,900,001 chips"),
        (["--topology", f"v5e:{'9' * 5000}"], "is no topology; expected a generation and a shape"),
        (["--topology", "v5e:2x2", "--topology", ""], "--topology: '' is no topology"),
    ],
)
def test_mistakes_are_named(path, arguments, message, capsys):
    assert main(["plan", str(path), *arguments]) == 2
    assert message in capsys.readouterr().err
    # XLA ends the process where this is no number, or prints all its flags.
    assert 1 <= int(os.environ["XLA_FLAGS"].rpartition("=")[2]) <= topology.MOST


@pytest.mark.parametrize("count", ["0", "-1", "00", "1.5", "x", "", "9" * 5000])
def test_a_count_is_positive(path, count, capsys):
    before = os.environ["XLA_FLAGS"]
    with pytest.raises(SystemExit, match="2"):
        main(["plan", str(path), "--cpu", count])
    errors = capsys.readouterr().err
    assert f"argument --cpu: expected a whole number from 1 to 999999999, found {count!r}" in errors
    assert os.environ["XLA_FLAGS"] == before


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_configurations_train_what_their_header_says(path):
    config = configuration.load(path)
    mesh = topology.mesh(topology.cpu(8), {"data": 1, "fsdp": 8, "sequence": 1, "tensor": 1})
    if config.model.name not in models.ARCHITECTURES:
        pytest.fail(f"{config.model.name} needs files")
    subject = job.of_shapes(config, mesh)
    count = sum(leaf.size for leaf in jax.tree.leaves(subject.adapter.params))
    if stated := re.search(r"([\d,]{5,})\s+trained", path.read_text().replace("\n#", "")):
        assert count == int(stated[1].replace(",", ""))


def test_remedies_are_tried_on_top_of_each_other(path, monkeypatch):
    """Until one fits; the mesh changes as a whole, and what cannot be is left out."""
    monkeypatch.setattr(plan._Step, "available", 1.0)
    config = configuration.load(path, ["mesh.data=4", "mesh.fsdp=2", "model.remat=none", "train.batch_size=8"])
    changes = [list(change) for change in plan._changes(config, topology.cpu(8))]
    assert changes == [["model.remat"], ["mesh.data", "mesh.fsdp"], ["model.quantize"], ["data.max_length"]]
    found = plan.plan(config, topology.cpu(8))
    assert not found.fits
    said = [change for change, peak, fits in found.remedies if peak and not fits]
    assert said[:2] == ["model.remat=full", "model.remat=full mesh.data=1 mesh.fsdp=-1"]
    assert said[-1].endswith("data.max_length=33")
    # The model is 32 wide, and blocks are of 64.
    assert not any("nf4" in change for change in said)
    assert "too much" in plan_text.page(found)


@needs_libtpu
@pytest.mark.topology
def test_a_tpu_slice(path):
    """The tiny model's step for four chips, with every figure."""
    found = plan.plan(configuration.load(path, ["mesh.tensor=2"]), topology.named("v5e:2x2"))
    assert found.fits
    assert found.peak_bytes < found.hbm_bytes == 16 * 2**30
    assert found.roofline_seconds == max(found.terms.values())
    assert found.bound in found.terms
    assert found.collectives["all-reduce"] > 0
    on_cpu = plan.plan(configuration.load(path, ["mesh.tensor=2"]), topology.cpu(4))
    assert found.argument_bytes == on_cpu.argument_bytes
    assert found.flops == pytest.approx(on_cpu.flops, rel=0.05)
    full = plan.plan(configuration.load(path, ["mesh.tensor=2"]), topology.named("v5e:2x2"), effort="full")
    assert (found.effort, full.effort) == ("quick", "full")
    assert full.flops == found.flops
    assert full.memory_bytes < 0.9 * found.memory_bytes  # The rest stays in VMEM.
    assert found.overestimated
    assert not full.overestimated
    assert "--effort full tells it" in plan_text.page(found)
    assert "--effort" not in plan_text.page(full)


@needs_libtpu
@pytest.mark.topology
@pytest.mark.slow
def test_out_of_memory_is_an_answer():
    """What is too much, what is largest, and what makes it fit: compiled, not guessed."""
    found = plan.plan(big(), topology.named("v5e:1x1"))
    assert not found.fits
    assert found.peak_bytes > found.hbm_bytes
    assert found.buffers[0].bytes > 2**30
    *failed, last = found.remedies
    assert last[2]
    assert last[1] < found.hbm_bytes
    assert not any(fits for _, _, fits in failed)
    text = plan_text.page(found)
    assert "does not fit" in text
    assert f"{last[0]}: fits, peak" in text
