"""Conversion to plain LoRA: the same update where it is two factors, the best one of its rank elsewhere."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zoo
from moved import moved
from specs import SPECS

import jaxpeft
from jaxpeft import convert
from jaxpeft.methods import METHODS, full, lora, mixed, mos
from jaxpeft.spec import method_of

MERGED = [name for name, spec in SPECS.items() if method_of(spec).CARD.mergeable]
EXACT = {
    "adalora",
    "aslora",
    "beamlora",
    "dynamic_dora",
    "increlora",
    "lily",
    "loha",
    "lora",
    "loramini",
    "loraxs",
    "lorta",
    "lotr",
    "malora",
    "melora",
    "miss",
    "mos",
    "mtllora",
    "multilora",
    "nola",
    "prolora",
    "randlora",
    "sharelora",
    "sora",
    "tiedlora",
    "tinylora",
    "unilora",
    "vblora",
    "vera",
}
"""Methods whose main setting is a LoRA of its materialised rank."""


@cache
def model(name="plain unrolled"):
    return zoo.MODELS[name]()


@cache
def trained(name: str, seed: int = 5) -> jaxpeft.Adapter:
    made = model()
    sites = jaxpeft.find(made.params, made.pattern)
    return moved(jaxpeft.init(jax.random.key(1), SPECS[name], sites, made.params), 0.05, seed)


def assert_same_update(one, other, tolerance=1e-5, base=None):
    ours, theirs = jaxpeft.delta(one, base), jaxpeft.delta(other, base)
    assert ours.keys() == theirs.keys()
    for path, delta in ours.items():
        size = float(jnp.abs(theirs[path]).max())
        np.testing.assert_allclose(delta, theirs[path], atol=tolerance * size, rtol=0, err_msg=path)


@pytest.mark.parametrize("name", sorted(EXACT))
def test_a_method_with_two_factors_is_exactly_a_lora(name) -> None:
    adapter = trained(name)
    plain, report = jaxpeft.to_lora(adapter)
    assert isinstance(plain.spec, lora.Spec)
    assert report.exact
    assert "exactly" in str(report)
    assert_same_update(plain, adapter)


def test_the_others_say_so() -> None:
    for name in METHODS.keys() - EXACT - {"surm_block"}:
        with pytest.raises(ValueError, match="no product of two factors"):
            jaxpeft.to_lora(trained(name))


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in METHODS else [pytest.mark.slow]) for n in MERGED])
def test_every_method_at_full_rank_is_itself(name) -> None:
    adapter, base = trained(name), model().params
    plain, report = jaxpeft.to_lora(adapter, energy=1.0, base=base)
    assert_same_update(plain, adapter, 1e-4, base)
    assert max(report.error.values()) < 1e-3


@pytest.mark.parametrize("name", ["full", "mos", "ia3"])
def test_a_rank_keeps_the_largest_singular_values_and_states_the_rest(name) -> None:
    adapter, base = trained(name), model().params
    deltas, (plain, report) = jaxpeft.delta(adapter, base), jaxpeft.to_lora(adapter, rank=2, base=base)
    assert plain.spec == lora.Spec(rank=2)
    cut = jaxpeft.delta(plain)
    for path, delta in deltas.items():
        singular = np.linalg.svd(flat(delta, path))[1]
        best = np.sqrt((singular[2:] ** 2).sum() / (singular**2).sum())
        found = np.linalg.norm(cut[path] - delta) / np.linalg.norm(delta)
        assert found == pytest.approx(best, rel=1e-3)
        assert report.error[path] == pytest.approx(best, rel=1e-3)
    assert "relative error up to" in str(report)


def flat(delta, path):
    """A kernel's update as a matrix."""
    return np.asarray(delta).reshape((-1, zoo.EMBED) if "out" in path or "down" in path else (zoo.EMBED, -1))


def test_an_energy_keeps_the_smallest_rank_that_has_it() -> None:
    adapter = trained("full")
    plain, report = jaxpeft.to_lora(adapter, energy=0.6)
    for path, delta in jaxpeft.delta(adapter).items():
        squares = np.linalg.svd(flat(delta, path))[1] ** 2
        needed = 1 + int(np.argmax(np.cumsum(squares) >= 0.6 * squares.sum()))
        assert needed <= report.rank[path] <= needed + 2, "the group's largest"
        assert report.error[path] <= np.sqrt(0.4)
    assert isinstance(plain.spec, lora.Spec | mixed.Spec)


@pytest.mark.parametrize("name", ["plain scanned", "nnx scanned", "linen unrolled"])
def test_it_works_in_place_of_the_adapter(name) -> None:
    made = model(name)
    sites = jaxpeft.find(made.params, made.pattern, layers=[1, 3])
    adapter = moved(
        jaxpeft.init(jax.random.key(1), mos.Spec(rank=3, equivalent_rank=2, shards_per_vector=3), sites), 0.1
    )
    plain, _ = jaxpeft.to_lora(adapter)
    ids = jnp.arange(10).reshape(2, 5)
    forward = jaxpeft.adapt(made.apply)
    out = forward(made.params, adapter, ids)
    np.testing.assert_allclose(forward(made.params, plain, ids), out, atol=1e-4)  # of numbers up to 40
    assert float(jnp.abs(out - made.apply(made.params, ids)).max()) > 1e-2


def test_heads_and_vectors_stay_whole_and_ranks_differ_by_group(tmp_path) -> None:
    params = {
        "layers": [{"q": {"kernel": jnp.ones((8, 6))}, "up": {"kernel": jnp.ones((6, 10))}} for _ in range(2)],
        "norm": {"scale": jnp.ones(6)},
        "lm_head": {"kernel": jnp.ones((6, 12))},
    }
    spec = mixed.Spec(
        default=mos.Spec(rank=2, equivalent_rank=2, shards_per_vector=2),
        overrides={".*up/kernel": lora.Spec(rank=3), "norm/scale": full.Spec(), "lm_head/kernel": full.Spec()},
    )
    adapter = moved(jaxpeft.init(jax.random.key(0), spec, jaxpeft.find(params, ".*")), 0.1)
    plain, _ = jaxpeft.to_lora(adapter)
    assert_same_update(plain, adapter)
    assert {name: sorted(leaves) for name, leaves in plain.params.items()} == {
        "layers/*/q/kernel": ["a", "b"],
        "layers/*/up/kernel": ["a", "b"],
        "lm_head/kernel": ["w"],
        "norm/scale": ["w"],
    }
    assert plain.params["layers/*/q/kernel"]["a"].shape == (2, 2, 8)
    assert plain.params["layers/*/up/kernel"]["a"].shape == (2, 3, 6)
    jaxpeft.save(tmp_path / "plain", plain)
    assert_same_update(jaxpeft.load(tmp_path / "plain"), adapter)


def test_it_can_be_trained_further_and_alpha_scales_it() -> None:
    plain, _ = jaxpeft.to_lora(trained("vera"))
    double = plain.with_alpha(2 * plain.spec.alpha)
    for path, delta in jaxpeft.delta(double).items():
        np.testing.assert_allclose(delta, 2 * jaxpeft.delta(plain)[path], rtol=1e-5, atol=1e-7)
    assert jaxpeft.count(plain) == jaxpeft.count(jaxpeft.init(jax.random.key(0), plain.spec, plain.sites))


def test_what_cannot_be_is_said() -> None:
    adapter = trained("mos")
    for bad, match in (
        ({"rank": 0}, "at least 1"),
        ({"energy": 0.0}, r"\(0, 1\]"),
        ({"energy": 1.5}, r"\(0, 1\]"),
        ({"rank": 2, "energy": 0.5}, "one of the two"),
        ({"base": {"other": jnp.ones(3)}}, "the base has no array"),
    ):
        with pytest.raises(ValueError, match=match):
            jaxpeft.to_lora(adapter, **bad)
    with pytest.raises(ValueError, match="pass base="):
        jaxpeft.to_lora(trained("ia3"), rank=2)
    with pytest.raises(ValueError, match="no ΔW"):
        jaxpeft.to_lora(trained("surm_block"), rank=2)


def test_a_cut_of_factors_is_the_cut_of_their_product() -> None:
    random = np.random.default_rng(0)
    factors = convert.Factors(
        random.normal(size=(5, 9)).astype(np.float32), random.normal(size=(5, 7)).astype(np.float32)
    )
    by_factors, by_product = (convert.cut(delta, 3, None) for delta in (factors, factors.delta()))
    np.testing.assert_allclose(by_factors.delta(), by_product.delta(), atol=1e-5)
    assert by_factors.error == pytest.approx(by_product.error, rel=1e-4)
    assert convert.cut(factors, 5, None) is factors
    nothing = convert.cut(np.zeros((3, 4), np.float32), None, 0.9)
    assert (nothing.rank, nothing.error) == (1, 0.0)
