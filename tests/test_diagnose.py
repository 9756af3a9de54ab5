"""Intruder dimensions are found where they were planted, and ranks are what the methods' algebra says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpeft
from jaxpeft.diagnose import diagnose
from jaxpeft.methods import lora

L, IN, OUT = 3, 24, 16


def base_weights() -> dict:
    return {"layers": {"up": {"kernel": jax.random.normal(jax.random.key(0), (L, IN, OUT)) / 5}}}


def sites_of(base: dict) -> jaxpeft.Sites:
    return jaxpeft.find(base, layouts={".*": "lio"})


NAME = "layers/up/kernel"


def planted(size: float) -> tuple[dict, jaxpeft.Adapter, np.ndarray]:
    """LoRA of rank one that adds, in layer 1 only, a direction equally far from all singular vectors."""
    base = base_weights()
    _, _, v = np.linalg.svd(np.asarray(base["layers"]["up"]["kernel"][1]))
    direction = v.T @ np.where(np.arange(OUT) % 2, 1.0, -1.0) / np.sqrt(OUT)
    adapter = jaxpeft.init(jax.random.key(1), lora.Spec(rank=1, alpha=1), sites_of(base))
    a = jnp.zeros((L, 1, IN)).at[1, 0].set(jnp.ones(IN) / np.sqrt(IN))
    b = jnp.zeros((L, 1, OUT)).at[1, 0].set(size * direction)
    return base, adapter.replace(params={NAME: {"a": a, "b": b}}), direction


def test_a_planted_intruder_is_found() -> None:
    base, adapter, direction = planted(50.0)
    report = diagnose(base, adapter)
    assert [len(row.intruders) for row in report.weights] == [0, 1, 0]
    (intruder,) = report.weights[1].intruders
    assert intruder.number == 0
    assert intruder.value == pytest.approx(50, rel=0.05)
    assert intruder.similarity == pytest.approx(1 / np.sqrt(OUT), abs=0.05)
    assert np.abs(direction @ np.linalg.svd(jaxpeft.merge(base, adapter)["layers"]["up"]["kernel"][1])[2][0]) > 0.99
    assert report.intruders == 1
    assert "layers/up/kernel  1      1     1.0        1: #0 " in str(report)
    assert "1 intruder dimensions" in str(report)


def test_the_same_from_the_merged_tree() -> None:
    base, adapter, _ = planted(50.0)
    reports = [diagnose(base, tuned, adapter.sites) for tuned in (adapter, jaxpeft.merge(base, adapter))]
    for mine, theirs in zip(*(report.weights for report in reports), strict=True):
        assert mine.rank == theirs.rank
        assert [one.number for one in mine.intruders] == [one.number for one in theirs.intruders]
    assert reports[0].stacked_ranks == reports[1].stacked_ranks


def test_a_small_change_of_full_rank_has_none() -> None:
    base = base_weights()
    noise = 1e-3 * jax.random.normal(jax.random.key(2), (L, IN, OUT))
    tuned = {"layers": {"up": {"kernel": base["layers"]["up"]["kernel"] + noise}}}
    report = diagnose(base, tuned, sites_of(base))
    assert report.intruders == 0
    assert [row.rank for row in report.weights] == [OUT] * L
    assert all(0.7 * OUT < row.effective_rank <= OUT for row in report.weights)
    assert diagnose(base, tuned, sites_of(base), epsilon=1.01).intruders == 10 * L
    assert diagnose(base, tuned, sites_of(base), top=2, epsilon=1.01).intruders == 2 * L


def test_ranks_of_low_rank_updates() -> None:
    base = base_weights()
    adapter = jaxpeft.init(jax.random.key(1), lora.Spec(rank=2), sites_of(base))
    unchanged = diagnose(base, adapter)
    assert [(row.rank, row.effective_rank) for row in unchanged.weights] == [(0, 0.0)] * L
    assert unchanged.stacked_ranks == {NAME: 0}
    b = jax.random.normal(jax.random.key(3), (L, 2, OUT))
    params = {NAME: {**adapter.params[NAME], "b": b}}
    report = diagnose(base, adapter.replace(params=params))
    assert [row.rank for row in report.weights] == [2] * L
    assert all(1 < row.effective_rank <= 2 for row in report.weights)
    assert report.stacked_ranks == {NAME: 2 * L}
    shared = {NAME: {**adapter.params[NAME], "b": jnp.broadcast_to(b[0], b.shape)}}
    assert diagnose(base, adapter.replace(params=shared)).stacked_ranks == {NAME: 2}


def test_effective_rank_of_equal_values_is_their_number() -> None:
    base = {"up": {"kernel": jnp.zeros((6, 6))}}
    tuned = {"up": {"kernel": jnp.diag(jnp.array([2.0, 2, 2, 0, 0, 0]))}}
    (row,) = diagnose(base, tuned, jaxpeft.find(base)).weights
    assert row.effective_rank == pytest.approx(3)


def test_a_tree_of_another_model_is_refused() -> None:
    base = base_weights()
    with pytest.raises(ValueError, match="has shape"):
        diagnose(base, {"layers": {"up": {"kernel": jnp.zeros((L, 4, 4))}}}, sites_of(base))
