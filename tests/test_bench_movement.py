"""The benchmarks of merging, loading and checkpoints: what their rows hold, at toy size."""

import hashlib
import json
import os
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import test_models_gguf
import tiny
from rich.console import Console

import jaxpeft
from jaxpeft import models
from jaxpeft.checkpoint import Checkpoints
from jaxpeft.models import PACKAGED
from jaxpeft.models.pretrained import PackagedModel
from train.__main__ import main
from train.bench import checkpoint, load, merge, movement, specs, workers
from train.bench.workers import Entry, Work, Worker, rounds
from train.run import RunError

LORA, MOS = specs.LORA, specs.MOS
LAYERS, WIDTH = 15, 32
KERNELS = LAYERS * WIDTH * WIDTH * (1 + 0.5 + 0.5 + 1 + 2 + 2 + 2)  # q, k, v, o, gate, up, down
INS_AND_OUTS = WIDTH * (2 + 1.5 + 1.5 + 2 + 3 + 3 + 3)

needs_peaks = pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="this system does not tell the peak of resident memory"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """As deep as MoS of rank 16 needs for its pools."""
    return str(tiny.save_model(tmp_path_factory.mktemp("bench") / "model", layers=LAYERS, width=WIDTH))


ANSWERS = {
    "copy": [{"seconds": 2.0}, {"seconds": 1.0}, {"seconds": 4.0}],
    "work": [{"seconds": 6.0, "result": {"a": 1}}, {"seconds": 4.0, "result": {"a": 5}}, {"seconds": 8.0}],
}


class Scripted:
    """A worker whose answers are written down."""

    def __init__(self, name, entry):
        self.name, self.facts, self.number = name, {"bytes": 8e9, "told": entry.function, **entry.arguments}, -2

    def run(self):
        self.number += 1
        if self.number < 0:  # the round that is not kept
            return {"seconds": 1e9, "resident_bytes": 0, "peak_bytes": 10**12, "result": {"a": 1e9}}
        answer = {"resident_bytes": 10**6 * self.number, "peak_bytes": 3 * 10**6, "result": {"a": 2}}
        return answer | ANSWERS[self.name][self.number]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


def test_rows_of_answers(monkeypatch):
    monkeypatch.setattr(workers, "Worker", Scripted)
    entries = {"copy": Entry("m:copy", {}), "work": Entry("m:work", {"disk_bytes": 7})}
    found = movement.measure("name", "title", entries, {"work": "copy"}, 3, Console(quiet=True), ["a note"])
    copy, work = found.rows
    assert copy["ratio"] == 1
    assert work["seconds"] == [6, 4, 8]
    assert work["ratio"] == 3  # of 3, 4 and 2, round by round; the medians' would be 3 as well, their mean not
    assert work["gigabytes_per_second"] == 8 / 6
    assert (work["a"], work["disk_bytes"], work["told"]) == (2, 7, "m:work")
    assert work["extra_megabytes"] == 3  # the round with the least resident before
    assert "a note" in found.notes


def filling(megabytes, log):
    """Work that holds so many small arrays for a moment, and one above them for ever, as a cache might."""
    pinned = []

    def note(word):
        with Path(log).open("a") as file:
            file.write(f"{word}\n")

    def run():
        note("run")
        kept = [np.ones(2**13) for _ in range(16 * megabytes)]
        pinned.append(np.ones(2**9))
        return {"numbers": sum(map(len, kept))}

    return Work(run, {"bytes": megabytes * 2**20}, before=lambda: note("before"))


def ending():
    """Work that ends its process."""
    return Work(lambda: sys.exit("no more"), {})


def test_a_worker_that_is_gone(monkeypatch):
    """It is named with what it said last, and asking again says the same."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), *sys.path]))
    with Worker("w", Entry("test_bench_movement:ending", {})) as worker:
        with pytest.raises(RunError, match=r"w: the process ended with 1:\nno more"):
            worker.run()
        with pytest.raises(RunError, match="w: the process ended with 1"):
            worker.run()


@needs_peaks
def test_each_peak_is_the_works_own(tmp_path, monkeypatch):
    """Memory that a round frees is given back, or the next would seem to need less."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), *sys.path]))
    arguments = {"megabytes": 64, "log": str(tmp_path / "log")}
    with Worker("w", Entry("test_bench_movement:filling", arguments)) as worker:
        answers = rounds([worker], 3)["w"]
    for answer in answers:
        assert answer["peak_bytes"] - answer["resident_bytes"] == pytest.approx(64 * 2**20, rel=0.03)
    assert (tmp_path / "log").read_text().split() == ["before", "run"] * 4


class TestMerge:
    def test_bytes_that_are_moved(self, model):
        """Every kernel read and written, and what the adapter has read."""
        assert merge.work(model, merge.PLAIN).facts["bytes"] == 2 * 4 * KERNELS
        adapted = merge.work(model, LORA).facts["bytes"] - 2 * 4 * KERNELS
        factors, scales = 4 * 16 * INS_AND_OUTS * LAYERS, 7 * LAYERS * 4
        assert factors < adapted <= factors + scales

    def test_a_row_for_each_adapter(self):
        assert set(merge.ROWS) == set(specs.SPECS)


class TestLoad:
    def test_rows_and_sizes(self, model, tmp_path):
        loaded = models.pretrained(model, dtype="float32")
        for dtype in ("float32", "bfloat16"):
            models.save(tmp_path / dtype, loaded, dtype=dtype)
        adapter = jaxpeft.init(jax.random.key(0), specs.SPECS[LORA], jaxpeft.find(loaded.params))
        jaxpeft.save(tmp_path / "adapter", adapter)
        found, plain = load.entries(model, tmp_path)
        assert not any(row.startswith("GGUF") for row in found)
        sizes = {}
        for row, (entry, arguments, _) in found.items():
            module, _, function = entry.partition(":")
            work = getattr(sys.modules[module], function)(**arguments)
            work.before()
            work.run()
            sizes[row] = work.facts["bytes"]
        assert {sizes[row] - sizes[plain[row]] for row in plain} == {0}
        assert found.keys() - plain.keys() == set(plain.values())
        parameters = sum(leaf.size for leaf in jax.tree.leaves(loaded.params))
        assert sizes["float32 safetensors, loaded"] == pytest.approx(4 * parameters, rel=0.15)
        ratio = sizes["bfloat16 safetensors, loaded"] / sizes["float32 safetensors, loaded"]
        assert ratio == pytest.approx(0.5, abs=0.06)  # names and shapes come on top

    def test_a_gguf_file(self, tmp_path, monkeypatch):
        source = tmp_path / "cache" / "m.gguf"
        source.parent.mkdir()
        test_models_gguf.write(source, *test_models_gguf.tiny_llama())
        digest = hashlib.sha256(source.read_bytes()).hexdigest()
        packaged = PackagedModel("tiny-package", "1.0", "unused.whl", "0", "tiny_package/m.gguf", digest)
        monkeypatch.setitem(PACKAGED, "tiny-instruct", packaged)
        monkeypatch.setenv("JAXPEFT_CACHE", str(source.parent))
        found, _ = load.entries("tiny-instruct", tmp_path / "kept")
        assert list(found)[:3] == ["GGUF, its bytes", "GGUF, the first load", "GGUF, its blocks kept"]
        (tmp_path / "kept").mkdir()
        blocks = load.gguf_blocks(**found["GGUF, its blocks kept"][1])
        first = load.gguf_first(**found["GGUF, the first load"][1])
        assert first.facts == blocks.facts == {"bytes": source.stat().st_size}
        blocks.run()
        made = tmp_path / "cache" / f"tiny-instruct-{digest[:12]}"
        kept = Path(found["GGUF, the first load"][1]["cache"])
        for _ in range(2):
            first.before()
            assert [path.name for path in kept.iterdir() if path.is_dir()] == []
            first.run()
            assert (kept / made.name / "model.safetensors").is_file()


class TestCheckpoint:
    @pytest.mark.parametrize("row", checkpoint.ROWS)
    def test_what_is_saved_is_read(self, model, tmp_path, row):
        folder = tmp_path / "saved"
        work = checkpoint.saved(model, row, str(folder))
        work.before()
        assert not any(path.name.isdigit() for path in folder.iterdir())
        blocking = work.run()["blocking_seconds"]
        assert blocking > 0
        adapter, state = checkpoint.state(model, row)
        with Checkpoints(folder, read_only=True) as checkpoints:
            read, read_state, _ = checkpoints.restore(1, adapter, state)
        jax.tree.map(np.testing.assert_array_equal, (read.params, read_state), (adapter.params, state))
        weights = {LORA: 16 * INS_AND_OUTS, MOS: 2 * INS_AND_OUTS, "full fine-tuning": KERNELS / LAYERS}[row] * LAYERS
        floats = 3 * 4 * weights  # the weights and AdamW's two moments
        tables = 7 * 2 * LAYERS * 16 * 4 * 4 if row == MOS else 0
        assert floats + tables < work.facts["bytes"] <= floats + tables + 7 * LAYERS * 4 + 4  # scales, and the count
        # Values that compress away would make saving seem cheap.
        assert work.facts["disk_megabytes"] * 1e6 > 0.85 * floats

    def test_reading_fails_if_a_file_is_damaged(self, model, tmp_path):
        work = checkpoint.restored(model, LORA, str(tmp_path / "saved"))
        work.run()
        largest = max((tmp_path / "saved").rglob("*"), key=lambda path: path.is_file() and path.stat().st_size)
        largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
        with pytest.raises(jaxpeft.checkpoint.CheckpointError):
            work.run()

    def test_the_command(self, model, tmp_path, monkeypatch):
        monkeypatch.setattr(checkpoint, "ROWS", (LORA,))
        assert main(["bench", "checkpoint", "--model", model, "--rounds", "2", "--out", str(tmp_path)]) == 0
        rows = {row["name"]: row for row in json.loads((tmp_path / "checkpoint.json").read_text())["rows"]}
        assert list(rows) == [f"{LORA}, {what}" for what in ("its bytes", "saved", "read")]
        assert len({row["bytes"] for row in rows.values()}) == 1
        saved = rows[f"{LORA}, saved"]
        assert 0 < saved["blocking_seconds"] <= saved["median_seconds"]
        assert len(saved["seconds"]) == 2
        assert "| blocking s | MB on disk |" in (tmp_path / "checkpoint.md").read_text()


@pytest.mark.parametrize("what", ["merge", "load", "checkpoint"])
def test_models_that_cannot_be_measured(what, tmp_path, capsys):
    shallow = tiny.save_model(tmp_path / "model", layers=4)
    assert main(["bench", what, "--model", str(shallow)]) == 2
    assert "needs 15 public ranks" in capsys.readouterr().err
    assert main(["bench", what, "--model", "no-such"]) == 2
    assert "--model: 'no-such' is no existing folder" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("what", ["merge", "load"])
def test_whole_commands(what, model, tmp_path):
    assert main(["bench", what, "--model", model, "--rounds", "1", "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / f"{what}.json").read_text())["rows"]
    names = {"merge": [merge.PLAIN, *merge.ROWS], "load": list(load.entries(model, tmp_path)[0])}[what]
    assert [row["name"] for row in rows] == names
    assert all(row["extra_megabytes"] >= 0 and row["gigabytes_per_second"] > 0 for row in rows)
