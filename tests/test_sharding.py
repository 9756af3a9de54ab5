"""Adapters on meshes: where their arrays lie, and that a step on a mesh is the step on one device."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import zoo
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from moved import moved
from specs import SPECS

import jaxpeft
from jaxpeft import models, sharding
from jaxpeft.methods import full, lora, mos
from jaxpeft.updates import PerShard
from train import costs

RULES = (
    ("query/kernel", P(None, "fsdp", None, "tensor")),
    ("out/kernel", P(None, None, "tensor", "fsdp")),
    ("up/kernel", P(None, "fsdp", "tensor")),
    ("down/kernel", P(None, "tensor", "fsdp")),
)
IDS = jax.random.randint(jax.random.key(7), (8, 5), 0, zoo.VOCAB)


def mesh_of(kind=AxisType.Auto, **axes):
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(kind,) * len(axes))


def scanned(spec):
    """The scanned model and a moved adapter for it."""
    model = zoo.MODELS["plain scanned"]()
    sites = jaxpeft.find(model.params, model.pattern)
    return model, moved(jaxpeft.init(jax.random.key(1), spec, sites, model.params), 0.05)


def step(forward, adapter, **options):
    """Loss and gradient of the trained arrays, of (params, constants, base, ids)."""

    def loss(params, constants, base, ids):
        return jnp.mean(forward(base, adapter.replace(params=params, constants=constants), ids, **options) ** 2)

    return jax.value_and_grad(loss)


def assert_close(found, expected, tolerance=1e-5):
    for got, leaf in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(got, leaf, atol=tolerance * max(1, float(jnp.abs(leaf).max())), rtol=0)


# --- where things lie ---


def test_rules():
    params = zoo.MODELS["plain scanned"]().params
    mesh = mesh_of(fsdp=2, tensor=2, more=2)
    placed = sharding.from_rules(params, mesh, [*RULES[:2], ("up/kernel", P(None, ("fsdp", "absent"), "tensor"))])
    assert placed["layers"]["up"]["kernel"].spec == P(None, "fsdp", "tensor")
    assert placed["layers"]["down"]["kernel"].spec == placed["embed"]["embedding"].spec == P()
    assert sharding.of(jax.device_put(params, placed)) == placed


def test_rules_that_do_not_fit_say_so():
    params = zoo.MODELS["plain scanned"]().params
    with pytest.raises(ValueError, match=r"layers/down/kernel: axis 1 of shape \(4, 18, 12\) .* into 4 parts"):
        sharding.from_rules(params, mesh_of(fsdp=2, tensor=4), RULES)
    lenient = sharding.from_rules(params, mesh_of(fsdp=2, tensor=4), RULES, strict=False)
    assert lenient["layers"]["up"]["kernel"].spec == P(None, "fsdp", None)
    with pytest.raises(ValueError, match=r"fits an array of this tree; 'updown/kernel': nearest: layers/"):
        sharding.from_rules(params, mesh_of(fsdp=8), [("updown/kernel", P("fsdp"))])
    with pytest.raises(ValueError, match=r"norm/scale has shape \(4, 12\), but its sharding rule .* has 3 axes"):
        sharding.from_rules(params, mesh_of(fsdp=8), [("norm", P(None, None, "fsdp"))])
    with pytest.raises(ValueError, match="on one mesh, found 0 meshes"):
        sharding.adapter(scanned(lora.Spec(rank=2))[1], {"up": None})


def test_factors_lie_as_kernels_and_pools_are_whole():
    model, adapter = scanned(lora.Spec(rank=3))
    placed = sharding.from_rules(model.params, mesh_of(data=2, fsdp=2, tensor=2), RULES)
    stored = sharding.adapter(adapter, placed).params
    assert stored["layers/up/kernel"]["a"].spec == P(None, None, "fsdp")
    assert stored["layers/up/kernel"]["b"].spec == P(None, None, "tensor")
    # (heads, head_dim) are one side; it is cut into runs by its first axis only.
    assert stored["layers/query/kernel"]["b"].spec == P(None, None, None)
    assert stored["layers/out/kernel"]["b"].spec == P(None, None, "fsdp")

    model, adapter = scanned(full.Spec())
    assert sharding.adapter(adapter, placed).params["layers/up/kernel"]["w"].spec == P(None, "fsdp", "tensor")

    model, adapter = scanned(mos.Spec(rank=3, equivalent_rank=2, shards_per_vector=2))
    stored = sharding.adapter(adapter, placed)
    assert not any(any(at.spec) for at in jax.tree.leaves((stored.params, stored.constants)))
    with_magnitudes = sharding.adapter(scanned(lora.Spec(rank=3, dora=True))[1], placed)
    assert with_magnitudes.params["layers/up/kernel"]["magnitude"].spec == P(None, "tensor")


def test_an_optimizers_state_lies_as_what_it_mirrors():
    model, adapter = scanned(lora.Spec(rank=3))
    stored = sharding.adapter(adapter, sharding.from_rules(model.params, mesh_of(fsdp=2, tensor=2), RULES)).params
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    state = jax.eval_shape(optimizer.init, adapter.params)
    placed = sharding.like(state, adapter.params, stored)
    moments = next(part for part in jax.tree.leaves(placed, is_leaf=lambda x: hasattr(x, "mu")) if hasattr(part, "mu"))
    assert moments.mu == moments.nu == stored
    assert moments.count.spec == P()


def test_a_moment_lies_as_the_array_of_its_whole_path():
    kernel = {"kernel": jnp.ones((8, 8))}
    base = {"up": kernel, "z": {"up": kernel}}
    mesh = mesh_of(fsdp=2, tensor=2)
    rules = [("^up", P("fsdp", "tensor")), ("z/up", P("tensor", "fsdp"))]
    adapter = jaxpeft.init(jax.random.key(0), lora.Spec(rank=2), jaxpeft.find(base, ".*kernel"))
    stored = sharding.adapter(adapter, sharding.from_rules(base, mesh, rules)).params
    assert stored["up/kernel"] != stored["z/up/kernel"]
    state = jax.eval_shape(optax.scale_by_adam().init, adapter.params)
    assert sharding.like(state, adapter.params, stored).mu == stored


def test_experts_are_split_over_their_stack():
    base = {"experts": {"up": {"kernel": jnp.ones((8, 4, 6))}}}
    mesh = mesh_of(data=2, expert=4)
    placed = sharding.from_rules(base, mesh, [("kernel", P("expert"))])
    sites = jaxpeft.find(base, ".*kernel", layouts={".*": "lio"})
    adapter = moved(jaxpeft.init(jax.random.key(0), lora.Spec(rank=2), sites), 0.1)
    stored = sharding.adapter(adapter, placed)
    assert stored.params["experts/up/kernel"]["a"].spec == P("expert", None, None)

    def apply(base, x):
        return jnp.einsum("ebi,eio->ebo", x, base["experts"]["up"]["kernel"])

    x = jax.random.normal(jax.random.key(2), (8, 3, 4))
    forward = jax.jit(jaxpeft.adapt(apply, shardings=placed))
    found = forward(jax.device_put(base, placed), jax.device_put(adapter, stored), x)
    np.testing.assert_allclose(found, jaxpeft.adapt(apply)(base, adapter, x), atol=1e-5)


# --- a step on a mesh is the step on one device ---

MESHES = {
    "data": {"data": 8},
    "fsdp": {"fsdp": 2, "tensor": 1},
    "data, fsdp, tensor": {"data": 2, "fsdp": 2, "tensor": 2},
}


@pytest.mark.parametrize("style", ["plain scanned", "plain unrolled", "linen scanned", "nnx scanned"])
def test_every_way_to_write_a_model(style):
    model = zoo.MODELS[style]()
    adapter = jaxpeft.init(jax.random.key(1), SPECS["mos"], jaxpeft.find(model.params, model.pattern))
    adapter = moved(adapter, 0.05)
    unstacked = "unrolled" in style
    rules = [(pattern, P(*spec[1:]) if unstacked else spec) for pattern, spec in RULES]
    placed = sharding.from_rules(model.params, mesh_of(**MESHES["data, fsdp, tensor"]), rules)
    expected = jax.jit(step(jaxpeft.adapt(model.apply), adapter))(adapter.params, adapter.constants, model.params, IDS)
    on_mesh = jax.device_put(adapter, sharding.adapter(adapter, placed))
    found = jax.jit(step(jaxpeft.adapt(model.apply, shardings=placed), adapter))(
        on_mesh.params, on_mesh.constants, jax.device_put(model.params, placed), IDS
    )
    assert_close(found, expected)


@pytest.mark.parametrize("axes", MESHES)
@pytest.mark.parametrize("name", ["lora", "mos", "oft", "full", "rows", "smoa_structured", "surm_block"])
def test_every_kind_of_mesh(name, axes):
    model, adapter = scanned(SPECS[name])
    mesh = mesh_of(**MESHES[axes])
    placed = sharding.from_rules(model.params, mesh, RULES)
    expected = jax.jit(step(jaxpeft.adapt(model.apply), adapter))(adapter.params, adapter.constants, model.params, IDS)
    on_mesh = jax.device_put(adapter, sharding.adapter(adapter, placed))
    batch = tuple(axis for axis in ("data", "fsdp") if axis in mesh.axis_names)
    found = jax.jit(step(jaxpeft.adapt(model.apply, shardings=placed), adapter))(
        on_mesh.params,
        on_mesh.constants,
        jax.device_put(model.params, placed),
        jax.device_put(IDS, NamedSharding(mesh, P(batch))),
    )
    assert_close(found, expected)


@pytest.mark.parametrize(
    "switches", [{}, {"dropout_on": "update"}, {"dropout_on": "factors"}], ids=["input", "update", "factors"]
)
def test_dropout_drops_the_same_on_every_mesh(switches):
    """Also on a data axis: what is drawn does not depend on how many devices draw it."""
    model, adapter = scanned(lora.Spec(rank=3, dropout=0.3, **switches))
    placed = sharding.from_rules(model.params, mesh_of(**MESHES["data, fsdp, tensor"]), RULES)
    arguments = adapter.params, adapter.constants, model.params, IDS
    key = jax.random.key(5)
    expected = jax.jit(step(jaxpeft.adapt(model.apply), adapter, dropout_key=key))(*arguments)
    found = jax.jit(step(jaxpeft.adapt(model.apply, shardings=placed), adapter, dropout_key=key))(*arguments)
    still = jax.jit(step(jaxpeft.adapt(model.apply, shardings=placed), adapter))(*arguments)
    assert abs(float(still[0] - found[0])) > 1e-4
    assert_close(found, expected)


def test_dropout_inside_dora_draws_for_every_shard():
    model, adapter = scanned(lora.Spec(rank=3, dropout=0.5, dora=True))
    placed = sharding.from_rules(model.params, mesh_of(data=8), RULES)
    forward = jax.jit(jaxpeft.adapt(model.apply, shardings=placed))
    same = jnp.broadcast_to(IDS[:1], IDS.shape)
    out = forward(model.params, adapter, same, dropout_key=jax.random.key(5))
    assert len(np.unique(np.asarray(out[:, 0, 0]))) == 8


@pytest.mark.parametrize("name", ["mos", "prolora", "vblora", "sharelora"])
def test_pools_stay_out_of_the_loop_over_layers(name):
    """Factors are gathered and reduced there, as kernels are under fsdp; what they are made of moves once, outside."""
    model, adapter = scanned(SPECS[name])
    mesh = mesh_of(**MESHES["data, fsdp, tensor"])
    placed = sharding.from_rules(model.params, mesh, RULES)
    stored = sharding.adapter(adapter, placed)
    compiled = jax.jit(
        step(jaxpeft.adapt(model.apply, shardings=placed), adapter),
        out_shardings=(NamedSharding(mesh, P()), stored.params),
    )
    on_mesh = jax.device_put(adapter, stored)
    base = jax.device_put(model.params, placed)
    ids = jax.device_put(IDS, NamedSharding(mesh, P(("data", "fsdp"))))
    found = costs.analyse(compiled.lower(on_mesh.params, on_mesh.constants, base, ids).compile().as_text())
    whole = {leaf.shape for leaf in jax.tree.leaves(adapter.params)}
    moved = [one for one in found.collectives if whole & {shape.dims for shape in (*one.operands, *one.results)}]
    assert moved
    assert all(one.kind == "all-reduce" and (one.depth, one.times) == (0, 1) for one in moved)
    assert any(one.depth for one in found.collectives)


@pytest.mark.parametrize("axes", ["fsdp", "data, fsdp, tensor"])
@pytest.mark.parametrize("name", ["lora", "hira", "smoa_structured", "surm_block"])
def test_no_gradient_as_large_as_a_kernel_is_reduced(name, axes):
    """Where fsdp splits both the batch and the kernels: neither a formed update's, nor that of a layer's output."""
    model, adapter = scanned(SPECS[name])
    mesh = mesh_of(**MESHES[axes])
    placed = sharding.from_rules(model.params, mesh, RULES)
    stored = sharding.adapter(adapter, placed)
    batch = tuple(axis for axis in sharding.BATCH if axis in mesh.axis_names)
    compiled = jax.jit(
        step(jaxpeft.adapt(model.apply, shardings=placed), adapter),
        out_shardings=(NamedSharding(mesh, P()), stored.params),
    )
    on_mesh, base = jax.device_put(adapter, stored), jax.device_put(model.params, placed)
    ids = jax.device_put(IDS, NamedSharding(mesh, P(batch)))
    found = costs.analyse(compiled.lower(on_mesh.params, on_mesh.constants, base, ids).compile().as_text())
    kernels = {zoo.EMBED * zoo.EMBED, zoo.EMBED * zoo.HIDDEN}
    kernels |= {zoo.LAYERS * kernel for kernel in kernels}
    reduced = {shape.size for one in found.collectives if one.kind == "all-reduce" for shape in one.operands}
    assert reduced
    assert not reduced & kernels - {leaf.size for leaf in jax.tree.leaves(adapter.params)}


def test_batches_that_no_shard_divides_are_right():
    model, adapter = scanned(SPECS["mos"])
    placed = sharding.from_rules(model.params, mesh_of(data=8), RULES)
    forward = jaxpeft.adapt(model.apply)
    arguments = model.params, adapter, IDS[:3]
    np.testing.assert_allclose(
        jax.jit(jaxpeft.adapt(model.apply, shardings=placed))(*arguments), jax.jit(forward)(*arguments), atol=1e-5
    )


def test_embeddings_tied_heads_and_formed_weights():
    base = {"embed": {"embedding": jax.random.normal(jax.random.key(0), (24, 8))}}
    adapter = moved(jaxpeft.init(jax.random.key(1), lora.Spec(rank=2), jaxpeft.find(base, ".*")), 0.1)

    def apply(base, ids):
        table = base["embed"]["embedding"]
        return jnp.tanh(table[ids]) @ table.T + jnp.sum(jnp.sin(table))

    placed = sharding.from_rules(base, mesh_of(data=4, tensor=2), [("embedding", P("tensor", None))])
    with pytest.warns(jaxpeft.MaterializeWarning):
        expected = step(jaxpeft.adapt(apply), adapter)(adapter.params, adapter.constants, base, IDS)
    with pytest.warns(jaxpeft.MaterializeWarning):
        found = jax.jit(step(jaxpeft.adapt(apply, shardings=placed), adapter))(
            adapter.params, adapter.constants, jax.device_put(base, placed), IDS
        )
    assert_close(found, expected)


def test_a_mesh_of_explicit_axes():
    """Shardings are in the types there: nothing has to be passed, and every result has the model's own type."""
    mesh = mesh_of(AxisType.Explicit, data=4, tensor=2)

    def apply(base, x):
        def block(x, p):
            h = jnp.einsum("bsi,io->bso", x, p["up"], out_sharding=P("data", None, "tensor"))
            return x + jnp.einsum("bso,oi->bsi", jnp.tanh(h), p["down"], out_sharding=P("data", None, None)), None

        return jax.lax.scan(jax.checkpoint(block), x, base)[0]

    weights = zoo.weights()
    base = {"up": weights["up"], "down": weights["down"]}
    sites = jaxpeft.find(base, ".*", layouts={".*": "lio"})
    x = jax.random.normal(jax.random.key(3), (8, 5, zoo.EMBED))

    def hand(base, x):
        return jax.lax.scan(lambda x, p: (x + jnp.tanh(x @ p["up"]) @ p["down"], None), x, base)[0]

    for name in ("lora", "mos", "lora dora", "oft", "full", "rows", "surm"):
        adapter = moved(jaxpeft.init(jax.random.key(1), SPECS[name], sites, base), 0.05)
        expected = jax.jit(step(jaxpeft.adapt(hand), adapter))(adapter.params, adapter.constants, base, x)
        with jax.set_mesh(mesh):
            typed = {
                "up": jax.device_put(base["up"], P(None, None, "tensor")),
                "down": jax.device_put(base["down"], P(None, "tensor", None)),
            }
            found = jax.jit(step(jaxpeft.adapt(apply), adapter))(
                adapter.params, adapter.constants, typed, jax.device_put(x, P("data"))
            )
            out = jax.jit(jaxpeft.adapt(apply))(typed, adapter, jax.device_put(x, P("data")))
            assert jax.typeof(out).sharding.spec == P("data", None, None)
            told = jaxpeft.adapt(apply, shardings=sharding.of(typed))
            np.testing.assert_allclose(told(typed, adapter, jax.device_put(x, P("data"))), out, atol=1e-5)
        assert_close(found, expected)


def test_the_decoder_lies_by_its_logical_axes():
    """Data, fsdp, sequence and tensor: activations follow the mesh of the context, and losses stay what they were."""
    config = models.Config(
        vocab_size=64, hidden_size=32, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, remat="full"
    )
    lm = models.random(config, jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (4, 16), 0, 64)
    expected = jax.jit(lm.token_losses)(lm.params, tokens, tokens)
    mesh = mesh_of(data=1, fsdp=2, sequence=2, tensor=2)
    placed = sharding.from_rules(lm.params, mesh, models.DEFAULT_RULES)
    params = jax.device_put(lm.params, placed)
    on_mesh = jax.device_put(tokens, NamedSharding(mesh, P(("data", "fsdp"), "sequence")))
    with jax.set_mesh(mesh):
        compiled = jax.jit(lm.token_losses).lower(params, on_mesh, on_mesh).compile()
    np.testing.assert_allclose(compiled(params, on_mesh, on_mesh), expected, atol=1e-5)
    # A quarter of the rows' positions, and half the features, on every device: (2, 8, 48).
    assert "f32[2,8,48]" in compiled.as_text()
    assert "f32[4,16,96]" not in compiled.as_text()


def test_copies_serve_one_shard_each():
    mesh = mesh_of(data=2)
    update = jaxpeft.updates.LowRank(jnp.ones((2, 1, 3)), jnp.stack([jnp.ones((1, 4)), jnp.zeros((1, 4))]), jnp.ones(2))
    per_shard = PerShard(update, mesh, ("data",))
    y = jax.jit(per_shard.delta_matmul)(jnp.ones((4, 3)))
    np.testing.assert_array_equal(y[:, 0], [3, 3, 0, 0])
    assert dataclasses.replace(per_shard, update=update).additive
