"""Facts of the methods that share factors, vectors or bases: formulas, special cases, starts and published counts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpeft
from jaxpeft.methods import lora, loraxs, randlora, sharelora, tiedlora, unilora, vblora, vera
from jaxpeft.updates import Update


def sites_of(layers: int, **kernels: tuple[int, int]) -> jaxpeft.Sites:
    """Stacked kernels, as shapes."""
    tree = {name: {"kernel": jax.ShapeDtypeStruct((layers, *dims), "float32")} for name, dims in kernels.items()}
    return jaxpeft.find(tree, layouts={".*": "lio"})


def start_of(spec, sites: jaxpeft.Sites, weights=None) -> jaxpeft.Adapter:
    """A new adapter, in NumPy, with which the tests compute."""
    return jax.device_get(jax.jit(lambda key: jaxpeft.init(key, spec, sites, weights))(jax.random.key(0)))


def moved(adapter: jaxpeft.Adapter) -> jaxpeft.Adapter:
    """The adapter with normal trained leaves."""
    rng = np.random.default_rng(1)
    return adapter.replace(params=jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype("f4"), adapter.params))


def adapter_of(spec, sites: jaxpeft.Sites, weights=None) -> jaxpeft.Adapter:
    return moved(start_of(spec, sites, weights))


@jax.jit
def updates_of(adapter: jaxpeft.Adapter) -> dict[str, Update]:
    return adapter.updates()


@jax.jit
def delta_of(adapter: jaxpeft.Adapter) -> dict[str, jax.Array]:
    return jaxpeft.delta(adapter)


def deltas_of(adapter: jaxpeft.Adapter) -> dict[str, np.ndarray]:
    """{name: ΔW}, (L, in, out)."""
    return {path.split("/")[0]: np.asarray(delta) for path, delta in delta_of(adapter).items()}


def linear_layers(layers: int, width: int, hidden: int, kv: int) -> jaxpeft.Sites:
    """The seven linear layers of a Llama-like decoder."""
    square, narrow, up = (width, width), (width, kv), (width, hidden)
    return sites_of(layers, q=square, k=narrow, v=narrow, o=square, gate=up, up=up, down=up[::-1])


LLAMA2_7B = linear_layers(32, 4096, 11008, 4096)
LLAMA3_8B = linear_layers(32, 4096, 14336, 1024)
LLAMA2_7B_QKV = sites_of(32, qkv=(4096, 3 * 4096))
LLAMA32_3B_QV = sites_of(28, q=(3072, 3072), v=(3072, 1024))
ROBERTA_LARGE = sites_of(24, q=(1024, 1024), v=(1024, 1024), o=(1024, 1024), up=(1024, 4096))


@pytest.mark.parametrize(
    ("sites", "spec", "published"),
    [
        (LLAMA32_3B_QV, vera.Spec(rank=256), 129_024),
        (LLAMA2_7B, vera.Spec(rank=256), 1_417_216),
        (LLAMA32_3B_QV, randlora.Spec(rank=32), 9_289_728),
        (LLAMA32_3B_QV, vblora.Spec(rank=4, num_vectors=256, vector_length=256), 1_212_416),
        (LLAMA2_7B_QKV, tiedlora.Spec(rank=280), 4 * 4096 * 280 + (280 + 3 * 4096) * 32),
        (LLAMA2_7B, unilora.Spec(rank=4, theta_length=524_288), 524_288),
    ],
)
def test_published_counts_without_memory(sites, spec, published) -> None:
    adapter = jax.eval_shape(lambda: jaxpeft.init(jax.random.key(0), spec, sites))
    assert jaxpeft.count(adapter) == published


@pytest.mark.parametrize(
    ("sites", "rank", "published"),
    [(LLAMA3_8B, 128, 3_670_016), (ROBERTA_LARGE, 16, 24_576), (ROBERTA_LARGE, 25, 60_000)],
)
def test_published_counts_of_loraxs(sites, rank, published) -> None:
    assert loraxs.count(loraxs.Spec(rank=rank), sites) == published


TWO = sites_of(3, wide=(6, 10), tall=(12, 8))


def test_vera_slices_one_frozen_pair() -> None:
    adapter = adapter_of(vera.Spec(rank=5), TWO)
    shared, deltas = adapter.constants["shared"], deltas_of(adapter)
    assert shared["a"].shape == (5, 12)
    assert shared["b"].shape == (5, 10)
    for name, (rows, columns) in {"wide": (6, 10), "tall": (12, 8)}.items():
        vectors = adapter.params[f"{name}/kernel"]
        for layer in range(3):
            d, b = np.diag(vectors["lambda_d"][layer]), np.diag(vectors["lambda_b"][layer])
            expected = shared["a"][:, :rows].T @ d @ shared["b"][:, :columns] @ b
            np.testing.assert_allclose(deltas[name][layer], expected, atol=1e-5)


def test_vera_starts_kaiming_uniform() -> None:
    adapter = start_of(vera.Spec(rank=300, d_initial=1e-3), sites_of(1, up=(200, 400)))
    for leaf, fan_in in ((adapter.constants["shared"]["a"], 200), (adapter.constants["shared"]["b"], 300)):
        assert abs(leaf).max() <= np.sqrt(6 / fan_in)
        assert leaf.std() == pytest.approx(np.sqrt(2 / fan_in), rel=0.01)
    assert set(np.unique(adapter.params["up/kernel"]["lambda_d"])) == {np.float32(1e-3)}


def test_vera_gradients_are_vectors() -> None:
    """With frozen factors no gradient is as large as a factor."""
    adapter = adapter_of(vera.Spec(rank=7), sites_of(1, up=(11, 13)))
    x = jnp.ones((3, 11))

    def loss(params):
        update = adapter.replace(params=params).updates()["up/kernel"]
        return jax.vmap(lambda update: update.delta_matmul(x))(update).sum()

    forward, backward = jax.make_jaxpr(loss)(adapter.params), jax.make_jaxpr(jax.grad(loss))(adapter.params)

    def products(jaxpr) -> int:
        return sum(equation.primitive.name == "dot_general" for equation in jaxpr.eqns)

    # Two products forward; backward only the one that carries the cotangent from the output to the hidden vector.
    assert products(forward) == 2
    assert products(backward) == 3


def test_vblora_admixes_the_largest_logits() -> None:
    spec = vblora.Spec(rank=2, num_vectors=9, vector_length=2, top_k=3)
    adapter = adapter_of(spec, TWO)
    bank = np.asarray(adapter.params["shared"]["bank"])
    factors = jax.device_get(updates_of(adapter)["tall/kernel"])
    for side, found in (("a", factors.a), ("b", factors.b)):
        logits = np.asarray(adapter.params["tall/kernel"][f"logits_{side}"])
        for layer, row, place in np.ndindex(*logits.shape[:3]):
            chosen = np.argsort(-logits[layer, row, place])[:3]
            weights = np.exp(logits[layer, row, place][chosen])
            expected = weights / weights.sum() @ bank[chosen]
            np.testing.assert_allclose(found[layer, row, 2 * place : 2 * place + 2], expected, atol=1e-5)


@pytest.mark.parametrize(("vectors", "dtype"), [(256, "uint8"), (257, "uint16")])
def test_vblora_compact_form_has_the_same_updates(vectors, dtype) -> None:
    spec = vblora.Spec(rank=3, num_vectors=vectors, vector_length=2, top_k=3)
    adapter = adapter_of(spec, TWO)
    stored = jax.jit(lambda params: vblora.compact(params, spec, TWO))(adapter.params)
    assert stored["wide/kernel"]["index_a"].dtype == dtype
    places = 3 * 3 * (6 + 10 + 12 + 8) // 2
    assert sum(leaf.size for leaf in jax.tree.leaves(stored)) == vectors * 2 + places * (2 * 3 - 1)
    again = adapter.replace(params=jax.jit(lambda stored: vblora.expand(stored, spec, TWO))(stored))
    assert jax.tree.structure(again) == jax.tree.structure(adapter)
    found, expected = deltas_of(again), deltas_of(adapter)
    assert all(np.allclose(found[name], expected[name], atol=1e-5) for name in ("wide", "tall"))


def test_vblora_expanded_logits_train_on() -> None:
    spec = vblora.Spec(rank=2, num_vectors=9, vector_length=2)
    adapter = adapter_of(spec, TWO)

    def loss(params):
        return sum(jnp.sum(delta**2) for delta in jaxpeft.delta(adapter.replace(params=params)).values())

    @jax.jit
    def step(params):
        params = vblora.expand(vblora.compact(params, spec, TWO), spec, TWO)
        before, gradients = jax.value_and_grad(loss)(params)
        moved = jax.tree.map(lambda leaf, gradient: leaf - 1e-3 * gradient, params, gradients)
        return before, loss(moved), moved

    before, after, moved = step(adapter.params)
    assert not any(np.isnan(leaf).any() for leaf in jax.tree.leaves(jax.device_get(moved)))
    assert after < before


def test_unilora_is_an_isometry_without_dead_entries() -> None:
    spec = unilora.Spec(rank=5, theta_length=77)
    adapter = adapter_of(spec, TWO)
    theta, updates = adapter.params["shared"]["theta"], jax.device_get(updates_of(adapter))
    entries = np.concatenate([leaf.ravel() for update in updates.values() for leaf in (update.a, update.b)])
    np.testing.assert_allclose(np.linalg.norm(entries), np.linalg.norm(theta), rtol=1e-5)
    tables = [adapter.constants[g.name][name].ravel() for g in TWO for name in ("a_index", "b_index")]
    uses = np.bincount(np.concatenate(tables), minlength=77)
    assert set(uses) == {entries.size // 77, entries.size // 77 + 1}
    np.testing.assert_allclose(adapter.constants["shared"]["norm"], uses**-0.5, rtol=1e-6)
    frozen = adapter.constants["tall/kernel"]
    expected = (theta / np.sqrt(uses))[frozen["b_index"]]
    np.testing.assert_allclose(updates["tall/kernel"].b, expected, rtol=1e-5)
    assert (np.diff(np.asarray(frozen["a_index"]), axis=0) != 0).any(), "layers differ"


def test_unilora_finds_corrupted_tables() -> None:
    spec = unilora.Spec(rank=5, theta_length=77)
    adapter = adapter_of(spec, TWO)
    unilora.check_constants(adapter.constants, spec, TWO)
    tall = adapter.constants["tall/kernel"]
    for table, message in ((tall["a_index"] + 1, r"indices 1\.\.77 leave theta"), (0 * tall["a_index"], "norm is not")):
        corrupted = {**adapter.constants, "tall/kernel": {**tall, "a_index": table}}
        with pytest.raises(ValueError, match=message):
            unilora.check_constants(corrupted, spec, TWO)


@pytest.mark.parametrize(("trained", "zero"), [("abuv", "b"), ("uv", "v"), ("au", "u"), ("a", "a")])
def test_tiedlora_trains_what_it_is_told(trained, zero) -> None:
    start = start_of(tiedlora.Spec(rank=4, trained=trained), TWO)
    pieces = {**start.constants["tall/kernel"], **start.params["tall/kernel"]}
    assert "".join(sorted(start.params["tall/kernel"])) == trained
    assert [name for name in "abuv" if not pieces[name].any()] == [zero]
    adapter = moved(start)
    pieces = {**adapter.constants["tall/kernel"], **adapter.params["tall/kernel"]}
    delta = deltas_of(adapter)["tall"]
    for layer in range(3):
        expected = pieces["a"].T @ np.diag(pieces["u"][layer]) @ pieces["b"] @ np.diag(pieces["v"][layer]) * 16 / 4
        np.testing.assert_allclose(delta[layer], expected, atol=1e-4)


def test_tiedlora_has_vera_and_sharelora_in_it() -> None:
    one = sites_of(3, up=(6, 10))
    name, like_vera = "up/kernel", adapter_of(vera.Spec(rank=4), one)
    tied = adapter_of(tiedlora.Spec(rank=4, trained="uv", alpha=4), one)
    vectors = {"u": like_vera.params[name]["lambda_d"], "v": like_vera.params[name]["lambda_b"]}
    frozen = {name: {**tied.constants[name], **like_vera.constants["shared"]}}
    tied = tied.replace(params={name: vectors}, constants=frozen)
    np.testing.assert_allclose(deltas_of(tied)["up"], deltas_of(like_vera)["up"], atol=1e-5)
    shared = adapter_of(sharelora.Spec(rank=4, share="ab"), one)
    tied = adapter_of(tiedlora.Spec(rank=4, trained="ab"), one).replace(params=shared.params)
    np.testing.assert_allclose(deltas_of(tied)["up"], deltas_of(shared)["up"], atol=1e-5)


@pytest.mark.parametrize("share", ["a", "b", "ab"])
def test_sharelora_layers_have_a_factor_in_common(share) -> None:
    adapter = adapter_of(sharelora.Spec(rank=4, share=share), TWO)
    update = jax.device_get(updates_of(adapter)["tall/kernel"])
    for name, leaf in (("a", update.a), ("b", update.b)):
        same = bool((leaf == leaf[0]).all())
        assert same == (name in share)


def test_sharelora_of_one_layer_is_lora() -> None:
    one = sites_of(1, up=(6, 10))
    like_lora = updates_of(start_of(lora.Spec(rank=4), one))
    alone = updates_of(start_of(sharelora.Spec(rank=4), one))
    for leaf, other in zip(jax.tree.leaves(alone), jax.tree.leaves(like_lora), strict=True):
        np.testing.assert_array_equal(leaf, other)


KERNELS = {
    "wide": {"kernel": np.random.default_rng(3).normal(size=(3, 6, 10)).astype("float32")},
    "tall": {"kernel": np.random.default_rng(4).normal(size=(3, 12, 8)).astype("float32")},
}


def test_loraxs_is_the_formula_and_spans_the_weight() -> None:
    spec = loraxs.Spec(rank=6, alpha=6)
    adapter = adapter_of(spec, TWO, weights=KERNELS)
    for name, delta in deltas_of(adapter).items():
        u, s, v = np.linalg.svd(KERNELS[name]["kernel"], full_matrices=False)
        frozen = adapter.constants[f"{name}/kernel"]
        np.testing.assert_allclose(np.abs(frozen["a"]), np.abs((u * s[:, None]).swapaxes(1, 2)[:, :6]), atol=1e-4)
        np.testing.assert_allclose(np.abs(frozen["b"]), np.abs(v[:, :6]), atol=1e-4)
        expected = frozen["a"].swapaxes(1, 2) @ adapter.params[f"{name}/kernel"]["R"] @ frozen["b"]
        np.testing.assert_allclose(delta, expected, atol=1e-4)
    eye = {name: {"R": np.tile(np.eye(6, dtype="float32"), (3, 1, 1))} for name in adapter.params}
    spanned = deltas_of(adapter.replace(params=eye))
    np.testing.assert_allclose(spanned["wide"], KERNELS["wide"]["kernel"], atol=1e-5)


def test_loraxs_start() -> None:
    start = start_of(loraxs.Spec(rank=6), TWO, weights=KERNELS)
    leaf = np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(start.params)])
    assert leaf.std() == pytest.approx(1e-5, rel=0.2)
    zero = start_of(loraxs.Spec(rank=6, r_std=0), TWO, weights=KERNELS)
    assert not any(delta.any() for delta in deltas_of(zero).values())

    def total(params):
        return sum(delta.sum() for delta in jaxpeft.delta(zero.replace(params=params)).values())

    assert all(gradient.any() for gradient in jax.tree.leaves(jax.jit(jax.grad(total))(zero.params)))


def literal_randlora(adapter: jaxpeft.Adapter, name: str, narrow: int, wide: int, pairs) -> np.ndarray:
    """(alpha / r) · Σ diag(gam_j) a_kᵀ lam_jk b_j'k' over pairs ((j, k), (j', k')), (3, narrow, wide)."""
    shared, trained = adapter.constants["shared"], adapter.params[f"{name}/kernel"]
    total = np.zeros((3, narrow, wide))
    for (j, k), (j_of_b, k_of_b) in pairs:
        row = trained["gam"][:, j] * shared["a"][k, :narrow] * trained["lam"][:, j, k, None]
        total += row[:, :, None] * shared["b"][j_of_b, k_of_b, :wide]
    return total * adapter.spec.alpha / adapter.spec.rank


def test_randlora_is_the_literal_formula_in_either_order() -> None:
    adapter = adapter_of(randlora.Spec(rank=4, alpha=2), TWO)
    assert adapter.constants["shared"]["a"].shape == (4, 10)
    assert adapter.constants["shared"]["b"].shape == (3, 4, 12)
    paper = deltas_of(adapter)
    peft = deltas_of(adapter.replace(spec=dataclasses.replace(adapter.spec, order="peft")))
    for name, narrow, wide in (("wide", 6, 10), ("tall", 8, 12)):
        n = -(-narrow // 4)
        same = [((j, k), (j, k)) for j in range(n) for k in range(4)]
        flat = [((f % n, f // n), (f // 4, f % 4)) for f in range(4 * n)]
        for pairs, deltas in ((same, paper), (flat, peft)):
            found = deltas[name] if name == "wide" else deltas[name].swapaxes(1, 2)
            np.testing.assert_allclose(found, literal_randlora(adapter, name, narrow, wide, pairs), atol=1e-4)
        assert np.abs(paper[name] - peft[name]).max() > 1
        assert (np.linalg.matrix_rank(paper[name]) == narrow).all(), "full rank"


def test_randlora_of_few_bases_has_their_rank() -> None:
    few = deltas_of(adapter_of(randlora.Spec(rank=2, num_bases=2, alpha=1), TWO))
    assert all((np.linalg.matrix_rank(delta) == 4).all() for delta in few.values())


@pytest.mark.parametrize(("distribution", "share"), [("uniform", 1), ("sparse", 1 / 3), ("very_sparse", 1 / 10)])
def test_randlora_bases_have_unit_variance(distribution, share) -> None:
    spec = randlora.Spec(rank=50, distribution=distribution)
    shared = start_of(spec, sites_of(1, up=(100, 120))).constants["shared"]
    for leaf in shared.values():
        assert leaf.std() == pytest.approx(1, rel=1e-3)
        assert (leaf != 0).mean() == pytest.approx(share, rel=0.1)
        assert distribution == "uniform" or len(np.unique(leaf)) == 3


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: vera.Spec(rank=0), "vera.Spec: rank=0, expected at least 1"),
        (lambda: vera.Spec(rank=1, d_initial=0), "vera.Spec: d_initial=0, expected not 0"),
        (
            lambda: vblora.Spec(rank=1, num_vectors=4, vector_length=2, top_k=1),
            "top_k=1, expected from 2 to num_vec.*=4",
        ),
        (
            lambda: vblora.Spec(rank=1, num_vectors=4, vector_length=2, bank_bound=0),
            "bank_bound=0, expected a positive",
        ),
        (lambda: unilora.Spec(rank=1, theta_length=0), "theta_length=0, expected at least 1"),
        (lambda: unilora.Spec(rank=1, theta_length=4, theta_bound=0), "theta_bound=0, expected a positive number"),
        (lambda: tiedlora.Spec(rank=1, trained="vu"), "trained='vu', expected letters of 'abuv' .* e.g. 'uv'"),
        (lambda: tiedlora.Spec(rank=1, trained=""), "trained='', expected letters of 'abuv' .* e.g. 'abuv'"),
        (lambda: sharelora.Spec(rank=1, share="c"), "sharelora.Spec: share='c', expected a, b or ab"),
        (lambda: loraxs.Spec(rank=1, r_std=-1), "loraxs.Spec: r_std=-1, expected at least 0"),
        (lambda: randlora.Spec(rank=1, num_bases=0), "num_bases=0, expected at least 1, or None"),
        (lambda: randlora.Spec(rank=1, distribution="normal"), "distribution='normal', expected uniform, sparse or"),
        (lambda: randlora.Spec(rank=1, order="torch"), "order='torch', expected paper or peft"),
        (
            lambda: adapter_of(vblora.Spec(rank=1, num_vectors=4, vector_length=6), TWO),
            "vector_length=6 does not divide in=12 and out=8 of tall/kernel; nearest that divides .* all groups: 2",
        ),
        (
            lambda: adapter_of(unilora.Spec(rank=1, theta_length=109), TWO),
            "theta_length=109, expected at most 108, the entries of all factors",
        ),
        (
            lambda: adapter_of(loraxs.Spec(rank=7), TWO, weights=KERNELS),
            "rank=7 is more than the singular values of wide/kernel, in=6 and out=10; largest rank here: 6",
        ),
        (lambda: adapter_of(loraxs.Spec(rank=1), TWO), "pass weights=base to jaxpeft.init"),
    ],
)
def test_errors(make, message) -> None:
    with pytest.raises(ValueError, match=message):
        make()
