"""Many adapters in one batch: every row answers as it does alone, whoever its neighbours are."""

import dataclasses

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import zoo
from moved import moved
from specs import SPECS, STRUCTURES

import jaxpeft
from jaxpeft import batch, models
from jaxpeft.methods import METHODS, lora

NAMES = [name for name in SPECS if name in METHODS or name in STRUCTURES]
IDS = jnp.array([2, 0, batch.BASE, 1, 1])
TOKENS = jax.random.randint(jax.random.key(3), (5, 5), 0, zoo.VOCAB)


def made(name="plain scanned"):
    return zoo.MODELS[name]()


def adapters(spec, count=3, model="plain scanned"):
    given = made(model)
    sites = jaxpeft.find(given.params, given.pattern)
    return [moved(jaxpeft.init(jax.random.key(i), spec, sites, given.params), 0.05, i) for i in range(count)]


def alone(model, several, ids, tokens):
    """Every row by itself, as the base or with its own adapter."""
    forward = jax.jit(jaxpeft.adapt(model.apply))
    plain = jax.jit(model.apply)
    rows = [
        plain(model.params, row[None]) if number < 0 else forward(model.params, several[number], row[None])
        for number, row in zip(ids.tolist(), tokens, strict=True)
    ]
    return jnp.concatenate(rows)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            n,
            marks=[]
            if n in ("lora", "mos", "ia3", "lora dora", "surm", "surm_block", "prolora unexpanded")
            else [pytest.mark.slow],
        )
        for n in NAMES
    ],
)
def test_every_row_answers_as_it_does_alone(name) -> None:
    model, several = made(), adapters(SPECS[name])
    stacked = batch.stack(several)
    assert batch.size(stacked) == 3
    forward = jax.jit(batch.batched(model.apply))
    out = forward(model.params, stacked, IDS, TOKENS)
    wanted = alone(model, several, IDS, TOKENS)
    np.testing.assert_allclose(out, wanted, atol=1e-5 * float(jnp.abs(wanted).max()))
    expanded = jax.jit(jax.vmap(batch.expand))(stacked)
    np.testing.assert_allclose(forward(model.params, expanded, IDS, TOKENS), out, atol=1e-5 * float(jnp.abs(out).max()))


@pytest.mark.parametrize("style", zoo.MODELS)
def test_every_way_to_write_a_model(style) -> None:
    model, several = made(style), adapters(SPECS["mos"], model=style)
    out = jax.jit(batch.batched(model.apply))(model.params, batch.stack(several), IDS, TOKENS)
    np.testing.assert_allclose(out, alone(model, several, IDS, TOKENS), atol=5e-4)  # of numbers up to 40


def test_methods_and_ranks_are_mixed() -> None:
    model = made()
    parts = [adapters(SPECS[name], 2) for name in ("mos", "surm", "lora dora", "lora")]
    ids = jnp.array([7, 0, 3, 5, 2])
    out = jax.jit(batch.batched(model.apply))(model.params, [batch.stack(part) for part in parts], ids, TOKENS)
    wanted = alone(model, [adapter for part in parts for adapter in part], ids, TOKENS)
    np.testing.assert_allclose(out, wanted, atol=1e-5 * float(jnp.abs(wanted).max()))


def test_rows_are_made_once_and_changed_one_by_one() -> None:
    model, traces = made(), []

    def apply(params, tokens):
        traces.append(None)
        return model.apply(params, tokens)

    forward = jax.jit(batch.batched(apply))
    parts = [adapters(SPECS[name], 2) for name in ("mos", "ia3", "lora dora")]
    several, ids = [adapter for part in parts for adapter in part], jnp.array([5, 0, batch.BASE, 3, 2])
    own = jax.jit(batch.rows)([batch.stack(part) for part in parts], ids)
    out = forward(model.params, own, None, TOKENS)
    wanted = alone(model, several, ids, TOKENS)
    np.testing.assert_allclose(out, wanted, atol=1e-5 * float(jnp.abs(wanted).max()))
    before = len(traces)
    place = jax.jit(batch.place)
    # The base's row gets adapter 1, and the first row is the base's.
    own = [place(own[0], 2, batch.expand(several[1])), own[1], place(own[2], 0, None)]
    changed = ids.at[2].set(1).at[0].set(batch.BASE)
    out = forward(model.params, own, None, TOKENS)
    wanted = alone(model, several, changed, TOKENS)
    np.testing.assert_allclose(out, wanted, atol=1e-5 * float(jnp.abs(wanted).max()))
    assert len(traces) == before


def test_rows_lie_where_a_loop_over_layers_reads_them() -> None:
    """A loop of calls moves no array of the rows, which would copy all of them for every token."""
    model = made()
    own = batch.rows(batch.stack(adapters(SPECS["lora"])), IDS)
    several = {leaf.shape for leaf in jax.tree.leaves(own)}
    forward = batch.batched(model.apply)

    def calls(own, tokens):
        return jax.lax.scan(
            lambda total, _: (total + forward(model.params, own, None, tokens).sum(), None), 0.0, length=3
        )[0]

    def equations(jaxpr):
        for equation in jaxpr.eqns:
            yield equation
            for inner in jex.jaxprs_in_params(equation.params):
                yield from equations(inner)

    jaxpr = jax.make_jaxpr(calls)(own, TOKENS).jaxpr
    scans = [equation for equation in equations(jaxpr) if equation.primitive.name == "scan"]
    assert len(scans) == 2, "the tokens', and in it the layers'"
    moved = [e for e in equations(jaxpr) if e.primitive.name == "transpose" and e.invars[0].aval.shape in several]
    assert not moved


def test_updates_that_are_alike_are_one() -> None:
    """Whatever method made them: a row costs what the largest rank costs."""
    model = made()
    specs = [
        lora.Spec(rank=2),
        SPECS["ia3"],
        lora.Spec(rank=5, alpha=3.0),
        SPECS["mos"],
        lora.Spec(rank=3, dropout=0.1),
    ]
    parts = [adapters(spec, 1) for spec in specs]
    ids = jnp.array([3, 2, batch.BASE, 0, 1])
    own = batch.rows([batch.stack(part) for part in parts], ids)
    widths = [{update.a.shape[2] for update in one.made.values()} for one in own if isinstance(one.spec, lora.Spec)]
    assert len(own) == 3, "both LoRAs with MoS; IA3; and what drops otherwise in training"
    assert widths == [{max(5, SPECS["mos"].rank)}, {3}]
    out = jax.jit(batch.batched(model.apply))(model.params, own, None, TOKENS)
    wanted = alone(model, [part[0] for part in parts], ids, TOKENS)
    np.testing.assert_allclose(out, wanted, atol=1e-5 * float(jnp.abs(wanted).max()))


def test_every_row_drops_what_it_drops_itself() -> None:
    base = {"up": {"kernel": jnp.zeros((8, 6))}}
    found = [
        moved(jaxpeft.init(jax.random.key(i), lora.Spec(rank=2, dropout=0.5), jaxpeft.find(base)), 0.3, i)
        for i in range(2)
    ]
    forward = batch.batched(lambda base, x: x @ base["up"]["kernel"])
    same, ids = jnp.ones((4, 5, 8)), jnp.zeros(4, jnp.int32)
    for stacks, numbers in ((batch.stack(found), ids), (batch.rows(batch.stack(found), ids), None)):
        out = forward(base, stacks, numbers, same, dropout_key=jax.random.key(3))
        np.testing.assert_array_equal(out, forward(base, stacks, numbers, same, dropout_key=jax.random.key(3)))
        assert len(np.unique(np.asarray(out).reshape(4, -1), axis=0)) == 4
        assert len(np.unique(np.asarray(forward(base, stacks, numbers, same)).reshape(4, -1), axis=0)) == 1


def test_ids_and_adapters_are_data() -> None:
    model, traces = made(), []

    def apply(params, tokens):
        traces.append(None)
        return model.apply(params, tokens)

    forward = jax.jit(batch.batched(apply))
    first = adapters(SPECS["mos"])
    forward(model.params, batch.stack(first), IDS, TOKENS)
    before = len(traces)
    others = [moved(one, 0.1, 9).with_alpha(3.0) for one in first]
    out = forward(model.params, batch.stack(others), IDS[::-1], TOKENS)
    assert len(traces) == before
    np.testing.assert_allclose(out, alone(model, others, IDS[::-1], TOKENS), atol=5e-4)


def test_many_are_trained_at_once_as_each_is_alone() -> None:
    model, several = made(), adapters(SPECS["mos"])
    ids = jnp.array([2, 0, 0, 1, 1])
    forward, single = batch.batched(model.apply), jaxpeft.adapt(model.apply)
    optimizer = optax.adam(1e-2)

    def loss(out):
        return jnp.sum((out - 1) ** 2)

    @jax.jit
    def step(stacked, state):
        def value(params):
            return loss(forward(model.params, stacked.replace(params=params), ids, TOKENS))

        updates, state = optimizer.update(jax.grad(value)(stacked.params), state)
        return stacked.replace(params=optax.apply_updates(stacked.params, updates)), state

    @jax.jit
    def step_alone(adapter, state, tokens):
        def value(params):
            return loss(single(model.params, adapter.replace(params=params), tokens))

        updates, state = optimizer.update(jax.grad(value)(adapter.params), state)
        return adapter.replace(params=optax.apply_updates(adapter.params, updates)), state

    stacked = batch.stack(several)
    state = optimizer.init(stacked.params)
    for _ in range(3):
        stacked, state = step(stacked, state)
    for number, adapter in enumerate(several):
        own, rows = optimizer.init(adapter.params), TOKENS[np.asarray(ids) == number]
        for _ in range(3):
            adapter, own = step_alone(adapter, own, rows)
        together = jax.tree.leaves(batch.member(stacked, number).params)
        for ours, theirs in zip(together, jax.tree.leaves(adapter.params), strict=True):
            np.testing.assert_allclose(ours, theirs, atol=2e-4)


def test_products_with_the_base_stay_one() -> None:
    """XLA counts little more than for one adapter: the base's products are done once for all rows."""
    config = models.Config(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4
    )
    lm = models.random(config, jax.random.key(0))
    sites = jaxpeft.find(lm.params)
    several = [jaxpeft.init(jax.random.key(i), lora.Spec(rank=4), sites) for i in range(8)]
    tokens, ids = jnp.zeros((16, 12), jnp.int32), jnp.arange(16) % 8

    def flops(function, *args):
        return jax.jit(function).lower(*args).compile().cost_analysis()["flops"]

    mixed = flops(batch.batched(lm.logits), lm.params, batch.stack(several), ids, tokens)
    assert mixed < 1.02 * flops(jaxpeft.adapt(lm.logits), lm.params, several[0], tokens)


def test_mistakes_are_named() -> None:
    several = adapters(SPECS["mos"])
    with pytest.raises(ValueError, match="at least one"):
        batch.stack([])
    with pytest.raises(ValueError, match="adapter 1 has another spec"):
        batch.stack([several[0], *adapters(SPECS["lora"], 1)])
    fewer = dataclasses.replace(several[0], sites=jaxpeft.Sites(several[0].sites.groups[:1]))
    with pytest.raises(ValueError, match="another sites"):
        batch.stack([several[0], fewer])
    model, stacked = made(), batch.stack(several)
    forward = batch.batched(model.apply)
    with pytest.raises(ValueError, match="expected one integer a row"):
        forward(model.params, stacked, jnp.zeros(5), TOKENS)
    with pytest.raises(ValueError, match="expected 4 rows"):
        forward(model.params, stacked, IDS[:4], TOKENS)
    for wrong in (99, -7):
        with pytest.raises(ValueError, match=rf"ids holds {wrong}; expected 0 to \d+, or -1 for the base alone"):
            forward(model.params, stacked, IDS.at[1].set(wrong), TOKENS)
    with pytest.raises(ValueError, match="found an adapter that is not stacked"):
        forward(model.params, several[0], IDS, TOKENS)
    with pytest.raises(ValueError, match="found a dict"):
        forward(model.params, several[0].params, IDS, TOKENS)
    own = batch.rows(stacked, IDS[:4])
    with pytest.raises(ValueError, match="expected 4 rows"):
        forward(model.params, own, None, TOKENS)
    with pytest.raises(ValueError, match="found Adapter, which needs ids"):
        forward(model.params, [stacked, *own], None, TOKENS)
