"""Faults of whole runs: each a named error, nothing lost, and the run goes on once the fault is mended."""

import contextlib
import json
import os
import resource
import shutil
import subprocess
import threading
from contextlib import contextmanager

import jax
import numpy as np
import pytest
import tiny
from runs import CONFIG, Run
from test_checkpoint import data_files, each, flip

import jaxpeft
from jaxpeft.checkpoint import Checkpoints
from jaxpeft.methods import lora
from train import metrics
from train.__main__ import main
from train.template import Template

ROWS = [json.dumps({"prompt": f"Is {i} rising?", "response": "rising" if i % 3 else "falling"}) for i in range(60)]
SETTINGS = ("evaluate.choices=[]", "evaluate.exact_match=null", "evaluate.exact_match_rows=null")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """The model and the data of all runs here."""
    place = tmp_path_factory.mktemp("place")
    tiny.save_model(place / "tiny")
    (place / "rows.jsonl").write_text("\n".join(ROWS) + "\n")
    return place


def configuration(place, folder):
    path = place / f"{folder.parent.name}-{folder.name}.yaml"
    path.write_text(CONFIG.replace("MODEL", str(place / "tiny")).replace("FOLDER", str(folder)))
    return [str(path), f"data.source={place / 'rows.jsonl'}", *SETTINGS]


@pytest.fixture(scope="module")
def finished(place):
    """A finished run with the checkpoints of steps 4 and 6."""
    assert main(["fit", *configuration(place, place / "finished")]) == 0
    return place / "finished"


@pytest.fixture
def copy(finished, tmp_path):
    """The finished run, to be damaged."""
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    path = folder / "config.yaml"
    path.write_text(path.read_text().replace(str(finished), str(folder)))
    return folder


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def fails(capsys):
    """Runs a command that must end with an error on stderr, which is returned, and leave a folder as it is."""

    def fails(folder, *arguments, code=1):
        before = contents(folder)
        capsys.readouterr()
        assert main([*map(str, arguments)]) == code
        errors = capsys.readouterr().err
        assert "Traceback" not in errors
        assert contents(folder) == before
        return errors

    return fails


@contextmanager
def replaced(path, content):
    """A file with other content for a while."""
    before = path.read_bytes()
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    try:
        yield
    finally:
        path.write_bytes(before)


def assert_same_run(folder, finished):
    for a, b in zip(*(jax.tree.leaves(jaxpeft.load(run / "adapter")) for run in (folder, finished)), strict=True):
        np.testing.assert_array_equal(a, b)
    losses = [[record["loss"] for record in metrics.read(run / "metrics.jsonl")] for run in (folder, finished)]
    assert len(losses[0]) == 6
    assert losses[0] == losses[1]


# --- checkpoints that cannot be read ---


def half_written(step):
    files = sorted(path for path in step.rglob("*") if path.is_file())
    each(files[len(files) // 2 :], lambda file: file.write_bytes(b""))


DAMAGES = {
    "half written": half_written,
    "empty": lambda step: each([path for path in step.iterdir() if path.is_dir()], shutil.rmtree),
    "a bit flipped in the adapter": lambda step: each(data_files(step / "params"), flip),
    "a bit flipped in the optimizer's state": lambda step: each(data_files(step / "state"), flip),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_step_is_named_with_the_newest_whole_one(copy, finished, fails, damage):
    newest = copy / "checkpoints" / "6"
    DAMAGES[damage](newest)
    errors = fails(copy, "fit", copy / "config.yaml")
    assert errors.startswith(f"error: checkpoint {newest} (other steps there: [4])")
    assert "damaged" in errors or "no readable metadata" in errors
    assert f"Step 4 is whole: delete {newest} to go on from there" in errors
    shutil.rmtree(newest)
    shutil.rmtree(copy / "adapter")
    assert main(["fit", str(copy / "config.yaml")]) == 0
    assert_same_run(copy, finished)


def test_a_damaged_step_is_not_called_whole(copy, fails):
    for step in ("4", "6"):
        each(data_files(copy / "checkpoints" / step / "params"), flip)
    errors = fails(copy, "fit", copy / "config.yaml")
    assert f"checkpoint {copy / 'checkpoints' / '6'}" in errors
    assert "is whole" not in errors


def test_a_damaged_adapter_is_named(copy, fails):
    (step,) = (path for path in (copy / "adapter").iterdir() if path.is_dir())
    each(data_files(step / "params"), flip)
    for command in (["evaluate", copy], ["generate", copy, "--prompt", "Is 1 rising?"]):
        errors = fails(copy, *command)
        assert errors.startswith(f"error: checkpoint {step}")
        assert "damaged" in errors


def test_a_step_of_another_spec_is_named(copy, fails):
    adapter = jaxpeft.load(copy / "adapter")
    with Checkpoints(copy / "checkpoints", keep=None) as checkpoints:
        checkpoints.save(8, jaxpeft.init(jax.random.key(0), lora.Spec(rank=2), adapter.sites))
    errors = fails(copy, "fit", copy / "config.yaml")
    assert f"checkpoint {copy / 'checkpoints' / '8'}" in errors
    assert "was saved with Spec(" in errors
    assert f"expected {adapter.spec}" in errors
    assert "Step 6 is whole" in errors
    assert "holds a run with another configuration" in fails(copy, "fit", copy / "config.yaml", "method.rank=4")


def test_another_base_is_named(copy, place, fails, tmp_path):
    other = tiny.save_model(tmp_path / "tiny", seed=1) / "model.safetensors"
    with replaced(place / "tiny" / "model.safetensors", other.read_bytes()):
        errors = fails(copy, "fit", copy / "config.yaml")
        assert f"checkpoint {copy / 'checkpoints' / '6'}" in errors
        assert "is of another base: fingerprint" in errors
        assert "is whole" not in errors
        assert "is of another base: fingerprint" in fails(copy, "evaluate", copy)
        assert "is of another base: fingerprint" in fails(copy, "generate", copy, "--prompt", "Is 1 rising?")


# --- other files of the run ---


def line_of(number, content):
    """Damage of one line of metrics.jsonl."""

    def damage(path):
        lines = path.read_bytes().splitlines(keepends=True)
        path.write_bytes(b"".join([*lines[: number - 1], content + b"\n", *lines[number:]]))

    return damage


def written(content):
    return lambda path: path.write_text(content)


def emptied(path):
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    path.mkdir()


def a_file(path):
    shutil.rmtree(path)
    path.write_text("x")


def of_others(path):
    emptied(path)
    (path / "notes.txt").write_text("x")


def changed(**changes):
    """Damage of a JSON object: values by name, None takes it out."""

    def damage(path):
        found = {**json.loads(path.read_text()), **changes}
        path.write_text(json.dumps({name: value for name, value in found.items() if value is not None}))

    return damage


RECORD = "expected a JSON object of numbers with step, loss, tokens, seconds, found"


@pytest.mark.parametrize(
    ("command", "name", "damage", "error"),
    [
        ("fit", "metrics.jsonl", line_of(2, b"\xff\x00\xd7"), f":2: damaged, or written by another version: {RECORD}"),
        ("fit", "metrics.jsonl", line_of(3, b"3"), f":3: damaged, or written by another version: {RECORD} '3'"),
        ("fit", "metrics.jsonl", line_of(1, b"[]"), f":1: damaged, or written by another version: {RECORD} '[]'"),
        ("fit", "metrics.jsonl", line_of(1, b'{"step": 1}'), ":1: damaged, or written by another version: expected"),
        ("fit", "metrics.jsonl", emptied, ": cannot be read: Is a directory"),
        (
            "fit",
            "before.json",
            written("[]"),
            ": damaged, or written by another version: expected a JSON object of num",
        ),
        ("fit", "before.json", written('{"eval_loss": "1"}'), ": damaged, or written by another version: expected a"),
        ("fit", "before.json", written("{}"), "numbers with eval_loss, found '{}'"),
        ("fit", "before.json", written('{"eval_loss": NaN}'), "numbers with eval_loss, found '{\"eval_loss\": NaN}'"),
        ("fit", "before.json", emptied, ": cannot be read: Is a directory"),
        ("fit", "adapter", a_file, ": expected a folder for the trained adapter: Not a directory"),
        ("fit", "adapter", of_others, ": expected the trained adapter, found notes.txt; move them away"),
        ("report", "metrics.jsonl", written(""), ": holds no records, expected one of each of the run's 6 steps"),
        ("report", "summary.json", written(""), ": damaged, or written by another version: Invalid JSON"),
        (
            "report",
            "summary.json",
            written("[]"),
            ": damaged, or written by another version: Input should be an object",
        ),
        (
            "report",
            "summary.json",
            written("{}"),
            ": damaged, or written by another version: config: Field required; ver",
        ),
        ("report", "summary.json", emptied, ": cannot be read: Is a directory"),
        (
            "report",
            "summary.json",
            changed(steps="6"),
            ": damaged, or written by another version: steps: Input should be",
        ),
        ("report", "summary.json", changed(config={}), "config: 5 errors model: missing section"),
        (
            "report",
            "summary.json",
            changed(sites={}),
            ": damaged, or written by another version: sites: KeyError('groups",
        ),
        (
            "report",
            "summary.json",
            changed(perplexity_before=None),
            "perplexity_before: Input should be a valid number",
        ),
    ],
)
def test_a_damaged_file_of_the_run_is_named(copy, fails, command, name, damage, error):
    damage(copy / name)
    (line,) = fails(copy, command, copy / "config.yaml" if command == "fit" else copy).strip().splitlines()
    assert line.startswith(f"error: {copy / name}")
    assert error in line


def test_measurements_of_other_settings_are_named(copy, capsys):
    (copy / "before.json").write_text('{"eval_loss": 1}')
    assert main(["fit", str(copy / "config.yaml")]) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(f"error: {copy / 'before.json'}: holds eval_loss, expected eval_loss, perplexity; delete it")
    (copy / "before.json").unlink()
    assert main(["fit", str(copy / "config.yaml")]) == 0


def test_records_that_are_gone_stop_no_run(copy, capsys):
    lines = (copy / "metrics.jsonl").read_text().splitlines(keepends=True)
    (copy / "metrics.jsonl").write_text("".join(lines[:1] + lines[2:]))
    assert main(["fit", str(copy / "config.yaml")]) == 0
    assert "metrics.jsonl holds 5 records of the checkpoint's 6 steps" in capsys.readouterr().out


def test_a_last_record_cut_off_by_a_kill_is_left_out(copy):
    with (copy / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 7, "lo\xc3')
    assert [record["step"] for record in metrics.read(copy / "metrics.jsonl")] == [*range(1, 7)]


# --- data and tokenizer ---


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (
            "\n".join(ROWS)[:-9],
            "rows.jsonl:60: not valid JSON (Expecting value); the file may be trunc",
        ),
        ("\n".join(ROWS[:40]), "the training data or its tokens are not those of the checkpoint of step 6"),
        ("\n".join(ROWS).replace("?", "¿").encode("latin-1"), "rows.jsonl:1: not UTF-8: byte 0xbf at offset"),
        ("\n".join(ROWS).encode("utf-16"), "rows.jsonl:1: not UTF-8: byte 0xff at offset 0"),
        ("", "rows.jsonl: the file holds no rows"),
    ],
    ids=["truncated", "truncated between rows", "latin-1", "utf-16", "empty"],
)
def test_damaged_data_is_named(copy, place, fails, content, error):
    with replaced(place / "rows.jsonl", content):
        assert error in fails(copy, "fit", copy / "config.yaml")


@pytest.mark.parametrize(
    ("name", "content", "error"),
    [
        ("config.json", "", "expected a JSON object, cannot be read: Expecting value: line 1 column 1"),
        ("config.json", '{"model_type": "lla', "expected a JSON object, cannot be read: Unterminated string"),
        ("config.json", b"\xff\xfe", "expected a JSON object, cannot be read: 'utf-8' codec can't decode"),
        ("config.json", "[]", "expected a JSON object, found list"),
        ("config.json", "[" * 100_000, "expected a JSON object, cannot be read: maximum recursion depth"),
        ("tokenizer.json", "", "expected a JSON object, cannot be read: Expecting value: line 1 column 1"),
        ("tokenizer.json", '{"version": "1.0", "tru', "expected a JSON object, cannot be read: Unterminated string"),
        ("tokenizer.json", "{}", "cannot be used ("),
        ("tokenizer_config.json", '{"tok', "expected a JSON object, cannot be read: Unterminated string"),
        ("tokenizer_config.json", "3", "expected a JSON object, found int"),
        ("generation_config.json", "{", "expected a JSON object, cannot be read: Expecting property name"),
        ("model.safetensors", "", "damaged or incomplete (0 bytes)"),
        ("model.safetensors.index.json", "{", "expected a JSON object, cannot be read: Expecting property name"),
        ("model.safetensors.index.json", "{}", "no weight_map; expected the names of the tensors and their files"),
    ],
)
def test_a_damaged_file_of_the_model_is_named(place, fails, tmp_path, name, content, error):
    model = tmp_path / "tiny"
    shutil.copytree(place / "tiny", model)
    (model / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    errors = fails(model, "fit", *configuration(place, tmp_path / "run"), f"model.name={model}")
    (line,) = errors.strip().splitlines()
    assert line.startswith(f"error: {model / name}: {error}")


def tokenizer_json(place, change):
    content = json.loads((place / "tiny" / "tokenizer.json").read_text())
    change(content["model"])
    return json.dumps(content)


def exchanged(model):
    model["vocab"]["a"], model["vocab"]["e"] = model["vocab"]["e"], model["vocab"]["a"]


def test_another_tokenizer_is_named(copy, place, fails):
    ours = Template(tiny.tokenizer()).fingerprint
    assert ours.startswith("260 tokens, checksum ")
    for change in (exchanged, lambda model: model["merges"].clear()):
        with replaced(place / "tiny" / "tokenizer.json", tokenizer_json(place, change)):
            for command in (
                ["fit", copy / "config.yaml"],
                ["evaluate", copy],
                ["generate", copy, "--prompt", "Is 1 rising?"],
            ):
                errors = fails(copy, *command)
                where = copy / "checkpoints" / "6" if command[0] == "fit" else copy / "adapter"
                assert errors.startswith(
                    f"error: {where}: was trained with another tokenizer ({ours}) than the model's"
                )
                assert "now (260 tokens, checksum " in errors
                assert "put the model's own tokenizer files back" in errors
    assert main(["evaluate", str(copy)]) == 0


def test_tokens_beyond_the_embedding_are_named(copy, place, fails, tmp_path):
    larger = tiny.tokenizer()
    larger.add_tokens(["rising", "never used"])
    larger.save_pretrained(tmp_path / "larger")
    with replaced(place / "tiny" / "tokenizer.json", (tmp_path / "larger" / "tokenizer.json").read_bytes()):
        for command in (["fit", copy / "config.yaml"], ["generate", copy, "--prompt", "Is 1 rising?"]):
            errors = fails(copy, *command)
            if command[0] == "fit":
                assert "token 260, 'rising', is beyond the 260 tokens (0 to 259) that the model embeds" in errors
            else:
                assert "was trained with another tokenizer (260 tokens, " in errors
        # A model without a run has nothing to compare with.
        errors = fails(copy, "generate", configuration(place, tmp_path / "none")[0], "--prompt", "Is 1 rising?")
        assert "use the tokenizer's files that came with the weights" in errors
        # Some models' tokenizers have tokens that only their larger sisters know.
        assert main(["generate", configuration(place, tmp_path / "none")[0], "--prompt", "Is 1 ok?"]) == 0


# --- folders that cannot be written ---


@contextmanager
def mounted(folder, *commands):
    """A folder after some `mount` commands."""
    made = 0
    try:
        for command in commands:
            done = subprocess.run(["mount", *command, str(folder)], capture_output=True, text=True, check=False)
            if done.returncode:
                pytest.skip(f"mounting is not permitted here: {done.stderr.strip()}")
            made += "remount" not in " ".join(command)
        yield
    finally:
        for _ in range(made):
            subprocess.run(["umount", str(folder)], check=True)


@contextmanager
def read_only(folder):
    """A folder that cannot be written, by the superuser either."""
    if os.geteuid():
        mode = folder.stat().st_mode
        folder.chmod(0o555)
        try:
            yield
        finally:
            folder.chmod(mode)
    else:
        with mounted(folder, ["--bind", str(folder)], ["-o", "remount,bind,ro"]):
            yield


@contextmanager
def small_files_only(folder):
    """No file can grow beyond 64 bytes; needs no privileges."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, limit[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)


@contextmanager
def full(folder):
    """The file system of a folder without room; it should be a small one."""
    filler = folder / "filler"
    try:
        with filler.open("wb", buffering=0) as file:
            with contextlib.suppress(OSError):
                while True:
                    file.write(bytes(4096))
            with pytest.raises(OSError, match="No space left"):
                file.write(bytes(4096))
        yield
    finally:
        filler.unlink()


@pytest.fixture
def small_disk(tmp_path):
    """32 MB, where a run finds room."""
    folder = tmp_path / "disk"
    folder.mkdir()
    with mounted(folder, ["-t", "tmpfs", "-o", "size=32m", "tmpfs"]):
        yield folder


@pytest.fixture
def at_step(monkeypatch):
    """Enters a context when the checkpoint of a step is about to be written, and those before it are complete."""
    original = Checkpoints.save

    @contextmanager
    def at_step(number, context):
        entered = []

        def save(self, step, *args, **options):
            if step == number:
                self.wait()
                context.__enter__()
                entered.append(step)
            original(self, step, *args, **options)

        with monkeypatch.context() as patch:
            patch.setattr(Checkpoints, "save", save)
            try:
                yield
            finally:
                if entered:
                    context.__exit__(None, None, None)
        assert entered

    return at_step


def assert_goes_on(folder, configuration, finished):
    """The checkpoint before the fault is whole, and the run ends as if there had been none."""
    with Checkpoints(folder / "checkpoints", read_only=True) as checkpoints:
        assert checkpoints.latest() == 2
    jaxpeft.load(folder / "checkpoints")
    assert not (folder / "adapter").exists()
    assert main(["fit", *configuration]) == 0
    assert_same_run(folder, finished)


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (full, "No space left on device"),
        (read_only, "Read-only file system|Permission denied"),
        (small_files_only, "File too large"),
    ],
)
def test_what_happens_to_the_disk_while_it_trains_is_named(place, finished, small_disk, at_step, capsys, fault, reason):
    folder = small_disk / "run"
    where = folder / "checkpoints" if fault is read_only else small_disk
    arguments = configuration(place, folder)
    with at_step(4, fault(where)):
        assert main(["fit", *arguments]) == 1
    # The process would wait for Orbax's threads when it exits.
    for thread in threading.enumerate():
        if type(thread).__name__ == "_SignalingThread":
            thread.join(10)
            assert not thread.is_alive(), thread
    errors = capsys.readouterr().err
    assert "Traceback" not in errors
    (line,) = errors.strip().splitlines()
    assert line.startswith(f"error: checkpoints in {folder / 'checkpoints'} cannot be written: ")
    assert any(one in line for one in reason.split("|"))
    assert line.endswith("; the newest complete step is 2")
    assert_goes_on(folder, arguments, finished)


def test_a_disk_that_fills_up_ends_the_process_with_one_line(place, small_disk, tmp_path):
    folder = small_disk / "run"
    settings = ("train.steps=1000", "train.checkpoint_every=1", "train.log_every=1", "train.evaluate_every=0")
    run = Run(place / "tiny", tmp_path / "run", tmp_path / "cache", *SETTINGS, *settings, f"output.folder={folder}")
    with run:
        run.reach(3, lambda run: len(metrics.read(folder / "metrics.jsonl")))
        with full(small_disk):
            ((code, errors),) = run.wait(60)
    assert code == 1, errors
    (line,) = errors.strip().splitlines()
    assert line.startswith("error: ")
    assert str(folder) in line
    assert "cannot be written: " in line
    assert "No space left on device" in line
    jaxpeft.load(folder / "checkpoints")


def test_a_full_disk_after_training_leaves_the_adapter(copy, small_disk, fails):
    folder = small_disk / "run"
    shutil.copytree(copy, folder)
    with full(small_disk):
        errors = fails(folder, "fit", copy / "config.yaml", f"output.folder={folder}")
    assert errors.startswith(f"error: {folder}: ")
    assert "cannot be written: No space left on device" in errors


def test_a_read_only_folder_is_named(copy, fails):
    with read_only(copy):
        errors = fails(copy, "fit", copy / "config.yaml")
        assert errors.startswith(f"error: {copy}")
        assert "cannot be written: " in errors
        # Measuring writes nothing.
        assert main(["evaluate", str(copy)]) == 0
