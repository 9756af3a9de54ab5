"""Wrong arguments are named before anything is computed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpeft
from jaxpeft import batch
from jaxpeft.methods import lora, mos, vera

BASE = {"layers": {"up": {"kernel": jnp.ones((2, 8, 4))}, "down": {"kernel": jnp.ones((2, 4, 8))}}}
SITES = jaxpeft.find(BASE, layouts={".*": "lio"})
SPEC = lora.Spec(rank=2)
ADAPTER = jaxpeft.init(jax.random.key(0), SPEC, SITES)
X = jnp.ones((3, 8))


def apply(base, x):
    for up, down in zip(base["layers"]["up"]["kernel"], base["layers"]["down"]["kernel"], strict=True):
        x = x @ up @ down
    return x


FORWARD = jaxpeft.adapt(apply)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: FORWARD(BASE, ADAPTER.params, X), "found a dict; trained arrays alone are none"),
        (lambda: FORWARD(BASE, X), "expected an adapter, or several in a list, found a"),
        (lambda: FORWARD(BASE, [ADAPTER, SPEC], X), "found a Spec"),
        (lambda: FORWARD(BASE, jaxpeft.to_lora(ADAPTER, rank=1), X), "an adapter and a report on it: pass the first"),
        (lambda: jaxpeft.explain(apply, BASE, BASE, X), "found a dict"),
        (lambda: jaxpeft.merge(ADAPTER, BASE), "found a dict"),
        (lambda: jaxpeft.save("unused", ADAPTER.params), "expected an adapter, found a dict"),
        (lambda: jaxpeft.summary(BASE), "expected an adapter, found a dict"),
        (lambda: jaxpeft.count(ADAPTER.params), "expected an adapter, found a dict"),
        (lambda: jaxpeft.init(jax.random.key(0), SPEC, BASE), r"sites: expected what jaxpeft.find\(params\) returns"),
        (lambda: jaxpeft.init(SPEC, jax.random.key(0), SITES), "spec: expected for instance"),
        (lambda: jaxpeft.init(jax.random.key(0), lora, SITES), r"the module .*; its hyper-parameters are lora.Spec"),
        (lambda: jaxpeft.init(jax.random.key(0), lora.Spec, SITES), "the class Spec; call it with hyper-parameters"),
        (lambda: lora.Spec(rnak=4), "lora.Spec has no field 'rnak'; did you mean 'rank'"),
    ],
)
def test_other_things_than_adapters_specs_and_sites(call, message) -> None:
    with pytest.raises(TypeError, match=message):
        call()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rank": "4"}, "lora.Spec: rank='4', expected an integer"),
        ({"rank": 4.0}, "lora.Spec: rank=4.0, expected an integer"),
        ({"rank": True}, "lora.Spec: rank=True, expected an integer"),
        ({"rank": 4, "alpha": "8"}, "lora.Spec: alpha='8', expected a number"),
        ({"rank": 4, "rslora": 1}, "lora.Spec: rslora=1, expected True or False"),
    ],
)
def test_values_of_another_type(fields, message) -> None:
    with pytest.raises(ValueError, match=message):
        lora.Spec(**fields)


def test_numbers_of_numpy_are_numbers(tmp_path) -> None:
    spec = lora.Spec(rank=np.int64(2), alpha=np.float32(8))
    assert (type(spec.rank), type(spec.alpha)) == (int, float)
    jaxpeft.save(tmp_path / "adapter", jaxpeft.init(jax.random.key(0), spec, SITES))
    assert jaxpeft.load(tmp_path / "adapter").spec == spec


@pytest.mark.parametrize("use", [lambda one: FORWARD(BASE, one, X), lambda one: jaxpeft.merge(BASE, one)])
@pytest.mark.parametrize(
    ("params", "message"),
    [
        (jax.tree.map(lambda leaf: leaf[:1], ADAPTER.params), r"has shape \(1, .*expected \(2, "),
        (jaxpeft.init(jax.random.key(0), lora.Spec(rank=4), SITES).params, r"/a has shape \(2, 4, .*expected \(2, 2, "),
        (
            {"layers/up/kernel": ADAPTER.params["layers/up/kernel"]},
            "missing .*layers/down/kernel/a.*unexpected nothing",
        ),
        (jaxpeft.init(jax.random.key(0), vera.Spec(rank=2), SITES).params, "missing .*unexpected"),
    ],
)
def test_arrays_of_another_spec(use, params, message, tmp_path) -> None:
    """They would be broadcast, or scaled as another rank's."""
    wrong = ADAPTER.replace(params=params)
    with pytest.raises(ValueError, match=f"not those of its lora.Spec and sites: .*{message}"):
        use(wrong)
    with pytest.raises(ValueError, match="not those of its lora"):
        jaxpeft.save(tmp_path / "adapter", wrong)
    assert not (tmp_path / "adapter").exists()


def test_what_stands_for_an_adapter() -> None:
    """An expanded one, and several in a tuple."""
    expected = FORWARD(BASE, [ADAPTER, ADAPTER], X)
    np.testing.assert_array_equal(FORWARD(BASE, (batch.expand(ADAPTER), ADAPTER), X), expected)
    spec = mos.Spec(rank=2, equivalent_rank=2, private_rank=1, shards_per_vector=2)
    other = jaxpeft.init(jax.random.key(0), spec, SITES)
    np.testing.assert_array_equal(FORWARD(BASE, batch.expand(other), X), FORWARD(BASE, other, X))
