"""With x64 and a float64 base: what is trained stays float32, and what is computed with it is as wide as the base."""

import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpeft
from jaxpeft.adapter import abstract
from jaxpeft.methods import fourierft, lora, loraxs, miss, mos, nola, prolora, superlora, surm

SPECS = {
    "lora": lora.Spec(rank=2),
    "dora": lora.Spec(rank=2, dora=True),
    "pissa": lora.Spec(rank=2, start="pissa"),
    "pissa and dora": lora.Spec(rank=2, start="pissa", dora=True),
    "mos": mos.Spec(equivalent_rank=2, rank=3, shards_per_vector=2, private_rank=1),
    "prolora": prolora.Spec(rank=3, unshared_rank=1, sharing_in=2, sharing_out=2),
    "superlora": superlora.Spec(groups=2, order=2, rank=2, projection="fastfood"),
    "surm": surm.Spec(kind="circulant"),
    "surm by fft": surm.Spec(kind="ldr", rank=2, path="fft"),
    "loraxs": loraxs.Spec(rank=2, r_std=0),
    "nola": nola.Spec(rank=2, bases=8),
    "formed, of the weight": miss.Spec(rank=2, variant="bat"),
    "formed, by a spectrum": fourierft.Spec(n_frequency=8, init="zeros"),
}


@pytest.fixture(autouse=True)
def as_errors() -> Iterator[None]:
    """JAX only warns where float64 is asked for and not to be had."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*float64.*")
        yield


def narrow() -> dict:
    keys = jax.random.split(jax.random.key(0))
    return {"up": {"kernel": jax.random.normal(keys[0], (2, 8, 12))}, "down": {"kernel": jnp.ones((2, 12, 8))}}


def wide() -> dict:
    """Weights that no float32 holds."""
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float64) * (1 + 1 / 3), narrow())


def model(base: dict, x: jax.Array) -> jax.Array:
    def layer(x: jax.Array, weights: dict) -> tuple[jax.Array, None]:
        return jnp.tanh(x @ weights["up"]["kernel"]) @ weights["down"]["kernel"], None

    return jax.lax.scan(layer, x, base)[0]


def forming(base: dict, x: jax.Array) -> jax.Array:
    """Adds up the weights themselves, for which there is no rule."""
    return sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(base)) * x


def started(name: str, base: dict) -> jaxpeft.Adapter:
    return jaxpeft.init(jax.random.key(1), SPECS[name], jaxpeft.find(base, layouts={".*": "lio"}), base)


def trained(adapter: jaxpeft.Adapter) -> jaxpeft.Adapter:
    return adapter.replace(params=jax.tree.map(lambda leaf: leaf + np.float32(0.01), adapter.params))


def dtypes(tree: object) -> list[str]:
    return [str(leaf.dtype) for leaf in jax.tree.leaves(tree)]


def same(found: object, expected: object) -> None:
    assert dtypes(found) == dtypes(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize("name", SPECS)
def test_a_key_gives_the_same_adapter_with_x64(name: str) -> None:
    base = narrow()
    expected = started(name, base)
    with jax.enable_x64(True):
        found = started(name, base)
        jitted = jax.jit(partial(started, name))(wide())
        shapes = jax.eval_shape(partial(abstract, found.spec, found.sites))
    if "dora" in name:  # Computed, not drawn, and then rounded.
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6), found, expected)
    else:
        same(found, expected)
    assert dtypes(jitted) == dtypes(shapes) == dtypes(found) == dtypes(expected)
    assert set(dtypes(found.params)) == {"float32"}


@pytest.mark.filterwarnings("ignore::jaxpeft.MaterializeWarning")
@pytest.mark.parametrize("name", SPECS)
def test_a_wide_base_keeps_its_bits(name: str) -> None:
    with jax.enable_x64(True):
        base, x = wide(), jnp.ones((3, 8))
        fresh = started(name, base)
        unchanged = partial(np.testing.assert_allclose, rtol=0, atol=1e-14)
        jax.tree.map(unchanged, jaxpeft.merge(base, fresh), base)
        for delta in jaxpeft.delta(fresh, base).values():
            unchanged(delta, np.zeros_like(delta))
        adapter = trained(fresh)
        merged, report = jaxpeft.merge_with_report(base, adapter)
        assert set(dtypes(merged)) == {"float64"}
        assert set(report.largest_error.values()) == {0.0}
        for path, delta in jaxpeft.delta(adapter, base).items():
            there = path.split("/")[0]
            unchanged(base[there]["kernel"] + delta, merged[there]["kernel"])
        for function in (model, forming):
            found = jaxpeft.adapt(function)(base, adapter, x)
            assert found.dtype == jnp.float64
            np.testing.assert_allclose(found, function(merged, x), rtol=1e-12)
            np.testing.assert_allclose(jaxpeft.adapt(function)(base, fresh, x), function(base, x), rtol=1e-12)
        gradients = jax.grad(lambda p: jaxpeft.adapt(model)(base, adapter.replace(params=p), x).sum())(adapter.params)
        assert dtypes(gradients) == dtypes(adapter.params)


@pytest.mark.parametrize("name", SPECS)
def test_a_narrow_base_stays_narrow(name: str) -> None:
    base, x = narrow(), np.ones((3, 8), np.float32)
    adapter = trained(started(name, base))
    expected = jaxpeft.adapt(model)(base, adapter, x), jaxpeft.merge(base, adapter), jaxpeft.delta(adapter, base)
    with jax.enable_x64(True):
        found = jaxpeft.adapt(model)(base, adapter, x), jaxpeft.merge(base, adapter), jaxpeft.delta(adapter, base)
        assert set(dtypes(found)) == {"float32"}
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), found, expected)


@pytest.mark.parametrize("name", ["lora", "dora", "mos", "superlora", "nola"])
def test_checkpoints_do_not_ask_for_x64(name: str, tmp_path: Path) -> None:
    adapter = trained(started(name, narrow()))
    jaxpeft.save(tmp_path / "without", adapter)
    with jax.enable_x64(True):
        same(jaxpeft.load(tmp_path / "without"), adapter)
        of_wide = trained(started(name, wide()))
        jaxpeft.save(tmp_path / "with", of_wide)
        same(jaxpeft.load(tmp_path / "with"), of_wide)
    same(jaxpeft.load(tmp_path / "with"), of_wide)


def test_a_wide_base_in_few_bits() -> None:
    with jax.enable_x64(True):
        base = wide()
        few = jaxpeft.quantize.quantize(base, "int8", block=4, layouts={".*": "lio"})
        adapter = started("pissa and dora", few)
        assert set(dtypes(adapter.params)) == {"float32"}
        assert jaxpeft.adapt(model)(few, adapter, jnp.ones((3, 8))).dtype == jnp.float64
        merged = jaxpeft.merge(few, adapter, dequantize=True)
        assert set(dtypes(merged)) == {"float64"}
