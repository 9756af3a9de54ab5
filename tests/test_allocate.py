"""Allocators: budgets, masks and schedules of the papers, inside a step that is compiled once."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxpeft
from jaxpeft import allocate
from jaxpeft.methods import adalora, aslora, beamlora, dynamic_dora, full, increlora, lora, mixed, sora

STEPS = 12


def adapter_of(spec, layers: int = 3) -> jaxpeft.Adapter:
    kernels = {"up": jnp.zeros((layers, 6, 5)), "down": jnp.zeros((layers, 5, 6))}
    base = {"layers": {name: {"kernel": kernel} for name, kernel in kernels.items()}}
    return jaxpeft.init(jax.random.key(0), spec, jaxpeft.find(base, layouts={".*": "lio"}))


def targets(adapter: jaxpeft.Adapter) -> dict:
    """Updates to learn, of very different sizes."""
    keys = jax.random.split(jax.random.key(7), len(adapter.sites))
    made = {}
    for key, g in zip(keys, adapter.sites, strict=True):
        made[g.name] = (
            jax.random.normal(key, (g.layers, g.in_dim, g.out_dim)) * 2.0 ** jnp.arange(g.layers)[:, None, None]
        )
    return made


def gates(params) -> dict:
    return {name: np.asarray(group["gate"]) for name, group in params.items()}


def train(adapter: jaxpeft.Adapter, optimizer, steps: int = STEPS):
    """(adapter, state) after every step; exactly one trace, with parameters and state donated."""
    wanted, traces = targets(adapter), []

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state):
        traces.append(None)

        def loss(params):
            deltas = jaxpeft.delta(adapter.replace(params=params))
            return sum(jnp.sum((deltas[name] - wanted[name]) ** 2) for name in wanted)

        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    params = jax.tree.map(jnp.copy, adapter.params)
    state, seen = optimizer.init(params), []
    allocate.check(adapter, state)
    for _ in range(steps):
        params, state = step(params, state)
        seen.append(jax.tree.map(np.array, (adapter.replace(params=params), state)))
    assert len(traces) == 1, "budgets and masks change, the program does not"
    return seen


def live(adapter) -> int:
    return int(sum(ranks.sum() for ranks in allocate.ranks(adapter).values()))


ADALORA = adalora.Spec(rank=4, target_rank=2)


def test_adalora_ends_with_exactly_its_budget_and_stays_there() -> None:
    optimizer = allocate.for_spec(ADALORA, optax.adam(0.05), STEPS, initial_steps=2, final_steps=4)
    seen = train(adapter_of(ADALORA), optimizer)
    room, target = 4 * 6, 2 * 6
    for number, (adapter, state) in enumerate(seen):
        budget = int(allocate.cubic_decay(number, room, target, 2, 8))
        assert sum(mask.sum() for mask in state.live.values()) == budget
        assert live(adapter) == budget
        for name, gate in gates(adapter.params).items():
            assert (gate[~state.live[name]] == 0).all()
    assert budget == target
    for _, state in seen[8:]:
        assert all((state.live[name] == mask).all() for name, mask in seen[8][1].live.items()), "the last mask is final"
    ranks = np.concatenate([*allocate.ranks(seen[-1][0]).values()])
    assert ranks.min() < ranks.max(), "the budget went where it was needed"


def test_adalora_between_allocations_a_gate_may_grow_back() -> None:
    optimizer = allocate.for_spec(ADALORA, optax.adam(0.05), STEPS, initial_steps=0, final_steps=3, every=4)
    seen = train(adapter_of(ADALORA), optimizer)
    masks = [sum(mask.sum() for mask in state.live.values()) for _, state in seen]
    assert masks[:4] == [24] * 4
    assert masks[4] == masks[7] == allocate.cubic_decay(4, 24, 12, 0, 9)
    assert live(seen[4][0]) < live(seen[5][0])
    assert live(seen[-1][0]) == 12


def test_adalora_schedule_is_the_papers() -> None:
    """b(t) = b0, then bT + (b0 - bT)(1 - (t - ti)/(T - ti - tf))³, then bT (eq. 9)."""
    total, first, final, start, end = 100, 15, 25, 96, 64
    for step in range(total):
        if step <= first:
            expected = start
        elif step > total - final:
            expected = end
        else:
            expected = int(end + (start - end) * (1 - (step - first) / (total - final - first)) ** 3)
        assert int(allocate.cubic_decay(jnp.int32(step), start, end, first, total - final)) == expected


def test_importance_after_two_steps() -> None:
    """Sensitivity, its deviation, and a triplet's sum, in plain numpy, from the gradients the rule saw."""
    adapter = adapter_of(ADALORA)
    optimizer = allocate.adalora(
        optax.sgd(0.1), target_rank=2, steps=9, initial_steps=1, final_steps=0, beta1=0.7, beta2=0.6
    )
    keys = iter(jax.random.split(jax.random.key(3), 99))
    params = jax.tree.map(lambda leaf: leaf + jax.random.normal(next(keys), leaf.shape), adapter.params)
    state = optimizer.init(params)
    mean = jax.tree.map(np.zeros_like, params)
    spread = jax.tree.map(np.zeros_like, params)
    for _ in range(3):
        gradients = jax.tree.map(lambda leaf: jax.random.normal(next(keys), leaf.shape), params)
        moved = jax.tree.map(lambda p, g: np.asarray(p - 0.1 * g), params, gradients)
        updates, state = optimizer.update(gradients, state, params)
        params = optax.apply_updates(params, updates)
        found = jax.tree.map(lambda p, g: np.abs(p * np.asarray(g)), moved, gradients)
        mean = jax.tree.map(lambda m, s: 0.7 * m + 0.3 * s, mean, found)
        spread = jax.tree.map(lambda u, s, m: 0.6 * u + 0.4 * np.abs(s - m), spread, found, mean)
    scores = {}
    for name in params:
        entries = {leaf: mean[name][leaf] * spread[name][leaf] for leaf in ("a", "b", "gate")}
        scores[name] = entries["gate"] + entries["a"].mean(-1) + entries["b"].mean(-1)
    flat = np.sort(np.concatenate([score.ravel() for score in scores.values()]))[::-1]
    budget = int(allocate.cubic_decay(2, 24, 12, 1, 9))
    assert 12 < budget < 24
    for name, score in scores.items():
        np.testing.assert_array_equal(state.live[name], score >= flat[budget - 1])


def test_dynamic_dora_prunes_the_smallest_shares() -> None:
    spec = dynamic_dora.Spec(rank=4, target_rank=2, alpha=1.0)
    optimizer = allocate.for_spec(spec, optax.adam(0.05), STEPS, initial_steps=2, final_steps=4, beta=0.0)
    seen = train(adapter_of(spec), optimizer)
    for number, (adapter, _) in enumerate(seen):
        assert live(adapter) == int(allocate.cubic_drop(number, 24, 12, 2, 8))
    adapter, state = seen[7]
    params = adapter.params
    for name, score in state.memory.items():
        for layer in range(3):
            a, b, gate = (params[name][leaf][layer] for leaf in ("a", "b", "gate"))
            parts = [gate[i] * np.outer(a[i], b[i]) for i in range(4)]
            shares = [np.linalg.norm(part) / np.linalg.norm(sum(parts)) for part in parts]
            kept = gate != 0
            np.testing.assert_allclose(
                score[layer][kept] / score[layer][kept].max(),
                np.array(shares)[kept] / max(np.array(shares)[kept]),
                rtol=1e-4,
            )
    assert allocate.variance(adapter).shape == ()
    factors = [params[name][leaf] for name in params for leaf in ("a", "b")]
    expected = np.mean(np.concatenate([factor.var(axis=-1, ddof=1).ravel() for factor in factors]))
    assert float(allocate.variance(adapter)) == pytest.approx(float(expected), rel=1e-5)


def test_sora_is_the_proximal_step() -> None:
    adapter = adapter_of(sora.Spec(rank=4))
    optimizer = allocate.for_spec(adapter.spec, optax.sgd(0.5), 10, threshold=optax.linear_schedule(0.3, 0.5, 1))
    params, state = adapter.params, optimizer.init(adapter.params)
    for size in (0.3, 0.5):
        gradients = jax.tree.map(jnp.ones_like, params)
        before = gates(params)
        updates, state = optimizer.update(gradients, state, params)
        params = optax.apply_updates(params, updates)
        for name, gate in gates(params).items():
            moved = before[name] - np.float32(0.5)
            expected = np.sign(moved) * np.maximum(np.abs(moved) - np.float32(size), 0)
            np.testing.assert_allclose(gate, expected, atol=1e-6)
            np.testing.assert_array_equal(gate == 0, expected == 0)
            np.testing.assert_array_equal(state.live[name], gate != 0)
            np.testing.assert_allclose(params[name]["a"], adapter.params[name]["a"] - 0.5 * int(state.count), atol=1e-6)
    assert 0 < sum((gate == 0).sum() for gate in gates(params).values()) < 24


INCRELORA = increlora.Spec(rank=5, target_rank=3, start_rank=1, rank_step=2)


def test_increlora_grows_to_its_budget() -> None:
    growing = {"initial_steps": 2, "every": 2, "top_h": 2}
    optimizer = allocate.for_spec(INCRELORA, optax.adam(0.05), 20, **growing)
    seen = train(adapter_of(INCRELORA), optimizer, 14)
    totals = [int(sum(mask.sum() for mask in state.live.values())) for _, state in seen]
    assert totals[:9] == [6, 6, 6, 6, 10, 10, 14, 14, 18], "6 weights of rank 1, then 2 of them gain 2 ranks"
    assert set(totals[9:]) == {18}, "3 ranks a weight, exactly"
    early, late = seen[1], seen[-1]
    for name, gate in gates(early[0].params).items():
        assert (gate[:, 0] != 0).all()
        np.testing.assert_allclose(gate[:, 1:3], 1e-5, rtol=1e-3), "the reserve"
        assert (gate[:, 3:] == 0).all()
        assert (early[1].inner[0].mu[name]["gate"][:, 1:] == 0).all(), "gates that are not alive do not train"
        assert (early[1].inner[0].mu[name]["a"][:, 1:3] != 0).any(), "but the reserve's factors do"
        assert (late[0].params[name]["a"][:, 1] != adapter_of(INCRELORA).params[name]["a"][:, 1]).any()
        np.testing.assert_array_equal(gates(late[0].params)[name] != 0, late[1].live[name])
        assert (late[1].live[name].sum(axis=1) <= 5).all()
    assert live(late[0]) == 18


def test_increlora_that_cannot_reach_its_target_is_an_error() -> None:
    growing = {"initial_steps": 2, "every": 2, "top_h": 2}
    params = adapter_of(INCRELORA).params
    allocate.for_spec(INCRELORA, optax.adam(0.05), 9, **growing).init(params)
    with pytest.raises(ValueError, match="takes 3 rounds of 2 updates and ends at update 8, but there are 8"):
        allocate.for_spec(INCRELORA, optax.adam(0.05), 8, **growing).init(params)


def test_beamlora_copies_the_best_over_the_worst() -> None:
    spec = beamlora.Spec(rank=4, temperature=1.0)
    adapter = adapter_of(spec)
    every = 4
    optimizer = allocate.for_spec(spec, optax.adam(0.05), 20, every=every, threshold=0.7)
    seen = train(adapter, optimizer, every)
    plain = train_plainly(adapter, optax.adam(0.05), every)
    (before, _), (after, after_state) = plain[-1], seen[-1]
    half, half_state = plain[every // 2 - 1]
    share = 1 - 0.3 * (1 + np.cos(np.pi * every / 20)) / 2
    weight = {n: np.asarray(beamlora.importance(jnp.asarray(g), 1.0)) for n, g in gates(before.params).items()}
    flat = np.sort(np.concatenate([w.ravel() for w in weight.values()]))[::-1]
    cut = flat[np.argmax(np.cumsum(flat) > share * flat.sum())]
    replaced = 0
    for name, w in weight.items():
        for layer in range(3):
            order = np.argsort(-w[layer])
            number = min(int((w[layer] <= cut).sum()), 2)
            replaced += number
            own = order[: 4 - number]
            for leaf in ("a", "b"):
                new, old = after.params[name][leaf][layer], before.params[name][leaf][layer]
                np.testing.assert_allclose(new[own], old[own], atol=1e-6)
                for k in range(number):
                    copied = half.params[name][leaf][layer][order[k]]
                    np.testing.assert_allclose(new[order[3 - k]], copied, atol=1e-6)
                    for moment in ("mu", "nu"):
                        new_moment = getattr(after_state.inner[0], moment)[name][leaf][layer]
                        old_moment = getattr(half_state[0], moment)[name][leaf][layer]
                        np.testing.assert_allclose(new_moment[order[3 - k]], old_moment[order[k]], rtol=1e-5)
            gate, former = after.params[name]["gate"][layer], before.params[name]["gate"][layer]
            for k in range(number):
                mean = (former[order[k]] + former[order[3 - k]]) / 2
                np.testing.assert_allclose(gate[[order[k], order[3 - k]]], mean, atol=1e-6)
        assert not after_state.inner[0].mu[name]["gate"].any()
    assert replaced > 0
    assert replaced < 12


def train_plainly(adapter, optimizer, steps):
    """The same training without an allocator."""
    wanted = targets(adapter)

    @jax.jit
    def step(params, state):
        def loss(params):
            deltas = jaxpeft.delta(adapter.replace(params=params))
            return sum(jnp.sum((deltas[name] - wanted[name]) ** 2) for name in wanted)

        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    params, state, seen = adapter.params, optimizer.init(adapter.params), []
    for _ in range(steps):
        params, state = step(params, state)
        seen.append(jax.tree.map(np.array, (adapter.replace(params=params), state)))
    return seen


def test_permute_ranks_moves_an_optimizers_moments_with_the_parameters() -> None:
    """Training permuted ranks is permuting trained ranks."""
    adapter = adapter_of(ADALORA)
    optimizer = optax.adam(0.05)
    table = {name: jnp.array([[1, 0, 3, 2], [0, 1, 2, 3], [3, 2, 1, 0]]) for name in adapter.params}
    params, state = train_plainly(adapter, optimizer, 3)[-1]
    gradients = jax.tree.map(lambda leaf: jnp.sin(7 * leaf), params.params)

    def step(params, state, gradients):
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    first = allocate.permute_ranks(step(params.params, state, gradients), table)
    then = step(*allocate.permute_ranks((params.params, state, gradients), table))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6), first, then)
    assert first[1][0].count == 4
    untouched = {"other": {"gate": jnp.ones((3, 4))}, **params.params}
    assert allocate.permute_ranks(untouched, table)["other"]["gate"] is untouched["other"]["gate"]


@pytest.mark.parametrize("spec", [ADALORA, sora.Spec(rank=4), beamlora.Spec(rank=4), INCRELORA])
def test_training_without_the_allocator_is_an_error(spec) -> None:
    adapter = adapter_of(spec)
    name = type(spec).__module__.rpartition(".")[2]
    with pytest.raises(ValueError, match=f"{name} chooses its ranks while it trains, but this optimizer state has no"):
        allocate.check(adapter, optax.adam(1e-3).init(adapter.params))


def test_for_spec_leaves_other_methods_alone_and_knows_the_parts_of_a_mixed_spec() -> None:
    optimizer = optax.adam(1e-3)
    plain = adapter_of(lora.Spec(rank=2))
    assert allocate.for_spec(plain.spec, optimizer, 10) is optimizer
    allocate.check(plain, optimizer.init(plain.params))
    spec = mixed.Spec(default=ADALORA, overrides={r".*down.*": full.Spec()})
    adapter = adapter_of(spec)
    with pytest.raises(ValueError, match="layers/up/kernel would keep all 4"):
        allocate.check(adapter, optimizer.init(adapter.params))
    wrapped = optax.chain(optax.clip_by_global_norm(1.0), allocate.for_spec(spec, optimizer, 10))
    allocate.check(adapter, wrapped.init(adapter.params))
    both = mixed.Spec(default=ADALORA, overrides={r".*down.*": sora.Spec(rank=4)})
    with pytest.raises(ValueError, match="one optimizer runs one rule"):
        allocate.for_spec(both, optimizer, 10)


def test_what_an_allocator_refuses() -> None:
    with pytest.raises(ValueError, match=r"needs groups with the arrays a, b, gate, found \['layers/down/kernel/a'"):
        allocate.sora(optax.sgd(1.0), threshold=0.1).init(adapter_of(lora.Spec(rank=2)).params)
    optimizer = allocate.sora(optax.sgd(1.0), threshold=0.1)
    params = adapter_of(sora.Spec(rank=2)).params
    with pytest.raises(ValueError, match="needs the parameters"):
        optimizer.update(params, optimizer.init(params))
    with pytest.raises(ValueError, match="initial_steps=6 and final_steps=4 leave no update to allocate at, of 10"):
        allocate.adalora(optax.sgd(1.0), target_rank=2, steps=10, initial_steps=6, final_steps=4)
    with pytest.raises(ValueError, match="beamlora: every=1, expected at least 2"):
        allocate.for_spec(beamlora.Spec(rank=2), optax.sgd(1.0), 10, every=1)
    with pytest.raises(TypeError, match="threshold"):
        allocate.for_spec(sora.Spec(rank=2), optax.sgd(1.0), 10)


def test_compact_is_the_same_update_as_plain_lora() -> None:
    optimizer = allocate.for_spec(ADALORA, optax.adam(0.05), STEPS, initial_steps=2, final_steps=4)
    adapter = jax.tree.map(jnp.asarray, train(adapter_of(ADALORA), optimizer)[-1][0])
    small = allocate.compact(adapter)
    largest = max(int(ranks.max()) for ranks in allocate.ranks(adapter).values())
    assert isinstance(small.spec, lora.Spec)
    assert small.spec.rank == largest <= 4
    for path, delta in jaxpeft.delta(adapter).items():
        np.testing.assert_allclose(jaxpeft.delta(small)[path], delta, atol=1e-6)
        np.testing.assert_allclose(jaxpeft.delta(small.with_alpha(2 * small.spec.alpha))[path], 2 * delta, atol=1e-5)
    assert {n: r.tolist() for n, r in allocate.ranks(small).items()} == {
        n: r.tolist() for n, r in allocate.ranks(adapter).items()
    }
    untrained = allocate.compact(adapter_of(ADALORA))
    assert untrained.spec.rank == 1
    with pytest.raises(ValueError, match="only a LowRank has ranks to leave out"):
        allocate.compact(adapter_of(full.Spec()))
    assert allocate.ranks(adapter_of(full.Spec())) == {}


def test_orthogonality() -> None:
    adapter = adapter_of(adalora.Spec(rank=2, target_rank=1))
    norms = []
    for group in adapter.params.values():
        for factor in (group["a"], group["b"]):
            norms += [np.linalg.norm(layer @ layer.T - np.eye(2)) for layer in np.asarray(factor)]
    assert float(allocate.orthogonality(adapter)) == pytest.approx(np.mean(norms), rel=1e-5)
    basis = {
        n: {
            **g,
            "a": jnp.eye(2, 6)[None].repeat(3, 0)[..., : g["a"].shape[2]],
            "b": jnp.eye(2, g["b"].shape[2])[None].repeat(3, 0),
        }
        for n, g in adapter.params.items()
    }
    perfect = adapter.replace(params=basis)
    assert float(allocate.orthogonality(perfect)) < 1e-5
    gradients = jax.grad(lambda params: allocate.orthogonality(perfect.replace(params=params)))(basis)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(gradients))


def test_aslora_merges_the_most_similar() -> None:
    adapter = adapter_of(aslora.Spec(rank=2, groups=2), layers=4)
    key = "layers/up/kernel"
    b = jax.random.normal(jax.random.key(1), adapter.params[key]["b"].shape).at[3].set(0.0)
    b = b.at[1].set(0.1)
    params = {
        name: {
            **group,
            "b": b[..., : group["b"].shape[2]]
            if name == key
            else jax.random.normal(jax.random.key(2), group["b"].shape),
        }
        for name, group in adapter.params.items()
    }
    adapter = adapter.replace(params=params)
    traces = []

    @jax.jit
    def deltas(adapter):
        traces.append(None)
        return jaxpeft.delta(adapter)[key]

    deltas(adapter)
    merged = allocate.merge_most_similar(adapter)
    assert merged.constants[key]["b_index"].tolist() == [0, 1, 2, 1]
    np.testing.assert_allclose(merged.params[key]["b"][1], (b[1] + b[3])[..., :5] / 2)
    found = deltas(merged)
    assert len(traces) == 1
    np.testing.assert_array_equal(found[1], found[3])
    assert jaxpeft.summary(merged).rows[0].dead > 0
    twice = allocate.merge_most_similar(merged)
    assert len(set(twice.constants[key]["b_index"].tolist())) == 2
    thrice = allocate.merge_most_similar(twice)
    jax.tree.map(np.testing.assert_array_equal, thrice, twice)
    with pytest.raises(ValueError, match="shares the b's of aslora"):
        allocate.merge_most_similar(adapter_of(ADALORA))


def test_a_checkpoint_has_the_state_of_an_allocator(tmp_path) -> None:
    optimizer = allocate.for_spec(ADALORA, optax.adam(0.05), STEPS, initial_steps=2, final_steps=4)
    adapter, state = jax.tree.map(jnp.asarray, train(adapter_of(ADALORA), optimizer, 6)[-1])
    with jaxpeft.checkpoint.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(6, adapter, state=state)
        _, restored, _ = checkpoints.restore(checkpoints.latest(), adapter, state)
    jax.tree.map(np.testing.assert_array_equal, restored, state)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: adalora.Spec(rank=0, target_rank=1), "adalora.Spec: rank=0, expected at least 1"),
        (lambda: adalora.Spec(rank=4, target_rank=5), "adalora.Spec: target_rank=5, expected from 1 to rank=4"),
        (lambda: dynamic_dora.Spec(rank=4, target_rank=0), "dynamic_dora.Spec: target_rank=0, expected from 1"),
        (
            lambda: dataclasses.replace(INCRELORA, start_rank=4),
            "increlora.Spec: start_rank=4, expected from 1 to target",
        ),
        (lambda: dataclasses.replace(INCRELORA, rank_step=5), r"rank_step=5, expected from 1 to rank - start_rank = 4"),
        (lambda: dataclasses.replace(INCRELORA, target_rank=6), "target_rank=6, expected from 1 to rank=5"),
        (lambda: beamlora.Spec(rank=4, temperature=0.0), "beamlora.Spec: temperature=0.0, expected a positive number"),
        (lambda: aslora.Spec(rank=4, groups=0), "aslora.Spec: groups=0, expected at least 1"),
        (lambda: aslora.Spec(rank=0), "aslora.Spec: rank=0, expected at least 1"),
    ],
)
def test_bad_hyper_parameters(make, message) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_starts() -> None:
    layers = 400
    up = "layers/up/kernel"
    normal = adapter_of(ADALORA, layers).params[up]
    assert normal["a"].std() == pytest.approx(0.02, rel=0.03)
    assert normal["b"].std() == pytest.approx(0.02, rel=0.03)
    kaiming = adapter_of(dynamic_dora.Spec(rank=4, target_rank=2), layers).params[up]
    assert float(jnp.abs(kaiming["a"]).max()) == pytest.approx(np.sqrt(6 / 6), rel=0.01)
    assert float(jnp.abs(kaiming["b"]).max()) == pytest.approx(np.sqrt(6 / 4), rel=0.01)
    gate = adapter_of(sora.Spec(rank=4), layers).params[up]["gate"]
    assert gate.std() == pytest.approx(1, rel=0.05)
    shared = adapter_of(aslora.Spec(rank=2), 5)
    assert shared.params[up]["a"].shape == (2, 6)
    assert jaxpeft.count(shared) == 2 * (6 + 5 * 5) + 2 * (5 + 5 * 6)
