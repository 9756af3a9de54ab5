"""Base weights in few bits: what they stand for, and that every update on them is what it is on the floats."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zoo
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from moved import moved
from specs import SPECS

import jaxpeft
from jaxpeft import quantize
from jaxpeft.blocks import Quantized
from jaxpeft.formats import KINDS, NF4
from jaxpeft.methods import METHODS, lora

IDS = jax.random.randint(jax.random.key(7), (8, 5), 0, zoo.VOCAB)
SLOW = ("linen unrolled", "nnx scanned", "nnx vmapped")
EVERYTHING = ["all-linear", "embed"]
W = 0.3 * jax.random.normal(jax.random.key(1), (3, 128, 10))


def one(kind: str, weight=W, layout: str = "lio", **settings) -> Quantized:
    return quantize.quantize({"w": weight}, kind, selection="w", layouts={"w": layout}, **settings)["w"]


def by_hand(kind: str, column: np.ndarray, block: int) -> tuple[np.ndarray, np.ndarray]:
    """(values, largest error allowed) of one column, block by block from the formats' descriptions, in float64."""
    values, allowed = [], []
    for at in range(0, len(column), block):
        x = column[at : at + block].astype(np.float64)
        if kind == "nf4":
            largest = np.abs(x).max()
            values += [largest * min(NF4, key=lambda value: abs(value - v / largest)) for v in x]
            allowed += [largest * max(np.diff(NF4)) / 2] * block
        elif kind == "q4_1":
            step, least = (x.max() - x.min()) / 15, x.min()
            codes = np.minimum(np.floor((x - least) / step + 0.5), 15)
            values += list(float(np.float16(step)) * codes + float(np.float16(least)))
            allowed += [0.51 * step + 2e-3 * np.abs(x).max()] * block
        else:
            bits = 4 if kind == "int4" else 8
            step = np.abs(x).max() / {"int4": 7.5, "int8": 127.5, "q8_0": 127}[kind]
            codes = np.clip(np.round(x / step), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
            values += list((float(np.float16(step)) if kind == "q8_0" else step) * codes)
            allowed += [0.51 * step + (1e-3 * np.abs(x).max() if kind == "q8_0" else 0)] * block
    return np.array(values), np.array(allowed)


@pytest.mark.parametrize("kind", KINDS)
def test_values_by_the_formats_descriptions(kind) -> None:
    weight = one(kind, double=False)
    found = weight.dequantize()
    assert (weight.shape, weight.dtype, weight.ndim, weight.size) == (W.shape, W.dtype, 3, W.size)
    assert (found.shape, found.dtype) == (W.shape, W.dtype)
    assert weight.block == KINDS[kind].block
    for layer, out in ((0, 0), (2, 9)):
        column = np.asarray(W[layer, :, out])
        values, allowed = by_hand(kind, column, weight.block)
        # The largest weight of a block is half a step beyond the last code; float32 may round it either way.
        largest = np.abs(column.reshape(-1, weight.block)).max(1, keepdims=True).repeat(weight.block, 1).ravel()
        tied = (np.abs(column) == largest) & (kind in ("int8", "int4"))
        np.testing.assert_allclose(np.where(tied, values, found[layer, :, out]), values, atol=2e-6)
        assert (np.abs(found[layer, :, out] - column) <= allowed).all()


@pytest.mark.parametrize("kind", ["nf4", "int8", "int4"])
def test_double_quantization(kind) -> None:
    """Scales of 8 bits, their mean subtracted, in blocks of up to 256 along the same axis."""
    deep = 1 + jax.random.normal(jax.random.key(2), (512, 64 * 2, 3)).transpose(2, 1, 0) * 0.2  # (3, 128, 512)
    plain, double = one(kind, deep, "lio", block=2, double=False), one(kind, deep, "lio", block=2, double=True)
    assert double.scales.dtype == jnp.int8
    np.testing.assert_array_equal(plain.codes, double.codes)
    scales = np.asarray(plain.scales, np.float64)
    mean = scales.mean(1, keepdims=True)
    step = np.abs(scales - mean).max(1, keepdims=True) / 127
    expected = mean + step * np.clip(np.round((scales - mean) / step), -128, 127)
    assert double.scale_steps.shape == double.scale_means.shape == (3, 1, 512)
    np.testing.assert_allclose(double.plain_scales(), expected, atol=0.6 * step.max())
    assert np.mean(np.abs(double.plain_scales() - expected) > 1e-5) < 1e-4  # Ties may round either way.
    wide = one(
        kind, jnp.ones((1028, 2)), "io", block=2, double=True
    )  # 514 scales: two blocks of 257 would be too many.
    assert wide.scale_steps.shape == (257, 2)


@pytest.mark.parametrize(
    ("kind", "double", "bits"),
    [
        ("nf4", None, 4 + 8 / 64 + 64 / 4096),
        ("nf4", False, 4 + 32 / 64),
        ("int4", None, 4 + 32 / 64),
        ("int8", None, 8 + 32 / 64),
        ("q4_1", None, 4 + 32 / 32),
        ("q8_0", None, 8 + 16 / 32),
    ],
)
def test_bits_per_weight(kind, double, bits) -> None:
    weight = one(kind, jax.ShapeDtypeStruct((4096, 8), jnp.bfloat16), "io", double=double)
    assert weight.nbytes * 8 / weight.size == quantize.nbytes({"w": weight}) * 8 / weight.size == bits


def test_special_blocks() -> None:
    """Blocks of zeros, of one value and of tiny values come back as what they are, or nearly."""
    weight = jnp.concatenate([jnp.zeros((64, 1)), jnp.full((64, 1), -0.25), 1e-20 * jnp.ones((64, 1))], axis=1)
    for kind in ("nf4", "int8", "int4"):
        found = one(kind, weight, "io", double=False).dequantize()
        np.testing.assert_allclose(found, weight, rtol=0.07, atol=0)


def test_dtypes_and_layouts() -> None:
    for layout, shape, axis in (("oi", (10, 128), -1), ("ilo", (128, 3, 10), -3), ("iio", (2, 64, 5), -2)):
        weight = 0.1 * jax.random.normal(jax.random.key(3), shape, jnp.bfloat16)
        made = one("nf4", weight, layout)
        assert made.axis == axis
        assert made.dequantize().dtype == made.dtype == jnp.bfloat16
        assert all(leaf.ndim == len(shape) for leaf in jax.tree.leaves(made))
        np.testing.assert_allclose(made.dequantize().astype(jnp.float32), weight.astype(jnp.float32), atol=0.08)
    embedding = quantize.quantize({"embed": {"embedding": W[0].T}}, selection=["embed"], block=32)["embed"]["embedding"]
    assert embedding.axis == -1  # A row has its own blocks.


def test_a_slice_and_a_map_of_the_stack() -> None:
    weight = one("nf4")
    whole = weight.dequantize()
    np.testing.assert_array_equal(jax.tree.map(lambda leaf: leaf[1], weight).dequantize(), whole[1])
    np.testing.assert_array_equal(jax.vmap(Quantized.dequantize)(weight), whole)
    np.testing.assert_array_equal(jax.lax.map(Quantized.dequantize, weight), whole)


def gradients(fn, base, adapter, *args):
    """Output and gradients of an adapted function."""

    def loss(params, base):
        out = jaxpeft.adapt(fn)(base, adapter.replace(params=params), *args)
        return jnp.mean((out - jnp.sin(jnp.arange(out.shape[-1]))) ** 2), out

    (_, out), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(adapter.params, base)
    return out, grads


def assert_same(found, expected, tolerance: float = 2e-3) -> None:
    for left, right in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(left, right, rtol=tolerance, atol=tolerance * (1e-3 + float(jnp.abs(right).max())))


@pytest.mark.parametrize(
    "model", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in zoo.MODELS]
)
def test_every_style_of_model_and_update(model) -> None:
    """Values and gradients are those of the floats and of the merged model; no weight is formed that need not be."""
    made = zoo.MODELS[model]()
    base = quantize.quantize(made.params, "nf4", block=2, selection=EVERYTHING)
    floats = quantize.dequantize(base)
    sites = jaxpeft.find(base, [*EVERYTHING])
    assert sites == jaxpeft.find(made.params, [*EVERYTHING])
    for name in ("lora", "mos", "lora dora", "oft", "full") if model == "plain scanned" else ("lora", "oft"):
        where = sites if name in ("lora", "full") else jaxpeft.find(base, made.pattern)
        adapter = moved(jaxpeft.init(jax.random.key(1), SPECS[name], where, base), 0.05)
        found = gradients(made.apply, base, adapter, IDS)
        assert_same(found, gradients(made.apply, floats, adapter, IDS))
        merged = jaxpeft.merge(base, adapter, dequantize=True)
        assert_same(found[0], jaxpeft.adapt(made.apply)(merged, [], IDS))
        report = jaxpeft.explain(made.apply, base, adapter, IDS)
        assert report.materialized == ()
        assert_same(jaxpeft.delta(adapter, base), jaxpeft.delta(adapter, floats))


@pytest.mark.parametrize("name", METHODS)
def test_every_method(name) -> None:
    """On an nf4 base each computes what it computes on the floats this stands for."""
    made = zoo.MODELS["plain scanned"]()
    base = quantize.quantize(made.params, "nf4", block=2, selection=EVERYTHING)
    floats = quantize.dequantize(base)
    sites = jaxpeft.find(base, made.pattern)
    start = jaxpeft.init(jax.random.key(1), SPECS[name], sites, base)
    assert_same(start, jaxpeft.init(jax.random.key(1), SPECS[name], sites, floats), 1e-4)
    adapter = moved(start, 0.05)
    forward = jax.jit(lambda base, adapter: jaxpeft.adapt(made.apply)(base, adapter, IDS))
    found = forward(base, adapter)
    assert np.isfinite(found).all()
    assert_same(found, forward(floats, adapter))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("adapted", [True, False])
def test_every_kind(kind, adapted) -> None:
    """Through a scan with remat, embedding rows and a tied head, with and without an adapter."""
    base, fn, tokens = scanned_model(layers=2, size=64)
    small = quantize.quantize(base, kind, selection=EVERYTHING, layouts={"layers/.*kernel": "lio"})
    floats = quantize.dequantize(small)
    forward = jaxpeft.adapt(fn)
    adapters = [trained(base)] if adapted else []
    expected = forward(floats, adapters, tokens)
    assert_same(forward(small, adapters, tokens), expected)
    assert_same(jax.jit(forward)(small, adapters, tokens), expected)
    assert_same(jax.vmap(lambda tokens: forward(small, adapters, tokens))(tokens), expected)
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), small)
    assert_same(jax.vmap(lambda base: forward(base, adapters, tokens))(stacked)[1], expected)
    assert jax.eval_shape(forward, small, adapters, tokens).shape == expected.shape


def test_bfloat16() -> None:
    """Factors stay float32 beside a base that stands for bfloat16, and a product is the model's own."""
    base, fn, tokens = scanned_model(layers=2, size=64)
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), base)
    small = quantize.quantize(half, "nf4", selection=EVERYTHING, layouts={"layers/.*kernel": "lio"})
    adapter = trained(small)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(adapter.params))
    found = gradients(fn, small, adapter, tokens)
    assert found[0].dtype == jnp.bfloat16
    assert_same(
        jax.tree.map(lambda leaf: leaf.astype(jnp.float32), found),
        gradients(fn, quantize.dequantize(small), adapter, tokens),
        0.05,
    )


def scanned_model(layers: int, size: int, remat: bool = True):
    """A scan over MLPs between an embedding and a tied head."""
    keys = jax.random.split(jax.random.key(0), 3)
    base = {
        "embed": {"embedding": jax.random.normal(keys[0], (50, size))},
        "layers": {
            "up": {"kernel": jax.random.normal(keys[1], (layers, size, 2 * size)) * 0.1},
            "down": {"kernel": jax.random.normal(keys[2], (layers, 2 * size, size)) * 0.1},
        },
    }

    def apply(params, tokens):
        def step(x, layer):
            return x + jnp.tanh(x @ layer["up"]["kernel"]) @ layer["down"]["kernel"], None

        x = jnp.take(params["embed"]["embedding"], tokens, axis=0)
        x, _ = jax.lax.scan(jax.checkpoint(step) if remat else step, x, params["layers"])
        return x @ params["embed"]["embedding"].T

    return base, apply, jnp.arange(12).reshape(4, 3)


def trained(base, spec=None) -> jaxpeft.Adapter:
    sites = jaxpeft.find(base, layouts={"layers/.*kernel": "lio"})
    return moved(jaxpeft.init(jax.random.key(1), spec or lora.Spec(rank=2), sites, base), 0.05)


@pytest.mark.parametrize(
    "spec", [lora.Spec(rank=2), lora.Spec(rank=2, dora=True), SPECS["oft"]], ids=lambda s: str(s)[:5]
)
@pytest.mark.parametrize("remat", [False, True])
def test_a_step_holds_the_floats_of_one_layer(spec, remat) -> None:
    """By XLA's own account: no kernels of all layers as floats, and no more temporary memory than on a float base."""
    base, fn, tokens = scanned_model(layers=8, size=96, remat=remat)
    small = quantize.quantize(base, "nf4", block=32, layouts={"layers/.*kernel": "lio"})
    adapter = trained(base, spec)

    def loss(params, base):
        return jnp.sum(jaxpeft.adapt(fn)(base, adapter.replace(params=params), tokens) ** 2)

    def compiled(base):
        return jax.jit(jax.value_and_grad(loss)).lower(adapter.params, base).compile()

    on_floats, on_blocks = compiled(base), compiled(small)
    kernel = 4 * 96 * 192

    def of_all_layers(step) -> bool:
        shapes = re.findall(r"\bf\d+\[([\d,]+)\]", step.as_text())
        return any(4 * math.prod(map(int, shape.split(","))) >= 8 * kernel for shape in shapes)

    assert of_all_layers(on_floats)
    assert not of_all_layers(on_blocks)
    temporary = on_blocks.memory_analysis().temp_size_in_bytes
    assert temporary <= on_floats.memory_analysis().temp_size_in_bytes + 2 * kernel
    saved = on_floats.memory_analysis().argument_size_in_bytes - on_blocks.memory_analysis().argument_size_in_bytes
    assert saved == quantize.nbytes(base) - quantize.nbytes(small) > 13 * kernel


def test_what_else_happens_to_a_weight() -> None:
    """Views keep the codes; what has no rule forms the weight, is right, and is reported."""
    base = {"w": W}
    small = {"w": one("nf4")}
    floats = quantize.dequantize(small)
    x = jax.random.normal(jax.random.key(4), (4, 128))
    kept = {
        "static index": lambda p: x @ p["w"][1],
        "traced index": lambda p: x @ p["w"][jnp.argmax(x[0]) % 3],
        "transposed": lambda p: x @ p["w"].transpose(2, 0, 1)[:, 2].T,
        "unit axes": lambda p: jnp.einsum("bi,alio->albo", x, p["w"][None]),
        "another type": lambda p: (x.astype(jnp.bfloat16) @ p["w"][0].astype(jnp.bfloat16)).astype(jnp.float32),
        "copied": lambda p: x @ jnp.array(p["w"], copy=True)[0],
        "on the left": lambda p: jnp.einsum("lio,bi->lob", p["w"], x),
        "over its layers too": lambda p: jnp.einsum("lbi,lio->bo", jnp.stack([x, -x, x]), p["w"]),
        "stop_gradient": lambda p: x @ jax.lax.stop_gradient(p["w"])[0],
    }
    formed = {
        "reshape": lambda p: x @ p["w"].reshape(3, 128, 2, 5)[0, :, 0],
        "half of the blocks' axis": lambda p: x[:, :64] @ p["w"][0, :64],
        "elementwise": lambda p: p["w"] * 2,
        "returned": lambda p: p["w"],
        "rows across blocks": lambda p: p["w"][0][jnp.array([3, 5])],
        "twice in one product": lambda p: p["w"][0].T @ p["w"][1],
        "filled with another value": lambda p: jnp.take(
            p["w"][0].T, jnp.array([1, 99]), axis=0, mode="fill", fill_value=7.0
        ),
    }
    for name, fn in {**kept, **formed}.items():
        report = jaxpeft.explain(lambda p, _, fn=fn: fn(p), base, [], None)
        assert report.uses == (), name
        report = jaxpeft.explain(lambda p, _, fn=fn: fn(p), small, [], None)
        assert report.materialized == (() if name in kept else ("w",)), name
        forward = jaxpeft.adapt(lambda p, _, fn=fn: fn(p))
        if name in kept:
            found = forward(small, [], None)
        else:
            with pytest.warns(jaxpeft.MaterializeWarning, match="w"):
                found = forward(small, [], None)
        assert_same(found, fn(floats))


def test_rows_outside_the_embedding_are_filled_as_the_floats_rows_are() -> None:
    table = jax.random.normal(jax.random.key(5), (50, 64))
    for kind in KINDS:
        base = quantize.quantize({"embed": {"embedding": table}}, kind, selection=["embed"])
        for fill in (None, 0.0):

            def rows(p, ids, fill=fill):
                return jnp.take(p["embed"]["embedding"], ids, axis=0, fill_value=fill, mode="fill")

            ids = jnp.array([[3, 49], [60, 0]])
            found = jaxpeft.adapt(rows)(base, [], ids)
            np.testing.assert_allclose(found, rows(quantize.dequantize(base), ids), atol=1e-6)


def test_on_eight_devices() -> None:
    """Codes lie as the weight lay, and a step gives what it gives on one device."""
    base, fn, tokens = scanned_model(layers=2, size=64)
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    specs = {
        "embed": {"embedding": P("tensor", "fsdp")},
        "layers": {"up": {"kernel": P(None, "fsdp", "tensor")}, "down": {"kernel": P(None, "tensor", "fsdp")}},
    }
    placed = jax.tree.map(lambda leaf, spec: jax.device_put(leaf, NamedSharding(mesh, spec)), base, specs)
    settings = {"block": 16, "selection": EVERYTHING, "layouts": {"layers/.*kernel": "lio"}}
    small = quantize.quantize(placed, "nf4", **settings)
    up = small["layers"]["up"]["kernel"]
    assert up.codes.sharding.spec == up.scales.sharding.spec == P(None, "fsdp", "tensor")
    assert up.scale_steps.sharding.spec == P(None, None, "tensor")  # One block of scales; 2 devices cannot share it.
    assert_same(quantize.quantize(base, "nf4", **settings), small, 1e-5)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), placed)
    planned = quantize.quantize(shapes, "nf4", **settings)
    for plan, leaf in zip(jax.tree.leaves(planned), jax.tree.leaves(small), strict=True):
        assert (plan.shape, plan.dtype, plan.sharding) == (leaf.shape, leaf.dtype, leaf.sharding)
    adapter = trained(base)
    where = jax.device_put(jnp.tile(tokens, (2, 1)), NamedSharding(mesh, P("data")))
    one_device = gradients(fn, quantize.quantize(base, "nf4", **settings), adapter, jnp.tile(tokens, (2, 1)))
    assert_same(gradients(fn, small, adapter, where), one_device)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_the_same_bits_on_every_mesh(axis_type) -> None:
    """Sums over scales of which each device has some; 72 of these are one second-level block, and no power of two."""
    base = {"w": 0.02 * jax.random.normal(jax.random.key(6), (3, 4608, 64))}
    settings = {"selection": "w", "layouts": {"w": "lio"}, "double": True}
    for kind in ("nf4", "int8"):
        expected = quantize.quantize(base, kind, **settings)
        for sizes in ((8, 1), (2, 4)):
            mesh = jax.make_mesh(sizes, ("fsdp", "tensor"), axis_types=(axis_type,) * 2)
            for spec in (P(None, "fsdp", "tensor"), P(None, "tensor", "fsdp")):
                with jax.set_mesh(mesh):
                    found = quantize.quantize(jax.device_put(base, NamedSharding(mesh, spec)), kind, **settings)
                jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_factors_follow_the_codes() -> None:
    """`jaxpeft.sharding` takes a base in few bits, on meshes of both kinds of axes."""
    base, _, _ = scanned_model(layers=2, size=64)
    base, x = {"layers": base["layers"]}, jax.random.normal(jax.random.key(0), (8, 64))

    def fn(params, x):
        return jnp.tanh(x @ params["layers"]["up"]["kernel"][0]) @ params["layers"]["down"]["kernel"][1]

    expected = None
    for kind in (AxisType.Auto, AxisType.Explicit):
        mesh = jax.make_mesh((2, 2), ("data", "fsdp"), axis_types=(kind, kind))
        rules = [("down/kernel", P(None, None, "fsdp"))]
        with jax.set_mesh(mesh):
            placed = jax.device_put(base, jaxpeft.sharding.from_rules(base, mesh, rules))
            small = quantize.quantize(placed, "nf4", block=16, layouts={"layers/.*kernel": "lio"})
            by_rules, found = jaxpeft.sharding.from_rules(small, mesh, rules), jaxpeft.sharding.of(small)
            for left, right, leaf in zip(*map(jax.tree.leaves, (by_rules, found, small)), strict=True):
                assert left.is_equivalent_to(right, leaf.ndim)
            rows = jax.device_put(x, NamedSharding(mesh, P("data")))
            for spec in (lora.Spec(rank=2), lora.Spec(rank=2, dora=True)):
                adapter = trained(base, spec)
                forward = jaxpeft.adapt(fn, shardings=found if kind == AxisType.Auto else None)
                out = np.asarray(jax.jit(forward)(small, adapter, rows))
                floats = jax.device_get(quantize.dequantize(small))
                if kind == AxisType.Auto:
                    expected = {**(expected or {}), spec: np.asarray(jaxpeft.adapt(fn)(floats, adapter, x))}
                np.testing.assert_allclose(out, expected[spec], rtol=1e-4, atol=1e-5)
            by_kernel = jaxpeft.sharding.adapter(trained(base), found)
            assert by_kernel.params["layers/down/kernel"]["b"].spec == P(None, None, "fsdp")


def test_shapes_alone() -> None:
    base, fn, tokens = scanned_model(layers=2, size=64)
    abstract = jax.eval_shape(lambda: base)
    layouts = {"layers/.*kernel": "lio"}
    small = quantize.quantize(abstract, "nf4", layouts=layouts)
    made = quantize.quantize(base, "nf4", layouts=layouts)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), small) == jax.tree.map(lambda a: (a.shape, a.dtype), made)
    traced = jax.eval_shape(lambda base: quantize.quantize(base, "nf4", layouts=layouts), base)
    assert jax.tree.structure(traced) == jax.tree.structure(made)
    report = jaxpeft.explain(fn, small, trained(base), jax.ShapeDtypeStruct(tokens.shape, tokens.dtype))
    assert len(report.fused) == 2


def test_merging() -> None:
    base, fn, tokens = scanned_model(layers=2, size=64)
    small = quantize.quantize(base, "nf4", layouts={"layers/.*kernel": "lio"})
    adapter = trained(base)
    with pytest.raises(
        ValueError, match=r"2 adapted weights are in few bits: layers/down/kernel.*nf4.*dequantize=True"
    ):
        jaxpeft.merge(small, adapter)
    merged, report = jaxpeft.merge_with_report(small, adapter, dequantize=True)
    assert max(report.lost.values()) < 1e-6
    assert merged["layers"]["up"]["kernel"].dtype == jnp.float32
    assert merged["embed"]["embedding"] is small["embed"]["embedding"]
    assert_same(fn(merged, tokens), jaxpeft.adapt(fn)(small, adapter, tokens))
    other = quantize.quantize(base, "nf4", exclude="layers/down/kernel", layouts={"layers/.*kernel": "lio"})
    sites = jaxpeft.find(base, "layers/down/kernel", layouts={"layers/.*kernel": "lio"})
    only_floats = jaxpeft.merge(other, jaxpeft.init(jax.random.key(0), lora.Spec(rank=2), sites))
    assert only_floats["layers"]["up"]["kernel"] is other["layers"]["up"]["kernel"]


def test_fingerprint_and_checkpoint(tmp_path) -> None:
    base, _, _ = scanned_model(layers=2, size=64)
    layouts = {"layers/.*kernel": "lio"}
    kinds = [quantize.quantize(base, kind, layouts=layouts) for kind in ("nf4", "int4", "int8")]
    prints = [jaxpeft.checkpoint.fingerprint(tree) for tree in (base, *kinds)]
    assert len(set(prints)) == 4
    adapter = trained(base)
    jaxpeft.save(tmp_path / "a", adapter, base=kinds[0])
    jaxpeft.load(tmp_path / "a", base=kinds[0])
    with pytest.raises(jaxpeft.CheckpointError, match="another base"):
        jaxpeft.load(tmp_path / "a", base=base)


def test_errors() -> None:
    base = {"up": {"kernel": jnp.ones((96, 4)), "bias": jnp.ones(4)}, "odd": {"kernel": jnp.ones((7, 2))}}
    with pytest.raises(ValueError, match=r"kind 'nf5' is not known; one of nf4.*nearest: 'nf4'"):
        quantize.quantize(base, "nf5")
    with pytest.raises(
        ValueError, match=r"up/kernel: block=64, expected an even divisor.*of size 96; nearest: block=48"
    ):
        quantize.quantize(base, "nf4", exclude="odd/kernel")
    with pytest.raises(ValueError, match=r"odd/kernel: block=2, .* of size 7; exclude it, or take another kind"):
        quantize.quantize(base, "nf4", block=2)
    with pytest.raises(ValueError, match=r"block=64: q4_1 has blocks of 32"):
        quantize.quantize(base, "q4_1", block=64)
    with pytest.raises(ValueError, match=r"double=True: q8_0"):
        quantize.quantize(base, "q8_0", double=True, exclude="odd/kernel")
    with pytest.raises(ValueError, match=r"up/bias is a vector"):
        quantize.quantize(base, "nf4", selection=["bias"])
    with pytest.raises(ValueError, match=r"matches none"):
        quantize.quantize(base, "nf4", selection=".*down.*")
    small = quantize.quantize(base, "nf4", block=32, exclude="odd/kernel")
    with pytest.raises(ValueError, match=r"up/kernel is nf4 already"):
        quantize.quantize(small, "int8", block=32, exclude="odd/kernel")


@pytest.mark.parametrize("kind", ["nf4", "int8", "int4"])
@pytest.mark.parity
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_as_qwix(kind) -> None:
    """The codes are those of qwix, and its arrays come and go as they are."""
    qwix = pytest.importorskip("qwix", reason="qwix is not installed: pip install 'jaxpeft[parity]'")
    qtype = {"nf4": "nf4", "int8": jnp.int8, "int4": jnp.int4}[kind]
    theirs = qwix.quantize(W, qtype, channelwise_axes=[0, 2], tiled_axes={1: 64})
    ours = one(kind, double=False)
    back = quantize.to_qwix(ours)
    assert (back.qvalue.dtype, back.qtype, back.scale.shape) == (theirs.qvalue.dtype, theirs.qtype, theirs.scale.shape)
    np.testing.assert_array_equal(back.qvalue.astype(jnp.int32), theirs.qvalue.astype(jnp.int32))
    np.testing.assert_allclose(back.scale, theirs.scale, rtol=1e-6)
    taken = quantize.from_qwix(theirs, "lio")
    np.testing.assert_allclose(taken.dequantize(), qwix.dequantize(theirs), rtol=1e-6)
    np.testing.assert_array_equal(taken.codes, ours.codes)
    whole = qwix.quantize(W, qtype, channelwise_axes=[2])  # One scale a column, over the layers too.
    np.testing.assert_allclose(quantize.from_qwix(whole, "lio").dequantize(), qwix.dequantize(whole), rtol=1e-6)
    with pytest.raises(ValueError, match="tiles along the axes"):
        quantize.from_qwix(qwix.quantize(W, qtype, tiled_axes={1: 64, 2: 5}), "lio")
    with pytest.raises(ValueError, match="qtype"):
        quantize.from_qwix(qwix.quantize(W, jnp.float8_e4m3fn, tiled_axes={1: 64}), "lio")
    with pytest.raises(ValueError, match="no q4_1"):
        quantize.to_qwix(one("q4_1"))
