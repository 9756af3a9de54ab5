"""The bar for every method: each spec goes through each check, on models written in every style."""

import dataclasses
import json
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
from moved import moved
from specs import FOR_TWO_LAYERS, SPECS, STRUCTURES

import jaxpeft
from jaxpeft import budget
from jaxpeft.methods import METHODS, spec_from_dict
from jaxpeft.spec import method_of
from jaxpeft.updates import Base, Block, Decomposed, LowRank
from jaxpeft.values import over_stack
from train import collectives, costs

SLOW = ("linen unrolled", "nnx scanned", "nnx vmapped")
"""Models that only `make slow` takes through every method; `make test` takes them through a few."""

IDS = jax.random.randint(jax.random.key(7), (8, 5), 0, zoo.VOCAB)


def parametrize(names):
    """Over specs; all tests of one spec go to one worker, which then computes what they share once."""

    def parameter(name: str):
        marks = [pytest.mark.xdist_group(name), *([] if name in METHODS else [pytest.mark.slow])]
        return pytest.param(name, marks=marks)

    return pytest.mark.parametrize("name", [parameter(name) for name in names])


every_spec = parametrize(SPECS)
every_structure = parametrize([name for name in SPECS if name in METHODS or name in STRUCTURES])
every_method = parametrize(METHODS)
every_model = pytest.mark.parametrize(
    "model", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in zoo.MODELS]
)


def test_every_method_is_in_the_common_test() -> None:
    assert SPECS.keys() >= METHODS.keys() | STRUCTURES


def sites_of(model: zoo.Model, layers: list[int] | None = None) -> jaxpeft.Sites:
    return jaxpeft.find(model.params, model.pattern, layers=layers)


@cache
def start(name: str) -> jaxpeft.Adapter:
    """The adapter of a spec before training."""
    made = zoo.MODELS["plain scanned"]()
    return jaxpeft.init(jax.random.key(1), SPECS[name], sites_of(made), made.params)


@cache
def trained(name: str) -> jaxpeft.Adapter:
    return moved(start(name), 0.05)


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
    """(loss, output), gradients by group; the parameters of the adapter are its updates."""
    base = zoo.MODELS[model]().params if base is None else base
    return model_alone(model, True)(adapter.params, adapter, base, IDS)


def output(model: str, adapter: jaxpeft.Adapter) -> jax.Array:
    """What an adapted model returns; the parameters of the adapter are its updates."""
    return model_alone(model, False)(adapter.params, adapter, zoo.MODELS[model]().params, IDS)[1]


@cache
def computed(name: str):
    """What a spec makes of its trained and frozen arrays, compiled: its updates, and a merged model."""
    like, base = start(name), zoo.MODELS["plain scanned"]().params

    def compute(params, constants):
        adapter = like.replace(params=params, constants=constants)
        return adapter.updates(), jaxpeft.merge(base, adapter) if card_of(name).mergeable else None

    return jax.jit(compute)


@cache
def pulled_back(name: str):
    """Gradients of the trained arrays from those of the updates, and from those of a merged model."""

    def pull(params, constants, *cotangents):
        def make(params):
            return [floats(tree) for tree in computed(name)(params, constants)]

        _, back = jax.vjp(make, params)
        nothing = [jax.tree.map(jnp.zeros_like, part) for part in cotangents]
        return back([cotangents[0], nothing[1]])[0], back([nothing[0], cotangents[1]])[0]

    return jax.jit(pull)


def floats(tree) -> list[jax.Array]:
    """The leaves that carry gradients."""
    return [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.floating)]


def updated(name: str, adapter: jaxpeft.Adapter) -> jaxpeft.Adapter:
    """The adapter with its updates for parameters."""
    return given(adapter, computed(name)(adapter.params, adapter.constants)[0])


def both(name: str, adapter: jaxpeft.Adapter):
    """(loss, gradients of the trained arrays), computed with the updates; and the same with a merged model."""
    updates, merged = computed(name)(adapter.params, adapter.constants)
    (loss, _), gradients = run("plain scanned", given(adapter, updates))
    merged_loss, of_merged = loss_of_base()(merged) if merged is not None else (None, None)
    pulled = pulled_back(name)(adapter.params, adapter.constants, floats(gradients), floats(of_merged))
    return (loss, pulled[0]), (merged_loss, pulled[1])


@cache
def both_when(name: str, training: str):
    return both(name, {"start": start, "trained": trained}[training](name))


@cache
def loss_of_base():
    apply = zoo.MODELS["plain scanned"]().apply
    return jax.jit(jax.value_and_grad(lambda base: squared_error(apply(base, IDS))))


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
    base = zoo.MODELS["plain scanned"]().params
    _, merged = computed(name)(start(name).params, start(name).constants)
    if merged is None:
        out = output("plain scanned", updated(name, start(name)))
        np.testing.assert_allclose(out, plain("plain scanned")(base, IDS), atol=2e-4)
        return
    changes = jax.tree.map(lambda new, old: float(jnp.abs(new - old).max()), merged, base)
    assert (max(jax.tree.leaves(changes)) > 2e-6) != card_of(name).zero_start


@every_spec
def test_gradients_at_the_start_reach_the_zero_factor_only(name) -> None:
    (_, gradients), _ = both_when(name, "start")
    for path, leaf in jax.tree_util.tree_leaves_with_path(start(name).params):
        gradient = dict(jax.tree_util.tree_leaves_with_path(gradients))[path]
        reached = bool(jnp.abs(gradient).max() > 1e-7)
        everywhere = not card_of(name).zero_start or SPECS[name].start != "method" or path[-1].key == "magnitude"
        assert reached == (everywhere or not leaf.any()), jax.tree_util.keystr(path)


@every_spec
def test_trained_parameters_are_the_formulas(name) -> None:
    spec, sites = SPECS[name], sites_of(zoo.MODELS["plain unrolled"]())
    adapter = jax.eval_shape(lambda: jaxpeft.adapter.abstract(spec, sites))
    assert jaxpeft.count(adapter) == budget.count(spec, sites) == jaxpeft.summary(adapter).trained


@every_spec
def test_fused_is_merged_in_values_and_gradients(name) -> None:
    if not card_of(name).mergeable:
        with pytest.raises(ValueError, match="no W' to form or to merge"):
            jaxpeft.merge(zoo.MODELS["plain scanned"]().params, trained(name))
        return
    assert_trees_close(*both_when(name, "trained"))


@every_spec
def test_training_lowers_the_loss_and_the_spec_is_read_back(name) -> None:
    adapter, optimizer = start(name), optax.adam(1e-2)
    params, state = adapter.params, optimizer.init(adapter.params)
    for _ in range(3):
        (_, gradients), _ = both(name, adapter.replace(params=params))
        updates, state = optimizer.update(gradients, state)
        params = optax.apply_updates(params, updates)
    assert both(name, adapter.replace(params=params))[0][0] < both_when(name, "start")[0][0]
    described = spec_from_dict(json.loads(json.dumps(adapter.spec.to_dict())))
    assert (described, described.to_dict()) == (adapter.spec, adapter.spec.to_dict())


@jax.jit
def both_deltas(update):
    return over_stack(type(update).delta, 1)(update), over_stack(LowRank.delta, 1)(update.factors())


@every_spec
def test_factors_give_the_same_update(name) -> None:
    adapter = trained(name)
    for group, update in updated(name, adapter).params.items():
        factors = update.factors()
        if factors is None:
            assert not isinstance(update, LowRank)
            continue
        rank = adapter.spec.materialized_rank(adapter.sites[group]) or factors.a.shape[1]
        assert factors.a.shape[1] == rank * (1 if adapter.spec.start == "method" else 2)
        np.testing.assert_allclose(*both_deltas(update), atol=1e-5)


@jax.jit
def with_zeros(update, weight, x):
    """What an update whose arrays are zero makes of a weight, and of a product with it."""
    nothing = jax.tree.map(jnp.zeros_like, update)
    if update.on_output:
        return weight, over_stack(lambda update, weight: update.transform(x @ weight), 1)(nothing, weight)
    product = over_stack(lambda update, weight: update.matmul(x, Base(weight, lambda x: x @ weight)), 1)
    return over_stack(type(update).materialize, 1)(nothing, weight), product(nothing, weight)


@every_structure
def test_arrays_of_zeros_change_nothing(name) -> None:
    """So layers that are not adapted may be filled with zeros, and a subset of layers needs no more."""
    adapter = trained(name)
    for group, update in updated(name, adapter).params.items():
        sites = adapter.sites[group]
        weight = jax.random.normal(jax.random.key(3), (sites.layers, sites.in_dim, sites.out_dim))
        x = jax.random.normal(jax.random.key(4), (3, sites.in_dim))
        formed, product = with_zeros(update, weight, x)
        np.testing.assert_array_equal(formed, weight)
        np.testing.assert_allclose(product, x @ weight, atol=1e-5)


@every_method
def test_a_subset_of_layers_has_the_parameters_of_the_formula(name) -> None:
    spec = FOR_TWO_LAYERS.get(name, SPECS[name])
    for model in ("plain scanned", "plain unrolled"):
        sites = sites_of(zoo.MODELS[model](), [1, 3])
        adapter = jax.eval_shape(lambda sites=sites: jaxpeft.adapter.abstract(spec, sites))
        assert jaxpeft.count(adapter) == budget.count(spec, sites)


@pytest.mark.parametrize("name", ["lora", "vera", "lora dora", "oft"])
def test_a_subset_of_layers(name) -> None:
    """Stacked, unrolled and merged agree, and the other layers keep their weights."""
    stacked, unrolled = zoo.MODELS["plain scanned"](), zoo.MODELS["plain unrolled"]()
    adapter = jaxpeft.init(jax.random.key(1), SPECS[name], sites_of(stacked, [1, 3]), stacked.params)
    adapter = moved(adapter, 0.05)
    updates, sites = adapter.updates(), sites_of(unrolled, [1, 3])
    found = output("plain scanned", given(adapter, updates))
    same = given(adapter.replace(sites=sites), {g.name: updates[g.name.replace("/*", "")] for g in sites})
    np.testing.assert_allclose(found, output("plain unrolled", same), atol=2e-4)
    merged = jaxpeft.merge(stacked.params, adapter)
    np.testing.assert_allclose(found, plain("plain scanned")(merged, IDS), atol=2e-4)
    for delta in jaxpeft.delta(adapter, stacked.params).values():
        assert [bool((jnp.abs(layer) > 1e-7).any()) for layer in delta] == [False, True, False, True]


def in_style(name: str, model: str) -> jaxpeft.Adapter:
    """The updates of the scanned model at the sites of the same model in another style."""
    like, sites = updated(name, trained(name)), sites_of(zoo.MODELS[model]())
    by_module = {group.split("/")[-2]: update for group, update in like.params.items()}
    return like.replace(params={g.name: by_module[g.name.split("/")[-2]] for g in sites}, sites=sites)


@every_model
@every_structure
def test_every_way_to_write_a_model(name, model) -> None:
    """All styles agree: scanned = unrolled, Linen = NNX = plain. A weight that had to be formed would be a warning."""
    adapter = in_style(name, model)
    found = output(model, adapter)
    if model == "nnx vmapped":  # An ensemble: another function of the same weights.
        if card_of(name).mergeable:
            merged = jaxpeft.merge(zoo.MODELS[model]().params, adapter)
            np.testing.assert_allclose(found, plain(model)(merged, IDS), atol=2e-4)
        return
    (_, expected), _ = run("plain scanned", updated(name, trained(name)))
    np.testing.assert_allclose(found, expected, atol=5e-4)


@pytest.mark.parametrize("model", [model for model in zoo.MODELS if model != "nnx vmapped"])
@pytest.mark.parametrize("name", ["lora", "vera", "lora dora"])
def test_gradients_in_every_way_to_write_a_model(name, model) -> None:
    _, gradients = run(model, in_style(name, model))
    _, expected = run("plain scanned", in_style(name, "plain scanned"))
    by_module = {group.split("/")[-2]: gradient for group, gradient in gradients.items()}
    assert_trees_close(by_module, {group.split("/")[-2]: gradient for group, gradient in expected.items()}, 1e-4)


MESH = {"data": 4, "tensor": 2}
RULES = (
    ("query/kernel", P(None, None, None, "tensor")),
    ("(out|up)/kernel", P(None, None, "tensor")),
    ("down/kernel", P(None, "tensor")),
)


@every_method
def test_eight_devices_are_one(name) -> None:
    """The same loss and gradients; over the batch's axis the gradients are summed once, and nothing else moves."""
    model, adapter = zoo.MODELS["plain scanned"](), trained(name)
    mesh = jax.make_mesh(tuple(MESH.values()), tuple(MESH), axis_types=(AxisType.Auto,) * 2)
    shardings = jaxpeft.sharding.from_rules(model.params, mesh, RULES, strict=False)
    forward = jaxpeft.adapt(model.apply, shardings=shardings)

    def step(params, constants, base, ids):
        return squared_error(forward(base, adapter.replace(params=params, constants=constants), ids))

    stored = jaxpeft.sharding.adapter(adapter, shardings)
    placed = jax.device_put(adapter, stored)
    arguments = placed.params, placed.constants, jax.device_put(model.params, shardings)
    ids = jax.device_put(IDS, NamedSharding(mesh, P("data")))
    out_shardings = NamedSharding(mesh, P()), stored.params
    compiled = jax.jit(jax.value_and_grad(step, allow_int=True), out_shardings=out_shardings)
    compiled = compiled.lower(*arguments, ids).compile()
    assert_trees_close(compiled(*arguments, ids), both_when(name, "trained")[0])

    found = costs.analyse(compiled.as_text())
    assert not found.unknown_loops
    kernels = {zoo.EMBED * zoo.EMBED, zoo.EMBED * zoo.HIDDEN}
    kernels |= {zoo.LAYERS * kernel for kernel in kernels}
    kernels -= {leaf.size for leaf in jax.tree.leaves(adapter.params)}  # In so small a model some are as large.
    over_data = 0
    for one in found.collectives:
        sizes = [shape.size for shape in (one.results if one.kind == "all-gather" else one.operands)]
        along_data = "data" in collectives.along(one.group, MESH)
        assert one.kind != "all-reduce" or not kernels & set(sizes), one
        assert not (one.kind == "all-gather" and along_data), one
        if along_data:
            over_data += one.times * sum(shape.bytes for shape in one.operands)
            assert not one.depth, one
    gradients = sum(leaf.nbytes for leaf in floats(adapter.params))
    # And four bytes of the loss.
    assert 4 < over_data <= 1.05 * gradients + 4


@cache
def on_eight_devices():
    return jax.pmap(jaxpeft.adapt(zoo.MODELS["plain scanned"]().apply))


@every_method
def test_pmap(name) -> None:
    adapter = updated(name, trained(name))
    arguments = zoo.MODELS["plain scanned"]().params, adapter
    replicated = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (8, *leaf.shape)), arguments)
    (_, out), _ = run("plain scanned", adapter)
    np.testing.assert_allclose(on_eight_devices()(*replicated, IDS[:, None])[:, 0], out, atol=2e-4)


@every_method
def test_one_trace_whatever_alpha(name) -> None:
    traces = []

    @jax.jit
    def deltas(adapter, base):
        traces.append(adapter)
        return jaxpeft.delta(adapter, base) if card_of(name).mergeable else adapter.updates()

    base, spec, adapter = zoo.MODELS["plain scanned"]().params, SPECS[name], trained(name)
    other = jaxpeft.init(jax.random.key(2), dataclasses.replace(spec, alpha=3.0), adapter.sites, base)
    first = deltas(adapter, base)
    doubled = deltas(adapter.with_alpha(2 * spec.alpha), base)
    deltas(moved(other, 0.05), base)
    assert len(traces) == 1
    if card_of(name).scaled and not any(spec.part(group).dora for group in adapter.sites):
        for path, delta in doubled.items():
            np.testing.assert_allclose(delta, 2 * first[path], atol=1e-5)


@every_structure
def test_no_gradient_of_a_kernel_is_computed(name) -> None:
    """No operation of the step, forward or backward, makes an array of a kernel's own size, but where ΔW needs one."""
    model = zoo.MODELS["plain unrolled"]()
    adapter = jax.eval_shape(lambda: jaxpeft.adapter.abstract(SPECS[name], sites_of(model)))
    forward = jaxpeft.adapt(model.apply)

    def step(params, constants, base, ids):
        return jnp.sum(forward(base, adapter.replace(params=params, constants=constants), ids) ** 2)

    def products(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name in ("dot_general", "add", "add_any"):
                yield equation.outvars[0].aval.shape
            for sub in jax.extend.core.jaxprs_in_params(equation.params):
                yield from products(sub)

    jaxpr = jax.make_jaxpr(jax.grad(step))(adapter.params, adapter.constants, model.params, IDS[:2])
    sizes = {int(np.prod(shape)) for shape in products(jaxpr.jaxpr)}
    assert sizes
    assert bool(sizes & {zoo.EMBED * zoo.EMBED, zoo.EMBED * zoo.HIDDEN}) == is_formed(trained(name))


@every_structure
def test_bfloat16_base_is_finite_and_close(name) -> None:
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), zoo.MODELS["linen scanned"]().params)
    adapter = updated(name, trained(name))
    (loss, _), gradients = run("linen scanned", adapter, half)
    (exact, _), _ = run("plain scanned", adapter)
    assert jnp.isfinite(loss)
    assert all(bool(jnp.isfinite(leaf).all()) and leaf.dtype == jnp.float32 for leaf in floats(gradients))
    np.testing.assert_allclose(loss, exact, rtol=0.05)


@every_structure
def test_saved_and_loaded_after_training(name, tmp_path) -> None:
    """The same arrays and spec come back, alpha too, and the base is untouched."""
    base = zoo.MODELS["plain scanned"]().params
    before = jax.tree.map(np.array, base)
    adapter = trained(name).with_alpha(5.0)
    jaxpeft.save(tmp_path / "adapter", adapter, base=base)
    loaded = jaxpeft.load(tmp_path / "adapter", base=base)
    assert loaded.spec.to_dict() == adapter.spec.to_dict()
    assert loaded.sites == adapter.sites
    assert jax.tree.structure(loaded) == jax.tree.structure(adapter)
    for (path, old), new in zip(jax.tree_util.tree_leaves_with_path(adapter), jax.tree.leaves(loaded), strict=True):
        assert old.dtype == new.dtype, path
        np.testing.assert_array_equal(old, new, err_msg=str(path))
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((np.asarray(a) == b).all()), base, before))


@cache
def dropped_outputs():
    """Outputs for many dropout keys; compiled once for all methods that yield the same structure."""
    model = zoo.MODELS["plain scanned"]()
    forward = jaxpeft.adapt(model.apply)
    each = jax.vmap(lambda adapter, key: forward(model.params, adapter, IDS[:1, :2], dropout_key=key), (None, 0))
    return jax.jit(each)


@every_method
def test_dropout_is_active_only_with_a_key(name) -> None:
    adapter = given(trained(name), updated(name, trained(name)).params, dropout=0.5)
    (_, still), _ = run("plain scanned", updated(name, trained(name)))
    keys = jax.random.split(jax.random.key(3), 600)
    if not all(update.additive or isinstance(update, Block | Decomposed) for update in adapter.params.values()):
        with pytest.raises(ValueError, match="dropout"):
            dropped_outputs()(adapter, keys)
        return
    dropped = dropped_outputs()(adapter, keys)
    assert bool((dropped[0] != dropped[1]).any())
    np.testing.assert_array_equal(dropped_outputs()(adapter, keys)[0], dropped[0])
    if not card_of(name).mergeable:  # A non-linearity does not keep the mean.
        return
    np.testing.assert_allclose(dropped.mean(axis=0), still[:1, :2], atol=0.25 * float(jnp.abs(still[:1, :2]).max()))
