"""The product with a thin factor: everything that JAX does with a product, in another order of operands."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxpeft import thin

HIDDEN = jax.random.normal(jax.random.key(0), (4, 5, 3))
FACTOR = jax.random.normal(jax.random.key(1), (3, 8))


def loss(product):
    return lambda hidden, factor: jnp.sum(jnp.sin(product(hidden, factor)))


def gradient(product):
    return jax.grad(loss(product), argnums=(0, 1))


TRANSFORMED = {
    "value": lambda product: product(HIDDEN, FACTOR),
    "gradient": lambda product: gradient(product)(HIDDEN, FACTOR),
    "jit": lambda product: jax.jit(gradient(product))(HIDDEN, FACTOR),
    "forward mode": lambda product: jax.jvp(product, (HIDDEN, FACTOR), (2 * HIDDEN, FACTOR)),
    "forward over reverse": lambda product: jax.jvp(gradient(product), (HIDDEN, FACTOR), (HIDDEN, -FACTOR)),
    "hessian": lambda product: jax.hessian(loss(product), argnums=1)(HIDDEN, FACTOR),
    "reverse over reverse": lambda product: jax.grad(
        lambda factor: sum(jnp.sum(jnp.cos(part)) for part in gradient(product)(HIDDEN, factor))
    )(FACTOR),
    "vmap": lambda product: jax.vmap(gradient(product), in_axes=(0, None))(HIDDEN, FACTOR),
    "vmap of factors": lambda product: jax.vmap(gradient(product), in_axes=(None, 0))(
        HIDDEN, jnp.stack([FACTOR, 2 * FACTOR])
    ),
    "vmap of both": lambda product: jax.vmap(gradient(product), in_axes=(1, 0))(
        jnp.stack([HIDDEN, HIDDEN], axis=1), jnp.stack([FACTOR, 2 * FACTOR])
    ),
    "vmap of all, twice": lambda product: jax.vmap(jax.vmap(gradient(product)))(
        jnp.stack([HIDDEN, -HIDDEN])[:, :, None], jnp.arange(8.0)[:, None, None].reshape(2, 4, 1, 1) * FACTOR
    ),
    "vmap of both, then of one": lambda product: jax.vmap(jax.vmap(gradient(product)), in_axes=(0, None))(
        jnp.stack([HIDDEN, -HIDDEN]), jnp.stack([FACTOR, 2 * FACTOR, 3 * FACTOR, 4 * FACTOR])
    ),
    "gradient of vmap": lambda product: gradient(jax.vmap(product))(HIDDEN, jnp.stack([FACTOR] * 4)),
    "remat": lambda product: jax.grad(jax.checkpoint(loss(product)), argnums=(0, 1))(HIDDEN, FACTOR),
    "transpose": lambda product: jax.linear_transpose(lambda hidden: product(hidden, FACTOR), HIDDEN)(
        jnp.ones((4, 5, 8))
    ),
    "one row": lambda product: gradient(product)(HIDDEN[0, 0], FACTOR),
}


@pytest.mark.parametrize("case", TRANSFORMED)
def test_as_a_plain_product(case) -> None:
    found, expected = TRANSFORMED[case](thin.times), TRANSFORMED[case](jnp.matmul)
    assert jax.tree.map(jnp.shape, found) == jax.tree.map(jnp.shape, expected)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), found, expected)


def test_bfloat16_as_near_to_float32_as_a_plain_product() -> None:
    hidden, factor = HIDDEN.astype(jnp.bfloat16), FACTOR.astype(jnp.bfloat16)
    exact = gradient(jnp.matmul)(hidden.astype(jnp.float32), factor.astype(jnp.float32))
    for found, expected in zip(gradient(thin.times)(hidden, factor), exact, strict=True):
        assert found.dtype == jnp.bfloat16
        np.testing.assert_allclose(found.astype(jnp.float32), expected, rtol=0.02, atol=0.05)


@pytest.mark.parametrize("precision", ["highest", "BF16_BF16_F32_X3"])
def test_all_products_have_the_precision_of_the_call(precision) -> None:
    """Also those of the gradients, which are made when the call is over, and where rows have factors of their own."""

    def product(hidden, factor):
        with jax.default_matmul_precision(precision):
            return thin.times(hidden, factor)

    several = jnp.stack([FACTOR] * 4)
    for mapped, factor in ((product, FACTOR), (jax.vmap(product), several), (jax.vmap(product, (None, 0)), several)):
        lines = jax.jit(gradient(mapped)).lower(HIDDEN, factor).as_text().splitlines()
        products = [line for line in lines if "dot_general" in line]
        wanted = "HIGHEST" if precision == "highest" else "num_primitive_operations = 3"
        assert len(products) == 3
        assert all(wanted in line for line in products), products


def test_the_large_operand_is_not_transposed() -> None:
    """The program that XLA makes of the factor's gradient has no array of the cotangent's transposed shape."""
    hidden, factor = jnp.ones((256, 4)), jnp.ones((4, 96))
    text = jax.jit(jax.grad(loss(thin.times), argnums=1)).lower(hidden, factor).compile().as_text()
    assert "f32[256,96]" in text
    assert "f32[96,256]" not in text


def test_nor_where_every_row_has_its_own_factor() -> None:
    hidden, factor = jnp.ones((8, 256, 4)), jnp.ones((8, 4, 96))
    text = jax.jit(jax.grad(loss(jax.vmap(thin.times)), argnums=1)).lower(hidden, factor).compile().as_text()
    assert "f32[8,256,96]" in text
    assert "f32[8,96,256]" not in text


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_on_a_mesh(kind) -> None:
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind, kind))
    with jax.set_mesh(mesh):
        hidden = jax.device_put(HIDDEN, NamedSharding(mesh, P("x")))
        factor = jax.device_put(FACTOR, NamedSharding(mesh, P(None, "y")))
        found = jax.jit(gradient(thin.times))(hidden, factor)
    expected = gradient(jnp.matmul)(HIDDEN, FACTOR)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), found, expected)


def test_in_shard_map() -> None:
    mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,))

    @partial(jax.shard_map, mesh=mesh, in_specs=(P("x"), P()), out_specs=P())
    def total(hidden, factor):
        return jax.lax.psum(loss(thin.times)(hidden, factor), "x")

    found = jax.jit(jax.grad(total, argnums=(0, 1)))(HIDDEN, FACTOR)
    expected = gradient(jnp.matmul)(HIDDEN, FACTOR)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), found, expected)
