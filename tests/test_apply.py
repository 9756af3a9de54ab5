"""Rules of adapted weights: every way a model consumes a weight gives what the merged weight gives, and is reported."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zoo
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxpeft
from jaxpeft.methods import hira, ia3, lokr, lora, mos
from jaxpeft.updates import Base, Update
from jaxpeft.values import Adapted

IN, OUT, STACK = 6, 10, 3


def adapted(shape: tuple[int, ...], layout: str, seed: int = 0) -> tuple[dict, jaxpeft.Adapter]:
    """One weight of a shape and layout, and a trained LoRA for it."""
    key = jax.random.key(seed)
    base = {"w": jax.random.normal(key, shape)}
    adapter = jaxpeft.init(key, lora.Spec(rank=2), jaxpeft.find(base, "w", layouts={"w": layout}))
    noise = jax.random.normal(jax.random.key(1), adapter.params["w"]["b"].shape)
    return base, adapter.replace(params={"w": {**adapter.params["w"], "b": noise}})


def assert_same_as_merged(fn, base, adapter, *args, fused: bool = True) -> None:
    """Values and gradients of the adapted function are those of the merged weight, and the report says how."""
    report = jaxpeft.explain(fn, base, adapter, *args)
    assert report.fused == (("w",) if fused else ()), str(report)
    assert report.materialized == (() if fused else ("w",)), str(report)

    def through(forward):
        def loss(params):
            out = jax.tree.leaves(forward(adapter.replace(params=params)))
            return sum(jnp.sum(jnp.sin(leaf.astype(jnp.float32))) for leaf in out)

        return jax.jit(jax.value_and_grad(loss))(adapter.params)

    def formed(adapter):
        return fn(jaxpeft.merge(base, adapter), *args)

    def fast(adapter):
        if fused:
            return jaxpeft.adapt(fn)(base, adapter, *args)
        with pytest.warns(jaxpeft.MaterializeWarning, match="w"):
            return jaxpeft.adapt(fn)(base, adapter, *args)

    for found, expected in zip(jax.tree.leaves(through(fast)), jax.tree.leaves(through(formed)), strict=True):
        np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-4)


X = jax.random.normal(jax.random.key(9), (4, IN))
Y = jax.random.normal(jax.random.key(10), (4, OUT))
MESH = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
HEADS = jax.random.normal(jax.random.key(11), (4, 2, 5))

FUSED = {
    "x @ w": ((IN, OUT), "io", lambda p: X @ p["w"]),
    "x @ w.T, stored (out, in)": ((OUT, IN), "oi", lambda p: X @ p["w"].T),
    "weight on the left": ((IN, OUT), "io", lambda p: jnp.einsum("io,bi->ob", p["w"], X)),
    "tied head: over the out-axes": ((IN, OUT), "io", lambda p: Y @ p["w"].T),
    "tied head, weight on the left": ((IN, OUT), "io", lambda p: p["w"] @ Y.T),
    "attention kernel out": ((IN, 2, 5), "ioo", lambda p: jnp.einsum("bi,ihk->hbk", X, p["w"])),
    "attention kernel in": ((2, 5, IN), "iio", lambda p: jnp.einsum("bhk,hkd->bd", HEADS, p["w"])),
    "in-axes swapped by the product": (
        (2, 5, IN),
        "iio",
        lambda p: jnp.einsum("bkh,hkd->bd", HEADS.swapaxes(1, 2), p["w"]),
    ),
    "in-axes around the out-axis": ((2, IN, 5), "ioi", lambda p: jnp.einsum("bhk,hdk->bd", HEADS, p["w"])),
    "split by a reshape": ((IN, OUT), "io", lambda p: jnp.einsum("bi,ihk->bhk", X, p["w"].reshape(IN, 2, 5))),
    "merged by a reshape": ((IN, 2, 5), "ioo", lambda p: X @ p["w"].reshape(IN, OUT)),
    "transposed, then reshaped": ((OUT, IN), "oi", lambda p: jnp.einsum("bi,ihk->bhk", X, p["w"].T.reshape(IN, 2, 5))),
    "batched experts": ((STACK, IN, OUT), "lio", lambda p: jnp.einsum("ebi,eio->ebo", jnp.stack([X] * STACK), p["w"])),
    "all experts at once": ((STACK, IN, OUT), "lio", lambda p: jnp.einsum("bi,eio->beo", X, p["w"])),
    "experts, backwards": (
        (STACK, IN, OUT),
        "lio",
        lambda p: jnp.einsum("ebo,eio->bei", jnp.stack([Y] * STACK), p["w"]),
    ),
    "two stack axes": (
        (STACK, 2, IN, OUT),
        "llio",
        lambda p: jnp.einsum("ebi,leio->leob", jnp.stack([X, X + 1]), p["w"]),
    ),
    "a loop over the layers": ((STACK, IN, OUT), "lio", lambda p: sum(X @ w for w in p["w"])),
    "a layer by a static index": ((STACK, IN, OUT), "lio", lambda p: X @ p["w"][1]),
    "a layer by a traced index": ((STACK, IN, OUT), "lio", lambda p: X @ p["w"][jnp.argmax(X[0]) % STACK]),
    "a slice of layers": (
        (STACK, IN, OUT),
        "lio",
        lambda p: jax.lax.scan(lambda c, w: (c, X @ w), 0, p["w"][1:])[1],
    ),
    "scan over a middle axis": (
        (IN, STACK, OUT),
        "ilo",
        lambda p: jax.lax.scan(lambda c, w: (c, X @ w), 0, p["w"].transpose(1, 0, 2))[1],
    ),
    "scan over layers, then experts": (
        (STACK, 2, IN, OUT),
        "llio",
        lambda p: jax.lax.scan(lambda c, w: jax.lax.scan(lambda c, w: (c, X @ w), c, w), 0, p["w"])[1],
    ),
    "a constant of a scan": ((IN, OUT), "io", lambda p: jax.lax.scan(lambda c, x: (c, x @ p["w"]), 0, X)[1]),
    "a unit axis": ((IN, OUT), "io", lambda p: jnp.einsum("bi,lio->blo", X, p["w"][None])),
    "remat": ((IN, OUT), "io", lambda p: jax.checkpoint(lambda w: jnp.tanh(X @ w))(p["w"])),
    "jit": ((IN, OUT), "io", lambda p: jax.jit(lambda w: X @ w)(p["w"])),
    "vmap over inputs": ((IN, OUT), "io", lambda p: jax.vmap(lambda x: x @ p["w"])(X)),
    "vmap over layers": ((STACK, IN, OUT), "lio", lambda p: jax.vmap(lambda w: X @ w)(p["w"])),
    "while": ((IN, OUT), "io", lambda p: jax.lax.fori_loop(0, 3, lambda i, y: y + X @ p["w"], jnp.zeros((4, OUT)))),
    "cond": ((IN, OUT), "io", lambda p: jax.lax.cond(X[0, 0] > 0, lambda w: X @ w, lambda w: 2 * X @ w, p["w"])),
    "a branch for each platform": (
        (IN, OUT),
        "io",
        lambda p: jax.lax.platform_dependent(
            p["w"], cpu=lambda w: X @ w, tpu=lambda w: 2 * X @ w, cuda=lambda w: 3 * X @ w
        ),
    ),
    "stop_gradient": ((IN, OUT), "io", lambda p: X @ jax.lax.stop_gradient(p["w"])),
    "sharding constraint": (
        (OUT, IN),
        "oi",
        lambda p: X @ jax.lax.with_sharding_constraint(p["w"].T, NamedSharding(MESH, P(None, "data"))),
    ),
    "named for a remat policy": ((IN, OUT), "io", lambda p: X @ checkpoint_name(p["w"], "kernel")),
    "copied": ((IN, OUT), "io", lambda p: X @ jnp.array(p["w"], copy=True)),
    "behind a barrier": ((IN, OUT), "io", lambda p: X @ jax.lax.optimization_barrier((p["w"], X))[0]),
    "fetched from the host in a loop": (
        (STACK, IN, OUT),
        "lio",
        lambda p: jax.lax.scan(lambda c, w: (c, X @ jax.device_put(w, jax.memory.Space.Device)), 0, p["w"])[1],
    ),
    "put where it lies": ((IN, OUT), "io", lambda p: X @ jax.device_put(p["w"])),
    "highest precision": ((IN, OUT), "io", lambda p: jnp.matmul(X, p["w"], precision="highest")),
    "gradient inside the model": ((IN, OUT), "io", lambda p: jax.grad(lambda x: jnp.sum(jnp.sin(x @ p["w"])))(X)),
    "embedding rows": ((IN, OUT), "io", lambda p: jnp.take(p["w"], jnp.array([[0, 3], [5, 1]]), axis=0)),
    "embedding by index": ((IN, OUT), "io", lambda p: p["w"][jnp.array([[0, 3], [5, 1]])]),
    "embedding rows past the last, filled with a value": (
        (IN, OUT),
        "io",
        lambda p: jnp.take(p["w"], jnp.array([0, IN, 2 * IN]), axis=0, mode="fill", fill_value=1.0),
    ),
    "embedding rows past the last, filled with NaN": (
        (IN, OUT),
        "io",
        lambda p: jnp.nan_to_num(jnp.take(p["w"], jnp.array([0, IN, 2 * IN]), axis=0, mode="fill")),
    ),
    "embedding used twice": ((IN, OUT), "io", lambda p: p["w"][jnp.array([0, 3])] @ p["w"].T),
}

FORMED = {
    "norm of the weight": ((IN, OUT), "io", lambda p: X @ p["w"] + jnp.linalg.norm(p["w"])),
    "half of the in-axis": ((IN, OUT), "io", lambda p: X[:, :3] @ p["w"][:3]),
    "one of two in-axes": ((2, 5, IN), "iio", lambda p: jnp.einsum("bhk,hkd->bkd", HEADS, p["w"])),
    "convolution": (
        (2, 2, 3, 4),
        "iiio",
        lambda p: jax.lax.conv_general_dilated(
            jnp.ones((1, 5, 5, 3)), p["w"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        ),
    ),
    "weight as a loop's carry": ((IN, OUT), "io", lambda p: jax.lax.scan(lambda w, x: (w / 2, x @ w), p["w"], X)[1]),
    "returned": ((IN, OUT), "io", lambda p: p["w"].T),
    "weight times itself": ((IN, IN), "io", lambda p: p["w"] @ p["w"]),
    "unlike axes merged": ((IN, 2, 5), "ioo", lambda p: jnp.sum(X) * p["w"].reshape(IN * 2, 5).sum(0)),
}


@pytest.mark.parametrize("case", FUSED)
def test_fused(case) -> None:
    shape, layout, fn = FUSED[case]
    base, adapter = adapted(shape, layout)
    assert_same_as_merged(lambda p, _: fn(p), base, adapter, None)


@pytest.mark.parametrize("case", FORMED)
def test_formed_and_reported(case) -> None:
    shape, layout, fn = FORMED[case]
    base, adapter = adapted(shape, layout)
    assert_same_as_merged(lambda p, _: fn(p), base, adapter, None, fused=False)


def test_custom_vjp_and_shard_map_beside_an_adapted_weight() -> None:
    """Kernels written as custom_vjp or under shard_map, as flash attention is, pass through untouched."""

    @jax.custom_vjp
    def double(x):
        return 2 * x

    double.defvjp(lambda x: (2 * x, None), lambda _, g: (2 * g,))

    @functools.partial(jax.shard_map, mesh=MESH, in_specs=P("data"), out_specs=P("data"))
    def local(x):
        return jnp.sin(x)

    base, adapter = adapted((IN, OUT), "io")
    assert_same_as_merged(lambda p, x: local(double(jnp.tanh(x @ p["w"]))), base, adapter, X)


IN_SHARD_MAP = {
    "x @ w": (lambda p, x: x @ p["w"], X),
    "tied head": (lambda p, y: y @ p["w"].T, Y),
    "embedding": (lambda p, ids: p["w"][ids] @ p["w"].T, jnp.arange(4)),
    "a constant of a scan": (lambda p, x: jax.lax.scan(lambda c, x: (c, x @ p["w"]), 0, x)[1], X),
}


@pytest.mark.parametrize("spec", [lora.Spec(rank=2), mos.Spec(rank=2, equivalent_rank=2, shards_per_vector=2)])
@pytest.mark.parametrize("case", IN_SHARD_MAP)
def test_the_whole_model_in_shard_map(case, spec) -> None:
    """What is summed over the data axis are the gradients of factors, of no array of the kernel's size."""
    fn, inputs = IN_SHARD_MAP[case]
    base = {"w": jax.random.normal(jax.random.key(0), (IN, OUT))}
    adapter = jaxpeft.init(jax.random.key(1), spec, jaxpeft.find(base, "w", layouts={"w": "io"}))
    adapter = adapter.replace(params=jax.tree.map(lambda leaf: leaf + 0.3, adapter.params))

    def loss(params, inputs):
        return jnp.sum(jnp.sin(jaxpeft.adapt(fn)(base, adapter.replace(params=params), inputs)))

    def merged(params, inputs):
        return jnp.sum(jnp.sin(fn(jaxpeft.merge(base, adapter.replace(params=params)), inputs)))

    @jax.jit
    @functools.partial(jax.shard_map, mesh=MESH, in_specs=(P(), P("data")), out_specs=P())
    def found(params, inputs):
        return jax.value_and_grad(lambda params: jax.lax.psum(loss(params, inputs), "data"))(params)

    expected = jax.value_and_grad(merged)(adapter.params, inputs)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=2e-4), found(adapter.params, inputs), expected
    )
    text = found.lower(adapter.params, inputs).as_text()
    summed = re.findall(r"all_reduce.*?\) -> tensor<([\dx]*)f32>", text, re.DOTALL)
    assert summed
    assert not {f"{IN}x{OUT}x", f"{OUT}x{IN}x"} & set(summed)


@pytest.mark.parametrize("case", IN_SHARD_MAP)
def test_each_device_its_own_factors_in_shard_map(case) -> None:
    """Trained arrays that vary before they come here, so that their gradients are summed once, by the caller."""
    fn, inputs = IN_SHARD_MAP[case]
    base, adapter = adapted((IN, OUT), "io")

    def loss(params, inputs):
        return jnp.sum(jnp.sin(jaxpeft.adapt(fn)(base, adapter.replace(params=params), inputs)))

    @jax.jit
    @functools.partial(jax.shard_map, mesh=MESH, in_specs=(P(), P("data")), out_specs=P())
    def found(params, inputs):
        own = jax.lax.pcast(params, "data", to="varying")
        return jax.lax.psum(jax.grad(loss)(own, inputs), "data")

    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=2e-4),
        found(adapter.params, inputs),
        jax.grad(loss)(adapter.params, inputs),
    )


def test_resharded_in_a_loop_on_explicit_axes() -> None:
    """A kernel that is gathered layer by layer keeps its factors, which lie as they did."""
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Explicit,))
    base, adapter = adapted((STACK, IN, OUT), "lio")

    def fn(p, x):
        return jax.lax.scan(lambda c, w: (c, x @ jax.sharding.reshard(w, P())), 0, p["w"])[1]

    expected = jnp.einsum("bi,lio->lbo", X, jaxpeft.merge(base, adapter)["w"])
    with jax.set_mesh(mesh):
        base = jax.device_put(base, NamedSharding(mesh, P(None, "data")))
        x = jax.device_put(X, NamedSharding(mesh, P("data")))
        assert jaxpeft.explain(fn, base, adapter, x).fused == ("w",)
        np.testing.assert_allclose(jax.jit(jaxpeft.adapt(fn))(base, adapter, x), expected, rtol=2e-4, atol=2e-4)


def test_a_branch_for_another_platform_is_not_compiled_for_this_one() -> None:
    """A kernel written for TPUs beside the product that stands for it elsewhere."""

    def kernel(x, w, out):
        out[...] = x[...] @ w[...]

    def on_tpu(x, w):
        return pl.pallas_call(kernel, out_shape=jax.ShapeDtypeStruct((4, OUT), jnp.float32))(x, w)

    def fn(p, x):
        return jax.lax.platform_dependent(x, p["w"], tpu=on_tpu, default=lambda x, w: x @ w)

    base, adapter = adapted((IN, OUT), "io")
    expected = X @ jaxpeft.merge(base, adapter)["w"]
    with pytest.warns(jaxpeft.MaterializeWarning, match="pallas_call"):
        found = jax.jit(jaxpeft.adapt(fn))(base, adapter, X)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    np.testing.assert_allclose(jaxpeft.adapt(fn)(base, adapter, X), expected, atol=1e-4)


def test_a_weight_inside_custom_vjp_is_formed() -> None:
    @jax.custom_vjp
    def product(x, w):
        return x @ w

    product.defvjp(lambda x, w: (x @ w, (x, w)), lambda kept, g: (g @ kept[1].T, kept[0].T @ g))
    base, adapter = adapted((IN, OUT), "io")
    assert_same_as_merged(lambda p, x: product(x, p["w"]), base, adapter, X, fused=False)


def test_low_precision_keeps_factors_in_float32() -> None:
    base, adapter = adapted((IN, OUT), "io")
    half = {"w": base["w"].astype(jnp.bfloat16)}

    def fn(p, x):
        return x @ p["w"]

    out = jaxpeft.adapt(fn)(half, adapter, X.astype(jnp.bfloat16))
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(jnp.float32), fn(jaxpeft.merge(base, adapter), X), rtol=0.1, atol=0.1)


@pytest.mark.parametrize("equation", ["bi,io->bo", "bo,io->bi"])
@pytest.mark.parametrize(
    ("operands", "preferred"), [("bfloat16", "float32"), ("float16", "float32"), ("float32", "bfloat16")]
)
@pytest.mark.parametrize("spec", [lora.Spec(rank=2), lora.Spec(rank=2, dora=True), hira.Spec(rank=2), ia3.Spec()])
def test_a_product_gives_the_type_the_model_prefers(spec, operands, preferred, equation) -> None:
    base = {"w": jax.random.normal(jax.random.key(0), (64, 64), operands)}
    sites = jaxpeft.find(base, "w", layouts={"w": "io"})
    adapter = jaxpeft.init(jax.random.key(1), spec, sites, weights=base)
    x = jax.random.normal(jax.random.key(2), (4, 64), operands)

    def fn(p, x):
        return jnp.einsum(equation, x, p["w"], preferred_element_type=preferred)

    found, expected = jaxpeft.adapt(fn)(base, adapter, x), fn(base, x)  # The same: an update is zero at the start.
    assert found.dtype == expected.dtype == preferred
    tolerance = 1e-5 if preferred == "float32" else 0.01
    np.testing.assert_allclose(*(y.astype("float32") for y in (found, expected)), rtol=tolerance, atol=10 * tolerance)


@pytest.mark.parametrize("spec", [lora.Spec(rank=2), lora.Spec(rank=2, dora=True), lokr.Spec(rank=1, alpha=2)])
def test_a_batch_of_no_rows(spec) -> None:
    base = {"w": jax.random.normal(jax.random.key(0), (IN, OUT))}
    adapter = jaxpeft.init(jax.random.key(1), spec, jaxpeft.find(base, "w", layouts={"w": "io"}), weights=base)
    assert jaxpeft.adapt(lambda p, x: x @ p["w"])(base, adapter, X[:0]).shape == (0, OUT)
    assert jaxpeft.adapt(lambda p, y: y @ p["w"].T)(base, adapter, Y[:0]).shape == (0, IN)


def test_dropout_in_an_unrolled_model_and_where_a_weight_is_formed() -> None:
    base, adapter = adapted((IN, OUT), "io")
    adapter = adapter.replace(spec=dataclasses.replace(adapter.spec, dropout=0.5))
    key = jax.random.key(0)
    x = jnp.ones((2000, IN))
    found = jaxpeft.adapt(lambda p, x: x @ p["w"])(base, adapter, x, dropout_key=key)
    expected = x @ jaxpeft.merge(base, adapter)["w"]
    assert not jnp.allclose(found[0], found[1])
    np.testing.assert_allclose(found.mean(axis=0), expected[0], atol=0.1 * float(jnp.abs(expected).max()))
    with pytest.raises(ValueError, match="dropout on an adapter needs a fused product"):
        jaxpeft.adapt(lambda p, x: x * p["w"].sum())(base, adapter, x, dropout_key=key)


def test_an_unused_site_is_an_error() -> None:
    base, adapter = adapted((IN, OUT), "io")
    with pytest.raises(ValueError, match=r"1 adapted weights are never used by this function.*: w;"):
        jaxpeft.adapt(lambda p, x: x)(base, adapter, X)
    with pytest.raises(ValueError, match="never used"):  # Passed into a loop, but not used there.
        jaxpeft.adapt(lambda p, x: jax.lax.scan(lambda c, w: (c, x), 0, (p["w"],))[1])(
            *adapted((STACK, IN, OUT), "lio"), X
        )


def test_another_base_is_an_error() -> None:
    base, adapter = adapted((IN, OUT), "io")
    forward = jaxpeft.adapt(lambda p, x: x @ p["w"])
    with pytest.raises(ValueError, match="no array 'w' to adapt; nearest: kernel"):
        forward({"kernel": base["w"]}, adapter, X)
    with pytest.raises(ValueError, match=r"w has shape \(6, 4\) in this base; the adapter was made for \(6, 10\)"):
        forward({"w": base["w"][:, :4]}, adapter, X)


def test_updates_of_several_adapters_add_up() -> None:
    base, first = adapted((IN, OUT), "io")
    second = adapted((IN, OUT), "io", seed=4)[1]
    forward = jaxpeft.adapt(lambda p, x: x @ p["w"])
    both = forward(base, [first, second], X)
    one_by_one = forward(base, first, X) + forward(base, second, X) - X @ base["w"]
    np.testing.assert_allclose(both, one_by_one, atol=1e-4)
    np.testing.assert_allclose(both, X @ jaxpeft.merge(base, [first, second])["w"], atol=1e-4)
    np.testing.assert_allclose(forward(base, [], X), X @ base["w"])


def test_arguments_that_are_no_arrays_stay_what_they_are() -> None:
    base, adapter = adapted((IN, OUT), "io")

    def fn(p, x, mode, *, train, scale=1.0, extra=None):
        assert mode == "mean"
        assert train is True
        assert extra is None
        return {"y": scale * (x @ p["w"]).mean() if mode == "mean" else x}

    out = jaxpeft.adapt(fn)(base, adapter, np.asarray(X), "mean", train=True, scale=2.0)
    np.testing.assert_allclose(out["y"], 2 * (X @ jaxpeft.merge(base, adapter)["w"]).mean(), rtol=1e-4)


def test_static_argument_names_are_those_of_the_adapted_function() -> None:
    base, adapter = adapted((IN, OUT), "io")

    def fn(p, x, mode):
        return x @ p["w"] if mode == "linear" else x

    forward = jax.jit(jaxpeft.adapt(fn), static_argnames="mode")
    np.testing.assert_allclose(
        forward(base, adapter, X, mode="linear"), X @ jaxpeft.merge(base, adapter)["w"], atol=1e-4
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rescaled(Update):
    """W' = W0 · diag(1 + g): an update that multiplies the weight, as the engine must also carry."""

    g: jax.Array
    additive = False

    def materialize(self, weight: jax.Array) -> jax.Array:
        return weight * (1 + self.g)

    def matmul(self, x: jax.Array, base: Base) -> jax.Array:
        return base.dot(x) * (1 + self.g)


@pytest.mark.parametrize("case", ["x @ w", "tied head: over the out-axes", "attention kernel out", "batched experts"])
def test_updates_that_multiply_the_weight(case) -> None:
    from jaxpeft.interpret import evaluate

    shape, layout, fn = FUSED[case]
    weight = jax.random.normal(jax.random.key(2), shape)
    stack = tuple(n for n, letter in zip(shape, layout, strict=True) if letter == "l")
    update = Rescaled(jax.random.normal(jax.random.key(3), (*stack, OUT)))
    additive = jaxpeft.updates.LowRank(jnp.ones((*stack, 1, IN)), jnp.ones((*stack, 1, OUT)), jnp.ones(stack))
    for updates in ((update,), (update, additive)):
        value = Adapted(weight, updates, layout, tuple(range(len(shape))), "w")
        (found,) = evaluate(jax.make_jaxpr(lambda w: fn({"w": w}))(weight), [value])
        np.testing.assert_allclose(found, fn({"w": value.materialize()}), atol=1e-4)


def test_fused_step_costs_what_hand_written_adapters_cost() -> None:
    """XLA counts no more FLOPs for the training step than for a model whose layers hold their factors."""
    model = zoo.MODELS["plain scanned"]()
    adapter = jaxpeft.init(jax.random.key(1), lora.Spec(rank=3), jaxpeft.find(model.params, model.pattern))
    ids = jnp.zeros((8, 5), jnp.int32)
    scale = 16.0 / 3

    def by_hand(params, base, ids):
        def dense(x, w, ab):
            return x @ w + ((x @ ab["a"].T) * scale) @ ab["b"]

        def block(x, layer):
            p, f = layer
            n = x.shape[:2]
            h = zoo.rms_norm(x, p["norm"]["scale"])
            q = jnp.tensordot(h, p["query"]["kernel"], 1)
            q = q + (((h @ f["query"]["a"].T) * scale) @ f["query"]["b"]).reshape(q.shape)
            h = jnp.tanh(q)
            o = jnp.tensordot(h, p["out"]["kernel"], 2)
            flat = h.reshape(*n, -1)
            x = x + o + ((flat @ f["out"]["a"].T) * scale) @ f["out"]["b"]
            h = jax.nn.gelu(dense(x, p["up"]["kernel"], f["up"]))
            return x + dense(h, p["down"]["kernel"], f["down"])

        table = base["embed"]["embedding"]
        factors = {name: params[f"layers/{name}/kernel"] for name in zoo.SITES}
        step = jax.checkpoint(block)
        x, _ = jax.lax.scan(lambda x, layer: (step(x, layer), None), table[ids], (base["layers"], factors))
        return jnp.sum((x @ table.T) ** 2)

    def fused(params, base, ids):
        return jnp.sum(jaxpeft.adapt(model.apply)(base, adapter.replace(params=params), ids) ** 2)

    def cost(fn):
        compiled = jax.jit(jax.value_and_grad(fn)).lower(adapter.params, model.params, ids).compile()
        return compiled.cost_analysis()["flops"], compiled.memory_analysis().temp_size_in_bytes

    value = jax.jit(by_hand)(adapter.params, model.params, ids)
    np.testing.assert_allclose(jax.jit(fused)(adapter.params, model.params, ids), value, rtol=1e-5)
    (flops, memory), (flops_by_hand, memory_by_hand) = cost(fused), cost(by_hand)
    assert 0.9 * flops_by_hand < flops <= 1.002 * flops_by_hand
    assert memory <= 1.02 * memory_by_hand
