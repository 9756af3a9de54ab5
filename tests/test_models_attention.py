"""Attention in blocks, against JAX's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpeft.models.attention import attention, blocks_of


def heads(length, dtype=jnp.float32, slots=None):
    shapes = [(2, length, 6, 8), (2, slots or length, 3, 8), (2, slots or length, 3, 8)]
    keys = jax.random.split(jax.random.key(0), 3)
    return [jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True)]


def gradients(function, arrays):
    return jax.grad(lambda arrays: jnp.sum(jnp.sin(function(*arrays))))(arrays)


@pytest.mark.parametrize("blocks", [1, 2, 3, 4, 10])
@pytest.mark.parametrize("masked", [False, True])
def test_causal(blocks, masked) -> None:
    """Also where the blocks are not equal, and where some tokens are hidden on top."""
    arrays = heads(10)
    mask = jnp.arange(10)[None, None, None] >= jnp.array([0, 2])[:, None, None, None] if masked else None
    mask = None if mask is None else mask | (jnp.arange(10)[:, None] < 2)

    def expected(*arrays):
        return jax.nn.dot_product_attention(*arrays, mask=mask, is_causal=True)

    def found(*arrays):
        return attention(*arrays, mask=mask, causal=True, blocks=blocks)

    np.testing.assert_allclose(found(*arrays), expected(*arrays), rtol=1e-5, atol=1e-5)
    for one, other in zip(gradients(found, arrays), gradients(expected, arrays), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(2, 1, 1, 7), (1, 1, 4, 7), (2, 1, 4, 7)])
def test_masks(shape) -> None:
    """Of a cache with more slots than there are queries, and of padding."""
    arrays = heads(4, slots=7)
    mask = jax.random.bernoulli(jax.random.key(1), 0.6, shape).at[..., 0].set(True)
    expected = jax.nn.dot_product_attention(*arrays, mask=jnp.broadcast_to(mask, (2, 1, 4, 7)))
    np.testing.assert_allclose(attention(*arrays, mask=mask), expected, rtol=1e-5, atol=1e-5)


def test_a_row_that_sees_nothing_is_finite() -> None:
    arrays = heads(4)
    mask = jnp.zeros((1, 1, 4, 4), bool)
    assert jnp.all(jnp.isfinite(attention(*arrays, mask=mask, causal=True, blocks=2)))


def test_large_scores_do_not_overflow() -> None:
    arrays = [1e4 * array for array in heads(8)]
    found = attention(*arrays, causal=True, blocks=2)
    expected = jax.nn.dot_product_attention(*arrays, is_causal=True)
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_bfloat16() -> None:
    arrays = heads(16, jnp.bfloat16)
    found = attention(*arrays, causal=True, blocks=2)
    assert found.dtype == jnp.bfloat16
    exact = jax.nn.dot_product_attention(*(array.astype(jnp.float32) for array in arrays), is_causal=True)
    np.testing.assert_allclose(found.astype(jnp.float32), exact, atol=0.03)


def test_blocks_save_products() -> None:
    """Four blocks compute ten sixteenths of the scores."""
    arrays = heads(256)

    def flops(blocks):
        run = jax.jit(lambda *arrays: attention(*arrays, causal=True, blocks=blocks))
        return run.lower(*arrays).compile().cost_analysis()["flops"]

    assert blocks_of(256) == 4
    assert flops(4) == pytest.approx(10 / 16 * flops(1), rel=0.05)
