"""Structured updates: SURM's kinds against explicit matrices, their displacement ranks, and their neighbours."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpeft
from jaxpeft import structured
from jaxpeft.methods import c3a, fourierft, lora, miss, surm
from jaxpeft.spec import Spec
from jaxpeft.structured import Chain, Circulant, Formed, LowDisplacementRank, Toeplitz
from jaxpeft.updates import Update

DIMS = [(7, 7), (12, 18), (11, 7), (1, 5), (5, 1)]


def normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def tree(in_dim: int, out_dim: int, layers: int = 1, names: tuple[str, ...] = ("q",)) -> dict:
    kernel = jax.ShapeDtypeStruct((in_dim, out_dim), "float32")
    return {"layers": [{name: {"kernel": kernel} for name in names} for _ in range(layers)]}


def adapter_of(spec: Spec, in_dim: int = 12, out_dim: int = 18, layers: int = 2) -> jaxpeft.Adapter:
    return jaxpeft.init(jax.random.key(0), spec, jaxpeft.find(tree(in_dim, out_dim, layers)))


def leaves_of(adapter: jaxpeft.Adapter) -> dict[str, jax.Array]:
    (leaves,) = adapter.params.values()
    return leaves


def trained_of(spec: Spec, in_dim: int = 12, out_dim: int = 18, layers: int = 2) -> jaxpeft.Adapter:
    """An adapter whose every leaf is random; it has no other constants than its scale."""
    adapter, random = jax.eval_shape(lambda: adapter_of(spec, in_dim, out_dim, layers)), np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: jnp.asarray(random.normal(size=leaf.shape), jnp.float32), adapter.params)
    constants = {g.name: {"scale": jnp.full(g.layers, spec.scale(g), jnp.float32)} for g in adapter.sites}
    return adapter.replace(params=params, constants=constants)


@jax.jit
def first_layer(adapter: jaxpeft.Adapter, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """ΔW and x·ΔW of the first layer."""
    (update,) = adapter.updates().values()
    update = jax.tree.map(lambda leaf: leaf[0], update)
    return update.delta(), update.delta_matmul(x)


def first_delta(adapter: jaxpeft.Adapter) -> np.ndarray:
    """ΔW of the first layer, formed."""
    return np.asarray(next(iter(jaxpeft.delta(adapter).values())))


# The matrices S, entry by entry. The kernel's update is Sᵀ.


def circulant(c, rows: int, columns: int) -> np.ndarray:
    return np.array([[c[(i - j) % len(c)] for j in range(columns)] for i in range(rows)])


def skew_circulant(h, rows: int, columns: int) -> np.ndarray:
    return np.array([[h[i - j] if i >= j else -h[len(h) + i - j] for j in range(columns)] for i in range(rows)])


def symmetric_toeplitz(t, rows: int, columns: int) -> np.ndarray:
    return np.array([[t[abs(i - j)] for j in range(columns)] for i in range(rows)])


def toeplitz(t, rows: int, columns: int) -> np.ndarray:
    """t begins with the entry of the last column of the first row, t_{1-columns}."""
    return np.array([[t[i - j + columns - 1] for j in range(columns)] for i in range(rows)])


def expected_s(spec: surm.Spec, leaves: dict[str, np.ndarray], in_dim: int, out_dim: int) -> np.ndarray:
    """S (out, in) of one layer without alpha, from the formulas of the paper."""
    n, alone = max(in_dim, out_dim), spec.product == "single"
    if spec.kind == "kronecker":
        return np.kron(leaves["b"], leaves["a"]) / spec.rank
    if spec.kind == "ldr":
        pairs = zip(leaves["g"], leaves["h"], strict=True)
        return sum(circulant(g, n, n) @ skew_circulant(h, n, n) for g, h in pairs)[:out_dim, :in_dim]
    a = leaves["a"]
    vector = a if alone else None if spec.form == "matmul" else a * leaves["b"]
    if spec.block is not None:
        blocks = [[circulant(c, spec.block, spec.block) for c in row] for row in np.swapaxes(vector, 0, 1)]
        return np.block(blocks)
    matrix = {"circulant": circulant, "symmetric_toeplitz": symmetric_toeplitz, "toeplitz": toeplitz}[spec.kind]
    if vector is None:
        return matrix(leaves["b"], out_dim, n) @ matrix(a, n, in_dim)
    return matrix(vector, out_dim, in_dim)


KINDS = [
    {"kind": kind, "product": product}
    for kind in ("circulant", "symmetric_toeplitz", "toeplitz")
    for product in ("hadamard", "matmul", "single")
] + [{"kind": "ldr", "rank": 3}, {"kind": "ldr", "rank": 1}]
IDS = ["-".join(map(str, fields.values())) for fields in KINDS]


@pytest.mark.parametrize("fields", KINDS, ids=IDS)
def test_fft_and_dense_path_are_the_matrix_of_the_formula(fields) -> None:
    for in_dim, out_dim in DIMS:
        x = normal(3, 2, 3, in_dim)
        for path in ("fft", "dense"):
            adapter = trained_of(surm.Spec(path=path, alpha=0.5, **fields), in_dim, out_dim)
            layer = {name: np.asarray(leaf[0], np.float64) for name, leaf in leaves_of(adapter).items()}
            expected = 0.5 * expected_s(adapter.spec, layer, in_dim, out_dim).T
            size = max(1.0, np.abs(expected).max())
            delta, y = first_layer(adapter, x)
            np.testing.assert_allclose(delta, expected, atol=1e-5 * size)
            np.testing.assert_allclose(y, np.asarray(x, np.float64) @ expected, atol=1e-5 * size * in_dim)


@pytest.mark.parametrize("fields", [{"kind": "kronecker", "rank": 3}, {"block": 6}, {"block": 3, "product": "single"}])
def test_kronecker_and_blocks_are_the_matrix_of_the_formula(fields) -> None:
    x = normal(3, 5, 12)
    for path in ("auto",) if "kind" in fields else ("fft", "dense"):
        adapter = trained_of(surm.Spec(alpha=0.5, path=path, **fields))
        layer = {name: np.asarray(leaf[0], np.float64) for name, leaf in leaves_of(adapter).items()}
        expected = 0.5 * expected_s(adapter.spec, layer, 12, 18).T
        delta, y = first_layer(adapter, x)
        np.testing.assert_allclose(delta, expected, atol=1e-5)
        np.testing.assert_allclose(y, np.asarray(x) @ expected, atol=1e-4)


UPDATES: list[Update] = [
    Circulant(normal(0, 1, 1, 11), 7, 11),
    Circulant(normal(0, 2, 3, 4), 8, 12),
    Toeplitz(normal(1, 17), 7),
    LowDisplacementRank(normal(2, 2, 11), normal(3, 2, 11), 11, 7),
    Chain(Toeplitz(normal(4, 17), 7), Circulant(normal(5, 1, 1, 11), 11, 5)),
]


@pytest.mark.parametrize("update", UPDATES, ids=lambda update: type(update).__name__)
def test_gradients_and_transpose_by_fft_are_those_of_the_matrix(update) -> None:
    """Backward by FFT, and x·ΔWᵀ as for a tied head."""
    dims = update.delta().shape
    x, cotangent = normal(8, 4, dims[0]), normal(9, 4, dims[1])

    def by(product):
        return jax.jit(lambda update, x: jax.vjp(product, update, x)[1](cotangent))(update, x)

    found, expected = by(lambda u, x: u.delta_matmul(x)), by(lambda u, x: x @ u.delta())
    for got, want in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-4)
    transposed = jax.jit(lambda cotangent: jax.linear_transpose(update.delta_matmul, x)(cotangent)[0])(cotangent)
    np.testing.assert_allclose(transposed, cotangent @ update.delta().T, atol=1e-4)


@pytest.mark.parametrize("update", UPDATES, ids=lambda update: type(update).__name__)
def test_half_precision_is_transformed_in_float32(update) -> None:
    x = normal(8, 4, update.delta().shape[0]).astype(jnp.bfloat16)
    y = update.delta_matmul(x)
    assert y.dtype == jnp.bfloat16
    exact = x.astype(jnp.float32) @ update.delta()
    # No error but that of the last rounding.
    np.testing.assert_allclose(y.astype(jnp.float32), exact, atol=2**-8 * float(jnp.abs(exact).max()))


def test_products_of_circulants_are_circulants() -> None:
    """C(a)·C(b) = C(a ⊛ b), and they commute; so `matmul` of a square circulant is one circulant."""
    a, b = np.asarray(normal(0, 9)), np.asarray(normal(1, 9))
    convolved = [sum(a[k] * b[(i - k) % 9] for k in range(9)) for i in range(9)]
    np.testing.assert_allclose(circulant(a, 9, 9) @ circulant(b, 9, 9), circulant(convolved, 9, 9), atol=1e-5)
    one, other = (Circulant(jnp.asarray(v)[None, None], 9, 9) for v in (a, b))
    np.testing.assert_allclose(Chain(one, other).delta().T, circulant(convolved, 9, 9), atol=1e-4)
    np.testing.assert_allclose(Chain(one, other).delta(), Chain(other, one).delta(), atol=1e-5)


def test_skew_circulant_product_is_the_papers_formula() -> None:
    """With g the first unit vector Z₁(g) is the identity, and what is left is Z₋₁(h)."""
    n = 7
    h, v = np.asarray(normal(0, n)), np.asarray(normal(1, n))
    e = np.exp(1j * np.pi / n) ** np.arange(n)
    formula = np.real(np.conj(e) * np.fft.ifft(np.fft.fft(h * e) * np.fft.fft(v * e)))
    np.testing.assert_allclose(formula, skew_circulant(h, n, n) @ v, atol=1e-5)
    update = LowDisplacementRank(jnp.eye(n)[:1], jnp.asarray(h)[None], n, n)
    np.testing.assert_allclose(update.delta_matmul(jnp.asarray(v)), formula, atol=1e-5)


def test_displacement_ranks() -> None:
    """rank(Z₁·S - S·Z₁) of a circulant is 0, of a Toeplitz 2; rank(Z₁·S - S·Z₋₁) of an LDR matrix is r."""
    n = 16
    shift, skew = np.roll(np.eye(n), 1, axis=0), np.roll(np.eye(n), 1, axis=0)
    skew[0, -1] = -1

    def displacement(update: Update, left: np.ndarray, right: np.ndarray) -> int:
        s = np.asarray(update.delta()).T
        return np.linalg.matrix_rank(left @ s - s @ right, tol=1e-4)

    assert displacement(Circulant(normal(0, 1, 1, n), n, n), shift, shift) == 0
    assert displacement(Toeplitz(normal(0, 2 * n - 1), n), shift, shift) == 2
    assert displacement(Toeplitz(normal(0, 2 * n - 1), n), shift, skew) == 2
    for rank in (1, 2, 3):
        update = LowDisplacementRank(normal(1, rank, n), normal(2, rank, n), n, n)
        assert displacement(update, shift, skew) == rank


def test_full_rank_at_the_cost_of_lora_of_rank_one() -> None:
    lora_of_one = trained_of(lora.Spec(rank=1), 24, 24)
    assert np.linalg.matrix_rank(first_delta(lora_of_one)) == 1
    ranks = {"circulant": 24, "symmetric_toeplitz": 24, "kronecker": 4 * 4, "ldr": 24}
    for kind, rank in ranks.items():
        adapter = trained_of(surm.Spec(kind=kind, rank={"kronecker": 4, "ldr": 1}.get(kind)), 24, 24)
        assert jaxpeft.count(adapter) == jaxpeft.count(lora_of_one)
        assert np.linalg.matrix_rank(first_delta(adapter)) == rank, kind


BERT = jaxpeft.find(tree(768, 768, 12, ("query", "key", "value")), ".*/kernel", layouts={".*": "io"})
LLAMA2_7B = jaxpeft.find(tree(4096, 4096, 32, ("q", "v")))
LLAMA32_3B = jaxpeft.find(
    {"layers": [{**tree(3072, 3072)["layers"][0], **tree(3072, 1024, 1, ("v",))["layers"][0]} for _ in range(28)]}
)
QUERY_VALUE = jaxpeft.find(tree(768, 768, 12, ("q", "v")))


@pytest.mark.parametrize(
    ("sites", "spec", "published"),
    [
        (BERT, surm.Spec(), 55_296),
        (BERT, surm.Spec(kind="symmetric_toeplitz"), 55_296),
        (BERT, surm.Spec(kind="kronecker", rank=32), 55_296),
        (BERT, surm.Spec(kind="ldr", rank=1), 55_296),
        (BERT, surm.Spec(product="single", trainable_scale=True), 12 * 3 * 769),
        (QUERY_VALUE, fourierft.Spec(n_frequency=1000), 24_000),
        (LLAMA2_7B, fourierft.Spec(n_frequency=1000), 64_000),
        (LLAMA32_3B, fourierft.Spec(n_frequency=5000), 280_000),
        (QUERY_VALUE, c3a.Spec(block_size=768), 18_432),
        (QUERY_VALUE, c3a.Spec(block_size=128), 110_592),
        (LLAMA32_3B, c3a.Spec(block_size=64), 5_505_024),
        (LLAMA2_7B, miss.Spec(rank=64), 64 * 64 * 4096),
        (LLAMA2_7B, miss.Spec(rank=64, variant="bat"), 64 * 64 * 4096),
        (LLAMA2_7B, miss.Spec(rank=64, variant="mini", mini_rank=64), 64 * 64 * 64),
    ],
)
def test_published_counts_without_memory(sites, spec, published) -> None:
    adapter = jax.eval_shape(lambda: jaxpeft.init(jax.random.key(0), spec, sites))
    assert jaxpeft.count(adapter) == published


@pytest.mark.parametrize(
    ("fields", "zero", "spread"),
    [
        ({}, "b", {"a": 1}),
        ({"kind": "symmetric_toeplitz"}, "b", {"a": 0.02}),
        ({"kind": "toeplitz", "trainable_scale": True}, "b", {"a": 0.02}),
        ({"kind": "kronecker", "rank": 10}, "b", {"a": 1 / np.sqrt(3 * 60)}),
        ({"kind": "ldr", "rank": 4}, "g", {"h": 0.02}),
        ({"product": "single", "trainable_scale": True}, "s", {"a": 1}),
        ({"product": "single"}, "a", {}),
    ],
)
def test_start_has_one_zero_piece_and_only_that_one_learns_first(fields, zero, spread) -> None:
    adapter = adapter_of(surm.Spec(path="fft" if fields.get("kind") != "kronecker" else "auto", **fields), 600, 600)
    leaves = leaves_of(adapter)
    assert {name for name, leaf in leaves.items() if not leaf.any()} == {zero}
    for name, std in spread.items():
        assert leaves[name].std() == pytest.approx(std, rel=0.08)
    if "s" in leaves and zero != "s":
        np.testing.assert_array_equal(leaves["s"], 1)
    x, target = normal(1, 3, 600), normal(2, 3, 600)

    def loss(params):
        (update,) = adapter.replace(params=params).updates().values()
        return jnp.sum(jax.vmap(lambda one: one.delta_matmul(x))(update) * target)

    (gradients,) = jax.grad(loss)(adapter.params).values()
    assert {name for name, gradient in gradients.items() if gradient.any()} == {zero}


def test_auto_path_forms_small_weights_only() -> None:
    assert [structured.prefers_fft(*dims) for dims in ((767, 767), (768, 64), (64, 768))] == [False, True, True]
    for size, path, formed in ((64, "auto", True), (64, "fft", False), (1024, "auto", False), (1024, "dense", True)):
        (update,) = trained_of(surm.Spec(path=path), size, size).updates().values()
        assert update.formed == isinstance(update, Formed) == formed


def test_fft_forms_nothing_of_the_size_of_a_kernel() -> None:
    (update,) = adapter_of(surm.Spec(path="fft"), 64, 64).updates().values()
    step = jax.grad(lambda u, x: jnp.sum(jax.vmap(lambda one: one.delta_matmul(x))(u) ** 2))
    jaxpr = jax.make_jaxpr(step)(update, jnp.ones((3, 64)))
    assert max(np.prod(v.aval.shape) for equation in jaxpr.eqns for v in equation.outvars) < 64 * 64


def test_c3a_is_the_papers_matrix_of_first_rows() -> None:
    """C(w): the first row is w, each further row the one above shifted to the right."""
    x = normal(0, 5, 12)
    for path in ("fft", "dense"):
        adapter = trained_of(c3a.Spec(block_size=6, alpha=3.0, path=path))
        w = np.asarray(leaves_of(adapter)["w"][0])
        rows = [[np.stack([np.roll(kernel, i) for i in range(6)]) for kernel in row] for row in w]
        expected = 3 / 12 * np.block(rows).T
        delta, y = first_layer(adapter, x)
        np.testing.assert_allclose(delta, expected, atol=1e-6)
        np.testing.assert_allclose(y, np.asarray(x) @ expected, atol=1e-5)


def test_c3a_starts() -> None:
    bounds = {"xavier_uniform": np.sqrt(6 / 360), "kaiming_uniform": np.sqrt(1 / 120), "zeros": 0}
    for start, bound in bounds.items():
        w = leaves_of(adapter_of(c3a.Spec(block_size=60, init=start), 120, 240))["w"]
        assert np.abs(w).max() <= bound
        assert w.std() == pytest.approx(bound / np.sqrt(3), rel=0.05)
    assert leaves_of(adapter_of(c3a.Spec(block_size=60, init="gaussian"), 120, 240))["w"].std() == pytest.approx(
        1, rel=0.1
    )
    assert not first_delta(adapter_of(c3a.Spec(block_size=6, init="zeros"))).any()


def test_fourierft_is_a_sum_of_waves_at_shared_places() -> None:
    sites = jaxpeft.find({**tree(6, 9, 3, ("q", "k")), "up": {"kernel": jax.ShapeDtypeStruct((9, 6), "float32")}})
    spec = fourierft.Spec(n_frequency=20, alpha=5.0)
    adapter = jaxpeft.init(jax.random.key(0), spec, sites)
    q, k, up = (adapter.constants[f"{name}/kernel"]["entries"] for name in ("layers/*/q", "layers/*/k", "up"))
    np.testing.assert_array_equal(q, k)
    assert (q != up).any()
    assert len({tuple(place) for place in np.asarray(q).T}) == 20
    c = np.asarray(adapter.params["layers/*/q/kernel"]["c"])
    u, v = np.arange(6)[:, None], np.arange(9)
    for layer in range(3):
        waves = [np.cos(2 * np.pi * (j * u / 6 + k * v / 9)) for j, k in np.asarray(q).T]
        expected = 5 / 54 * sum(size * wave for size, wave in zip(c[layer], waves, strict=True))
        np.testing.assert_allclose(jaxpeft.delta(adapter)[f"layers/{layer}/q/kernel"], expected, atol=1e-5)


def test_fourierft_starts_and_its_table_is_checked() -> None:
    assert leaves_of(adapter_of(fourierft.Spec(n_frequency=5000), 100, 80))["c"].std() == pytest.approx(1, rel=0.03)
    assert not first_delta(adapter_of(fourierft.Spec(n_frequency=9, init="zeros"))).any()
    adapter = adapter_of(fourierft.Spec(n_frequency=3))
    for bad, message in (
        ([[0, 1, 12], [0, 0, 0]], "leave the spectrum of 12 by 18"),
        ([[0, 1, 0], [2, 0, 2]], "3 diff"),
    ):
        constants = {name: {**frozen, "entries": jnp.asarray(bad)} for name, frozen in adapter.constants.items()}
        with pytest.raises(ValueError, match=message):
            fourierft.check_constants(constants, adapter.spec, adapter.sites)


@pytest.mark.parametrize("fields", [{"rank": 4}, {"rank": 5}, {"rank": 5, "variant": "mini", "mini_rank": 6}])
def test_miss_repeats_its_shard(fields) -> None:
    adapter, x = trained_of(miss.Spec(alpha=2.0, **fields)), normal(0, 2, 3, 12)
    d = np.asarray(leaves_of(adapter)["d"][0])
    expected = 2 * np.array([[d[i % d.shape[0], o % d.shape[1]] for o in range(18)] for i in range(12)])
    delta, y = first_layer(adapter, x)
    np.testing.assert_allclose(delta, expected, rtol=1e-6)
    np.testing.assert_allclose(y, np.asarray(x) @ expected, atol=1e-4)


def test_miss_mini_with_a_whole_shard_is_standard_and_bat_is_affine_in_the_weight() -> None:
    standard, mini = (trained_of(miss.Spec(rank=4, **f)) for f in ({}, {"variant": "mini", "mini_rank": 18}))
    np.testing.assert_array_equal(first_delta(standard), first_delta(mini))
    adapter = trained_of(miss.Spec(rank=3, variant="bat", alpha=0.5))
    base = {"layers": [{"q": {"kernel": normal(layer, 12, 18)}} for layer in range(2)]}
    d, w0 = np.asarray(leaves_of(adapter)["d"][0]), np.asarray(base["layers"][0]["q"]["kernel"])
    found = jaxpeft.delta(adapter, base)["layers/0/q/kernel"]
    for p in range(4):
        for q in range(6):
            at = np.s_[3 * p : 3 * p + 3, 3 * q : 3 * q + 3]
            np.testing.assert_allclose(found[at], 0.5 * d[q].T @ (w0[at] + np.eye(3)), atol=1e-5)


@pytest.mark.parametrize(
    ("method", "fields", "message"),
    [
        (
            surm,
            {"kind": "hankel"},
            "kind='hankel', expected one of circulant, symmetric_toeplitz, toeplitz, kronecker, ldr",
        ),
        (surm, {"product": "sum"}, "product='sum', expected hadamard, matmul, single, or None"),
        (surm, {"path": "gpu"}, "path='gpu', expected one of auto, fft, dense"),
        (surm, {"rank": 2}, "rank=2, expected None: circulant has no rank"),
        (surm, {"kind": "ldr"}, "rank=None, expected at least 1 for ldr"),
        (surm, {"kind": "kronecker", "rank": 2, "product": "single"}, "product='single', expected None: kronecker"),
        (surm, {"kind": "kronecker", "rank": 2, "path": "fft"}, "path='fft', expected auto"),
        (surm, {"kind": "toeplitz", "block": 2}, "block=2, expected None: toeplitz"),
        (surm, {"block": 0}, "block=0, expected at least 1"),
        (surm, {"block": 2, "product": "matmul"}, "product='matmul', expected hadamard or single with blocks"),
        (surm, {"alpha": 0.0}, "alpha=0.0, expected a positive number"),
        (c3a, {"block_size": 0}, "block_size=0, expected at least 1"),
        (c3a, {"block_size": 2, "init": "orthogonal"}, "init='orthogonal', expected one of xavier_uniform"),
        (c3a, {"block_size": 2, "path": "slow"}, "path='slow', expected one of auto, fft, dense"),
        (fourierft, {"n_frequency": 0}, "n_frequency=0, expected at least 1"),
        (fourierft, {"init": "ones"}, "init='ones', expected normal or zeros"),
        (miss, {"rank": 0}, "rank=0, expected at least 1"),
        (miss, {"rank": 2, "variant": "bone"}, "variant='bone', expected standard, mini or bat"),
        (miss, {"rank": 2, "variant": "mini"}, "mini_rank=None, expected at least 1 for mini"),
        (miss, {"rank": 2, "mini_rank": 2}, "mini_rank=2, expected None for standard"),
    ],
)
def test_bad_hyper_parameters(method, fields, message) -> None:
    with pytest.raises(ValueError, match=f"{method.__name__.rpartition('.')[2]}.Spec: {message}"):
        method.Spec(**fields)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (surm.Spec(block=5), "surm.Spec: block=5 does not divide in=12 and out=18 of .*; nearest that does: 6"),
        (surm.Spec(kind="kronecker", rank=4), "surm.Spec: rank=4 does not divide in=12 and out=18 of .*that does: 3"),
        (c3a.Spec(block_size=12), "c3a.Spec: block_size=12 does not divide in=12 and out=18 of .*nearest that does: 6"),
        (fourierft.Spec(n_frequency=217), r"n_frequency=217 exceeds the 12 · 18 frequencies of .* that fits: 216"),
        (miss.Spec(rank=13), "miss.Spec: rank=13, expected at most in=12 of layers"),
        (miss.Spec(rank=4, variant="bat"), "miss.Spec: rank=4 does not divide in=12 and out=18 .*nearest that does: 3"),
        (
            miss.Spec(rank=4, variant="mini", mini_rank=5),
            "mini_rank=5 does not divide out=18 of .*nearest that does: 6",
        ),
    ],
)
def test_specs_that_do_not_fit_the_sites(spec, message) -> None:
    with pytest.raises(ValueError, match=message):
        adapter_of(spec)
