"""Facts of Kronecker, Hadamard and multiplicative updates: counts, starts, special cases, errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpeft
from jaxpeft.methods import boft, glora, hira, ia3, loha, lokr, lora, oft, smoa_structured
from jaxpeft.spec import method_of

NAME = "layers/up/kernel"


def sites_of(layers: int, **kernels: tuple[int, int]) -> jaxpeft.Sites:
    """Sites of stacked kernels, of their shapes alone."""
    tree = {name: {"kernel": jax.ShapeDtypeStruct((layers, *dims), "float32")} for name, dims in kernels.items()}
    return jaxpeft.find({"layers": tree}, layouts={".*": "lio"})


def weights_of(ins: int = 12, outs: int = 8, layers: int = 3) -> dict:
    kernel = jax.random.normal(jax.random.key(1), (layers, ins, outs))
    return {"layers": {"up": {"kernel": kernel}}}


def trained(spec, base: dict, size: float = 0.1) -> jaxpeft.Adapter:
    """An adapter with every leaf moved."""
    sites, draw = jaxpeft.find(base, layouts={".*": "lio"}), np.random.default_rng(5)
    adapter = jax.jit(lambda base: jaxpeft.init(jax.random.key(0), spec, sites, base))(base)

    def move(leaf):
        return leaf + size * draw.standard_normal(leaf.shape, np.float32)

    return adapter.replace(params=jax.tree.map(move, adapter.params))


def delta_of(adapter: jaxpeft.Adapter, base: dict) -> np.ndarray:
    return np.asarray(jax.jit(jaxpeft.delta)(adapter, base)[NAME])


def merged_of(adapter: jaxpeft.Adapter, base: dict) -> np.ndarray:
    return np.array(jax.jit(jaxpeft.merge)(base, adapter)["layers"]["up"]["kernel"])


LLAMA32_3B = sites_of(28, q=(3072, 3072), v=(3072, 1024))
LLAMA2_7B = sites_of(32, q=(4096, 4096))
T5_XL_KV = sites_of(72, kv=(2048, 2048))
"""Keys and values: 24 of each in the encoder, 48 in the decoder with its cross-attention, here 72 of one of the two."""
T5_XL_FF = sites_of(48, down=(5120, 2048))


@pytest.mark.parametrize(
    ("sites", "spec", "expected"),
    [
        (LLAMA32_3B, glora.Spec(rank=8), 4_587_520),
        (LLAMA32_3B, glora.Spec(rank=8, a="vector", b="none"), 28 * (3072 + 1024)),
        (LLAMA32_3B, glora.Spec(rank=8, a="scalar", b="vector"), 28 * (2 + 3072 + 1024)),
        (LLAMA32_3B, hira.Spec(rank=32), 9_175_040),
        (LLAMA32_3B, loha.Spec(rank=8), 4_587_520),
        (LLAMA2_7B, lokr.Spec(rank=8), 32 * (64 * 64 + 8 * (64 + 64))),
        (LLAMA2_7B, lokr.Spec(rank=8, decompose_factor=16), 32 * (16 * 16 + 8 * (256 + 256))),
        (LLAMA2_7B, lokr.Spec(rank=32), 32 * 2 * 64 * 64),
        (LLAMA2_7B, oft.Spec(block_size=32), 32 * 128 * 496),
        (LLAMA2_7B, oft.Spec(block_size=32, block_share=True), 32 * 496),
        (LLAMA2_7B, boft.Spec(block_size=8, butterfly_factors=2), 32 * (2 * 4096 * 8 + 4096)),
        (LLAMA2_7B, smoa_structured.Spec(rank=8, bands=3), 32 * 3 * 8 * 8192),
    ],
)
def test_counts_without_memory(sites, spec, expected) -> None:
    assert method_of(spec).count(spec, sites) == expected
    if not isinstance(spec, smoa_structured.Spec):
        assert jaxpeft.count(jax.eval_shape(lambda: jaxpeft.init(jax.random.key(0), spec, sites))) == expected


def test_ia3_of_the_paper_trains_a_hundredth_of_a_percent_of_t0_3b() -> None:
    """Two adapters, keys and values on the output and feed-forward on the input: the 540 K of T-Few."""
    kv = 2 * ia3.count(ia3.Spec(), T5_XL_KV)
    assert kv + ia3.count(ia3.Spec(on="input"), T5_XL_FF) == 540_672


@pytest.mark.parametrize("zero", ["w1", "w2"])
@pytest.mark.parametrize(("rank", "both"), [(8, False), (1, False), (1, True)])
def test_lokr_starts_with_one_zero(zero, rank, both) -> None:
    base = weights_of(64, 36)
    spec = lokr.Spec(rank=rank, decompose_both=both, zero=zero)
    start = jaxpeft.init(jax.random.key(0), spec, jaxpeft.find(base, layouts={".*": "lio"})).params[NAME]
    (name,) = [name for name, leaf in start.items() if not leaf.any()]
    assert name in {"w1": ("w1", "w1_b"), "w2": ("w2", "w2_a")}[zero]


def test_lokr_is_a_kronecker_product_and_lora_with_factor_one() -> None:
    base = weights_of(12, 8)
    adapter = trained(lokr.Spec(rank=1, alpha=3), base)
    p = adapter.params[NAME]
    for layer, delta in enumerate(delta_of(adapter, base)):
        expected = 3 * np.kron(p["w1"][layer], p["w2_a"][layer].T @ p["w2_b"][layer])
        np.testing.assert_allclose(delta, expected, atol=1e-5)
    one = trained(lokr.Spec(rank=2, decompose_factor=1), base)
    p = one.params[NAME]
    same = {"a": p["w2_a"], "b": p["w2_b"] * p["w1"]}
    as_lora = jaxpeft.init(jax.random.key(0), lora.Spec(rank=2), one.sites).replace(params={NAME: same})
    np.testing.assert_allclose(delta_of(one, base), delta_of(as_lora, base), atol=1e-5)


def test_loha_has_rank_r_squared_and_divides_by_r() -> None:
    base = weights_of(24, 20)
    adapter = trained(loha.Spec(rank=3, alpha=6), base, 1.0)
    p = {name: np.asarray(leaf[0], np.float64) for name, leaf in adapter.params[NAME].items()}
    delta = delta_of(adapter, base)[0]
    np.testing.assert_allclose(delta, 2 * (p["a1"].T @ p["b1"]) * (p["a2"].T @ p["b2"]), rtol=1e-4, atol=1e-4)
    assert np.linalg.matrix_rank(delta, tol=1e-4 * np.abs(delta).max()) == 9
    factors = adapter.updates()[NAME].factors()
    np.testing.assert_allclose(factors.a[0].T @ factors.b[0] * factors.scale[0], delta, atol=1e-3)
    rslora = loha.Spec(rank=4, alpha=6, rslora=True)
    assert rslora.scale(adapter.sites[NAME]) == 3


def test_ia3_rescales_and_holds_the_hadamard_adapter() -> None:
    """A' = w * (x W0 + bias) + b is the rescaled kernel with a bias that is free to be w * bias + b."""
    base = weights_of()
    kernel = np.asarray(base["layers"]["up"]["kernel"])
    out, into = trained(ia3.Spec(), base), trained(ia3.Spec(on="input"), base)
    np.testing.assert_allclose(merged_of(out, base), kernel * (1 + out.params[NAME]["g"][:, None]), atol=1e-6)
    np.testing.assert_allclose(merged_of(into, base), kernel * (1 + into.params[NAME]["g"][..., None]), atol=1e-6)
    np.testing.assert_allclose(delta_of(out.with_alpha(2), base), 2 * delta_of(out, base), atol=1e-6)
    bias, b, x = np.ones(8), np.arange(8.0), np.ones(12)
    w = 1 + np.asarray(out.params[NAME]["g"][0])
    free = w * bias + b
    np.testing.assert_allclose(w * (x @ kernel[0] + bias) + b, x @ merged_of(out, base)[0] + free, atol=1e-5)


def test_ia3_keeps_the_bits_of_a_small_gain_in_bfloat16() -> None:
    gain = jnp.full(8, 2.0**-9)
    values = jnp.full(8, 1 + 2.0**-7, jnp.bfloat16)
    assert values.dtype == ia3.rescale(values, gain).dtype
    assert (1 + gain.astype(jnp.bfloat16) == 1).all(), "1 + gain is lost in bfloat16"
    assert (ia3.rescale(values, 3 * gain) > values).all()


@pytest.mark.parametrize("spec", [oft.Spec(block_size=4), oft.Spec(block_size=4, block_share=True)])
def test_oft_rotates_blocks_of_inputs(spec) -> None:
    base = weights_of()
    adapter = trained(spec, base, 0.5)
    kernel, moved = np.asarray(base["layers"]["up"]["kernel"][0]), merged_of(adapter, base)[0]
    assert np.abs(moved - kernel).max() > 0.5
    np.testing.assert_allclose(moved.T @ moved, kernel.T @ kernel, atol=1e-4, err_msg="angles between outputs")
    eye = {"layers": {"up": {"kernel": jnp.broadcast_to(jnp.eye(12), (3, 12, 12))}}}
    rotation = merged_of(trained(spec, eye, 0.5), eye)[0]
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(12), atol=1e-5)
    blocks = [rotation[k : k + 4, k : k + 4].copy() for k in (0, 4, 8)]
    for block in blocks:
        assert np.abs(block - np.eye(4)).max() > 0.1
        skew = np.linalg.solve(block + np.eye(4), block - np.eye(4))
        np.testing.assert_allclose(skew, -skew.T, atol=1e-5, err_msg="Cayley: Q = (R + I)⁻¹ (R - I)")
    assert np.allclose(blocks[0], blocks[1]) == spec.block_share
    for k, block in zip((0, 4, 8), blocks, strict=True):
        rotation[k : k + 4, k : k + 4] -= block
    assert not rotation.any()


def test_neumann_series_is_the_cayley_transform_to_fourth_order() -> None:
    upper = jnp.triu(jax.random.normal(jax.random.key(0), (6, 6)), 1) / 10
    errors = []
    for size in (1.0, 0.5):
        skew = size * (upper - upper.T)
        exact, series = (np.asarray(oft.cayley(skew, how), np.float64) for how in ("exact", "neumann"))
        errors.append(np.abs(exact - series).max())
        literal = np.linalg.solve((np.eye(6) - skew).T, (np.eye(6) + skew).T).T
        np.testing.assert_allclose(np.eye(6) + exact, literal, atol=1e-6)
    assert 12 < errors[0] / errors[1] < 24


@pytest.mark.parametrize("factors", [1, 2, 3])
def test_boft_is_the_product_of_permuted_block_rotations(factors) -> None:
    base = weights_of(32, 6)
    adapter = trained(boft.Spec(block_size=4, butterfly_factors=factors), base, 0.3)
    q, s = (np.asarray(adapter.params[NAME][name][0], np.float64) for name in ("q", "s"))
    rotation = np.eye(32)
    for level in range(factors):
        halves = np.arange(32).reshape(-1, 2 ** (level + 1), 2)
        order = np.concatenate([halves[:, ::2], halves[:, 1::2]], axis=1).ravel()
        permutation = np.eye(32)[order]
        diagonal = np.zeros((32, 32))
        for k, block in enumerate(q[level]):
            skew = (block - block.T) / 2
            diagonal[4 * k : 4 * k + 4, 4 * k : 4 * k + 4] = (np.eye(4) + skew) @ np.linalg.inv(np.eye(4) - skew)
        rotation = permutation @ diagonal @ permutation.T @ rotation
    kernel = np.asarray(base["layers"]["up"]["kernel"][0])
    np.testing.assert_allclose(merged_of(adapter, base)[0], rotation @ kernel * (1 + s), atol=1e-4)
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(32), atol=1e-9)
    joined = (np.abs(rotation) > 1e-9).sum(axis=0)
    assert (joined == 4 * 2 ** (factors - 1)).all(), "inputs that one input is mixed with"
    x = jax.random.normal(jax.random.key(2), (5, 32))
    forward = jaxpeft.adapt(lambda base, x: x @ base["layers"]["up"]["kernel"][0])
    np.testing.assert_allclose(forward(base, adapter, x), x @ rotation @ kernel * (1 + s), atol=1e-4)


def test_one_butterfly_factor_without_a_scale_is_oft() -> None:
    base = weights_of()
    adapter = trained(oft.Spec(block_size=4), base)
    rows, columns = np.triu_indices(4, 1)
    q = jnp.zeros((3, 1, 3, 4, 4)).at[..., rows, columns].set(2 * adapter.params[NAME]["q"][:, None])
    same = jaxpeft.init(jax.random.key(0), boft.Spec(block_size=4), adapter.sites)
    same = same.replace(params={NAME: {"q": q, "s": jnp.zeros((3, 8))}})
    np.testing.assert_allclose(merged_of(same, base), merged_of(adapter, base), atol=1e-5)


def test_special_cases_of_glora() -> None:
    """A = none is LoRA, B = none with a low-rank A is HiRA, a vector A is (IA)³, and scalars are W0 (1 + a) + b."""
    base = weights_of()
    kernel = base["layers"]["up"]["kernel"]

    def same(spec, leaves) -> np.ndarray:
        sites = jaxpeft.find(base, layouts={".*": "lio"})
        return delta_of(jaxpeft.init(jax.random.key(0), spec, sites).replace(params={NAME: leaves}), base)

    plain = trained(glora.Spec(rank=4, a="none"), base)
    leaves = {"a": plain.params[NAME]["b_in"], "b": plain.params[NAME]["b_out"]}
    np.testing.assert_allclose(delta_of(plain, base), same(lora.Spec(rank=4, alpha=4), leaves), atol=1e-6)
    modulated = trained(glora.Spec(rank=4, b="none"), base)
    leaves = {"a": modulated.params[NAME]["a_in"], "b": modulated.params[NAME]["a_out"]}
    np.testing.assert_allclose(delta_of(modulated, base), same(hira.Spec(rank=4), leaves), atol=1e-6)
    vector = trained(glora.Spec(rank=4, a="vector", b="none"), base)
    leaves = {"g": vector.params[NAME]["a_out"][:, 0]}
    np.testing.assert_allclose(delta_of(vector, base), same(ia3.Spec(), leaves), atol=1e-6)
    scalars = trained(glora.Spec(rank=4, a="scalar", b="scalar"), base)
    a, b = scalars.params[NAME]["a_out"], scalars.params[NAME]["b_out"]
    np.testing.assert_allclose(delta_of(scalars, base), kernel * a + b, atol=1e-6)


@pytest.mark.parametrize("a", ["lora", "vector", "scalar", "none"])
@pytest.mark.parametrize("b", ["lora", "vector", "scalar", "none"])
def test_every_pair_of_paths(a, b) -> None:
    if (a, b) == ("none", "none"):
        return
    base = weights_of()
    adapter = trained(glora.Spec(rank=2, a=a, b=b), base)
    x = jax.random.normal(jax.random.key(2), (5, 12))
    forward = jaxpeft.adapt(lambda base, x: x @ base["layers"]["up"]["kernel"][0])
    np.testing.assert_allclose(forward(base, adapter, x), x @ merged_of(adapter, base)[0], atol=1e-4)
    assert {name[0] for name in adapter.params[NAME]} == {name for name, path in (("a", a), ("b", b)) if path != "none"}


def test_hira_is_of_high_rank() -> None:
    base = weights_of(24, 20)
    delta = delta_of(trained(hira.Spec(rank=2), base, 1.0), base)[0]
    assert np.linalg.matrix_rank(delta) == 20


@pytest.mark.parametrize("shape", [(12, 8), (8, 12)])
def test_smoa_modulates_bands_of_the_spectrum(shape) -> None:
    base = weights_of(*shape)
    adapter = trained(smoa_structured.Spec(rank=2, bands=3), base)
    a, b = (np.asarray(adapter.params[NAME][name], np.float64) for name in ("a", "b"))
    for layer, kernel in enumerate(np.asarray(base["layers"]["up"]["kernel"], np.float64)):
        u, s, v = np.linalg.svd(kernel, full_matrices=False)
        expected, before = np.zeros(shape), 0.0
        for i in range(8):
            k = int(3 * before / s.sum())
            expected += (a[layer, k].T @ b[layer, k]) * (s[i] * np.outer(u[:, i], v[i]))
            before += s[i]
        np.testing.assert_allclose(delta_of(adapter, base)[layer], expected, atol=1e-4)


def test_one_band_is_hira() -> None:
    base = weights_of()
    adapter = trained(smoa_structured.Spec(rank=2, bands=1), base)
    leaves = {name: leaf[:, 0] for name, leaf in adapter.params[NAME].items()}
    same = jaxpeft.init(jax.random.key(0), hira.Spec(rank=2), adapter.sites).replace(params={NAME: leaves})
    np.testing.assert_allclose(delta_of(adapter, base), delta_of(same, base), atol=1e-5)


def test_smoa_needs_the_weights_and_reports_bands_without_a_component() -> None:
    spec, sites = smoa_structured.Spec(rank=2, bands=3), jaxpeft.find(weights_of(), layouts={".*": "lio"})
    with pytest.raises(ValueError, match=r"smoa_structured reads .* pass weights=base to jaxpeft\.init"):
        jaxpeft.init(jax.random.key(0), spec, sites)
    one_component = {"layers": {"up": {"kernel": jnp.ones((3, 12, 8)).at[:, 0, 0].set(1.001)}}}
    adapter = jaxpeft.init(jax.random.key(0), spec, sites, one_component)
    assert jaxpeft.summary(adapter).rows[0].dead == pytest.approx(1 / 3)
    frozen = {**adapter.constants[NAME], "band": adapter.constants[NAME]["band"] + 1}
    with pytest.raises(ValueError, match=r"band: bands 1\.\.3, but there are 3"):
        smoa_structured.check_constants({NAME: frozen}, spec, sites)
    with pytest.raises(ValueError, match=r"bands=9, but .* has 8 singular components; largest that fits: 8"):
        jaxpeft.init(jax.random.key(0), smoa_structured.Spec(rank=2, bands=9), sites, weights_of())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: lokr.Spec(rank=0), "lokr.Spec: rank=0, expected at least 1"),
        (lambda: lokr.Spec(rank=1, decompose_factor=-1), "decompose_factor=-1, expected at least 1, or None"),
        (lambda: lokr.Spec(rank=1, zero="both"), "zero='both', expected w1 or w2"),
        (lambda: loha.Spec(rank=0), "loha.Spec: rank=0, expected at least 1"),
        (lambda: ia3.Spec(on="bias"), "on='bias', expected output or input"),
        (lambda: oft.Spec(block_size=1), "block_size=1, expected at least 2"),
        (lambda: oft.Spec(block_size=2, cayley="series"), "cayley='series', expected exact or neumann"),
        (lambda: boft.Spec(block_size=3, butterfly_factors=2), "block_size=3, expected an even number"),
        (lambda: boft.Spec(block_size=4, butterfly_factors=0), "butterfly_factors=0, expected at least 1"),
        (lambda: glora.Spec(rank=1, a="matrix"), "a='matrix', expected one of lora, vector, scalar, none"),
        (lambda: glora.Spec(rank=1, a="none", b="none"), "a='none', expected a path, if b is none"),
        (lambda: hira.Spec(rank=0), "hira.Spec: rank=0, expected at least 1"),
        (lambda: smoa_structured.Spec(rank=1, bands=0), "bands=0, expected at least 1"),
    ],
)
def test_bad_hyper_parameters(make, message) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (oft.Spec(block_size=5), r"block_size=5 does not divide in=12 of layers/up/kernel; nearest that does: (4|6)"),
        (boft.Spec(block_size=5), "join 5 inputs, which does not divide in=12 .* nearest block_size that fits: (4|6)"),
        (boft.Spec(block_size=4, butterfly_factors=2), "join 8 inputs, .* nearest block_size that fits: (2|6)"),
        (boft.Spec(block_size=4, butterfly_factors=4), "fits: none; use fewer butterfly_factors"),
        (hira.Spec(rank=2, rslora=True), "rslora=True, expected False"),
    ],
)
def test_specs_that_do_not_fit_the_sites(spec, message) -> None:
    with pytest.raises(ValueError, match=message):
        jaxpeft.init(jax.random.key(0), spec, sites_of(2, up=(12, 8)))
