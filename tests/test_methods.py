"""The bar for every method: each spec goes through each check, on models written in every style."""

import dataclasses
import warnings

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import zoo
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxpeft
from jaxpeft.methods import METHODS, lora, mos, prolora
from jaxpeft.spec import method_of

IDS = jax.random.randint(jax.random.key(7), (8, 5), 0, zoo.VOCAB)
ROTATION = {"rank": 6, "unshared_rank": 2, "sharing_in": 3, "sharing_out": 3}
SPECS = {
    "lora": lora.Spec(rank=3),
    "mos": mos.Spec(rank=5, equivalent_rank=2, private_rank=1, shards_per_vector=3),
    "mos all private": mos.Spec(rank=2, equivalent_rank=2, private_rank=2, shards_per_vector=2),
    "mos -pd": mos.Spec(rank=5, equivalent_rank=2, shards_per_vector=3, pair_dissociation=False),
    "mos -vs": mos.Spec(rank=5, equivalent_rank=2, shards_per_vector=1),
    "mos -sp": mos.Spec(rank=7, equivalent_rank=2, private_rank=0, shards_per_vector=3),
    "mos subset selection": mos.Spec(
        rank=7, equivalent_rank=2, private_rank=0, shards_per_vector=1, pair_dissociation=False
    ),
    "mos pure sharing": mos.Spec(rank=None, equivalent_rank=2, private_rank=0, shards_per_vector=1),
    "mos random scaling": mos.Spec(rank=None, equivalent_rank=2, private_rank=0, shards_per_vector=1, scaling="frozen"),
    "mos trained scaling": mos.Spec(
        rank=None, equivalent_rank=2, private_rank=0, shards_per_vector=1, scaling="trained"
    ),
    "prolora": prolora.Spec(**ROTATION),
    "prolora unexpanded": prolora.Spec(**ROTATION, expand=False),
    "prolora unexpanded, unequal": prolora.Spec(rank=6, unshared_rank=0, sharing_in=5, sharing_out=2, expand=False),
    "prolora unequal": prolora.Spec(rank=6, unshared_rank=1, sharing_in=5, sharing_out=2),
    "prolora all unshared": prolora.Spec(rank=3, unshared_rank=3, sharing_in=2, sharing_out=2),
    "prolora clora": prolora.Spec(**{**ROTATION, "unshared_rank": 0}, rotate=False),
    "prolora rolora": prolora.Spec(**{**ROTATION, "unshared_rank": 0}),
    "prolora -r": prolora.Spec(**ROTATION, rotate=False),
    "prolora -i": prolora.Spec(**ROTATION, rectified_init=False),
    "prolora share rank": prolora.Spec(**ROTATION, share_along="rank", rotate_along="rank"),
    "prolora share rank rotate hidden": prolora.Spec(**ROTATION, share_along="rank", rotate_along="hidden"),
    "prolora rotate hidden": prolora.Spec(**ROTATION, rotate_along="hidden"),
}
MAIN = {name: spec for name, spec in SPECS.items() if name in METHODS}

every_spec = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
main_specs = pytest.mark.parametrize("spec", MAIN.values(), ids=MAIN.keys())
every_model = pytest.mark.parametrize("model", zoo.MODELS.keys())


def test_every_method_is_in_the_common_test() -> None:
    assert MAIN.keys() == METHODS.keys()


def sites_of(model: zoo.Model, layers: list[int] | None = None) -> jaxpeft.Sites:
    return jaxpeft.find(model.params, model.pattern, layers=layers)


def trained(adapter: jaxpeft.Adapter, size: float = 0.05) -> jaxpeft.Adapter:
    """The adapter as after some training: no leaf is what it was at the start."""
    leaves, structure = jax.tree.flatten(adapter.params)
    keys = jax.random.split(jax.random.key(5), len(leaves))
    moved = [leaf + size * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=True)]
    return adapter.replace(params=jax.tree.unflatten(structure, moved))


def loss_of(forward, base, adapter):
    target = jnp.sin(jnp.arange(zoo.VOCAB))
    return lambda params: jnp.mean((forward(base, adapter.replace(params=params), IDS) - target) ** 2)


def assert_trees_close(found, expected, tolerance=2e-5):
    for path, leaf in jax.tree_util.tree_leaves_with_path(expected):
        name = jax.tree_util.keystr(path)
        got = dict(jax.tree_util.tree_leaves_with_path(found))[path]
        scale = max(1.0, float(jnp.abs(leaf).max()))
        np.testing.assert_allclose(got, leaf, atol=tolerance * scale, rtol=0, err_msg=name)


@every_spec
def test_update_is_zero_at_the_start(spec) -> None:
    adapter = jaxpeft.init(jax.random.key(1), spec, sites_of(zoo.MODELS["plain scanned"]()))
    for path, delta in jaxpeft.delta(adapter).items():
        assert not delta.any(), path


@every_spec
def test_gradients_at_the_start_reach_the_zero_factor_only(spec) -> None:
    model = zoo.MODELS["plain scanned"]()
    adapter = jaxpeft.init(jax.random.key(1), spec, sites_of(model))
    gradients = jax.jit(jax.grad(loss_of(jaxpeft.adapt(model.apply), model.params, adapter)))(adapter.params)
    for group, leaves in gradients.items():
        for name, leaf in leaves.items():
            zero_start = not adapter.params[group][name].any()
            assert bool(jnp.abs(leaf).max() > 1e-7) == zero_start, (group, name)


@every_spec
def test_trained_parameters_are_the_formulas(spec) -> None:
    sites = sites_of(zoo.MODELS["plain unrolled"]())
    adapter = jaxpeft.init(jax.random.key(1), spec, sites)
    assert jaxpeft.count(adapter) == method_of(spec).count(spec, sites) == jaxpeft.summary(adapter).trained


@every_spec
def test_fused_is_merged_in_values_and_gradients(spec) -> None:
    model = zoo.MODELS["plain scanned"]()
    adapter = trained(jaxpeft.init(jax.random.key(1), spec, sites_of(model)))

    def merged(base, adapter, ids):
        return model.apply(jaxpeft.merge(base, adapter), ids)

    fused = jax.jit(jax.value_and_grad(loss_of(jaxpeft.adapt(model.apply), model.params, adapter)))(adapter.params)
    formed = jax.jit(jax.value_and_grad(loss_of(merged, model.params, adapter)))(adapter.params)
    assert_trees_close(fused, formed)


@every_spec
def test_factors_give_the_same_update(spec) -> None:
    adapter = trained(jaxpeft.init(jax.random.key(1), spec, sites_of(zoo.MODELS["plain scanned"]())))
    for name, update in adapter.updates().items():
        factors = update.factors()
        assert factors is not None
        assert factors.a.shape[1] == spec.materialized_rank(adapter.sites[name])
        np.testing.assert_allclose(
            jax.vmap(type(factors).delta)(factors), jax.vmap(type(update).delta)(update), atol=1e-6
        )


@every_model
@main_specs
def test_every_way_to_write_a_model(spec, model) -> None:
    """Nothing is formed, and all styles agree on value and gradients: scanned = unrolled, Linen = NNX = plain."""
    made = zoo.MODELS[model]()
    sites = sites_of(made)
    reference = zoo.MODELS["plain scanned"]()
    like = trained(jaxpeft.init(jax.random.key(1), spec, sites_of(reference)))
    names = {
        group.name: next(s for s in like.sites if s.name.split("/")[-2] == group.name.split("/")[-2]) for group in sites
    }
    adapter = jaxpeft.Adapter(
        {name: like.params[same.name] for name, same in names.items()},
        {name: like.constants[same.name] for name, same in names.items()},
        spec,
        sites,
    )
    report = jaxpeft.explain(made.apply, made.params, adapter, IDS)
    assert not report.materialized
    assert len(report.fused) == sum(len(group.paths) for group in sites)
    loss, gradients = jax.jit(jax.value_and_grad(loss_of(jaxpeft.adapt(made.apply), made.params, adapter)))(
        adapter.params
    )
    if model == "nnx vmapped":
        merged = made.apply(jaxpeft.merge(made.params, adapter), IDS)
        np.testing.assert_allclose(jaxpeft.adapt(made.apply)(made.params, adapter, IDS), merged, atol=2e-4)
        return
    forward = jaxpeft.adapt(reference.apply)
    expected, theirs = jax.jit(jax.value_and_grad(loss_of(forward, reference.params, like)))(like.params)
    np.testing.assert_allclose(loss, expected, rtol=1e-4)
    assert_trees_close(gradients, {name: theirs[same.name] for name, same in names.items()}, 1e-4)


@main_specs
def test_eight_devices_are_one(spec) -> None:
    """Data and tensor axes: the same loss and gradients, and no collective as large as a kernel."""
    model = zoo.MODELS["plain scanned"]()
    adapter = trained(jaxpeft.init(jax.random.key(1), spec, sites_of(model)))
    forward = jaxpeft.adapt(model.apply)

    def step(params, base, ids):
        out = forward(base, adapter.replace(params=params), ids)
        return jnp.mean(out**2)

    alone = jax.jit(jax.value_and_grad(step))(adapter.params, model.params, IDS)
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    specs = {"query": P(None, None, None, "tensor"), "out": P(None, None, "tensor"), "up": P(None, None, "tensor")}
    specs |= {"down": P(None, "tensor", None)}

    def place(path, leaf):
        module = path.split("/")[-2]
        return jax.device_put(leaf, NamedSharding(mesh, specs.get(module, P())))

    base = jax.tree.unflatten(
        jax.tree.structure(model.params), [place(p, leaf) for p, leaf in jaxpeft.sites.paths_and_leaves(model.params)]
    )
    params = jax.device_put(adapter.params, NamedSharding(mesh, P()))
    ids = jax.device_put(IDS, NamedSharding(mesh, P("data")))
    compiled = jax.jit(jax.value_and_grad(step)).lower(params, base, ids).compile()
    assert_trees_close(compiled(params, base, ids), alone)
    kernel = zoo.EMBED * zoo.HIDDEN * zoo.LAYERS
    for line in compiled.as_text().splitlines():
        if " all-reduce(" in line:
            shapes = [s.split("[")[1].split("]")[0] for s in line.split(" all-reduce(")[0].split("f32")[1:] if "[" in s]
            sizes = [int(np.prod([int(n) for n in s.split(",") if n])) for s in shapes]
            assert kernel not in sizes, line


@main_specs
def test_pmap(spec) -> None:
    model = zoo.MODELS["plain scanned"]()
    adapter = trained(jaxpeft.init(jax.random.key(1), spec, sites_of(model)))
    forward = jaxpeft.adapt(model.apply)
    replicated = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (8, *leaf.shape)), (model.params, adapter))
    parallel = jax.pmap(forward)(*replicated, IDS[:, None])
    np.testing.assert_allclose(parallel[:, 0], forward(model.params, adapter, IDS), atol=2e-4)


@main_specs
def test_one_trace_whatever_alpha(spec) -> None:
    model = zoo.MODELS["plain scanned"]()
    forward, traces = jaxpeft.adapt(model.apply), []

    @jax.jit
    def step(base, adapter, ids):
        traces.append(adapter)
        return forward(base, adapter, ids)

    sites = sites_of(model)
    adapter = trained(jaxpeft.init(jax.random.key(1), spec, sites))
    other = trained(jaxpeft.init(jax.random.key(2), dataclasses.replace(spec, alpha=3.0), sites))
    first = step(model.params, adapter, IDS)
    doubled = step(model.params, adapter.with_alpha(32.0), IDS)
    step(model.params, other, IDS)
    assert len(traces) == 1
    assert not jnp.allclose(first, doubled)
    for path, delta in jaxpeft.delta(adapter.with_alpha(32.0)).items():
        np.testing.assert_allclose(delta, 2 * jaxpeft.delta(adapter)[path], rtol=1e-6)


@main_specs
def test_no_gradient_of_a_kernel_is_computed(spec) -> None:
    """No operation of the compiled step, forward or backward, produces a float array of a kernel's own size."""
    model = zoo.MODELS["plain unrolled"]()
    adapter = jaxpeft.init(jax.random.key(1), spec, sites_of(model))
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
    assert not sizes & {zoo.EMBED * zoo.EMBED, zoo.EMBED * zoo.HIDDEN}


@main_specs
def test_bfloat16_base_is_finite_and_close(spec) -> None:
    model = zoo.MODELS["linen scanned"]()
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), model.params)
    adapter = trained(jaxpeft.init(jax.random.key(1), spec, sites_of(model)))
    loss, gradients = jax.jit(jax.value_and_grad(loss_of(jaxpeft.adapt(model.apply), half, adapter)))(adapter.params)
    exact = loss_of(jaxpeft.adapt(model.apply), model.params, adapter)(adapter.params)
    assert jnp.isfinite(loss)
    assert all(bool(jnp.isfinite(leaf).all()) and leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(gradients))
    np.testing.assert_allclose(loss, exact, rtol=0.05)


@every_spec
def test_saved_and_loaded_after_training(spec, tmp_path) -> None:
    """Three real steps, then a round trip: same arrays, same output, base untouched; and alpha survives."""
    model = zoo.MODELS["plain scanned"]()
    before = jax.tree.map(np.array, model.params)
    spec = dataclasses.replace(spec, alpha=5.0)
    adapter = jaxpeft.init(jax.random.key(1), spec, sites_of(model))
    forward, optimizer = jaxpeft.adapt(model.apply), optax.adam(1e-2)
    loss = loss_of(forward, model.params, adapter)

    @jax.jit
    def step(params, state):
        updates, state = optimizer.update(jax.grad(loss)(params), state)
        return optax.apply_updates(params, updates), state

    params, state = adapter.params, optimizer.init(adapter.params)
    for _ in range(3):
        params, state = step(params, state)
    assert loss(params) < loss(adapter.params)
    adapter = adapter.replace(params=params)
    jaxpeft.save(tmp_path / "adapter", adapter, base=model.params)
    loaded = jaxpeft.load(tmp_path / "adapter", base=model.params)
    assert loaded.spec.to_dict() == spec.to_dict()
    assert loaded.sites == adapter.sites
    assert jax.tree.structure(loaded) == jax.tree.structure(adapter)
    for (path, old), new in zip(jax.tree_util.tree_leaves_with_path(adapter), jax.tree.leaves(loaded), strict=True):
        assert old.dtype == new.dtype, path
        np.testing.assert_array_equal(old, new, err_msg=str(path))
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((np.asarray(a) == b).all()), model.params, before))


@main_specs
def test_dropout_is_active_only_with_a_key(spec) -> None:
    model = zoo.MODELS["plain scanned"]()
    spec = dataclasses.replace(spec, dropout=0.5)
    adapter = trained(jaxpeft.init(jax.random.key(1), spec, sites_of(model)))
    forward = jaxpeft.adapt(model.apply)
    still = forward(model.params, adapter, IDS)
    np.testing.assert_allclose(still, model.apply(jaxpeft.merge(model.params, adapter), IDS), atol=1e-4)
    keys = jax.random.split(jax.random.key(3), 600)
    dropped = jax.jit(jax.vmap(lambda key: forward(model.params, adapter, IDS[:1, :2], dropout_key=key)))(keys)
    assert bool((dropped[0] != dropped[1]).any())
    first = forward(model.params, adapter, IDS[:1, :2], dropout_key=keys[0])
    np.testing.assert_allclose(first, dropped[0], atol=1e-4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_allclose(dropped.mean(axis=0), still[:1, :2], atol=0.25 * float(jnp.abs(still[:1, :2]).max()))


@main_specs
def test_a_subset_of_layers(spec) -> None:
    """Stacked and unrolled models agree, and the other layers keep their weights."""
    spec = dataclasses.replace(spec, rank=3) if isinstance(spec, mos.Spec) else spec
    stacked, unrolled = zoo.MODELS["plain scanned"](), zoo.MODELS["plain unrolled"]()
    adapter = trained(jaxpeft.init(jax.random.key(1), spec, sites_of(stacked, [1, 3])))
    sites = sites_of(unrolled, [1, 3])
    by_name = {group.name: group.name.replace("/*", "") for group in sites}
    same = jaxpeft.Adapter(
        {name: adapter.params[other] for name, other in by_name.items()},
        {name: adapter.constants[other] for name, other in by_name.items()},
        spec,
        sites,
    )
    found = jaxpeft.adapt(stacked.apply)(stacked.params, adapter, IDS)
    np.testing.assert_allclose(found, jaxpeft.adapt(unrolled.apply)(unrolled.params, same, IDS), atol=2e-4)
    np.testing.assert_allclose(found, stacked.apply(jaxpeft.merge(stacked.params, adapter), IDS), atol=2e-4)
    for delta in jaxpeft.delta(adapter).values():
        assert [bool(layer.any()) for layer in delta] == [False, True, False, True]
