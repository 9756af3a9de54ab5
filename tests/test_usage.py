"""Layouts read off a model's own computation."""

import jax
import jax.numpy as jnp
import pytest
import zoo
from moved import moved

import jaxpeft
from jaxpeft.methods import lora


def shape(*sizes: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, "float32")


X = jnp.ones((2, 5, 8))


@jax.custom_vjp
def with_own_gradient(x, w):
    return x @ w


with_own_gradient.defvjp(lambda x, w: (x @ w, (x, w)), lambda kept, g: (g @ kept[1].T, kept[0].T @ g))

USES = {
    "dense": ((8, 4), lambda w: X @ w, "io"),
    "transposed": ((4, 8), lambda w: X @ w.T, "oi"),
    "torch's way": ((4, 8), lambda w: jax.vmap(jax.vmap(lambda x: w @ x))(X), "oi"),
    "heads": ((2, 8, 4), lambda w: jnp.einsum("bsd,ndh->bsnh", X, w), "oio"),
    "keys and values": ((2, 3, 8, 4), lambda w: jnp.einsum("bsd,ckdh->cbskh", X, w), "ooio"),
    "heads out": ((2, 4, 8), lambda w: jnp.einsum("bsnh,nhd->bsd", jnp.ones((2, 5, 2, 4)), w), "iio"),
    "reshaped": ((8, 2, 4), lambda w: X @ w.reshape(8, 8), "ioo"),
    "split": ((8, 8), lambda w: jnp.einsum("bsd,dnh->bsnh", X, w.reshape(8, 2, 4)), "io"),
    "half of it": ((8, 6), lambda w: X @ w[:, :3], "io"),
    "in another type": ((8, 4), lambda w: X.astype("bfloat16") @ w.astype("bfloat16"), "io"),
    "experts": ((3, 8, 4), lambda w: jnp.einsum("ebd,edf->ebf", jnp.ones((3, 2, 8)), w), "lio"),
    "one of a stack": ((3, 8, 4), lambda w: X @ w[1], "lio"),
    "one at a traced place": (
        (3, 8, 4),
        lambda w: jax.lax.fori_loop(0, 3, lambda i, y: y + X @ w[i], X[..., :4]),
        "lio",
    ),
    "stacked on axis 1": ((8, 3, 4), lambda w: jnp.einsum("bsd,dlk->lbsk", X, w), "ioo"),
    "scanned": ((3, 8, 8), lambda w: jax.lax.scan(lambda x, w: (x @ w, None), X, w)[0], "lio"),
    "scanned over one": ((1, 8, 8), lambda w: jax.lax.scan(lambda x, w: (x @ w, None), X, w)[0], "lio"),
    "scanned, transposed": ((3, 4, 8), lambda w: jax.lax.scan(lambda c, w: (c, X @ w.T), 0.0, w)[1], "loi"),
    "vmapped": ((2, 8, 4), lambda w: jax.vmap(lambda w, x: x @ w)(w, X), "lio"),
    "vmapped, one input for all": ((3, 8, 4), lambda w: jax.vmap(lambda w: X @ w)(w), "oio"),
    "remat and jit": ((8, 4), lambda w: jax.checkpoint(jax.jit(lambda w, x: x @ w))(w, X), "io"),
    "either branch": ((8, 4), lambda w: jax.lax.cond(X.sum() > 0, lambda w: X @ w, lambda w: 2 * X @ w, w), "io"),
    "twice": ((8, 8), lambda w: X @ w @ w, "io"),
    "there and back": ((8, 4), lambda w: X @ w @ w.T, "io"),
    "custom gradient": ((8, 4), lambda w: with_own_gradient(X, w), "io"),
}


@pytest.mark.parametrize(("sizes", "model", "layout"), USES.values(), ids=USES.keys())
def test_a_product_tells_the_layout(sizes, model, layout) -> None:
    (group,) = jaxpeft.find({"anything": shape(*sizes)}, model=lambda params: model(params["anything"]))
    assert group.layout == layout


OTHERS = {
    "a scale": ((8,), lambda w: X * w),
    "a mask": ((5, 8), lambda w: X * w),
    "looked up": ((20, 8), lambda w: w[jnp.ones((2, 5), jnp.int32)]),
    "looked up, and the head": ((20, 8), lambda w: w[jnp.ones((2, 5), jnp.int32)] @ w.T),
    "a convolution": (
        (3, 8, 4),
        lambda w: jax.lax.conv_general_dilated(X, w, (1,), "SAME", None, None, ("NWC", "WIO", "NWC")),
    ),
    "normalised": ((8, 4), lambda w: X @ (w / jnp.linalg.norm(w))),
    "a vector": ((8,), lambda w: X @ w),
    "part of an axis": ((8, 4), lambda w: X @ w.reshape(2, 4, 4).transpose(0, 2, 1).reshape(8, 4)),
    "not used": ((8, 4), lambda w: X),
    "in vain": ((8, 4), lambda w: (X @ w, X)[1]),
}


@pytest.mark.parametrize(("sizes", "model"), OTHERS.values(), ids=OTHERS.keys())
def test_what_is_no_linear_weight(sizes, model) -> None:
    params = {"kernel": shape(*sizes), "w": shape(8, 4)}
    (group,) = jaxpeft.find(params, model=lambda params: (model(params["kernel"]), X @ params["w"]))
    assert group.name == "w"


def test_leaves_that_are_no_weights_are_passed_by() -> None:
    params = {"temperature": 2.0, "empty": jnp.zeros((0, 4)), "none": None, "w": jnp.ones((8, 4))}

    def model(params):
        return X @ params["w"] / params["temperature"], params["empty"].reshape(0)

    (group,) = jaxpeft.find(params, model=model)
    assert group.name == "w"


def test_use_agrees_with_names_in_every_style_of_model() -> None:
    for name, make in zoo.MODELS.items():
        made = make()
        by_use = jaxpeft.find(made.params, model=lambda params: made.apply(params, jnp.ones((2, 5), jnp.int32)))  # noqa: B023
        assert by_use == jaxpeft.find(made.params), name


def test_embeddings_heads_and_declared_layouts() -> None:
    params = {"table": shape(20, 8), "head": {"w": shape(8, 20)}, "up": {"w": shape(8, 8)}}

    def model(params):
        return params["table"][jnp.ones((2, 5), jnp.int32)] @ params["up"]["w"].T @ params["head"]["w"]

    assert [(g.name, g.layout) for g in jaxpeft.find(params, model=model)] == [("up/w", "oi")]
    named = jaxpeft.find(params, ["table", "head"], model=model)
    assert {(g.name, g.layout) for g in named} == {("table", "io"), ("head/w", "io")}
    (declared,) = jaxpeft.find(params, model=model, layouts={"up/w": "io"})
    assert declared.layout == "io"


def test_weights_in_few_bits() -> None:
    x = jax.random.normal(jax.random.key(1), (2, 64))
    base = {"anything": jax.random.normal(jax.random.key(0), (24, 64))}

    def model(params):
        return x @ params["anything"].T

    small = jaxpeft.quantize.quantize(base, "int8", model=model)
    assert small["anything"].shape == (24, 64)
    assert small["anything"].scales.shape == (24, 1)
    (group,) = jaxpeft.find(small, model=model)
    assert group.layout == "oi"
    adapter = moved(jaxpeft.init(jax.random.key(2), lora.Spec(rank=2), jaxpeft.find(small, model=model)), 0.1)
    expected = model(jaxpeft.merge(small, adapter, dequantize=True))
    assert jnp.allclose(jaxpeft.adapt(model)(small, adapter), expected, rtol=1e-4, atol=1e-4)


def test_a_layout_the_wrong_way_round_shows() -> None:
    params = {"c_proj": {"kernel": jnp.ones((4, 8))}}  # As GPT-2 stores them: (out, in).

    def model(params):
        return X @ params["c_proj"]["kernel"].T

    def how(sites):
        adapter = jaxpeft.init(jax.random.key(0), lora.Spec(rank=2), sites)
        ((use, _),) = jaxpeft.explain(model, params, adapter).uses
        return use.primitive

    assert how(jaxpeft.find(params)) == "dot_general, transposed"
    assert how(jaxpeft.find(params, model=model)) == "dot_general"


def test_what_tells_no_layout_is_an_error_that_says_so() -> None:
    params = {"conv": shape(3, 8, 4), "w": shape(8, 4)}

    def model(params):
        y = jax.lax.conv_general_dilated(X, params["conv"], (1,), "SAME", None, None, ("NWC", "WIO", "NWC"))
        return y, X @ params["w"]

    with pytest.raises(ValueError, match=r"conv, shape \(3, 8, 4\), enters conv_general_dilated in the model.*'lio'"):
        jaxpeft.find(params, ".*", model=model)
    with pytest.raises(ValueError, match=r"not certain from its name.*model=lambda params"):
        jaxpeft.find(params, "conv")
