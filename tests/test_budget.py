"""Equal budgets, found for every method that has a hyper-parameter for one."""

import jax
import pytest

import jaxpeft
from jaxpeft.methods import METHODS, TYPICAL, full, lora, mos
from jaxpeft.spec import method_of
from train import methods


@pytest.fixture(scope="module")
def llama() -> jaxpeft.Sites:
    return methods.sites("meta-llama/Llama-2-7b-hf")


def test_published_budgets(llama) -> None:
    found = jaxpeft.fit_budget(mos.Spec(rank=8, equivalent_rank=4, private_rank=1), llama, 5_000_000)
    assert (found.spec.equivalent_rank, found.parameters) == (2, 4_997_120)
    assert found.error == pytest.approx(-0.000576)
    assert str(found) == "equivalent_rank=2: 4,997,120 trained parameters, -0.06% of the budget"
    assert jaxpeft.fit_budget(lora.Spec(rank=1), llama, 40_000_000).spec.rank == 16


def test_values_beyond_those_that_are_tried_one_by_one() -> None:
    sites = jaxpeft.find({"up": {"kernel": jax.ShapeDtypeStruct((8, 8), "float32")}})
    found = jaxpeft.fit_budget(lora.Spec(rank=1), sites, 16 * 1_000_003)
    assert (found.spec.rank, found.error) == (1_000_003, 0)


def test_values_that_do_not_fit_are_left_out(llama) -> None:
    """With every rank private the rank must be the equivalent rank."""
    found = jaxpeft.fit_budget(mos.Spec(rank=4, equivalent_rank=4, private_rank=4), llama, 5_000_000)
    assert found.spec.equivalent_rank == 4


def test_errors(llama) -> None:
    with pytest.raises(ValueError, match="full has no hyper-parameter for a budget: it trains 6,476,005,376"):
        jaxpeft.fit_budget(full.Spec(), llama, 10)
    with pytest.raises(ValueError, match="parameters=0, expected at least 1"):
        jaxpeft.fit_budget(lora.Spec(rank=1), llama, 0)
    smallest = 2_498_560
    assert jaxpeft.fit_budget(lora.Spec(rank=4), llama, smallest // 2).spec.rank == 1
    with pytest.raises(
        ValueError, match=r"parameters=3 is too few .* the smallest count that fits is 2,498,560, of rank=1"
    ):
        jaxpeft.fit_budget(lora.Spec(rank=4), llama, 3)
    with pytest.raises(ValueError, match=r"too few at these sites; .* is 9,994,240, of equivalent_rank=4"):
        jaxpeft.fit_budget(mos.Spec(rank=4, equivalent_rank=4, private_rank=4), llama, 4_000_000)


def test_every_method_has_a_typical_setting() -> None:
    assert TYPICAL.keys() == METHODS.keys()
    assert all(method_of(TYPICAL[name]) is METHODS[name] for name in METHODS)


COARSE = {"boft": 1.1, "malora": 0.5, "multilora": 0.6, "surm": 0.3}
"""How far off the budget methods may be whose smallest step, or smallest setting, is larger than a quarter of it."""


@pytest.mark.parametrize("name", [name for name in METHODS if METHODS[name].CARD.budget])
def test_every_method_comes_as_close_as_its_steps_allow(name, llama) -> None:
    found = jaxpeft.fit_budget(TYPICAL[name], llama, 4_997_120)
    assert abs(found.error) < COARSE.get(name, 0.25)
    shapes = jax.eval_shape(lambda: jaxpeft.adapter.abstract(found.spec, llama))
    assert jaxpeft.count(shapes) == found.parameters
