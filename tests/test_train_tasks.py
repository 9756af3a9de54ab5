"""`train evaluate --tasks`: the harness on a run's adapter and on its base, and what is refused before work starts."""

import json
import sys

import pytest
import tiny
from moved import moved

import jaxpeft
from train import config as configuration
from train import job, run
from train.__main__ import main

pytest.importorskip("lm_eval", reason="the harness is not installed: pip install 'jaxpeft[eval]'")

CONFIG = """
model: {name: MODEL}
method: {name: lora, rank: 2}
sites: {select: [q_proj, down_proj]}
data: {source: synthetic, held_out_rows: 8, max_length: 128}
train: {steps: 1, batch_size: 8}
output: {folder: FOLDER}
"""
TASK = """
task: direction
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/rows.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{series}}"
doc_to_choice: [rising, falling]
doc_to_target: label
metric_list: [{metric: acc}]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run folder with a trained adapter, `run`, and a folder of task files, `tasks`."""
    folder = tmp_path_factory.mktemp("run")
    model = tiny.save_model(folder / "model")
    text = CONFIG.replace("MODEL", str(model)).replace("FOLDER", str(folder / "run"))
    config = configuration.parse(text)
    made = job.subject(config)
    (folder / "run").mkdir()
    run.write(folder / "run" / "config.yaml", configuration.dump(config))
    extra = {"tokenizer": made.template.fingerprint}
    jaxpeft.save(folder / "run" / "adapter", moved(made.adapter, 0.3), base=made.base, extra=extra)
    (folder / "tasks").mkdir()
    rows = [{"series": f"{i} {i + step} {i + 2 * step}", "label": int(step < 0)} for i in range(9) for step in (1, -1)]
    (folder / "tasks" / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "tasks" / "direction.yaml").write_text(TASK.replace("FOLDER", str(folder / "tasks")))
    return folder


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    # Asks the machine for its drivers and compilers, for seconds.
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda storage: None)
    # The harness' own fourteen thousand task files take seconds to index.
    from lm_eval.tasks import TaskManager

    def only(include_path=None):
        return TaskManager(include_path=include_path, include_defaults=False)

    monkeypatch.setattr("lm_eval.tasks.TaskManager", only)


def evaluate(folder, *options):
    return main(["evaluate", str(folder / "run"), "--include-path", str(folder / "tasks"), *options])


def test_an_adapter_beside_its_base(folder, capsys, tmp_path):
    assert evaluate(folder, "--tasks", "direction", "--base", "--limit", "12", "--json", str(tmp_path / "f.json")) == 0
    found = json.loads((folder / "run" / "tasks.json").read_text())
    assert found == json.loads((tmp_path / "f.json").read_text())
    assert list(found) == ["base", "adapter"]
    # Of the direction alone a random model knows nothing, but the adapter changes how likely each answer is.
    assert found["adapter"]["config"]["adapters"] != found["base"]["config"]["adapters"] == []
    for results in found.values():
        assert results["n-samples"]["direction"]["effective"] == 12
    shown = capsys.readouterr().out
    for name, results in found.items():
        assert name in shown
        assert f"{results['results']['direction']['acc,none']:.4f} ± " in shown


def test_a_configuration_is_its_base(folder, capsys):
    config, tasks = folder / "run" / "config.yaml", folder / "tasks"
    options = ["--tasks", "dir*", "--include-path", str(tasks), "--apply-chat-template"]
    assert main(["evaluate", str(config), *options]) == 0
    shown = capsys.readouterr().out
    assert "base" in shown
    assert "adapter" not in shown


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tasks", "directoin"], "unknown task 'directoin'; did you mean direction?"),
        (["--tasks", "direction,zzz"], "unknown task 'zzz'; --include-path names a folder of task files"),
        (["--tasks", "direction", "--limit", "0"], "--limit: expected at least 1, found 0"),
        (["--tasks", "direction", "--num-fewshot", "-1"], "--num-fewshot: expected at least 0, found -1"),
        (["--tasks", "direction", "--include-path", "/nowhere"], "--include-path: /nowhere is no folder"),
        (["--tasks", "direction", "--json", "/nowhere/found.json"], "--json: /nowhere is no folder"),
        (["--base", "--limit", "3"], "--include-path, --limit, --base: has no effect without --tasks"),
    ],
)
def test_mistakes(folder, capsys, options, message):
    assert evaluate(folder, *options) == 2
    assert message in capsys.readouterr().err


def test_a_task_that_does_not_fit_the_model(folder, capsys, tmp_path):
    text = TASK.replace("multiple_choice", "generate_until").replace("FOLDER", str(folder / "tasks"))
    settings = 'doc_to_target: ""\ngeneration_kwargs: {until: ["."], max_gen_toks: 5000}\n'
    (tmp_path / "long.yaml").write_text(text.replace("doc_to_target: label\n", settings).replace("direction", "long"))
    assert main(["evaluate", str(folder / "run"), "--include-path", str(tmp_path), "--tasks", "long"]) == 1
    assert "max_gen_toks=5000: expected at least 1 and less than the model's length of 512" in capsys.readouterr().err


def test_without_the_harness(folder, capsys, monkeypatch):
    monkeypatch.delitem(sys.modules, "jaxpeft.evaluation", raising=False)
    monkeypatch.delattr(jaxpeft, "evaluation", raising=False)
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    assert evaluate(folder, "--tasks", "direction") == 1
    assert "pip install 'jaxpeft[eval]'" in capsys.readouterr().err
