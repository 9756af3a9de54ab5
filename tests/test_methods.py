"""The bar for every method: each spec goes through each check, on models written in every style."""

import dataclasses
from functools import cache

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import zoo
from given import given
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from specs import FOR_TWO_LAYERS, MAIN, SPECS, STRUCTURES

import jaxpeft
from jaxpeft.methods import METHODS
from jaxpeft.spec import method_of
from jaxpeft.updates import LowRank

IDS = jax.random.randint(jax.random.key(7), (8, 5), 0, zoo.VOCAB)

every_spec = pytest.mark.parametrize("name", SPECS.keys())
main_specs = pytest.mark.parametrize("name", MAIN.keys())
every_model = pytest.mark.parametrize("model", zoo.MODELS.keys())


def test_every_method_is_in_the_common_test() -> None:
    assert {name for name in MAIN if name not in STRUCTURES} == METHODS.keys()
    assert SPECS.keys() >= STRUCTURES


def sites_of(model: zoo.Model, layers: list[int] | None = None) -> jaxpeft.Sites:
    return jaxpeft.find(model.params, model.pattern, layers=layers)


@cache
def start(name: str, model: str = "plain scanned") -> jaxpeft.Adapter:
    """The adapter of a spec before training."""
    made = zoo.MODELS[model]()
    return jaxpeft.init(jax.random.key(1), SPECS[name], sites_of(made), made.params)


def trained(adapter: jaxpeft.Adapter, size: float = 0.05) -> jaxpeft.Adapter:
    """The adapter as after some training: no leaf is what it was at the start."""
    leaves, structure = jax.tree.flatten(adapter.params)
    keys = jax.random.split(jax.random.key(5), len(leaves))
    moved = [leaf + size * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=True)]
    return adapter.replace(params=jax.tree.unflatten(structure, moved))


def card_of(name: str):
    return method_of(SPECS[name]).CARD


def is_formed(adapter: jaxpeft.Adapter) -> bool:
    return any(update.formed for update in adapter.updates().values())


def squared_error(out: jax.Array) -> jax.Array:
    return jnp.mean((out - jnp.sin(jnp.arange(zoo.VOCAB))) ** 2)


@cache
def model_alone(model: str):
    """Output of a model, and gradients of the updates; compiled once for all methods that yield the same structure."""
    made = zoo.MODELS[model]()
    forward = jaxpeft.adapt(made.apply)

    def loss(updates, adapter, base, ids):
        out = forward(base, adapter.replace(params=updates), ids)
        return squared_error(out), out

    return jax.jit(jax.value_and_grad(loss, has_aux=True, allow_int=True))


def output(model: str, adapter: jaxpeft.Adapter, base=None, ids: jax.Array = IDS):
    """((loss, output), gradients by group) of an adapted model."""
    made = given(adapter)
    return model_alone(model)(made.params, made, zoo.MODELS[model]().params if base is None else base, ids)


def floats(tree) -> list[jax.Array]:
    """The leaves that carry gradients."""
    return [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.floating)]


@cache
def pullback(name: str, through):
    """Gradients of the trained arrays from those of what `through` makes of the adapter."""
    like = start(name)

    def pull(params, constants, cotangents):
        def make(params):
            return floats(through(like.replace(params=params, constants=constants)))

        return jax.vjp(make, params)[1](cotangents)[0]

    return jax.jit(pull)


def updates_of(adapter: jaxpeft.Adapter):
    return adapter.updates()


def merged_of(adapter: jaxpeft.Adapter):
    return jaxpeft.merge(zoo.MODELS["plain scanned"]().params, adapter)


def fused(name: str, adapter: jaxpeft.Adapter):
    """Loss, and gradients of the trained arrays, computed with the updates."""
    (loss, _), gradients = output("plain scanned", adapter)
    return loss, pullback(name, updates_of)(adapter.params, adapter.constants, floats(gradients))


@cache
def loss_of_base():
    apply = zoo.MODELS["plain scanned"]().apply
    return jax.jit(jax.value_and_grad(lambda base: squared_error(apply(base, IDS))))


def formed(name: str, adapter: jaxpeft.Adapter):
    """The same, computed with a merged model."""
    loss, gradients = loss_of_base()(merged_of(adapter))
    return loss, pullback(name, merged_of)(adapter.params, adapter.constants, floats(gradients))


@cache
def plain(model: str):
    return jax.jit(zoo.MODELS[model]().apply)


def assert_trees_close(found, expected, tolerance=2e-5):
    for path, leaf in jax.tree_util.tree_leaves_with_path(expected):
        if leaf.dtype == jax.dtypes.float0:
            continue
        name = jax.tree_util.keystr(path)
        got = dict(jax.tree_util.tree_leaves_with_path(found))[path]
        scale = max(1.0, float(jnp.abs(leaf).max()))
        np.testing.assert_allclose(got, leaf, atol=tolerance * scale, rtol=0, err_msg=name)


@every_spec
def test_update_is_zero_at_the_start(name) -> None:
    deltas = jaxpeft.delta(start(name), zoo.MODELS["plain scanned"]().params)
    moved = any(bool((jnp.abs(delta) > 1e-6).any()) for delta in deltas.values())
    assert moved != card_of(name).zero_start


@every_spec
def test_gradients_at_the_start_reach_the_zero_factor_only(name) -> None:
    adapter = start(name)
    _, gradients = fused(name, adapter)
    for path, leaf in jax.tree_util.tree_leaves_with_path(adapter.params):
        gradient = dict(jax.tree_util.tree_leaves_with_path(gradients))[path]
        reached = bool(jnp.abs(gradient).max() > 1e-7)
        zero = not leaf.any()
        assert reached == (zero or not card_of(name).zero_start), jax.tree_util.keystr(path)


@every_spec
def test_trained_parameters_are_the_formulas(name) -> None:
    adapter = start(name, "plain unrolled")
    count = method_of(adapter.spec).count(adapter.spec, adapter.sites)
    assert jaxpeft.count(adapter) == count == jaxpeft.summary(adapter).trained


@every_spec
def test_fused_is_merged_in_values_and_gradients(name) -> None:
    adapter = trained(start(name))
    assert_trees_close(fused(name, adapter), formed(name, adapter))


@every_spec
def test_factors_give_the_same_update(name) -> None:
    adapter = trained(start(name))
    for group, update in adapter.updates().items():
        factors = update.factors()
        if factors is None:
            assert not isinstance(update, LowRank)
            continue
        assert factors.a.shape[1] == (adapter.spec.materialized_rank(adapter.sites[group]) or factors.a.shape[1])
        np.testing.assert_allclose(jax.vmap(LowRank.delta)(factors), jax.vmap(type(update).delta)(update), atol=1e-5)


@every_model
@main_specs
def test_every_way_to_write_a_model(name, model) -> None:
    """Nothing is formed, and all styles agree on values and gradients: scanned = unrolled, Linen = NNX = plain."""
    made, like = zoo.MODELS[model](), trained(start(name))
    sites, updates = sites_of(made), like.updates()
    renamed = {
        group.name: updates[next(s.name for s in like.sites if s.name.split("/")[-2] == group.name.split("/")[-2])]
        for group in sites
    }
    adapter = dataclasses.replace(given(like), params=renamed, sites=sites)
    report = jaxpeft.explain(made.apply, made.params, adapter, IDS)
    assert not report.materialized
    assert len(report.fused) == sum(len(group.paths) for group in sites)
    (loss, out), gradients = model_alone(model)(renamed, adapter, made.params, IDS)
    if model == "nnx vmapped":
        np.testing.assert_allclose(out, plain(model)(jaxpeft.merge(made.params, adapter), IDS), atol=2e-4)
        return
    (expected, _), theirs = output("plain scanned", like)
    np.testing.assert_allclose(loss, expected, rtol=1e-4)
    assert_trees_close(list(gradients.values()), [theirs[g.name] for g in like.sites], 1e-4)


@main_specs
def test_eight_devices_are_one(name) -> None:
    """Data and tensor axes: the same loss and gradients, and no collective as large as a kernel."""
    model, adapter = zoo.MODELS["plain scanned"](), trained(start(name))
    forward = jaxpeft.adapt(model.apply)

    def step(params, constants, base, ids):
        return squared_error(forward(base, adapter.replace(params=params, constants=constants), ids))

    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    specs = {"query": P(None, None, None, "tensor"), "out": P(None, None, "tensor"), "up": P(None, None, "tensor")}
    specs |= {"down": P(None, "tensor", None)}

    def place(path, leaf):
        module = path.split("/")[-2]
        return jax.device_put(leaf, NamedSharding(mesh, specs.get(module, P())))

    base = jax.tree.unflatten(
        jax.tree.structure(model.params), [place(p, leaf) for p, leaf in jaxpeft.sites.paths_and_leaves(model.params)]
    )
    params, constants = jax.device_put((adapter.params, adapter.constants), NamedSharding(mesh, P()))
    ids = jax.device_put(IDS, NamedSharding(mesh, P("data")))
    compiled = jax.jit(jax.value_and_grad(step)).lower(params, constants, base, ids).compile()
    assert_trees_close(compiled(params, constants, base, ids), fused(name, adapter))
    kernel = zoo.EMBED * zoo.HIDDEN * zoo.LAYERS
    found = set()
    for line in compiled.as_text().splitlines():
        if " all-reduce(" in line:
            shapes = [s.split("[")[1].split("]")[0] for s in line.split(" all-reduce(")[0].split("f32")[1:] if "[" in s]
            found |= {int(np.prod([int(n) for n in s.split(",") if n])) for s in shapes}
    assert found
    assert kernel not in found or is_formed(adapter)


@main_specs
def test_pmap(name) -> None:
    model = zoo.MODELS["plain scanned"]()
    adapter = given(trained(start(name)))
    forward = jaxpeft.adapt(model.apply)
    replicated = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (8, *leaf.shape)), (model.params, adapter))
    parallel = jax.pmap(forward)(*replicated, IDS[:, None])
    (_, out), _ = output("plain scanned", adapter)
    np.testing.assert_allclose(parallel[:, 0], out, atol=2e-4)


@main_specs
def test_one_trace_whatever_alpha(name) -> None:
    traces = []

    @jax.jit
    def deltas(adapter, base):
        traces.append(adapter)
        return jaxpeft.delta(adapter, base)

    base, spec = zoo.MODELS["plain scanned"]().params, SPECS[name]
    adapter = trained(start(name))
    other = jaxpeft.init(jax.random.key(2), dataclasses.replace(spec, alpha=3.0), adapter.sites, base)
    first = deltas(adapter, base)
    doubled = deltas(adapter.with_alpha(2 * spec.alpha), base)
    deltas(trained(other), base)
    assert len(traces) == 1
    if card_of(name).scaled:
        for path, delta in doubled.items():
            np.testing.assert_allclose(delta, 2 * first[path], atol=1e-5)


@main_specs
def test_no_gradient_of_a_kernel_is_computed(name) -> None:
    """No operation of the step, forward or backward, makes an array of a kernel's own size, but where ΔW needs one."""
    model, adapter = zoo.MODELS["plain unrolled"](), start(name, "plain unrolled")
    forward = jaxpeft.adapt(model.apply)

    def step(params, base, ids):
        return jnp.sum(forward(base, adapter.replace(params=params), ids) ** 2)

    def products(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name in ("dot_general", "add", "add_any"):
                yield equation.outvars[0].aval.shape
            for sub in jax.extend.core.jaxprs_in_params(equation.params):
                yield from products(sub)

    jaxpr = jax.make_jaxpr(jax.grad(step))(adapter.params, model.params, IDS[:2])
    sizes = {int(np.prod(shape)) for shape in products(jaxpr.jaxpr)}
    assert sizes
    assert bool(sizes & {zoo.EMBED * zoo.EMBED, zoo.EMBED * zoo.HIDDEN}) == is_formed(adapter)


@main_specs
def test_bfloat16_base_is_finite_and_close(name) -> None:
    model = zoo.MODELS["linen scanned"]()
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), model.params)
    adapter = trained(start(name))
    (loss, _), gradients = output("linen scanned", adapter, half)
    (exact, _), _ = output("linen scanned", adapter)
    assert jnp.isfinite(loss)
    assert all(bool(jnp.isfinite(leaf).all()) and leaf.dtype == jnp.float32 for leaf in floats(gradients))
    np.testing.assert_allclose(loss, exact, rtol=0.05)


@every_spec
def test_saved_and_loaded_after_training(name, tmp_path) -> None:
    """Three real steps, then a round trip: same arrays, base untouched; and alpha survives."""
    model, adapter = zoo.MODELS["plain scanned"](), start(name)
    before = jax.tree.map(np.array, model.params)
    optimizer = optax.adam(1e-2)
    params, state = adapter.params, optimizer.init(adapter.params)
    losses = []
    for _ in range(4):
        loss, gradients = fused(name, adapter.replace(params=params))
        losses.append(loss)
        updates, state = optimizer.update(gradients, state)
        params = optax.apply_updates(params, updates)
    assert losses[-1] < losses[0]
    adapter = adapter.replace(params=params).with_alpha(5.0)
    jaxpeft.save(tmp_path / "adapter", adapter, base=model.params)
    loaded = jaxpeft.load(tmp_path / "adapter", base=model.params)
    assert loaded.spec.to_dict() == adapter.spec.to_dict()
    assert loaded.sites == adapter.sites
    assert jax.tree.structure(loaded) == jax.tree.structure(adapter)
    for (path, old), new in zip(jax.tree_util.tree_leaves_with_path(adapter), jax.tree.leaves(loaded), strict=True):
        assert old.dtype == new.dtype, path
        np.testing.assert_array_equal(old, new, err_msg=str(path))
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((np.asarray(a) == b).all()), model.params, before))


@cache
def dropped_outputs():
    """Outputs for many dropout keys; compiled once for all methods that yield the same structure."""
    model = zoo.MODELS["plain scanned"]()
    forward = jaxpeft.adapt(model.apply)
    each = jax.vmap(lambda adapter, key: forward(model.params, adapter, IDS[:1, :2], dropout_key=key), (None, 0))
    return jax.jit(each)


@main_specs
def test_dropout_is_active_only_with_a_key(name) -> None:
    adapter = trained(start(name))
    adapter = given(adapter.replace(spec=dataclasses.replace(adapter.spec, dropout=0.5)))
    (_, still), _ = output("plain scanned", adapter)
    keys = jax.random.split(jax.random.key(3), 600)
    if not all(update.additive for update in adapter.updates().values()):
        with pytest.raises(ValueError, match="dropout"):
            dropped_outputs()(adapter, keys)
        return
    dropped = dropped_outputs()(adapter, keys)
    assert bool((dropped[0] != dropped[1]).any())
    np.testing.assert_array_equal(dropped_outputs()(adapter, keys)[0], dropped[0])
    np.testing.assert_allclose(dropped.mean(axis=0), still[:1, :2], atol=0.25 * float(jnp.abs(still[:1, :2]).max()))


@main_specs
def test_a_subset_of_layers(name) -> None:
    """Stacked and unrolled models agree, and the other layers keep their weights."""
    stacked, unrolled = zoo.MODELS["plain scanned"](), zoo.MODELS["plain unrolled"]()
    spec = FOR_TWO_LAYERS.get(name, SPECS[name])
    sites = sites_of(stacked, [1, 3])
    adapter = trained(jaxpeft.init(jax.random.key(1), spec, sites, stacked.params))
    updates = adapter.updates()
    others = sites_of(unrolled, [1, 3])
    same = dataclasses.replace(
        given(adapter), params={g.name: updates[g.name.replace("/*", "")] for g in others}, sites=others
    )
    (_, found), _ = output("plain scanned", adapter)
    (_, other), _ = output("plain unrolled", same)
    np.testing.assert_allclose(found, other, atol=2e-4)
    merged = plain("plain scanned")(jaxpeft.merge(stacked.params, adapter), IDS)
    np.testing.assert_allclose(found, merged, atol=2e-4)
    for delta in jaxpeft.delta(adapter, stacked.params).values():
        assert [bool((jnp.abs(layer) > 1e-7).any()) for layer in delta] == [False, True, False, True]
