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
from jaxpeft import switches
from jaxpeft.methods import METHODS
from jaxpeft.spec import method_of
from jaxpeft.updates import Block, Decomposed, LowRank
from jaxpeft.values import over_stack

IDS = jax.random.randint(jax.random.key(7), (8, 5), 0, zoo.VOCAB)


def parametrize(names):
    """Over specs; all tests of one spec go to one worker, which then computes what they share once."""
    return pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in names])


every_spec = parametrize(SPECS)
main_specs = parametrize(MAIN)
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
    updates = adapter.updates().values()
    return any((update.update if isinstance(update, Block) else update).formed for update in updates)


def squared_error(out: jax.Array) -> jax.Array:
    return jnp.mean((out - jnp.sin(jnp.arange(zoo.VOCAB))) ** 2)


@cache
def model_alone(model: str, differentiate: bool):
    """Loss and output of a model, and gradients of the updates.

    Compiled once for all methods that yield the same structure of updates.
    """
    forward = jaxpeft.adapt(zoo.MODELS[model]().apply)

    def loss(updates, adapter, base, ids):
        out = forward(base, adapter.replace(params=updates), ids)
        return squared_error(out), out

    return jax.jit(jax.value_and_grad(loss, has_aux=True, allow_int=True) if differentiate else loss)


def run(model: str, adapter: jaxpeft.Adapter, base=None):
    """(loss, output), gradients by group."""
    made = given(adapter)
    return model_alone(model, True)(made.params, made, zoo.MODELS[model]().params if base is None else base, IDS)


def output(model: str, adapter: jaxpeft.Adapter):
    """What an adapted model returns."""
    made = given(adapter)
    return model_alone(model, False)(made.params, made, zoo.MODELS[model]().params, IDS)[1]


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
    (loss, _), gradients = run("plain scanned", adapter)
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
    if not card_of(name).mergeable:
        (_, out), _ = run("plain scanned", start(name))
        np.testing.assert_allclose(out, plain("plain scanned")(zoo.MODELS["plain scanned"]().params, IDS), atol=2e-4)
        return
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
        everywhere = not card_of(name).zero_start or SPECS[name].start != "method" or path[-1].key == "magnitude"
        assert reached == (everywhere or not leaf.any()), jax.tree_util.keystr(path)


@every_spec
def test_trained_parameters_are_the_formulas(name) -> None:
    adapter = start(name, "plain unrolled")
    count = method_of(adapter.spec).count(adapter.spec, adapter.sites) + switches.count(adapter.spec, adapter.sites)
    assert jaxpeft.count(adapter) == count == jaxpeft.summary(jax.eval_shape(lambda: adapter)).trained


@every_spec
def test_fused_is_merged_in_values_and_gradients(name) -> None:
    adapter = trained(start(name))
    if not card_of(name).mergeable:
        with pytest.raises(ValueError, match="no W' to form or to merge"):
            formed(name, adapter)
        return
    assert_trees_close(fused(name, adapter), formed(name, adapter))


@every_spec
def test_factors_give_the_same_update(name) -> None:
    adapter = trained(start(name))
    for group, update in adapter.updates().items():
        factors = update.factors()
        if factors is None:
            assert not isinstance(update, LowRank)
            continue
        rank = adapter.spec.materialized_rank(adapter.sites[group]) or factors.a.shape[1]
        assert factors.a.shape[1] == rank * (1 if adapter.spec.start == "method" else 2)
        formed = over_stack(type(update).delta, 1)(update)
        np.testing.assert_allclose(over_stack(LowRank.delta, 1)(factors), formed, atol=1e-5)


@every_model
@main_specs
def test_every_way_to_write_a_model(name, model) -> None:
    """Nothing is formed, and all styles agree: scanned = unrolled, Linen = NNX = plain, in gradients too."""
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
    if model == "nnx vmapped":
        if card_of(name).mergeable:
            merged = plain(model)(jaxpeft.merge(made.params, adapter), IDS)
            np.testing.assert_allclose(output(model, adapter), merged, atol=2e-4)
        return
    (_, expected), theirs = run("plain scanned", like)
    if model != "linen scanned":
        np.testing.assert_allclose(output(model, adapter), expected, atol=5e-4)
        return
    (_, out), gradients = run(model, adapter)
    np.testing.assert_allclose(out, expected, atol=5e-4)
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
    (_, out), _ = run("plain scanned", adapter)
    np.testing.assert_allclose(parallel[:, 0], out, atol=2e-4)


@main_specs
def test_one_trace_whatever_alpha(name) -> None:
    traces = []

    @jax.jit
    def deltas(adapter, base):
        traces.append(adapter)
        return jaxpeft.delta(adapter, base) if card_of(name).mergeable else adapter.updates()

    base, spec = zoo.MODELS["plain scanned"]().params, SPECS[name]
    adapter = trained(start(name))
    other = jaxpeft.init(jax.random.key(2), dataclasses.replace(spec, alpha=3.0), adapter.sites, base)
    first = deltas(adapter, base)
    doubled = deltas(adapter.with_alpha(2 * spec.alpha), base)
    deltas(trained(other), base)
    assert len(traces) == 1
    if card_of(name).scaled and not any(spec.part(group).dora for group in adapter.sites):
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
    (loss, _), gradients = run("linen scanned", adapter, half)
    (exact, _), _ = run("plain scanned", adapter)
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
    (_, still), _ = run("plain scanned", adapter)
    keys = jax.random.split(jax.random.key(3), 600)
    if not all(update.additive or isinstance(update, Block | Decomposed) for update in adapter.updates().values()):
        with pytest.raises(ValueError, match="dropout"):
            dropped_outputs()(adapter, keys)
        return
    dropped = dropped_outputs()(adapter, keys)
    assert bool((dropped[0] != dropped[1]).any())
    np.testing.assert_array_equal(dropped_outputs()(adapter, keys)[0], dropped[0])
    if not card_of(name).mergeable:  # A non-linearity does not keep the mean.
        return
    np.testing.assert_allclose(dropped.mean(axis=0), still[:1, :2], atol=0.25 * float(jnp.abs(still[:1, :2]).max()))


@main_specs
def test_a_subset_of_layers(name) -> None:
    """Fused is merged, and the other layers keep their weights."""
    model = zoo.MODELS["plain scanned"]()
    spec = FOR_TWO_LAYERS.get(name, SPECS[name])
    adapter = trained(jaxpeft.init(jax.random.key(1), spec, sites_of(model, [1, 3]), model.params))
    found = output("plain scanned", adapter)
    assert not jnp.allclose(found, plain("plain scanned")(model.params, IDS), atol=1e-3)
    if not card_of(name).mergeable:
        return
    merged = jaxpeft.merge(model.params, adapter)
    np.testing.assert_allclose(found, plain("plain scanned")(merged, IDS), atol=2e-4)
    for group in adapter.sites:
        module = group.name.split("/")[-2]
        change = merged["layers"][module]["kernel"] - model.params["layers"][module]["kernel"]
        assert [bool((jnp.abs(layer) > 1e-7).any()) for layer in change] == [False, True, False, True]


def test_a_subset_of_layers_of_stacked_and_unrolled_models() -> None:
    stacked, unrolled = zoo.MODELS["plain scanned"](), zoo.MODELS["plain unrolled"]()
    adapter = trained(jaxpeft.init(jax.random.key(1), SPECS["lora"], sites_of(stacked, [1, 3])))
    updates, sites = adapter.updates(), sites_of(unrolled, [1, 3])
    renamed = {group.name: updates[group.name.replace("/*", "")] for group in sites}
    same = dataclasses.replace(given(adapter), params=renamed, sites=sites)
    np.testing.assert_allclose(output("plain scanned", adapter), output("plain unrolled", same), atol=2e-4)
