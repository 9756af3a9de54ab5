"""Facts of the PRoLoRA paper: how copies are rotated, that they are never expanded, and the start."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpeft
from jaxpeft.methods import lora, prolora


def adapter_of(spec, dims=(23, 17), layers=2, seed=0):
    params = {"up": {"kernel": jax.ShapeDtypeStruct((layers, *dims), "float32")}}
    adapter = jaxpeft.init(jax.random.key(seed), spec, jaxpeft.find(params, layouts={".*": "lio"}))
    leaves = {
        k: jax.random.normal(jax.random.key(i), v.shape) for i, (k, v) in enumerate(adapter.params["up/kernel"].items())
    }
    return adapter, adapter.replace(params={"up/kernel": leaves})


def test_copies_are_rotated_along_the_rank() -> None:
    """Row k of chunk i is row (k + i·s) mod R of the shared part, s = max(⌊R/m⌋, 1), and the last copy is cut."""
    spec = prolora.Spec(rank=8, unshared_rank=1, sharing_in=3, sharing_out=9)
    _, adapter = adapter_of(spec)
    factors = adapter.updates()["up/kernel"].factors()
    trained = adapter.params["up/kernel"]
    for name, whole, copies, dim in (("a", factors.a, 3, 23), ("b", factors.b, 9, 17)):
        shared, width, stride = trained[f"{name}_shared"], -(-dim // copies), max(7 // copies, 1)
        np.testing.assert_array_equal(whole[:, :1], trained[f"{name}_unshared"])
        for k in range(7):
            for column in range(dim):
                i, c = divmod(column, width)
                np.testing.assert_array_equal(whole[:, 1 + k, column], shared[:, (k + i * stride) % 7, c])


def test_blocks_depend_on_the_difference_of_rotations_alone() -> None:
    """Block (i of b, j of a) is set by (j·s_A - i·s_B) mod R: m = n = R gives R different blocks in all."""
    spec = prolora.Spec(rank=4, unshared_rank=0, sharing_in=4, sharing_out=4)
    _, adapter = adapter_of(spec, dims=(8, 12), layers=1)
    blocks = np.asarray(jaxpeft.delta(adapter)["up/kernel"])[0].reshape(4, 2, 4, 3).transpose(0, 2, 1, 3)
    for j in range(4):
        for i in range(4):
            np.testing.assert_allclose(blocks[j, i], blocks[(j - i) % 4, 0], atol=1e-4)
    assert not np.allclose(blocks[0, 0], blocks[1, 0])


@pytest.mark.parametrize("sharing", [(3, 9), (1, 1), (23, 17), (4, 5)])
@pytest.mark.parametrize("rotate", [True, False])
def test_product_without_expansion(sharing, rotate) -> None:
    spec = prolora.Spec(
        rank=8, unshared_rank=2, sharing_in=sharing[0], sharing_out=sharing[1], rotate=rotate, expand=False
    )
    _, adapter = adapter_of(spec)
    update = jax.tree.map(lambda leaf: leaf[0], adapter.updates()["up/kernel"])
    x = jax.random.normal(jax.random.key(3), (2, 5, 23))
    np.testing.assert_allclose(update.delta_matmul(x), x @ update.delta(), atol=1e-3)
    shapes = {
        equation.outvars[0].aval.shape
        for equation in jax.make_jaxpr(update.shared.delta_matmul)(x).eqns
        if sharing[0] > 1
    }
    assert (6, 23) not in shapes
    assert (23, 6) not in shapes


def test_everything_unshared_is_lora() -> None:
    ours, _ = adapter_of(prolora.Spec(rank=3, unshared_rank=3, sharing_in=2, sharing_out=2))
    theirs, _ = adapter_of(lora.Spec(rank=3))
    assert jaxpeft.count(ours) == jaxpeft.count(theirs)
    values = theirs.params["up/kernel"]
    same = ours.replace(params={"up/kernel": {"a_unshared": values["a"], "b_unshared": values["b"] + 1}})
    plain = theirs.replace(params={"up/kernel": {"a": values["a"], "b": values["b"] + 1}})
    np.testing.assert_array_equal(jaxpeft.delta(same)["up/kernel"], jaxpeft.delta(plain)["up/kernel"])


@pytest.mark.parametrize(("rectified", "fan_in"), [(True, 200), (False, 25)])
def test_start_is_rectified(rectified, fan_in) -> None:
    spec = prolora.Spec(rank=8, unshared_rank=2, sharing_in=8, sharing_out=8, rectified_init=rectified)
    adapter, _ = adapter_of(spec, dims=(200, 80), layers=20)
    start = adapter.params["up/kernel"]
    for name, expected in (("a_shared", fan_in), ("a_unshared", 200)):
        assert abs(start[name]).max() == pytest.approx(expected**-0.5, rel=0.01)
        assert start[name].std() == pytest.approx((3 * expected) ** -0.5, rel=0.03)
    assert not start["b_shared"].any()
    assert not start["b_unshared"].any()


def test_siblings() -> None:
    """Sharing along the rank repeats rows; rotating along the hidden axis shifts columns."""
    spec = prolora.Spec(rank=6, unshared_rank=0, sharing_in=3, sharing_out=3, share_along="rank", rotate_along="hidden")
    _, adapter = adapter_of(spec, dims=(12, 9))
    assert adapter.params["up/kernel"]["a_shared"].shape == (2, 2, 12)
    a = adapter.updates()["up/kernel"].factors().a
    for copy in range(3):
        np.testing.assert_array_equal(a[:, 2 * copy : 2 * copy + 2], jnp.roll(a[:, :2], -4 * copy, axis=-1))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"unshared_rank": 9}, "unshared_rank=9, expected from 0 to rank=8"),
        ({"sharing_in": 0}, "sharing_in=0, expected at least 1"),
        ({"share_along": "width"}, "share_along='width', expected hidden or rank"),
    ],
)
def test_bad_hyper_parameters(fields, message) -> None:
    with pytest.raises(ValueError, match=f"prolora.Spec: {message}"):
        prolora.Spec(**{"rank": 8, "unshared_rank": 1, "sharing_in": 2, "sharing_out": 2, **fields})


def test_more_copies_than_features() -> None:
    with pytest.raises(ValueError, match="sharing_in=24 copies do not fit up/kernel; at most 23"):
        adapter_of(prolora.Spec(rank=8, unshared_rank=1, sharing_in=24, sharing_out=2))
