"""Adapters as PEFT's files and back: every method, patterns, and every kind of damage or doubt."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zoo
from moved import moved
from specs import SPECS

import jaxpeft
from jaxpeft.spec import method_of

MODEL = zoo.MODELS["plain scanned"]()
NATIVE = {
    "boft": "BOFT",
    "c3a": "C3A",
    "hira": "HIRA",
    "ia3": "IA3",
    "loha": "LOHA",
    "lokr": "LOKR",
    "lora": "LORA",
    "miss": "MISS",
    "oft": "OFT",
    "vblora": "VBLORA",
    "vera": "VERA",
}


def adapter_of(spec, model=MODEL, size=0.1) -> jaxpeft.Adapter:
    sites = jaxpeft.find(model.params, model.pattern, layouts=dict(model.layouts) or None)
    return moved(jaxpeft.init(jax.random.key(0), spec, sites, model.params), size)


def assert_same_update(found, expected, base=MODEL.params, tolerance=1e-5) -> None:
    ours, theirs = jaxpeft.delta(expected, base), jaxpeft.delta(found, base)
    assert ours.keys() == theirs.keys()
    for path, delta in ours.items():
        size = float(jnp.abs(delta).max())
        assert size > 1e-4
        np.testing.assert_allclose(theirs[path], delta, atol=tolerance * max(1, size), rtol=0, err_msg=path)


def on_output(spec) -> bool:
    return not method_of(spec).CARD.mergeable


@pytest.mark.parametrize("name", SPECS)
def test_round_trip(name, tmp_path) -> None:
    adapter = adapter_of(SPECS[name])
    try:
        report = jaxpeft.to_peft(tmp_path / "a", adapter, base_model="m", base=MODEL.params)
    except ValueError as error:
        if on_output(SPECS[name]):
            assert "ΔW" in str(error) or "factors" in str(error)
            return
        assert "rank=" in str(error)
        assert not (tmp_path / "a").exists()
        report = jaxpeft.to_peft(tmp_path / "a", adapter, base_model="m", base=MODEL.params, rank=12)
        assert report.how in ("lossless", "truncated")
        assert report.error < 1e-6
    found = jaxpeft.from_peft(tmp_path / "a", MODEL.params)
    assert_same_update(found, adapter)
    print(name, report)
