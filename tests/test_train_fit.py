"""Whole runs on a tiny model: training, resuming after kills, stopping, evaluating, reporting."""

import dataclasses
import itertools
import json
import random
import resource
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from moved import moved
from runs import CONFIG, Run
from tensorboardX.proto.event_pb2 import Event

import jaxpeft
from jaxpeft.checkpoint import Checkpoints
from jaxpeft.models import loading
from train import config as configuration
from train import data, evaluate, job, loop, metrics, optim, report, run
from train.__main__ import main


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.save_model(tmp_path_factory.mktemp("model") / "tiny")


def parse(model, folder, *overrides):
    return configuration.parse(CONFIG.replace("MODEL", str(model)).replace("FOLDER", str(folder)), overrides)


@pytest.fixture(scope="module")
def made(model, tmp_path_factory):
    return job.assemble(parse(model, tmp_path_factory.mktemp("unused")))


def perturbed(adapter, seed=0):
    """An adapter that changes the model: a new one does not."""
    return moved(adapter, 0.2, seed)


# --- a whole run ---


@pytest.fixture(scope="module")
def finished(model, tmp_path_factory):
    """The folder of a finished run, and what it printed."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    path = folder.parent / "config.yaml"
    path.write_text(CONFIG.replace("MODEL", str(model)).replace("FOLDER", str(folder)))
    assert main(["fit", str(path)]) == 0
    return folder


def test_a_run_leaves_a_summary_a_report_and_an_adapter(finished):
    summary = json.loads((finished / "summary.json").read_text())
    for name in ("eval_loss", "perplexity", "accuracy", "exact_match"):
        assert {f"{name}_before", f"{name}_after"} <= summary.keys()
    assert summary["eval_loss_after"] < summary["eval_loss_before"]
    assert summary["perplexity_after"] == pytest.approx(np.exp(summary["eval_loss_after"]))
    assert summary["steps"] == 6
    for name in ("adapter_bytes", "tokens_per_second", "compile_seconds", "peak_memory_bytes", "tokens"):
        assert summary[name] > 0
    assert summary["config"]["method"]["rank"] == 3
    assert summary["versions"]["jax"] == jax.__version__
    adapter = jaxpeft.load(finished / "adapter")
    assert jaxpeft.count(adapter) == summary["trainable_parameters"]
    assert "| eval_loss |" in (finished / "report.md").read_text()
    assert (finished / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert any((finished / "tensorboard").iterdir())
    assert not list(finished.glob(".*"))


def test_every_step_has_one_record(finished):
    records = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
    assert [record["step"] for record in records if "held_out_loss" in record] == [3, 6]
    assert sum("compile_seconds" in record for record in records) == 1


def test_tensorboard_shows_the_records(finished):
    (path,) = (finished / "tensorboard").iterdir()
    content, events = path.read_bytes(), []
    while content:  # length, its checksum, an event, its checksum
        size = int.from_bytes(content[:8], "little")
        events.append(Event.FromString(content[12 : 12 + size]))
        content = content[16 + size :]
    assert events[0].file_version == "brain.Event:2"
    losses = [(e.step, v.simple_value) for e in events for v in e.summary.value if v.tag == "loss"]
    records = metrics.read(finished / "metrics.jsonl")
    assert losses == [(record["step"], np.float32(record["loss"])) for record in records]


def test_evaluate_generate_and_report_read_the_run(finished, capsys):
    assert main(["evaluate", str(finished), "evaluate.exact_match=null", "evaluate.exact_match_rows=null"]) == 0
    summary = json.loads((finished / "summary.json").read_text())
    assert f"eval_loss    {summary['eval_loss_after']:.4f}" in capsys.readouterr().out
    assert main(["generate", str(finished), "--prompt", "Rising or falling?\n1 2", "--max-new-tokens", "3"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1
    (finished / "report.md").unlink()
    assert main(["report", str(finished)]) == 0
    assert (finished / "report.md").exists()


def test_a_dry_run_loads_and_writes_nothing(model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(loading._Tensors, "array", None)
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG.replace("MODEL", str(model)).replace("FOLDER", str(tmp_path / "run")))
    assert main(["fit", str(path), "--dry-run", "train.steps=9"]) == 0
    printed = capsys.readouterr().out
    assert "layers/mlp/down_proj/kernel" in printed
    assert "trained parameters" in printed
    assert "9 steps; batches of 16 x 56" in printed
    assert " MB = base 0.0 + adapter" in printed
    assert not (tmp_path / "run").exists()


def test_mistakes_are_printed_without_a_traceback(model, tmp_path, capsys):
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG.replace("MODEL", str(model)).replace("FOLDER", str(tmp_path / "run")))
    assert main(["fit", str(path), "train.stpes=9"]) == 2
    assert "train.stpes: unknown key; did you mean steps?" in capsys.readouterr().err
    assert main(["fit", str(path), "sites.select=.*/nothing"]) == 2
    assert "sites: " in capsys.readouterr().err
    assert main(["fit", str(path), "method.rank=16"]) == 2
    assert "method: " in capsys.readouterr().err
    assert main(["fit", str(path), "data.source=missing.jsonl"]) == 1
    assert "missing.jsonl: cannot be read" in capsys.readouterr().err
    assert main(["fit", str(path), "model.name=smollm"]) == 2
    assert "model.name: 'smollm' is no existing folder" in capsys.readouterr().err
    assert main(["report", str(tmp_path)]) == 1
    with pytest.raises(SystemExit):
        main(["report", str(tmp_path), "a=b"])


def test_a_finished_run_is_not_trained_again(finished):
    before = (finished / "metrics.jsonl").read_text()
    assert main(["fit", str(finished / "config.yaml")]) == 0
    assert (finished / "metrics.jsonl").read_text() == before


# --- one step ---


def test_accumulation_is_the_big_batch(made):
    forward = jaxpeft.adapt(made.model.token_losses)
    adapter = perturbed(made.adapter).replace(spec=made.adapter.spec)
    batch = {name: jnp.asarray(array) for name, array in data.collate(made.batches[0], made.examples).items()}
    # Rows with very different numbers of learned tokens: a mean of means would differ.
    batch["weights"] = batch["weights"].at[:5].set(0).at[5:7].set(1)
    results = []
    for parts in (1, 2):
        optimizer = optax.sgd(1.0)
        step = jax.jit(optim.step_function(no_dropout(forward), optimizer, parts))
        after, _, measured = step(adapter, optimizer.init(adapter.params), made.base, batch, made.key, np.int32(1))
        results.append((after.params, measured))
    for other in results[1:]:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), results[0], other)


def no_dropout(forward):
    return lambda *args, dropout_key, **inputs: forward(*args, **inputs)


def test_packed_rows_have_the_losses_of_separate_rows(made):
    losses = jax.jit(made.model.token_losses)
    batch = data.Batch(168, ((0, 1, 2),))
    packed = data.collate(batch, made.examples, packed=True)
    weights = packed.pop("weights")
    together = np.asarray(losses(made.base, **packed))[weights > 0]
    single = data.collate(data.Batch(128, ((0,), (1,), (2,))), made.examples)
    weights = single.pop("weights")
    np.testing.assert_allclose(together, np.asarray(losses(made.base, **single))[weights > 0], rtol=1e-5, atol=1e-5)


def test_schedules():
    for name, last in (("linear", 0.0), ("cosine", 0.0), ("constant", 1.0)):
        rates = [
            float(optim.schedule(configuration.Optimizer(learning_rate=1.0, schedule=name), 100)(i)) for i in range(101)
        ]
        np.testing.assert_allclose(rates[:4], [0.25, 0.5, 0.75, 1.0])
        assert all(a >= b for a, b in itertools.pairwise(rates[3:]))
        assert rates[100] == pytest.approx(last, abs=1e-6)


# --- evaluation ---


@pytest.mark.parametrize("answers", [("rising", "falling"), ("rising", "falling", "ri", "f", "x")])
def test_evaluation_is_the_naive_computation(made, answers):
    made = dataclasses.replace(
        made, config=dataclasses.replace(made.config, evaluate=configuration.Evaluate(batch_size=8, choices=answers))
    )
    adapter = perturbed(made.adapter)
    merged = jaxpeft.merge(made.base, adapter)
    template, rows = made.template, made.held_out

    logits = jax.jit(made.model.logits)

    def log_probabilities(tokens):
        padded = np.zeros((1, 64), np.int32)
        padded[0, : len(tokens)] = tokens
        return np.asarray(jax.nn.log_softmax(logits(merged, padded)))[0, np.arange(len(tokens) - 1), tokens[1:]]

    losses = [-log_probabilities(e.tokens)[e.learned[1:]] for e in made.held_out_examples]
    right = 0
    for row in rows:
        prompt = template.prompt(row.prompt)
        totals = []
        for answer in made.config.evaluate.choices:
            tokens = [*prompt, *template.tokenizer(answer, add_special_tokens=False).input_ids]
            totals.append(log_probabilities(np.array(tokens))[len(prompt) - 1 :].sum())
        right += made.config.evaluate.choices[int(np.argmax(totals))] == row.answer
    found = evaluate.Evaluator(made)(adapter)
    assert found["eval_loss"] == pytest.approx(float(np.concatenate(losses).mean()), rel=1e-4)
    assert found["accuracy"] == right / len(rows)


def test_generation_in_batches_is_generation_alone(made):
    adapter = perturbed(made.adapter)
    evaluator = evaluate.Evaluator(made)
    prompts = [made.template.prompt(row.prompt) for row in made.held_out]
    merged = jaxpeft.merge(made.base, adapter)
    alone = [
        made.template.decode(
            np.asarray(
                made.model.generate(
                    merged,
                    jnp.asarray(prompt)[None],
                    jnp.array([len(prompt)]),
                    max_new_tokens=4,
                    eos_ids=made.template.end_ids,
                )
            )[0]
        )
        for prompt in prompts[:3]
    ]
    assert evaluator.generate(adapter, prompts)[:3] == alone
    assert len(evaluator.generate.generate.executables) == 1


@pytest.mark.parametrize(
    ("answer", "expected", "same"),
    [
        ("so 3\n#### 1,234.0", "#### 1234", True),
        ("#### 5 #### -7", "#### -7", True),
        ("#### $ 12", "#### 12", True),
        ("#### 12.", "#### 12", True),
        ("12", "#### 12", False),
        ("#### none", "#### 12", False),
        ("", "#### 12", False),
    ],
)
def test_numbers_are_compared_as_numbers(answer, expected, same):
    assert evaluate.number_match(answer, expected) is same


def test_choices_must_cover_the_answers(model, tmp_path):
    made = job.assemble(parse(model, tmp_path, "evaluate.choices=[up, down]"))
    with pytest.raises(ValueError, match=r"a held-out answer is '(rising|falling)', not one of evaluate.choices"):
        evaluate.Evaluator(made)


# --- run folders ---


def test_folders_that_cannot_be_used(model, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(run.RunError, match="cannot be written: Not a directory"):
        run.open_folder(parse(model, tmp_path / "file" / "run"))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "x").write_text("")
    with pytest.raises(run.RunError, match="not empty, and not a run folder"):
        run.open_folder(parse(model, tmp_path / "other"))


def test_a_full_disk_shows_before_training(model, tmp_path):
    config = parse(model, tmp_path / "run")
    folder = run.open_folder(config)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limit[1]))
    try:
        run.claim(folder, config, 900_000)
        with pytest.raises(run.RunError, match="the run's 2 MB cannot be written: File too large"):
            run.claim(folder, config, 2_000_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert [path.name for path in folder.iterdir()] == ["config.yaml"]


def test_a_folder_belongs_to_one_configuration(model, tmp_path):
    config = parse(model, tmp_path / "run")
    run.claim(run.open_folder(config), config, 1000)
    run.open_folder(config)
    with pytest.raises(
        run.RunError, match=r"(?s)another configuration.*method.alpha: 16.0, now 8.*train.steps: 6, now 7"
    ):
        run.open_folder(parse(model, tmp_path / "run", "train.steps=7", "method.alpha=8"))
    with pytest.raises(run.RunError, match=r"not empty, and output.resume is never"):
        run.open_folder(parse(model, tmp_path / "run", "output.resume=never"))


def test_records_after_the_checkpoint_are_taken_out(tmp_path):
    lines = [{"step": step, "loss": 1.0, "tokens": 1, "seconds": 1.0} for step in range(1, 6)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 6, "lo')
    with metrics.Metrics(tmp_path, done=3, steps=10) as kept:
        kept.write([lines[3] | {"loss": 2.0}])
    assert metrics.read(tmp_path / "metrics.jsonl") == [*lines[:3], lines[3] | {"loss": 2.0}]


def test_an_unfinished_run_has_no_report(tmp_path):
    with pytest.raises(run.RunError, match="the run is not finished"):
        report.write(tmp_path)


def test_batches_must_split_over_the_devices(model, tmp_path):
    if jax.device_count() == 1:
        pytest.skip("one device takes every batch")
    with pytest.raises(configuration.ConfigError, match=r"train.batch_size: 3 sequences at a time .*use a multiple of"):
        job.assemble(parse(model, tmp_path, "train.batch_size=3"))


# --- stopping and going on ---


def test_divergence_names_the_last_good_checkpoint(model, tmp_path):
    config = parse(
        model, tmp_path / "run", "optimizer.learning_rate=3e38", "optimizer.clip=0", "train.checkpoint_every=1"
    )
    folder = run.open_folder(config)
    made = job.assemble(config)
    with pytest.raises(
        loop.Diverged, match=r"step \d: (loss|grad_norm) is (nan|inf); .*checkpoint.*learning_rate"
    ) as error:
        loop.train(made, folder, evaluate.Evaluator(made))
    bad = int(str(error.value).split()[1].rstrip(":"))
    with Checkpoints(folder / "checkpoints") as checkpoints:
        assert checkpoints.latest() == bad - 1
    assert [record["step"] for record in metrics.read(folder / "metrics.jsonl")] == list(range(1, bad))


LONG = (
    "train.steps=40",
    "train.log_every=1",
    "train.evaluate_every=0",
    "evaluate.exact_match=null",
    "evaluate.exact_match_rows=null",
)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="module")
def uninterrupted(model, cache, tmp_path_factory):
    return Run(model, tmp_path_factory.mktemp("uninterrupted") / "run", cache, *LONG).finish().result()


def assert_identical(found, expected):
    for a, b in zip(found[0], expected[0], strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    assert [record["step"] for record in found[1]] == list(range(1, 41))
    assert found[1] == expected[1]


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_bit_for_bit_the_same(model, cache, tmp_path, uninterrupted):
    killed = Run(model, tmp_path / "run", cache, *LONG)
    generator = random.Random(0)
    for _ in range(4):
        at = min(killed.steps() + generator.randint(1, 9), 39)
        code, _ = killed.interrupt(signal.SIGKILL, at, generator.uniform(0, 0.3))
        assert code == -signal.SIGKILL
    assert_identical(killed.finish().result(), uninterrupted)


@pytest.mark.slow
def test_sigterm_finishes_the_step_and_saves_it(model, cache, tmp_path, uninterrupted):
    stopped = Run(model, tmp_path / "run", cache, *LONG)
    code, errors = stopped.interrupt(signal.SIGTERM, 5)
    assert code == 143, errors
    step = stopped.steps()
    assert f"stopped after step {step} of 40" in errors
    with Checkpoints(stopped.folder / "checkpoints") as checkpoints:
        assert checkpoints.latest() == step
    assert_identical(stopped.finish().result(), uninterrupted)


def test_other_data_is_refused_on_resume(model, tmp_path):
    lines = [json.dumps({"prompt": f"p{i}", "response": "rising"}) for i in range(40)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    config = parse(
        model, tmp_path / "run", f"data.source={tmp_path}/a.jsonl", "train.steps=2", "train.evaluate_every=0"
    )
    folder = run.open_folder(config)
    made = job.assemble(config)
    loop.train(made, folder, evaluate.Evaluator(made))
    (tmp_path / "a.jsonl").write_text("\n".join([*lines[1:], lines[0]]))
    made = job.assemble(config)
    with pytest.raises(run.RunError, match="the training data or its tokens are not those of the checkpoint of step 2"):
        loop.train(made, folder, evaluate.Evaluator(made))
