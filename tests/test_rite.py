"""LoRA-RITE: steps of ΔW that do not depend on the factors, and its own formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxpeft
from jaxpeft.methods import lora, mos
from jaxpeft.rite import rite, scale_by_rite

L, R, IN, OUT = 2, 3, 7, 5


def factors(seed: int = 0) -> dict:
    keys = jax.random.split(jax.random.key(seed), 2)
    return {"w": {"a": jax.random.normal(keys[0], (L, R, IN)), "b": jax.random.normal(keys[1], (L, R, OUT))}}


def delta(params: dict) -> jax.Array:
    return jnp.einsum("lri,lro->lio", params["w"]["a"], params["w"]["b"])


def train(params: dict, optimizer: optax.GradientTransformation, steps: int) -> list[np.ndarray]:
    target = jax.random.normal(jax.random.key(9), (L, IN, OUT))

    @jax.jit
    def step(params, state, number):
        def loss(params):
            return jnp.mean((delta(params) - target * jnp.cos(number)) ** 2)

        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    state, seen = optimizer.init(params), []
    for number in range(steps):
        params, state = step(params, state, jnp.float32(number))
        seen.append(np.asarray(delta(params)))
    return seen


def refactored(params: dict, size: float) -> dict:
    """(Ra)ᵀ (R⁻ᵀ b), another pair of factors of the same ΔW."""
    matrix = size * (jnp.eye(R) + 0.4 * jax.random.normal(jax.random.key(4), (L, R, R)))
    a, b = params["w"]["a"], params["w"]["b"]
    return {"w": {"a": matrix @ a, "b": jnp.linalg.solve(jnp.swapaxes(matrix, 1, 2), b)}}


@pytest.mark.parametrize("escape", [True, False])
@pytest.mark.parametrize("size", [1.0, 10.0])
def test_steps_do_not_depend_on_the_factors(escape, size) -> None:
    params = factors()
    other = refactored(params, size)
    np.testing.assert_allclose(delta(params), delta(other), atol=1e-5)
    optimizer = rite(0.02, escape=escape, eps=1e-4)
    mine, theirs = train(params, optimizer, 8), train(other, optimizer, 8)
    assert np.abs(mine[-1] - mine[0]).max() > 0.1
    for found, expected in zip(theirs, mine, strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5 * max(1, np.abs(expected).max()))


def test_adam_depends_on_the_factors() -> None:
    params = factors()
    mine, theirs = (train(start, optax.adam(0.02), 3) for start in (params, refactored(params, 1.0)))
    assert np.abs(mine[-1] - theirs[-1]).max() > 1e-2


def test_the_first_step_is_the_papers() -> None:
    """Without history: U (UᵀU/n)^-½ R⁻ᵀ, computed here from singular values."""
    params, gradients = factors(), factors(1)
    optimizer = scale_by_rite(eps=0.0, clip=0)
    directions, _ = optimizer.update(gradients, optimizer.init(params), params)
    for factor, partner, n in (("a", "b", IN), ("b", "a", OUT)):
        for layer in range(L):
            _, r = np.linalg.qr(np.asarray(params["w"][partner][layer]).T)
            u, _, v = np.linalg.svd(np.asarray(gradients["w"][factor][layer]).T @ np.linalg.inv(r), full_matrices=False)
            expected = np.sqrt(n) * u @ v @ np.linalg.inv(r).T
            np.testing.assert_allclose(directions["w"][factor][layer], expected.T, rtol=1e-3, atol=1e-4)


def test_escaped_mass() -> None:
    """A partner that turns away takes the second moment with it; the escaped mass keeps its size."""
    gradients, optimizer = factors(1), scale_by_rite(clip=0)
    params = factors()
    _, state = optimizer.update(gradients, optimizer.init(params), params)
    before = state.moments["w"]["a"]
    assert not before.escaped.any()
    turned = {"w": {**params["w"], "b": factors(2)["w"]["b"]}}
    _, state = optimizer.update(gradients, state, turned)
    after = state.moments["w"]["a"]
    basis = np.linalg.qr(np.swapaxes(np.asarray(turned["w"]["b"]), 1, 2))[0]
    for layer in range(L):
        turn = basis[layer].T @ np.asarray(before.basis[layer])
        carried = turn @ np.asarray(before.second[layer]) @ turn.T
        lost = np.linalg.eigvalsh(before.second[layer]) - np.linalg.eigvalsh(carried)
        decay = 0.999 * (1 - 0.999) / (1 - 0.999**2)
        assert after.escaped[layer] == pytest.approx(decay * min(lost.max(), lost.sum()), rel=1e-3)
        assert after.escaped[layer] > 0


def test_from_the_start_of_lora_b_moves_first() -> None:
    sites = jaxpeft.find({"w": {"kernel": jnp.zeros((L, IN, OUT))}}, layouts={".*": "lio"})
    params = {"w": jaxpeft.init(jax.random.key(0), lora.Spec(rank=R), sites).params["w/kernel"]}
    optimizer = rite(0.05)
    updates, _ = optimizer.update(
        {"w": {"a": 0 * params["w"]["a"], "b": factors()["w"]["b"]}}, optimizer.init(params), params
    )
    assert not updates["w"]["a"].any()
    assert jnp.isfinite(updates["w"]["b"]).all()
    assert jnp.abs(updates["w"]["b"]).max() > 0
    assert all(np.isfinite(seen).all() for seen in train(params, optimizer, 5))


def test_large_unmagnified_gradients_are_clipped() -> None:
    params, gradients = factors(), factors(1)
    small, large = (scale_by_rite(clip=clip) for clip in (0.5, 1.0))
    second = [o.update(gradients, o.init(params), params)[1].moments["w"]["a"].second for o in (small, large)]
    np.testing.assert_allclose(second[0] * 4, second[1], rtol=1e-4)


def test_parameters_that_are_no_pairs_are_refused() -> None:
    sites = jaxpeft.find({"w": {"kernel": jnp.zeros((4, 8, 8))}}, layouts={".*": "lio"})
    pools = jaxpeft.init(jax.random.key(0), mos.Spec(rank=4, equivalent_rank=2, shards_per_vector=2), sites).params
    with pytest.raises(ValueError, match=r"needs pairs of factors.*Found w/kernel/a \(16, 4\), w/kernel/b \(16, 4\)"):
        rite(1e-3).init(pools)
    with pytest.raises(ValueError, match=r"Found w/a \(2, 3, 7\), w/b \(2, 3, 5\), w/magnitude \(2, 5\)"):
        rite(1e-3).init({"w": {**factors()["w"], "magnitude": jnp.ones((2, 5))}})
