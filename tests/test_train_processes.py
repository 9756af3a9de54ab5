"""Whole runs over meshes and processes: the same numbers on each, and what happens when a process is gone."""

import json
import random
import signal
import sys
import time

import numpy as np
import pytest
import tiny
from runs import Run

import jaxpeft

SETTINGS = (
    "train.steps=10",
    "data.train_rows=160",
    "train.log_every=1",
    "train.evaluate_every=0",
    "train.checkpoint_every=2",
    "optimizer.learning_rate=1e-3",
    "evaluate.choices=[]",
    "evaluate.exact_match=null",
    "evaluate.exact_match_rows=null",
)
# What `full` trains is split over fsdp and tensor, thus over processes; pools are whole on every device.
METHODS = {"mos": (), "full": ("method={name: full, dropout: 0.1}",)}
EIGHT = ("mesh={data: 2, fsdp: 2, tensor: 2}", 8, 1)
SEQUENCES = ("mesh={data: 2, fsdp: 1, tensor: 2, sequence: 2}", 8, 1)
TWO_BY_TWO = ("mesh={data: 2, fsdp: -1}", 2, 2)
TENSOR_TWO_BY_TWO = ("mesh={fsdp: 2, tensor: 2}", 2, 2)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.save_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="module")
def on_one_device(model, cache, tmp_path_factory):
    """The result of a method's run on one device."""
    results = {}

    def result(method):
        if method not in results:
            folder = tmp_path_factory.mktemp("one") / method
            results[method] = Run(model, folder, cache, *SETTINGS, *METHODS[method]).finish().result()
        return results[method]

    return result


def newest(run):
    """The newest checkpoint; 0 without one."""
    folder = run.folder / "checkpoints"
    return max((int(path.name) for path in folder.glob("*") if path.name.isdigit()), default=0)


def assert_same(found, expected):
    """The same losses and adapter to 1e-5, after training that changed both by far more."""
    losses, same = ([record["loss"] for record in records] for _, records in (found, expected))
    assert len(losses) == 10
    np.testing.assert_allclose(losses, same, rtol=0, atol=1e-5)
    assert losses[0] - losses[-1] > 0.1
    for a, b in zip(found[0], expected[0], strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("method", "shape"),
    [
        ("mos", EIGHT),
        ("mos", SEQUENCES),
        ("mos", TWO_BY_TWO),
        pytest.param("full", EIGHT, marks=pytest.mark.slow),
        pytest.param("full", SEQUENCES, marks=pytest.mark.slow),
        pytest.param("full", TENSOR_TWO_BY_TWO, marks=pytest.mark.slow),
    ],
)
def test_every_mesh_gives_the_same_run(model, cache, tmp_path, on_one_device, method, shape):
    mesh, devices, processes = shape
    run = Run(
        model, tmp_path / "run", cache, *SETTINGS, *METHODS[method], mesh, devices=devices, processes=processes
    ).finish()
    assert_same(run.result(), on_one_device(method))


@pytest.mark.parametrize(
    ("method", "shapes"),
    [
        ("mos", [TWO_BY_TWO, EIGHT]),
        pytest.param("full", [EIGHT, TENSOR_TWO_BY_TWO, ("mesh={}", 1, 1)], marks=pytest.mark.slow),
    ],
)
def test_killed_it_goes_on_on_another_mesh(model, cache, tmp_path, on_one_device, method, shapes):
    for number, (mesh, devices, processes) in enumerate(shapes, start=1):
        run = Run(
            model, tmp_path / "run", cache, *SETTINGS, *METHODS[method], mesh, devices=devices, processes=processes
        )
        if number < len(shapes):
            with run:
                run.reach(2 * number, newest)
                for process in run.processes:
                    process.kill()
                assert [code for code, _ in run.wait()] == [-signal.SIGKILL] * processes
            assert 2 * number <= newest(run) < 10
    run.finish()
    assert_same(run.result(), on_one_device(method))


# Every process collates the rows of its devices, and the global arrays are those of the whole batch.
ROWS = """
import os, sys
import jax, numpy as np
from train import data, devices
from train.config import Mesh
from train.processes import together
from train.template import Example

with together():
    examples = [Example(np.arange(n, 2 * n), np.arange(n) > 0) for n in range(3, 11)]
    batch = data.Batch(16, tuple((row,) for row in range(8)))
    whole = data.collate(batch, examples)
    for sizes in ({"data": 2, "fsdp": 2}, {"data": 2, "fsdp": 1, "tensor": 2}, {"fsdp": 1, "tensor": 4},
                  {"fsdp": 2, "sequence": 2}, {"fsdp": 1, "sequence": 4}):
        mesh = devices.mesh(Mesh(**sizes))
        rows = devices.rows_here(mesh, 8)
        local = next(data.iterate([batch], lambda batch, rows=rows: data.collate(batch, examples, rows=rows)))
        assert len(local["tokens"]) == len(rows), (sizes, len(local["tokens"]))
        for name, array in devices.shard(local, mesh, 8).items():
            assert array.shape == whole[name].shape
            for part in array.addressable_shards:
                np.testing.assert_array_equal(part.data, whole[name][part.index])
        print(jax.process_index(), sizes, rows, file=sys.stderr)
"""


def test_every_process_collates_only_its_rows(model, cache, tmp_path):
    run = Run(model, tmp_path / "run", cache, devices=2, processes=2)
    run.command = [sys.executable, "-c", ROWS]
    run.finish()
    for number, mine in enumerate(([0, 1, 2, 3], [4, 5, 6, 7])):
        said = run.said(number)
        for sizes in ({"data": 2, "fsdp": 2}, {"data": 2, "fsdp": 1, "tensor": 2}, {"fsdp": 2, "sequence": 2}):
            assert f"{number} {sizes} {mine}" in said
        # These axes cross the processes: both hold parts of all sequences.
        for sizes in ({"fsdp": 1, "tensor": 4}, {"fsdp": 1, "sequence": 4}):
            assert f"{number} {sizes} {[0, 1, 2, 3, 4, 5, 6, 7]}" in said


# --- a process is gone ---


@pytest.fixture
def pair(model, cache, tmp_path):
    """Two processes of two devices each."""
    return Run(
        model,
        tmp_path / "run",
        cache,
        *SETTINGS,
        "train.steps=1000",  # more than there is time for
        TWO_BY_TWO[0],
        devices=2,
        processes=2,
        JAXPEFT_HEARTBEAT_SECONDS="5",
    )


def assert_stops(run, number, seconds=60):
    """A process sees in time that the other is gone, and says so."""
    started = time.monotonic()
    code = run.processes[number].wait(seconds)
    print(f"process {number} stopped {time.monotonic() - started:.1f} s later with {code}")
    errors = run.said(number)
    if code == 4:
        assert f"process {number} of 2: another process is gone, so this one stops" in errors
        assert "start all processes again to go on" in errors
        assert "Traceback" not in errors
    else:
        assert code == -signal.SIGABRT, errors
        by_service = "Terminating process because the JAX distributed service detected fatal errors" in errors
        assert by_service or f"process {number} of 2: a connection to another process broke" in errors


@pytest.mark.parametrize(
    ("number", "sent"),
    [
        pytest.param(1, signal.SIGKILL, id="the second is killed"),
        pytest.param(0, signal.SIGKILL, id="the first is killed"),
        pytest.param(1, signal.SIGSTOP, id="the second does not answer"),
    ],
)
def test_without_a_process_the_other_stops(pair, number, sent):
    with pair:
        pair.reach(2, newest)
        pair.processes[number].send_signal(sent)
        assert_stops(pair, 1 - number)
    assert newest(pair) >= 2
    jaxpeft.load(pair.folder / "checkpoints")


# What gloo does where half of a message came from a process that is gone: an exception in a thread of its own.
UNCAUGHT = """
import ctypes, threading
from train.processes import together

with together():
    threading.Thread(target=ctypes.CDLL("libstdc++.so.6")._ZSt9terminatev).start()
    threading.Event().wait(60)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="C++'s handler is replaced on Linux only")
def test_an_exception_of_a_connection_is_explained(pair):
    pair.command = [sys.executable, "-c", UNCAUGHT]
    with pair:
        for number, process in enumerate(pair.processes):
            assert process.wait(60) == -signal.SIGABRT
            said = pair.said(number)
            assert f"process {number} of 2: a connection to another process broke" in said
            assert "start all processes again to go on" in said
            assert said.index("process") < said.index("terminate called")


@pytest.mark.parametrize(
    ("number", "heartbeat"),
    [(0, "5"), (1, "5"), pytest.param(1, "60", marks=pytest.mark.slow)],
)
def test_a_process_that_fails_on_its_own_ends_both(pair, tmp_path, number, heartbeat):
    rows = "".join(json.dumps({"prompt": f"p{i}", "response": "rising"}) + "\n" for i in range(40))
    for host in range(2):
        pair.folders[host] = tmp_path / f"host{host}"
        pair.folders[host].mkdir()
        (pair.folders[host] / "rows.jsonl").write_text(rows[:-9] if host == number else rows)
    pair.command.append("data.source=rows.jsonl")
    pair.environment["JAXPEFT_HEARTBEAT_SECONDS"] = heartbeat
    with pair:
        assert pair.processes[number].wait(60) == 1
        said = pair.said(number)
        assert "rows.jsonl:40: not valid JSON" in said
        assert "Traceback" not in said
        # The other may still have to load the model; then it waits half a minute for the first connection.
        assert_stops(pair, 1 - number, 120 if heartbeat == "60" else 60)


@pytest.mark.slow
@pytest.mark.timeout(1800)  # forty processes start
def test_killed_twenty_times_it_ends_bit_for_bit_the_same(model, cache, tmp_path):
    def run(name):
        settings = (*SETTINGS, "train.steps=150", "train.checkpoint_every=1", TWO_BY_TWO[0])
        return Run(model, tmp_path / name, cache, *settings, devices=2, processes=2, JAXPEFT_HEARTBEAT_SECONDS="10")

    whole, killed, generator = run("whole").finish(), run("killed"), random.Random(0)
    for _ in range(20):
        before = newest(killed)
        victims = generator.choice([(0,), (1,), (0, 1)])
        with killed:
            if len(victims) == 1:
                killed.reach(before + generator.randint(1, 3), newest)
                time.sleep(generator.uniform(0, 0.4))
            else:  # anywhere, while it starts or restores as well; on a fast machine, before it is over
                killed.reach(before + 3, newest, seconds=generator.uniform(0, 15))
            for number in victims:
                killed.processes[number].kill()
                assert killed.processes[number].wait() == -signal.SIGKILL, killed.said(number)
            for number in {0, 1} - {*victims}:
                assert_stops(killed, number)
        print(f"{victims} killed after step {newest(killed)}")
        assert newest(killed) >= before
        if newest(killed):
            jaxpeft.load(killed.folder / "checkpoints")
    killed.finish()
    for a, b in zip(killed.result()[0], whole.result()[0], strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    assert len(whole.result()[1]) == 150
    assert killed.result()[1] == whole.result()[1]
