"""Merging: float32, one cast, nothing touched that is not adapted, and an honest error."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpeft
from jaxpeft.methods import lora


def made(dtype=jnp.float32):
    base = {"up": {"kernel": jax.random.normal(jax.random.key(0), (32, 16)).astype(dtype)}, "norm": jnp.ones(16, dtype)}
    adapter = jaxpeft.init(jax.random.key(1), lora.Spec(rank=2), jaxpeft.find(base))
    b = 1e-3 * jax.random.normal(jax.random.key(2), adapter.params["up/kernel"]["b"].shape)
    return base, adapter.replace(params={"up/kernel": {**adapter.params["up/kernel"], "b": b}})


def test_merged_is_base_plus_delta_and_the_rest_is_shared() -> None:
    base, adapter = made()
    merged = jaxpeft.merge(base, adapter)
    np.testing.assert_allclose(
        merged["up"]["kernel"], base["up"]["kernel"] + jaxpeft.delta(adapter)["up/kernel"], atol=1e-7
    )
    assert merged["norm"] is base["norm"]
    assert jax.tree.structure(merged) == jax.tree.structure(base)


def test_report_measures_the_cast() -> None:
    base, adapter = made(jnp.bfloat16)
    merged, report = jaxpeft.merge_with_report(base, adapter)
    assert merged["up"]["kernel"].dtype == jnp.bfloat16
    exact = np.asarray(base["up"]["kernel"], np.float32) + np.asarray(jaxpeft.delta(adapter)["up/kernel"])
    error = np.asarray(merged["up"]["kernel"], np.float32) - exact
    assert report.largest_error["up/kernel"] == pytest.approx(abs(error).max(), rel=1e-5)
    change = np.linalg.norm(np.asarray(jaxpeft.delta(adapter)["up/kernel"]))
    assert report.lost["up/kernel"] == pytest.approx(np.linalg.norm(error) / change, rel=1e-3)
    assert report.lost["up/kernel"] > 0.1, "bfloat16 drowns a small update, and the report says so"
    assert "up/kernel" in str(report)
    full = jaxpeft.merge_with_report(*made())[1]
    assert full.lost["up/kernel"] < 1e-4


def test_under_jit_and_for_an_empty_update() -> None:
    base, adapter = made()
    np.testing.assert_allclose(
        jax.jit(jaxpeft.merge)(base, adapter)["up"]["kernel"], jaxpeft.merge(base, adapter)["up"]["kernel"], atol=1e-6
    )
    fresh = jaxpeft.init(jax.random.key(1), lora.Spec(rank=2), adapter.sites)
    merged, report = jaxpeft.merge_with_report(base, fresh)
    assert (merged["up"]["kernel"] == base["up"]["kernel"]).all()
    assert report.lost == {"up/kernel": 0.0}


def test_delta_has_the_kernels_own_shape() -> None:
    base = {"out": {"kernel": jnp.zeros((2, 3, 8))}, "h": {"c_attn": {"kernel": jnp.zeros((12, 5))}}}
    sites = jaxpeft.find(base, layouts={".*c_attn/kernel": "oi"})
    adapter = jaxpeft.init(jax.random.key(1), lora.Spec(rank=2), sites)
    adapter = adapter.replace(params=jax.tree.map(lambda leaf: leaf + 1, adapter.params))
    deltas = jaxpeft.delta(adapter)
    assert {path: delta.shape for path, delta in deltas.items()} == {
        "out/kernel": (2, 3, 8),
        "h/c_attn/kernel": (12, 5),
    }
    merged = jaxpeft.merge(base, adapter)
    np.testing.assert_array_equal(merged["out"]["kernel"], deltas["out/kernel"])
    assert adapter.params["h/c_attn/kernel"]["a"].shape == (1, 2, 5)
