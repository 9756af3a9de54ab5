"""The benchmark of expanding pools: every way gives the same factors and gradients, and the figures are all there."""

import importlib.util
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jaxpeft import pools as drawn
from train.__main__ import main
from train.bench import pools

LAYERS, RANK, SHARDS, WIDTH = 5, 4, 2, 6
ENTRIES = 2 * LAYERS * SHARDS


def table(seed):
    key = jax.random.key(seed)
    public = ENTRIES - LAYERS * SHARDS
    return np.asarray(drawn.draw(key, layers=LAYERS, slots=(RANK - 1) * SHARDS, public=public, private=SHARDS))


@pytest.mark.parametrize("name", pools.VARIANTS)
def test_factors_and_gradients_are_those_of_numpy(name):
    index = table(0)
    # Shards that none uses, that one layer uses, and that several do: paddings and sums are both needed.
    counts = np.bincount(index.reshape(-1), minlength=ENTRIES + 1)
    assert counts.min() == 0
    assert counts.max() > 1
    random = np.random.default_rng(0)
    pool = random.normal(size=(ENTRIES + 1, WIDTH)).astype(np.float32)
    cotangent = random.normal(size=(*index.shape, WIDTH)).astype(np.float32)
    run = jax.jit(pools.expansion(pools.VARIANTS[name], {"group": {"a_index": index}}))
    factors, gradient = run({"group": {"a": pool}}, {"group": {"a": cotangent}})
    expected = np.zeros_like(pool)
    np.add.at(expected, index, cotangent)
    np.testing.assert_allclose(factors["group"]["a"], pool[index], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(gradient["group"]["a"], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("once", [True, False])
def test_gradients_through_the_layers(once):
    """Of Σ (x·aᵀb)², written down without scan, gather or the library's update."""
    index = {"a_index": table(0).reshape(LAYERS, RANK, SHARDS), "b_index": table(1).reshape(LAYERS, RANK, SHARDS)}
    random = np.random.default_rng(1)
    params = {name: random.normal(size=(ENTRIES, WIDTH)).astype(np.float32) for name in ("a", "b")}
    x = random.normal(size=(LAYERS, 7, SHARDS * WIDTH)).astype(np.float32)

    def plain(params):
        a, b = (jnp.reshape(params[name][index[f"{name}_index"]], (LAYERS, RANK, -1)) for name in ("a", "b"))
        return jnp.sum(jnp.einsum("lti,lri,lro->lto", x, a, b, precision="highest") ** 2)

    found, expected = jax.jit(pools.application(once, index))(params, x), jax.grad(plain)(params)
    for name in params:
        scale = float(jnp.abs(expected[name]).max())
        np.testing.assert_allclose(found[name] / scale, expected[name] / scale, atol=1e-5)


def measured(folder, model):
    assert main(["bench", "pools", "--model", str(model), "--rounds", "2", "--out", str(folder)]) == 0
    return json.loads((folder / "pools.json").read_text())


def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pools, "_chip", lambda: (None, "the TPU's compiler is not installed"))
    found = measured(tmp_path, tiny.save_model(tmp_path / "model", layers=15))
    rows = {row["name"]: row for row in found["rows"]}
    assert list(rows) == [*pools.VARIANTS, *pools.APPLIED]
    first = next(iter(pools.VARIANTS))
    assert rows[first]["ratio"] == rows[pools.APPLIED[0]]["ratio"] == 1
    for row in rows.values():
        assert 0 < row["least_milliseconds"] <= row["milliseconds"] <= row["greatest_milliseconds"]
        assert "tpu_megabytes" not in row
    assert "no TPU figures: the TPU's compiler is not installed" in found["notes"]
    assert (tmp_path / "pools.png").read_bytes().startswith(b"\x89PNG")
    assert first in capsys.readouterr().out


def test_a_model_with_too_few_layers(tmp_path, capsys):
    assert main(["bench", "pools", "--model", str(tiny.save_model(tmp_path / "model", layers=4))]) == 2
    assert "needs 15 public ranks" in capsys.readouterr().err


@pytest.mark.topology
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
@pytest.mark.parametrize("name", pools.VARIANTS)
def test_traffic_on_a_tpu(name):
    """At least the pool and the cotangents are read, and factors and gradient written."""
    index = np.asarray(drawn.draw(jax.random.key(0), layers=16, slots=60, public=256, private=4))
    pool, cotangent = np.zeros((320, 256), np.float32), np.zeros((*index.shape, 256), np.float32)
    arguments = ({"group": {"a": pool}}, {"group": {"a": cotangent}})
    chip, why = pools._chip()
    assert chip is not None, why
    found = pools._on(chip, pools.expansion(pools.VARIANTS[name], {"group": {"a_index": index}}), arguments)
    used = len(np.unique(index)) / len(pool)  # of the pool, what is gathered
    assert found["tpu_megabytes"] >= ((1 + used) * pool.nbytes + 2 * cotangent.nbytes) / 1e6
    assert found["tpu_temporary_megabytes"] >= 0
