"""Encoders with a head: whole runs on tiny models, their data, their scores, and what they have no use for."""

import json
import shutil

import jax
import numpy as np
import pytest
import scipy.stats
import tiny_encoder
from moved import moved
from PIL import Image

import jaxpeft
from train import builtin, config, data, devices, fit, heads, images, job, labelled, optim, scores
from train.__main__ import main
from train.config import ConfigError
from train.labelled import Row
from train.rows import DataError

TEXT = """
model: {name: MODEL}
task: {kind: classification}
method: {name: lora, rank: 2, dropout: 0.1}
sites: {select: [query, value]}
data: {source: synthetic, held_out_rows: 24, max_length: 20}
optimizer: {learning_rate: 1e-2}
train: {steps: 4, batch_size: 16, log_every: 2, evaluate_every: 2, checkpoint_every: 2}
evaluate: {batch_size: 8}
output: {folder: FOLDER}
"""
IMAGES = TEXT.replace("classification", "image-classification").replace("lora, rank: 2", "surm")


@pytest.fixture(scope="module")
def text_model(tmp_path_factory):
    return tiny_encoder.save(tmp_path_factory.mktemp("models") / "bert", "bert")


@pytest.fixture(scope="module")
def image_model(tmp_path_factory):
    return tiny_encoder.save(tmp_path_factory.mktemp("models") / "dinov2", "dinov2")


def written(text, model, folder):
    path = folder.parent / f"{folder.name}.yaml"
    path.write_text(text.replace("MODEL", str(model)).replace("FOLDER", str(folder)))
    return str(path)


def parse(text, model, *overrides):
    return config.parse(text.replace("MODEL", str(model)).replace("FOLDER", "unused"), overrides)


@pytest.fixture(scope="module")
def finished(text_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "text"
    assert main(["fit", written(TEXT, text_model, folder)]) == 0
    return folder


class TestRuns:
    def test_a_run_leaves_scores_and_a_head(self, finished):
        summary = json.loads((finished / "summary.json").read_text())
        for name in ("eval_loss", "accuracy", "matthews", "f1"):
            assert {f"{name}_before", f"{name}_after"} <= summary.keys()
        assert summary["eval_loss_before"] == pytest.approx(np.log(2))  # a head of zeros
        assert summary["head_parameters"] == 2 * 32 + 2
        adapter = jaxpeft.load(finished / "adapter")
        assert jaxpeft.count(adapter) == summary["trainable_parameters"]
        assert float(np.abs(adapter.params["classifier/kernel"]["w"]).max()) > 0
        assert float(np.abs(adapter.params["layers/attention/query/kernel"]["b"]).max()) > 0
        extra = jaxpeft.checkpoint.extra(finished / "adapter")
        assert (extra["task"], extra["outputs"]) == ("classification", ["falling", "rising"])
        report = (finished / "report.md").read_text()
        assert "| accuracy |" in report
        assert "| of which the head | 66 |" in report
        assert (finished / "loss.png").exists()

    def test_the_merged_model_predicts_the_same(self, text_model, finished):
        made = job.assemble(config.load(finished / "config.yaml"))
        adapter = fit.trained(made, finished)
        evaluator = made.task.evaluator(made)
        merged = jaxpeft.merge(made.base, adapter)
        untouched = adapter.replace(params=jax.tree.map(np.zeros_like, adapter.params))
        inputs = {name: a for name, a in made.collate(made.batches[0]).items() if name not in heads.ANSWERS}
        placed = dict(zip(inputs, devices.put(list(inputs.values()), made.mesh), strict=True))
        found = evaluator.predict(merged, untouched, placed)
        np.testing.assert_allclose(found, evaluator.predict(made.base, adapter, placed), atol=1e-5)

    def test_evaluate_reads_the_run(self, finished, capsys):
        summary = json.loads((finished / "summary.json").read_text())
        assert main(["evaluate", str(finished)]) == 0
        assert f"accuracy     {summary['accuracy_after']:.4f}" in capsys.readouterr().out
        assert main(["generate", str(finished), "--prompt", "x"]) == 2
        assert "task.kind: classification writes no text; expected generation" in capsys.readouterr().err

    def test_going_on_gives_the_same_adapter(self, finished, text_model, tmp_path, monkeypatch, capsys):
        again = tmp_path / "again"
        shutil.copytree(finished, again)
        for name in ("adapter", "checkpoints/4"):
            shutil.rmtree(again / name)
        path = written(TEXT, text_model, again)
        with monkeypatch.context() as patch:
            patch.setattr(labelled, "synthetic", lambda *_: [Row("1 2", "rising"), Row("2 1", "falling")] * 300)
            assert main(["fit", path]) == 1
            assert "training data or its tokens are not those of the checkpoint" in capsys.readouterr().err
        assert main(["fit", path]) == 0
        one, other = (jaxpeft.load(folder / "adapter") for folder in (finished, again))
        jax.tree.map(np.testing.assert_array_equal, one.params, other.params)

    def test_images_are_learned(self, image_model, tmp_path):
        folder = tmp_path / "run"
        path = written(IMAGES, image_model, folder)
        assert main(["fit", path, "train.steps=40", "train.evaluate_every=0", "data.held_out_rows=64"]) == 0
        summary = json.loads((folder / "summary.json").read_text())
        assert summary["accuracy_after"] > 0.9
        assert summary["tokens"] == 40 * 16 * 17  # 16 patches and one token an image

    def test_a_regression_is_learned(self, text_model, tmp_path):
        folder = tmp_path / "run"
        path = written(TEXT.replace("classification", "regression"), text_model, folder)
        assert main(["fit", path, "train.steps=60", "train.evaluate_every=0", "data.held_out_rows=64"]) == 0
        summary = json.loads((folder / "summary.json").read_text())
        assert summary["eval_loss_after"] < 0.5 * summary["eval_loss_before"]
        assert min(summary["pearson_after"], summary["spearman_after"]) > 0.5
        assert summary["pearson_before"] == 0.0

    @pytest.mark.parametrize(("text", "model"), [(TEXT, "text_model"), (IMAGES, "image_model")])
    def test_a_dry_run_and_a_plan(self, text, model, tmp_path, request, capsys):
        folder = tmp_path / "run"
        path = written(text, request.getfixturevalue(model), folder)
        assert main(["fit", path, "--dry-run"]) == 0
        assert "classifier/kernel" in capsys.readouterr().out
        assert not folder.exists()
        assert main(["plan", path, "--cpu", "8", "--json"]) == 2
        assert "task.labels: give the classes" in capsys.readouterr().err
        assert main(["plan", path, "--cpu", "8", "--json", "task.labels=[a, b, c]"]) == 0
        plan = json.loads(capsys.readouterr().out)
        assert plan["fits"]
        assert plan["batch"] == ([16, 24] if model == "text_model" else [16, 17])


class TestSteps:
    @pytest.mark.parametrize(("text", "model"), [(TEXT, "text_model"), (IMAGES, "image_model")])
    def test_a_mesh_parts_and_one_device_agree(self, text, model, request):
        results = []
        for overrides in (
            ["mesh={data: 8, fsdp: 1}"],
            ["mesh={data: 2, fsdp: 2, tensor: 2}", "train.accumulate=2"],
            ["model.remat=full"],
        ):
            made = job.assemble(parse(text, request.getfixturevalue(model), *overrides, "method.dropout=0"))
            adapter = jax.device_put(moved(made.adapter, 0.1, 0), made.stored)
            optimizer = optim.optimizer(made.config.optimizer, 4, made.config.method)
            step = optim.compiled_step(made.config, optimizer, made, donate=False)
            state = jax.device_put(optimizer.init(adapter.params), optim.state_shardings(optimizer, made))
            batch = devices.shard(made.collate(made.batches[0]), made.mesh, 16)
            after, _, measured = step(adapter, state, made.base, batch, made.key, np.int32(1))
            results.append((measured, after.params))
        for measured, params in results[1:]:
            np.testing.assert_allclose(measured["loss"], results[0][0]["loss"], rtol=1e-5)
            np.testing.assert_allclose(measured["grad_norm"], results[0][0]["grad_norm"], rtol=1e-3)
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-3), params, results[0][1])

    def test_rows_that_fill_up_a_batch_do_not_count(self, text_model):
        made = job.assemble(parse(TEXT, text_model))
        losses = jax.jit(made.losses)
        one = made.collate(data.Batch(8, ((3,), (5,), (), ())))
        assert one["weights"].tolist() == [1, 1, 0, 0]
        moved_base = jax.tree.map(lambda leaf: leaf + 0.01, made.base)
        weights = one.pop("weights")
        found = losses(moved_base, **one)
        assert np.isfinite(found).all()
        two = made.collate(data.Batch(16, ((3,), (5,))))
        two.pop("weights")
        np.testing.assert_allclose(found[weights > 0], losses(moved_base, **two), atol=1e-5)

    def test_a_quantized_base(self, tmp_path):
        model = tiny_encoder.save(tmp_path / "wide", "bert", hidden_size=64, intermediate_size=64)
        made, floats = (job.assemble(parse(TEXT, model, f"model.quantize={kind}")) for kind in ("nf4", "null"))
        assert jaxpeft.quantize.nbytes(made.base) < jaxpeft.quantize.nbytes(floats.base)
        found, expected = (one.task.evaluator(one).loss(moved(one.adapter, 0.1, 0)) for one in (made, floats))
        assert found == pytest.approx(expected, rel=0.1)

    def test_the_evaluator_is_the_model(self, text_model):
        made = job.assemble(parse(TEXT, text_model, "data.held_out_rows=21", "evaluate.batch_size=8"))
        adapter = moved(made.adapter, 0.2, 0)
        merged = jaxpeft.merge(made.base, adapter)
        losses, hits = [], []
        for example in made.held_out_examples:
            tokens = example.tokens[None]
            logits = made.model.predict(merged, tokens=tokens, mask=np.ones_like(tokens))[0]
            losses.append(-jax.nn.log_softmax(logits)[int(example.target)])
            hits.append(int(np.argmax(logits)) == example.target)
        found = made.task.evaluator(made)(adapter)
        assert found["eval_loss"] == pytest.approx(np.mean(losses), abs=1e-5)
        assert found["accuracy"] == pytest.approx(np.mean(hits))


class TestConfig:
    @pytest.mark.parametrize(
        ("overrides", "problem"),
        [
            (["data.batching=pack"], "data.batching: pack has no use with task.kind classification"),
            (["mesh={sequence: 2}"], "mesh.sequence: must be 1 with task.kind classification"),
            (["evaluate.choices=[a, b]"], "evaluate.choices: is for task.kind generation, found classification"),
            (["data.source=gsm_symbolic"], "gsm_symbolic is no data set of task.kind classification; .*sst-like"),
            (["data.source=cifar10"], "cifar10 is no data set of task.kind classification"),
            (["task.image_size=28"], "task.image_size: has no effect with task.kind classification"),
            (["task.labels=[a]"], "task.labels: give at least two classes"),
            (["task.labels=[a, a]"], "task.labels: the same class is given twice"),
            (["task={kind: regression, labels: [a, b]}"], "task.labels: has no effect with task.kind regression"),
            (["task={pooling: cls}"], "task.pooling: has no effect with task.kind generation"),
            (["task.kind=clasification"], "task.kind: expected .*'classification'.*found 'clasification'"),
        ],
    )
    def test_what_a_task_has_no_use_for(self, text_model, overrides, problem):
        with pytest.raises(ConfigError, match=problem):
            parse(TEXT, text_model, *overrides)

    def test_a_model_of_another_kind(self, text_model, image_model):
        with pytest.raises(ConfigError, match=r"is an encoder of text, but task.kind image-classification needs"):
            job.assemble(parse(IMAGES, text_model))
        with pytest.raises(ConfigError, match=r"is an encoder of images, but task.kind classification needs"):
            job.assemble(parse(TEXT, image_model))
        generation = TEXT.replace("task: {kind: classification}", "")
        with pytest.raises(ConfigError, match=r"is an encoder; set task.kind to classification or regression"):
            job.subject(parse(generation, text_model))

    def test_an_image_size_that_patches_do_not_divide(self, image_model):
        with pytest.raises(ConfigError, match=r"task.image_size: 18 is no multiple of the model's patches of 4; .* 16"):
            job.assemble(parse(IMAGES, image_model, "task.image_size=18"))

    def test_an_image_size_of_ones_own(self, image_model):
        made = job.assemble(parse(IMAGES, image_model, "task.image_size=24", "task.pooling=mean"))
        assert made.collate(made.batches[0])["images"].shape == (16, 24, 24, 3)
        assert made.lengths[0] == 37
        assert np.isfinite(made.task.evaluator(made)(made.adapter)["eval_loss"])

    def test_a_head_is_trained_whatever_is_selected(self, text_model):
        made = job.assemble(parse(TEXT, text_model, "sites.select=.*(query|classifier)/kernel"))
        names = ["layers/attention/query/kernel", "classifier/bias", "classifier/kernel"]
        assert [group.name for group in made.adapter.sites] == names
        override = "method={name: mixed, default: {method: lora, rank: 2}, overrides: {'.*value.*': {rank: 3}}}"
        made = job.assemble(parse(TEXT, text_model, override))
        assert made.adapter.params["layers/attention/value/kernel"]["a"].shape[1] == 3
        assert "w" in made.adapter.params["classifier/kernel"]


class TestText:
    def test_files(self, tmp_path):
        import pyarrow.parquet

        expected = [Row("good film", "1"), Row("bad film", "0")]
        records = [{"sentence": row.text, "label": int(row.target)} for row in expected]
        (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, records)))
        (tmp_path / "a.json").write_text(json.dumps(records))
        (tmp_path / "a.csv").write_text("sentence,label\ngood film,1\nbad film,0\n")
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "a.parquet")
        for ending in ("jsonl", "json", "csv", "parquet"):
            assert labelled.read(str(tmp_path / f"a.{ending}"), {}, "classification") == expected

    def test_pairs_and_scores(self, tmp_path):
        file = tmp_path / "a.jsonl"
        file.write_text('{"sentence1": "a", "sentence2": "b", "similarity": 3.5}')
        assert labelled.read(str(file), {"score": "similarity"}, "regression") == [Row("a", 3.5, "b")]

    @pytest.mark.parametrize(
        ("record", "kind", "problem"),
        [
            ({"txt": "a", "label": 1}, "classification", r"a.jsonl:1: expected a column text/.*, found txt, label"),
            ({"text": "a", "lable": 1}, "classification", r"expected a column label, .*data.columns.*label: …"),
            ({"text": "a", "label": 0.5}, "classification", "label should be the name or number of a class, found 0.5"),
            ({"text": "a", "label": "x"}, "regression", "label should be a finite number, found 'x'"),
            ({"text": 3, "label": "x"}, "classification", "text should be text, found int"),
            (["a"], "classification", "expected an object with named fields, found list"),
        ],
    )
    def test_rows_that_cannot_be_used(self, tmp_path, record, kind, problem):
        (tmp_path / "a.jsonl").write_text(json.dumps(record))
        with pytest.raises(DataError, match=problem):
            labelled.read(str(tmp_path / "a.jsonl"), {}, kind)

    def test_labels(self, text_model):
        made = parse(TEXT, text_model)
        rows = [Row("a", name) for name in ("10", "9", "x", "9")]
        assert labelled.labels(made, rows) == ("9", "10", "x")
        with pytest.raises(DataError, match="all training rows are 'x'"):
            labelled.labels(made, rows[2:3])
        with pytest.raises(DataError, match="labelled 'y'; the classes are 9, 10"):
            labelled.number("y", ("9", "10"))

    def test_long_rows(self, text_model):
        reader = labelled.Reader(tiny_encoder.tokenizer(), 50, 20, typed=True)
        rows = [Row("1 2 3 4 5 6", "a"), Row("1 2", "b"), Row("1 2", "b", "3 4")]
        for how, count, said in (
            ("cut", 3, "1 longer than 7 tokens cut"),
            ("drop", 2, "1 longer than 7 tokens dropped"),
        ):
            made = parse(TEXT, text_model, "data.max_length=7", f"data.too_long={how}")
            kept, examples, note = labelled.encode(rows, reader, made, ("a", "b"))
            assert len(kept) == len(examples) == count
            assert said in note
        assert examples[-1].tokens.tolist() == [2, 5, 6, 3, 7, 8, 3]
        assert examples[-1].types.tolist() == [0, 0, 0, 0, 1, 1, 1]
        made = parse(TEXT, text_model, "data.max_length=512", "data.too_long=cut")
        _, examples, note = labelled.encode([Row("1 " * 40, "a")], reader, made, ("a", "b"))
        assert examples[0].tokens[-1] == 3  # [SEP] stays
        assert "longer than 20 tokens cut" in note  # the model's positions

    def test_sst_like(self, text_model):
        try:
            builtin.sst_ratings()
        except builtin.DownloadError as error:
            pytest.skip(str(error))
        train, held_out = labelled.load(parse(TEXT, text_model, "data.source=sst-like", "data.held_out_rows=1500"))
        assert (len(train), len(held_out)) == (7673, 1500)
        assert {row.target for row in held_out} == {"negative", "positive"}
        scored = TEXT.replace("classification", "regression")
        rated, _ = labelled.load(parse(scored, text_model, "data.source=sst-like"))
        assert [(row.target > 0) == (other.target == "positive") for row, other in zip(rated, train, strict=True)]


class TestImages:
    def test_a_folder_and_an_archive(self, tmp_path):
        pixels = np.random.default_rng(0).integers(0, 256, (4, 6, 5, 3), dtype=np.uint8)
        for i, image in enumerate(pixels):
            (tmp_path / "set" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(tmp_path / "set" / "ab"[i % 2] / f"{i}.png")
        (tmp_path / "set" / "a" / "notes.txt").write_text("no image")
        np.savez(tmp_path / "a.npz", images=pixels, labels=np.array([0, 1, 0, 1]), classes=np.array(["a", "b"]))
        folder, archive = (
            {(row.target, images._open(row.image).tobytes()) for row in images.read(str(tmp_path / name))}
            for name in ("set", "a.npz")
        )
        assert folder == archive
        assert len(folder) == 4

    @pytest.mark.parametrize(
        ("arrays", "problem"),
        [
            ({"images": np.zeros((2, 3, 3), "u1")}, "no array 'labels'; found images"),
            ({"images": np.zeros((2, 3, 3), "f"), "labels": [0, 1]}, r"expected images .*uint8.*float32 and 2 labels"),
            ({"images": np.zeros((2, 3, 3), "u1"), "labels": [0]}, "and 1 labels"),
        ],
    )
    def test_archives_that_cannot_be_used(self, tmp_path, arrays, problem):
        np.savez(tmp_path / "a.npz", **arrays)
        with pytest.raises(DataError, match=problem):
            images.read(str(tmp_path / "a.npz"))

    def test_damaged_and_missing_files(self, tmp_path):
        (tmp_path / "a.npz").write_bytes(b"PK nothing")
        with pytest.raises(DataError, match=r"a.npz: cannot be read as .npz"):
            images.read(str(tmp_path / "a.npz"))
        with pytest.raises(DataError, match=r"a.txt: expected one of cifar10, .*a folder with a folder of images"):
            images.read(str(tmp_path / "a.txt"))
        with pytest.raises(DataError, match="no images; expected a folder for each class"):
            images.read(str(tmp_path))
        (tmp_path / "x.png").write_bytes(b"no image")
        with pytest.raises(DataError, match=r"x.png: cannot be read as an image"):
            images._open(tmp_path / "x.png")

    def test_pixels(self):
        reader = images.Reader(4, (0.5, 0.5, 0.5), (0.25, 0.5, 1.0), 2)
        whole = reader.normalised(reader.resized(np.full((4, 4, 3), 255, np.uint8)))
        np.testing.assert_allclose(whole[0, 0], [2.0, 1.0, 0.5])
        np.testing.assert_allclose(reader.normalised(reader.resized(np.full((9, 5, 3), 255, np.uint8))), whole)

    def test_digits(self, image_model):
        pytest.importorskip("sklearn", reason="scikit-learn is not installed: pip install 'jaxpeft[vision]'")
        train, held_out = images.load(parse(IMAGES, image_model, "data.source=digits", "data.held_out_rows=300"))
        assert (len(train), len(held_out)) == (1497, 300)
        assert {row.target for row in held_out} == set("0123456789")


class TestScores:
    def test_against_other_implementations(self):
        metrics = pytest.importorskip("sklearn.metrics", reason="scikit-learn is not installed")
        random = np.random.default_rng(0)
        targets = random.integers(0, 2, 50)
        logits = random.normal(size=(50, 2)) + np.eye(2)[targets]
        found = scores.classification(logits, targets)
        assert found["accuracy"] == pytest.approx(metrics.accuracy_score(targets, logits.argmax(1)))
        assert found["matthews"] == pytest.approx(metrics.matthews_corrcoef(targets, logits.argmax(1)))
        assert found["f1"] == pytest.approx(metrics.f1_score(targets, logits.argmax(1)))
        assert scores.classification(random.normal(size=(50, 3)), targets).keys() == {"accuracy"}
        values = targets + random.normal(size=50).round(1)  # with ties
        found = scores.regression(values, targets)
        assert found["pearson"] == pytest.approx(scipy.stats.pearsonr(values, targets).statistic)
        assert found["spearman"] == pytest.approx(scipy.stats.spearmanr(values, targets).statistic)

    def test_where_nothing_varies(self):
        assert scores.regression(np.ones(3), np.arange(3)) == {"pearson": 0.0, "spearman": 0.0}
        assert scores.f1(np.zeros(3), np.zeros(3)) == 0.0
