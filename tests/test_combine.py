"""Combining adapters: over updates, so across methods; one adapter of weight 1 is itself."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import peft_oracle as oracle
import pytest
from moved import moved
from test_convert import MERGED, assert_same_update, model, trained

import jaxpeft
from jaxpeft.combine import How
from jaxpeft.methods import full, lora, mixed

PRUNED = {
    "ties": {},
    "magnitude_prune": {},
    "dare_linear": {"key": jax.random.key(3)},
    "dare_ties": {"key": jax.random.key(3)},
}
WAYS = {
    "linear": {},
    "svd": {"energy": 1.0},
    **{how: {"density": 1.0, **more} for how, more in PRUNED.items()},
}

ALWAYS = ("mos", "surm", "ia3", "mixed")
"""One of each kind of update; `make slow` takes all methods."""


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in ALWAYS else [pytest.mark.slow]) for n in MERGED])
def test_one_adapter_of_weight_one_is_itself(name) -> None:
    adapter, base = trained(name), model().params
    assert jaxpeft.combine([adapter], [1])[0] is adapter
    for how in WAYS if name in ALWAYS else ("svd",):
        more = WAYS[how]
        alone, _ = jaxpeft.combine([adapter], [1], how=how, base=base, **more)
        assert_same_update(alone, adapter, 1e-4, base)


@pytest.mark.parametrize("how", ["linear", "cat", "lego"])
def test_one_adapter_with_factors_is_itself(how) -> None:
    more = {"key": jax.random.key(0)} if how == "lego" else {}
    for name in ("lora", "mos", "prolora", "vera"):
        assert_same_update(jaxpeft.combine([trained(name)], [1.0], how=how, **more)[0], trained(name))


@pytest.mark.parametrize("how", ["linear", "cat"])
def test_a_sum_across_methods_is_the_sum_of_the_updates(how) -> None:
    adapters, weights = [trained(name) for name in ("lora", "mos", "prolora")], [0.5, 2.0, -1.0]
    both, report = jaxpeft.combine(adapters, weights, how=how)
    assert isinstance(both.spec, lora.Spec)
    assert both.spec.rank == 15
    assert report.exact
    deltas = [jaxpeft.delta(adapter) for adapter in adapters]
    for path, delta in jaxpeft.delta(both).items():
        wanted = sum(weight * one[path] for weight, one in zip(weights, deltas, strict=True))
        np.testing.assert_allclose(delta, wanted, atol=1e-5)


def test_what_has_no_factors_is_summed_whole_or_cut() -> None:
    adapters, base = [trained("lora"), trained("surm"), trained("ia3")], model().params
    whole, _ = jaxpeft.combine(adapters, base=base)
    assert isinstance(whole.spec, full.Spec)
    deltas = [jaxpeft.delta(adapter, base) for adapter in adapters]
    cut, report = jaxpeft.combine(adapters, how="svd", rank=4, base=base)
    for path, delta in jaxpeft.delta(whole).items():
        np.testing.assert_allclose(delta, sum(one[path] for one in deltas) / 3, atol=1e-5)
        error = np.linalg.norm(jaxpeft.delta(cut)[path] - delta) / np.linalg.norm(delta)
        assert report.error[path] == pytest.approx(error, rel=1e-3)
    merged = jaxpeft.merge(base, [adapters[0].with_alpha(2 * adapters[0].spec.alpha), adapters[1]])
    double, _ = jaxpeft.combine(adapters[:2], [2, 1], base=base)
    for ours, theirs in zip(jax.tree.leaves(jaxpeft.merge(base, double)), jax.tree.leaves(merged), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_other_layers_and_other_weights_are_added() -> None:
    made = model("plain scanned")
    find = lambda pattern, layers=None: jaxpeft.find(made.params, pattern, layers=layers)  # noqa: E731
    sites = [find(r".*query/kernel", [0, 1]), find(r".*query/kernel", [1, 3]), find(r".*(query|down)/kernel")]
    adapters = [
        moved(jaxpeft.init(jax.random.key(i), lora.Spec(rank=2 + i), own), 0.1, i) for i, own in enumerate(sites)
    ]
    two, _ = jaxpeft.combine(adapters[:2], [1, 1])
    assert [group.entries for group in two.sites] == [(0, 1, 3)]
    three, _ = jaxpeft.combine(adapters, [1, 1, 1])
    ids = jnp.arange(10).reshape(2, 5)
    forward = jaxpeft.adapt(made.apply)
    for combined, parts in ((two, adapters[:2]), (three, adapters)):
        ours, theirs = forward(made.params, combined, ids), forward(made.params, parts, ids)
        np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_ties_by_hand() -> None:
    sites = jaxpeft.find({"w": {"kernel": jnp.zeros((1, 4))}})
    adapters = []
    for values in ([4.0, -3.0, 0.5, 1.0], [-1.0, -2.0, 0.1, 3.0]):
        adapter = jaxpeft.init(jax.random.key(0), full.Spec(), sites)
        adapters.append(adapter.replace(params={"w/kernel": {"w": jnp.array(values).reshape(1, 1, 4)}}))

    def combined(**settings):
        return jaxpeft.delta(jaxpeft.combine(adapters, **settings)[0])["w/kernel"].ravel()

    # Pruned to half: [4, -3, 0, 0] and [0, -2, 0, 3]; signs +, -, ., +.
    np.testing.assert_allclose(combined(weights=[1, 1], how="ties", density=0.5), [4, -2.5, 0, 3])
    np.testing.assert_allclose(combined(weights=[1, 1], how="magnitude_prune", density=0.5), [4, -5, 0, 3])
    # Unpruned: the values' total is positive in the first entry, the signs' frequency is a draw.
    np.testing.assert_allclose(combined(weights=[1, 1], how="ties", density=1), [4, -2.5, 0.3, 2], atol=1e-6)
    by_frequency = combined(weights=[1, 1], how="ties", density=1, majority_sign="frequency")
    np.testing.assert_allclose(by_frequency, [0, -2.5, 0.3, 2], atol=1e-6)


def test_dare_keeps_the_mean_and_draws_the_same_again() -> None:
    sites = jaxpeft.find({"w": {"kernel": jnp.zeros((200, 300))}})
    adapter = jaxpeft.init(jax.random.key(0), full.Spec(), sites)
    adapter = adapter.replace(params=jax.tree.map(jnp.ones_like, adapter.params))

    def pruned(seed):
        one, _ = jaxpeft.combine([adapter], [1], how="dare_linear", density=0.25, key=jax.random.key(seed))
        return np.asarray(jaxpeft.delta(one)["w/kernel"])

    first = pruned(0)
    assert set(np.unique(first)) == {0.0, 4.0}
    assert first.mean() == pytest.approx(1, abs=0.03)
    np.testing.assert_array_equal(first, pruned(0))
    assert (first != pruned(1)).any()


def test_lego_finds_the_clusters_that_are_there() -> None:
    """Two adapters made of the same three rank-one pairs, slightly moved, in another order: these three come back."""
    random = np.random.default_rng(0)
    params = {"w": {"kernel": jnp.zeros((12, 9))}}
    a, b = 3 * random.normal(size=(3, 12)), 3 * random.normal(size=(3, 9))
    adapters = []
    for order in ([0, 1, 2], [2, 0, 1]):
        near = [0.01 * random.normal(size=leaf.shape) + leaf[order] for leaf in (a, b)]
        adapter = jaxpeft.init(jax.random.key(0), lora.Spec(rank=3, alpha=3), jaxpeft.find(params))
        leaves = dict(zip("ab", [jnp.asarray(leaf, jnp.float32)[None] for leaf in near], strict=True))
        adapters.append(adapter.replace(params={"w/kernel": leaves}))
    found, _ = jaxpeft.combine(adapters, how="lego", key=jax.random.key(0))
    assert found.spec.rank == 3
    wanted = a.T @ b
    assert np.linalg.norm(jaxpeft.delta(found)["w/kernel"] - wanted) < 0.02 * np.linalg.norm(wanted)
    smaller, _ = jaxpeft.combine(adapters, how="lego", rank=2, key=jax.random.key(0))
    assert smaller.spec.rank == 2


def test_heads_stay_whole() -> None:
    params = {"q": {"kernel": jnp.ones((8, 6))}, "lm_head": {"kernel": jnp.ones((6, 12)), "bias": jnp.ones(12)}}
    sites = jaxpeft.find(params, ".*")
    spec = mixed.Spec(default=lora.Spec(rank=2), overrides={"lm_head/.*": full.Spec()})
    adapters = [moved(jaxpeft.init(jax.random.key(i), spec, sites), 0.1, i) for i in range(2)]
    deltas = [jaxpeft.delta(adapter) for adapter in adapters]
    for how, more in (
        ("linear", {}),
        ("svd", {"rank": 4}),
        ("cat", {}),
        ("lego", {"rank": 4, "key": jax.random.key(0)}),
    ):
        both, _ = jaxpeft.combine(adapters, [0.5, 0.5], how=how, **more)
        assert list(both.params["lm_head/kernel"]) == ["w"], how
        for path in ("lm_head/kernel", "lm_head/bias"):
            mean = (deltas[0][path] + deltas[1][path]) / 2
            np.testing.assert_allclose(jaxpeft.delta(both)[path], mean, atol=1e-6, err_msg=how)


def test_mistakes_are_named() -> None:
    adapter = trained("lora")
    for adapters, settings, match in (
        ([], {}, "at least one"),
        ([adapter], {"weights": [1, 2]}, "2 weights for 1 adapters"),
        ([adapter], {"how": "tise"}, "did you mean 'ties'"),
        ([adapter], {"how": "ties"}, "density=None"),
        ([adapter], {"density": 0.5}, "nothing is pruned"),
        ([adapter], {"how": "ties", "density": 2}, r"in \(0, 1\]"),
        ([adapter], {"how": "svd"}, "needs rank= or energy="),
        ([adapter], {"how": "dare_ties", "density": 0.5}, "pass key="),
        ([adapter], {"how": "lego", "weights": [-1], "key": jax.random.key(0)}, "positive"),
        ([adapter], {"how": "ties", "density": 0.5, "majority_sign": "most"}, "total or frequency"),
        ([trained("surm")], {"how": "cat"}, "no product of two factors"),
        ([trained("ia3"), adapter], {}, "pass base="),
    ):
        with pytest.raises(ValueError, match=match):
            jaxpeft.combine(adapters, **settings)
    smaller = {"layers": [{"up": {"kernel": jnp.ones((3, 4))}}]}
    other = jaxpeft.init(jax.random.key(0), lora.Spec(rank=2), jaxpeft.find(smaller))
    with pytest.raises(ValueError, match="different bases"):
        jaxpeft.combine([adapter, other])


@cache
def peft_pair():
    """Two LoRA adapters, and what PEFT makes of them in each of its ways over updates."""
    params = oracle.base(2, 12, 18)
    made = [jaxpeft.init(jax.random.key(i), lora.Spec(rank=4, alpha=8), jaxpeft.find(params)) for i in range(2)]
    return [moved(adapter, 0.1, i) for i, adapter in enumerate(made)]


@pytest.mark.parity
@pytest.mark.parametrize("weights", [[0.7, 0.3], [1.0, 1.0]])
@pytest.mark.parametrize(
    ("theirs", "ours"),
    {
        "cat": {"how": "cat"},
        "svd": {"how": "svd", "rank": 3},
        "ties_svd": {"how": "ties", "density": 0.4, "rank": 5},
        "magnitude_prune_svd": {"how": "magnitude_prune", "density": 0.4, "rank": 5},
    }.items(),
)
def test_as_peft(theirs, ours, weights) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed: pip install 'jaxpeft[parity]'")
    torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'jaxpeft[parity]'")
    adapters = peft_pair()

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.ModuleList(torch.nn.ModuleDict({"proj": torch.nn.Linear(12, 18)}) for _ in range(2))

    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["proj"])
    wrapped = peft.get_peft_model(Model(), config, adapter_name="0")
    wrapped.add_adapter("1", config)
    state = dict(wrapped.named_parameters())
    for number, adapter in enumerate(adapters):
        (leaves,) = adapter.params.values()
        for layer in range(2):
            name = f"base_model.model.layers.{layer}.proj.lora_"
            state[f"{name}A.{number}.weight"].data = torch.tensor(np.asarray(leaves["a"][layer]))
            state[f"{name}B.{number}.weight"].data = torch.tensor(np.asarray(leaves["b"][layer]).T.copy())
    settings = {"density": ours["density"]} if "density" in ours else {}
    if theirs != "cat":
        settings["svd_rank"] = ours["rank"]
    wrapped.add_weighted_adapter(["0", "1"], weights, "both", combination_type=theirs, **settings)
    both, _ = jaxpeft.combine(adapters, weights, **ours)
    for layer in range(2):
        wanted = wrapped.base_model.model.layers[layer]["proj"].get_delta_weight("both").detach().numpy().T
        np.testing.assert_allclose(jaxpeft.delta(both)[f"layers/{layer}/proj/kernel"], wanted, atol=2e-6)


def test_every_way_is_in_these_tests() -> None:
    assert {*WAYS, "cat", "lego"} == set(How.__args__)
