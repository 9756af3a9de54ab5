"""The benchmarks of a training step and of its compilation, at toy size."""

import json
import subprocess
import sys

import pytest
import tiny
import tiny_encoder

from train.__main__ import main
from train.bench import step
from train.run import RunError

SIZE = ["--batch", "2", "--length", "24"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """As deep as MoS of rank 16 needs for its pools."""
    return str(tiny.save_model(tmp_path_factory.mktemp("bench") / "model", layers=15))


@pytest.fixture(scope="module")
def shallow(tmp_path_factory):
    return str(tiny.save_model(tmp_path_factory.mktemp("bench") / "shallow"))


def measured(model, folder, *names, rounds=1):
    only = [word for name in names for word in ("--only", name)]
    command = ["bench", "step", "--model", model, *SIZE, "--rounds", str(rounds), "--out", str(folder), "--eager"]
    assert main([*command, *only]) == 0
    found = json.loads((folder / "step.json").read_text())
    return {row["row"]: row for row in found["rows"]}, found["notes"]


class TestStep:
    def test_the_own_rows(self, model, tmp_path, capsys):
        names = ["full fine-tuning", step.LORA, step.MOS]
        rows, notes = measured(model, tmp_path, *names, rounds=2)
        assert list(rows) == [step.FROZEN, *names]  # the bound is always there, and first
        assert {len(row["seconds"]) for row in rows.values()} == {2}
        layers, ins_and_outs = 15, sum((32 + 32, 32 + 16, 32 + 16, 32 + 32, 32 + 64, 32 + 64, 64 + 32))
        assert rows[step.FROZEN]["trained"] == 0
        assert rows[step.LORA]["trained"] == layers * 16 * ins_and_outs
        assert rows[step.MOS]["trained"] == layers * 2 * ins_and_outs
        # 2 products a weight of the bound, 3 of full fine-tuning; the embedding's and the attention's come on top.
        assert 1.2 < rows["full fine-tuning"]["gflop"] / rows[step.FROZEN]["gflop"] < 1.5
        # x·a, ·b and their gradients: three products of 2 · tokens · r · (in + out).
        products = 6 * 48 * 16 * ins_and_outs * layers / 1e9
        extra = rows[step.LORA]["gflop"] - rows[step.FROZEN]["gflop"]
        assert extra == pytest.approx(products, rel=0.02)
        assert rows[step.MOS]["gflop"] == pytest.approx(rows[step.LORA]["gflop"], rel=0.01)
        assert rows[step.LORA]["flop_share"] == pytest.approx(extra / rows[step.FROZEN]["gflop"])
        losses = [row["first_loss"] for row in rows.values()]
        assert max(losses) - min(losses) < 1e-5
        assert rows[step.FROZEN]["losses"] == [rows[step.FROZEN]["first_loss"]] * 2  # it trains nothing
        for name in names:
            assert rows[name]["losses"][1] < rows[name]["losses"][0] < rows[name]["first_loss"]
        assert any(note.startswith("mos / lora of the same materialised rank") for note in notes)
        assert f"| {step.LORA} | {rows[step.LORA]['trained']:,} |" in capsys.readouterr().out
        assert (tmp_path / "step.png").read_bytes().startswith(b"\x89PNG")

    def test_all_adapters_start_at_the_base(self, shallow, tmp_path):
        rows, _ = measured(shallow, tmp_path, *[name for name in step.SPECS if name not in (step.LORA, step.MOS)])
        losses = [row["first_loss"] for row in rows.values()]
        assert len(losses) == 5
        assert max(losses) - min(losses) < 1e-5
        assert all(row["gflop"] > rows[step.FROZEN]["gflop"] for name, row in rows.items() if name != step.FROZEN)

    def test_written_by_hand(self, shallow, tmp_path):
        """It is the library's LoRA: the same model, the same sites, and a program of the same products."""
        rows, _ = measured(shallow, tmp_path, step.LORA, step.HANDWRITTEN)
        own, hand = rows[step.LORA], rows[step.HANDWRITTEN]
        assert hand["trained"] == own["trained"]
        assert hand["first_loss"] == pytest.approx(own["first_loss"], abs=1e-5)
        # The library's program computes the scores of the attention a second time.
        assert 0.95 < hand["gflop"] / own["gflop"] <= 1

    @pytest.mark.parity
    def test_other_libraries(self, shallow, tmp_path):
        for package in ("torch", "peft", "qwix"):
            pytest.importorskip(package, reason=f"{package} is not installed: pip install 'jaxpeft[parity]'")
        rows, notes = measured(shallow, tmp_path, step.LORA, step.FROZEN_TORCH, step.PEFT, step.QWIX)
        losses = [row["first_loss"] for row in rows.values()]
        assert len(losses) == 5
        assert max(losses) - min(losses) < 1e-4
        assert rows[step.PEFT]["trained"] == rows[step.QWIX]["trained"] == rows[step.LORA]["trained"]
        # Torch counts what XLA's program says; but the first layer's queries, keys and values need no gradient of their
        # input, which a scan over the layers computes nevertheless.
        assert rows[step.FROZEN_TORCH]["gflop"] == pytest.approx(rows[step.FROZEN]["gflop"], rel=1e-6)
        spared = 2 * 48 * (32 * (32 + 16 + 16) + 3 * 16 * 32) / 1e9
        assert rows[step.PEFT]["gflop"] == pytest.approx(rows[step.LORA]["gflop"] - spared, rel=1e-6)
        assert rows[step.FROZEN_TORCH]["flop_share"] == 0
        assert any(note.startswith(f"{step.PEFT}: eager") and "fused AdamW" in note for note in notes)
        assert any(note.startswith(f"{step.LORA} / {step.PEFT}, tokens/s (aim 1.2)") for note in notes)

    def test_a_worker_of_torch_has_no_jax(self):
        code = "import sys, train.bench.workers, train.bench.step_torch; sys.exit('jax' in sys.modules)"
        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


class TestMistakes:
    def test_an_unknown_row_and_a_bad_size(self, capsys):
        assert main(["bench", "step", "--only", "lora r=17", "--batch", "0"]) == 2
        printed = capsys.readouterr().err
        assert "--only: unknown row 'lora r=17'; did you mean 'lora r=16'?" in printed
        assert "--batch: at least 1, found 0" in printed

    def test_an_encoder(self, tmp_path, capsys):
        folder = str(tiny_encoder.save(tmp_path / "encoder", "bert"))
        for what in ("step", "compile"):
            assert main(["bench", what, "--model", folder]) == 2
            assert "is an encoder" in capsys.readouterr().err

    def test_an_unknown_model(self, capsys):
        assert main(["bench", "step", "--model", "smollm2-135m"]) == 2
        assert "did you mean 'smollm2-135m-instruct'" in capsys.readouterr().err

    def test_an_adapter_that_does_not_fit(self, shallow, capsys):
        assert main(["bench", "step", "--model", shallow]) == 2
        printed = capsys.readouterr().err
        assert f"{step.MOS}: mos.Spec: rank=16 needs 15 public ranks" in printed
        assert "--only: names the rows" in printed

    def test_a_library_that_is_missing(self, shallow, monkeypatch, capsys):
        monkeypatch.setattr(step.importlib.util, "find_spec", lambda name: None)
        assert main(["bench", "step", "--model", shallow, "--only", step.PEFT]) == 2
        assert "torch, peft not installed (pip install 'jaxpeft[parity]')" in capsys.readouterr().err

    def test_rows_that_compute_different_things(self):
        step.check_losses({"one": 6.1, "two": 6.1001})
        for one, other in ((6.1, 6.2), (6.1, float("nan")), (float("nan"), 6.1)):
            with pytest.raises(RunError, match="compute different things"):
                step.check_losses({"one": one, "two": other})


class TestCompile:
    def test_the_program_does_not_grow(self, model, tmp_path):
        command = ["bench", "compile", "--model", model, *SIZE, "--rounds", "1", "--out", str(tmp_path)]
        assert main([*command, "--depths", "16,32"]) == 0
        rows = json.loads((tmp_path / "compile.json").read_text())["rows"]
        found = {(row["method"], row["layers"]): row for row in rows}
        assert list(found) == [(name, depth) for name in (step.LORA, step.MOS) for depth in (16, 32)]
        for name in (step.LORA, step.MOS):
            assert found[name, 16]["times_first"] == 1
            assert found[name, 32]["instructions"] == pytest.approx(found[name, 16]["instructions"], rel=0.01)
        assert found[step.MOS, 16]["instructions"] > found[step.LORA, 16]["instructions"]

    @pytest.mark.parametrize(
        ("depths", "line"),
        [
            ("15,x", "--depths: numbers of layers, at least 1, found 'x'"),
            ("0", "--depths: numbers of layers, at least 1, found '0'"),
            ("15,15", "--depths: each once, found 15,15"),
            ("4", "--depths 4: mos r=16 e=2: mos.Spec: rank=16 needs 15 public ranks"),
        ],
    )
    def test_mistakes(self, depths, line, shallow, capsys):
        assert main(["bench", "compile", "--model", shallow, "--depths", depths]) == 2
        assert line in capsys.readouterr().err
