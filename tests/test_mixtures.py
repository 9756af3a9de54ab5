"""Facts of the methods that mix, split or aggregate low-rank parts: formulas, special cases, counts, starts, memory."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from moved import moved

import jaxpeft
from jaxpeft.methods import alore, lily, lora, loramini, malora, melora, mtllora, multilora, nola, tinylora
from jaxpeft.updates import Base, LowRank

NAME = "layers/up/kernel"


def tree(layers: int = 4, **kernels: tuple[int, int]) -> dict:
    """Stacked kernels."""
    keys = jax.random.split(jax.random.key(9), len(kernels))
    made = {
        name: {"kernel": jax.random.normal(key, (layers, *dims))}
        for key, (name, dims) in zip(keys, kernels.items(), strict=True)
    }
    return {"layers": made}


def sites_of(layers: int = 4, **kernels: tuple[int, int]) -> jaxpeft.Sites:
    return jaxpeft.find(jax.eval_shape(lambda: tree(layers, **kernels)), layouts={".*": "lio"})


delta_of = jax.jit(jaxpeft.delta)


@cache
def trained(spec, layers: int = 4, dims: tuple[int, int] = (12, 18)) -> tuple[jaxpeft.Adapter, dict, np.ndarray, float]:
    """An adapter of one kernel, its trained arrays, ΔW by layer, and the scale."""
    base, sites = tree(layers, up=dims), sites_of(layers, up=dims)
    adapter = jax.jit(lambda base: moved(jaxpeft.init(jax.random.key(0), spec, sites, base), 1.0))(base)
    params = {name: np.asarray(leaf) for name, leaf in adapter.params[NAME].items()}
    return adapter, params, np.asarray(delta_of(adapter, base)[NAME]), spec.scale(sites[NAME])


def close(found, expected) -> None:
    np.testing.assert_allclose(found, expected, atol=1e-5 * max(1.0, float(np.abs(expected).max())))


def softmax(x: np.ndarray) -> np.ndarray:
    return np.exp(x) / np.exp(x).sum()


# Counts


def test_published_counts() -> None:
    vit = sites_of(12, attention=(768, 2304), mlp=(768, 3072))
    assert alore.count(alore.Spec(rank=4, experts=4), vit) == 148_992
    roberta = sites_of(12, query=(768, 768), value=(768, 768))
    mini = melora.Spec(rank=1, mini_loras=8)
    assert 8 * melora.count(mini, roberta) == lora.count(lora.Spec(rank=8), roberta) == 294_912
    assert mini.materialized_rank(roberta["layers/query/kernel"]) == 8
    square, wide = (3584, 3584), (3584, 18944)
    qwen = sites_of(28, q=square, k=(3584, 512), v=(3584, 512), o=square, gate=wide, up=wide, down=wide[::-1])
    assert tinylora.count(tinylora.Spec(u=13, tied_layers=None, sharing="tiled"), qwen) == 13
    assert tinylora.count(tinylora.Spec(u=1, tied_layers=None), qwen) == 7


def test_malora_saves_what_the_paper_says() -> None:
    """30 % to 48 % of a mixture of as many LoRAs; here 8 experts of rank 8 on the MLP of LLaMA2-7B."""
    mlp = sites_of(32, gate=(4096, 11008), up=(4096, 11008), down=(11008, 4096))
    mixture = 8 * lora.count(lora.Spec(rank=8), mlp)
    assert 0.30 < 1 - malora.count(malora.Spec(rank=8, shared_rank=8, experts=8), mlp) / mixture < 0.48


def test_nola_counts_neither_rank_nor_width() -> None:
    for rank, dims in ((1, (8, 8)), (64, (4096, 11008))):
        spec = nola.Spec(rank=rank, bases=100, bases_b=50)
        assert nola.count(spec, sites_of(32, up=dims)) == 32 * 150


# TinyLoRA

TWO = {"q": (12, 12), "up": (12, 18)}


@pytest.mark.parametrize(
    ("sharing", "tied", "q", "up"),
    [
        ("structured", 1, [0, 1, 2, 3, 4], [5, 6, 7, 8, 9]),
        ("structured", 2, [0, 0, 1, 1, 2], [3, 3, 4, 4, 5]),
        ("structured", None, [0] * 5, [1] * 5),
        ("tiled", 2, [0, 1, 2, 3, 4], [0, 1, 2, 3, 4]),
        ("tiled", 4, [0, 0, 1, 1, 2], [0, 0, 1, 1, 2]),
        ("tiled", 3, [0, 0, 1, 2, 2], [0, 1, 1, 2, 3]),
        ("tiled", None, [0] * 5, [0] * 5),
    ],
)
def test_tinylora_ties(sharing, tied, q, up) -> None:
    spec = tinylora.Spec(u=3, tied_layers=tied, sharing=sharing)
    number, index = tinylora.vectors(spec, sites_of(5, **TWO))
    assert {name: list(vectors) for name, vectors in index.items()} == {"layers/q/kernel": q, "layers/up/kernel": up}
    assert number == max(q + up) + 1


@pytest.mark.parametrize("singular_values", ["output", "both"])
def test_tinylora_mixes_in_singular_subspaces(singular_values) -> None:
    spec = tinylora.Spec(rank=3, u=4, tied_layers=2, singular_values=singular_values)
    adapter, _, delta, _ = trained(spec)
    frozen, weights = adapter.constants[NAME], np.asarray(tree(4, up=(12, 18))["layers"]["up"]["kernel"])
    v = np.asarray(adapter.params["shared"]["v"])
    for layer in range(4):
        a, b, p = (np.asarray(frozen[name][layer]) for name in ("a", "b", "p"))
        u, s, vt = np.linalg.svd(weights[layer])
        close(a.T @ b, (u[:, :3] * s[:3]) @ vt[:3])
        close(np.linalg.norm(a, axis=1), 1 if singular_values == "output" else np.sqrt(s[:3]))
        mixed = np.einsum("u,usr->sr", v[layer // 2], p)
        # The paper's W is out x in, so its U Σ R Vᵀ is ours transposed.
        close(delta[layer].T, b.T @ mixed @ a)


def test_tinylora_projections_have_variance_one_over_rank() -> None:
    p = trained(tinylora.Spec(rank=5, u=200))[0].constants[NAME]["p"]
    assert p.std() == pytest.approx(5**-0.5, rel=0.02)


def test_tinylora_needs_weights_and_a_rank_they_have() -> None:
    with pytest.raises(ValueError, match=r"tinylora.*pass weights=base to jaxpeft.init"):
        jaxpeft.init(jax.random.key(0), tinylora.Spec(u=3), sites_of(up=(12, 18)))
    with pytest.raises(ValueError, match=r"rank=13, but layers/up/kernel is 12 x 18; largest rank: 12"):
        trained(tinylora.Spec(rank=13, u=3))
    adapter = trained(tinylora.Spec(u=3))[0]
    with pytest.raises(ValueError, match=r"v_index: indices 0\.\.3 leave the pool of 2"):
        tinylora.check_constants(adapter.constants, tinylora.Spec(u=3, tied_layers=2), adapter.sites)


# NOLA


@partial(jax.jit, static_argnums=2)
def explicit(coefficients: jax.Array, seed: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """The mixture with all bases at once."""
    return jnp.einsum("lk,krw->lrw", coefficients, nola.draw(seed, jnp.arange(coefficients.shape[1]), shape))


@pytest.mark.parametrize("bases", [1, nola.CHUNK, 2 * nola.CHUNK + 5])
def test_nola_in_chunks_is_nola_at_once(bases) -> None:
    seed, shape = jnp.array([3, 4], jnp.uint32), (5, 12)
    coefficients = jax.random.normal(jax.random.key(0), (4, bases))
    cotangent = jax.random.normal(jax.random.key(1), (4, *shape))

    def both(mixture):
        out, pull = jax.vjp(mixture, coefficients)
        return out, pull(cotangent)[0]

    found = jax.jit(lambda: both(lambda c: nola.mixture(shape, c, seed)))()
    expected = jax.jit(lambda: both(lambda c: explicit(c, seed, shape)))()
    for ours, theirs in zip(found, expected, strict=True):
        close(ours, theirs)


def test_nola_is_made_of_its_bases() -> None:
    for share in (True, False):
        spec = nola.Spec(rank=5, bases=20, bases_b=7, share_bases=share)
        adapter, params, delta, scale = trained(spec)
        frozen = adapter.constants[NAME]
        for layer in range(4):
            seeds = [frozen[name][0 if share else layer] for name in ("a_seed", "b_seed")]
            a, b = (
                explicit(params[name][layer : layer + 1], seed, (5, width))[0]
                for name, seed, width in zip("ab", seeds, (12, 18), strict=True)
            )
            close(delta[layer], scale * a.T @ b)
        assert len(np.unique(frozen["a_seed"], axis=0)) == (1 if share else 4)


def test_nola_starts_with_the_variance_of_lora_and_bases_are_uniform() -> None:
    sites = sites_of(64, up=(96, 8))

    @partial(jax.jit, static_argnums=0)
    def spread(spec):
        return jaxpeft.init(jax.random.key(0), spec, sites).updates()[NAME].a.std()

    ours, theirs = float(spread(nola.Spec(rank=4, bases=64))), float(spread(lora.Spec(rank=4)))
    assert ours == pytest.approx(theirs, rel=0.05)
    basis = nola.draw(jnp.array([3, 4], jnp.uint32), jnp.arange(50), (5, 12))
    assert float(jnp.abs(basis).max()) <= 1
    assert float(basis.std()) == pytest.approx(3**-0.5, rel=0.03)
    assert abs(float(basis.mean())) < 0.03


def test_nola_never_holds_all_bases() -> None:
    """What a step needs beside its arguments does not grow with the bases, but for their coefficients."""
    sites, rank = sites_of(2, up=(256, 384)), 8

    def temporaries(bases: int) -> int:
        like = jax.eval_shape(lambda: jaxpeft.init(jax.random.key(0), nola.Spec(rank=rank, bases=bases), sites))

        def loss(params, constants):
            update = like.replace(params=params, constants=constants).updates()[NAME]
            return jnp.sum(jax.vmap(LowRank.delta_matmul)(update, jnp.ones((2, 3, 256))) ** 2)

        compiled = jax.jit(jax.grad(loss)).lower(like.params, like.constants).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    few, many = temporaries(2 * nola.CHUNK), temporaries(40 * nola.CHUNK)
    one_basis = 4 * rank * 256
    assert few > nola.CHUNK * one_basis
    assert many - few < 2 * one_basis < 4 * rank * 256 * 38 * nola.CHUNK


def test_nola_notices_another_random_stream() -> None:
    adapter = trained(nola.Spec(rank=5, bases=20))[0]
    nola.check_constants(adapter.constants, adapter.spec, adapter.sites)
    with (
        jax.threefry_partitionable(not jax.config.jax_threefry_partitionable),
        pytest.raises(
            ValueError, match=r"layers/up/kernel/a_check: the seed yields bases that begin with .*use the ver"
        ),
    ):
        nola.check_constants(adapter.constants, adapter.spec, adapter.sites)
    other = {**adapter.constants[NAME], "b_seed": adapter.constants[NAME]["b_seed"] + 1}
    with pytest.raises(ValueError, match="b_check"):
        nola.check_constants({NAME: other}, adapter.spec, adapter.sites)


# LoRA-Mini


@pytest.mark.parametrize("share", [False, True])
def test_loramini_is_four_matrices(share) -> None:
    spec = loramini.Spec(rank=5, outer_in=7, outer_out=6, share_outer=share)
    adapter, params, delta, scale = trained(spec)
    outer = {name: np.asarray(adapter.constants[NAME][name]) for name in ("a_outer", "b_outer")}
    assert outer["a_outer"].shape == (1 if share else 4, 7, 12)
    for layer in range(4):
        a_outer, b_outer = (leaf[0 if share else layer] for leaf in outer.values())
        close(delta[layer], scale * a_outer.T @ params["a"][layer].T @ params["b"][layer] @ b_outer)


# Lily


def test_lily_mixes_up_projections_and_shares_down_projections() -> None:
    spec = lily.Spec(rank=5, experts=3, stride=2)
    _, params, delta, scale = trained(spec, layers=5)
    assert scale == 1
    assert params["a"].shape == (3, 5, 12)
    for layer in range(5):
        b = np.einsum("e,ero->ro", softmax(params["router"][layer]), params["b"])
        close(delta[layer], params["a"][layer // 2].T @ b)


def test_lily_experts_start_apart() -> None:
    """Equal routes would give all experts the same gradient for ever."""
    adapter = jaxpeft.init(jax.random.key(0), lily.Spec(rank=5, experts=3), sites_of(up=(12, 18)))

    def loss(params):
        update = adapter.replace(params=params).updates()[NAME]
        return jnp.sum((jax.vmap(LowRank.delta)(update) - 1) ** 2)

    experts = jax.jit(jax.grad(loss))(adapter.params)[NAME]["b"]
    assert float(jnp.abs(experts[0] - experts[1]).max()) > 1e-3


# MELoRA


def test_melora_is_block_diagonal() -> None:
    _, params, delta, scale = trained(melora.Spec(rank=2, mini_loras=3))
    for layer in range(4):
        expected = np.zeros((12, 18))
        for j in range(3):
            block = params["a"][layer, j].T @ params["b"][layer, j]
            expected[4 * j : 4 * j + 4, 6 * j : 6 * j + 6] = scale * block
        close(delta[layer], expected)


def test_one_mini_lora_is_lora() -> None:
    adapter, params, delta, _ = trained(melora.Spec(rank=5, mini_loras=1))
    same = jaxpeft.init(jax.random.key(0), lora.Spec(rank=5), adapter.sites)
    same = same.replace(params={NAME: {name: leaf[:, 0] for name, leaf in params.items()}})
    close(delta, delta_of(same)[NAME])


def test_melora_product_has_no_zeros() -> None:
    """Neither the weight nor its factors with their zeros appear in the product."""
    k, q, dims = 4, 2, (32, 64)
    update = jax.tree.map(
        lambda leaf: leaf[0], trained(melora.Spec(rank=q, mini_loras=k), dims=dims)[0].updates()[NAME]
    )
    jaxpr = jax.make_jaxpr(update.delta_matmul)(jnp.ones((1, 32)))
    sizes = [outvar.aval.size for equation in jaxpr.jaxpr.eqns for outvar in equation.outvars]
    assert max(sizes) <= q * max(dims)
    rows = update.delta_rows(lambda matrix: matrix[jnp.array([1, 30])])
    close(rows, update.delta()[jnp.array([1, 30])])


# MultiLoRA


def test_multilora_is_a_sum_of_scaled_loras() -> None:
    _, params, delta, scale = trained(multilora.Spec(rank=2, parallel=3))
    terms = np.einsum("lnri,lnro,lno->lio", params["a"], params["b"], params["scaling"])
    close(delta, scale * terms)
    assert scale == 16 / 6


def test_multilora_starts_both_factors() -> None:
    adapter = jaxpeft.init(jax.random.key(0), multilora.Spec(rank=4, parallel=3), sites_of(50, up=(12, 18)))
    for name, fan_in in (("a", 12), ("b", 4)):
        leaf = adapter.params[NAME][name]
        assert float(jnp.abs(leaf).max()) <= fan_in**-0.5
        assert float(leaf.std()) == pytest.approx((3 * fan_in) ** -0.5, rel=0.03)
    assert not adapter.params[NAME]["scaling"].any()


# MTL-LoRA

TASKS = mtllora.Spec(rank=5, tasks=3, projections=2, temperature=0.5)


def test_mtllora_of_every_task() -> None:
    adapter, params, _, scale = trained(TASKS)
    for task in range(3):
        constants = mtllora.with_task(adapter.constants, task)
        delta = delta_of(adapter.replace(constants=constants))[NAME]
        for layer in range(4):
            mixed = softmax(params["task_weights"][layer, task] / 0.5)
            b = np.einsum("n,nro->ro", mixed, params["b"][layer])
            close(delta[layer], scale * (params["task_matrix"][layer, task] @ params["a"][layer]).T @ b)


def test_another_task_or_expert_compiles_nothing() -> None:
    cases = [(TASKS, mtllora.with_task, (0, 2, jnp.int32(1)))]
    cases += [(malora.Spec(rank=4, shared_rank=5, experts=3), malora.with_expert, (None, 0, 2))]
    for spec, switch, settings in cases:
        traces = []

        @jax.jit
        def deltas(adapter, traces=traces):
            traces.append(adapter)
            return jaxpeft.delta(adapter)[NAME]

        adapter = trained(spec)[0]
        found = [deltas(adapter)]
        found += [deltas(adapter.replace(constants=switch(adapter.constants, to))) for to in settings]
        assert len(traces) == 1
        np.testing.assert_array_equal(found[0], found[1], err_msg="the first setting is the start")
        assert (found[1] != found[2]).any()
        assert (found[2] != found[3]).any()


def test_a_step_trains_its_own_task() -> None:
    adapter = trained(TASKS)[0]
    adapter = adapter.replace(constants=mtllora.with_task(adapter.constants, 1))
    loss = lambda params: jnp.sum(jaxpeft.delta(adapter.replace(params=params))[NAME] ** 2)  # noqa: E731
    gradients = jax.jit(jax.grad(loss))(adapter.params)[NAME]
    for name in ("task_matrix", "task_weights"):
        reached = jnp.abs(gradients[name]).reshape(4, 3, -1).max(axis=(0, 2)) > 0
        assert list(reached) == [False, True, False]
    assert all(bool((gradients[name] != 0).all()) for name in ("a", "b"))


def test_no_such_task_or_expert() -> None:
    adapter = trained(TASKS)[0]
    for task in (3, -4):
        wrong = mtllora.with_task(adapter.constants, task)
        assert jnp.isnan(delta_of(adapter.replace(constants=wrong))[NAME]).all()
        with pytest.raises(ValueError, match=f"shared/task: task {task} of 3"):
            mtllora.check_constants(wrong, adapter.spec, adapter.sites)
    gated = trained(malora.Spec(rank=4, shared_rank=5, experts=3))[0]
    for expert in (3, -1):
        with pytest.raises(ValueError, match=f"expert={expert}, expected from 0 to 2, or None for all"):
            malora.with_expert(gated.constants, expert)


def test_one_task_and_one_projection_start_as_lora() -> None:
    adapter = jaxpeft.init(jax.random.key(0), mtllora.Spec(rank=5, tasks=1, projections=1), sites_of(up=(12, 18)))
    params = adapter.params[NAME] | {"b": jnp.ones((4, 1, 5, 18))}
    same = jaxpeft.init(jax.random.key(0), lora.Spec(rank=5), adapter.sites)
    same = same.replace(params={NAME: {"a": params["a"], "b": params["b"][:, 0]}})
    close(delta_of(adapter.replace(params={NAME: params}))[NAME], delta_of(same)[NAME])


# MALoRA


def test_malora_average_is_the_mean_of_its_experts() -> None:
    adapter, params, average, scale = trained(malora.Spec(rank=4, shared_rank=5, experts=3))
    single = []
    for expert in range(3):
        constants = malora.with_expert(adapter.constants, expert)
        single.append(delta_of(adapter.replace(constants=constants))[NAME])
        p, b = params["p"][:, expert], params["b"][:, expert]
        close(single[-1], scale * np.einsum("ldi,lrd,lro->lio", params["a"], p, b))
    close(average, np.mean(single, axis=0))


# ALoRE


def test_alore_acts_on_the_input() -> None:
    spec = alore.Spec(rank=2, experts=3, alpha=0.7)
    adapter, params, delta, scale = trained(spec)
    assert scale == 0.7
    weights = np.asarray(tree(4, up=(12, 18))["layers"]["up"]["kernel"])
    x = jax.random.normal(jax.random.key(2), (7, 12))
    for layer in range(4):
        square = sum(
            np.kron(params["mixer"][layer, e], params["down"][layer, e].T @ params["up"][layer, e]) for e in range(3)
        )
        close(delta[layer], 0.7 * square @ weights[layer])
        update = jax.tree.map(lambda leaf, layer=layer: leaf[layer], adapter.updates()[NAME])
        base = Base(weight=jnp.asarray(weights[layer]), dot=lambda x, layer=layer: x @ weights[layer])
        close(update.matmul(x, base), x @ (weights[layer] + delta[layer]))


def test_alore_of_one_expert_is_a_low_rank_map_of_the_input() -> None:
    adapter, params, _, _ = trained(alore.Spec(rank=2, experts=1))
    params = params | {"mixer": np.ones((4, 1, 1, 1), np.float32)}
    base = tree(4, up=(12, 18))
    delta = delta_of(adapter.replace(params={NAME: params}), base)[NAME]
    inner = np.einsum("leri,lero->lio", params["down"], params["up"])
    close(delta, inner @ np.asarray(base["layers"]["up"]["kernel"]))


# Errors


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: alore.Spec(rank=0), "alore.Spec: rank=0, expected at least 1"),
        (lambda: alore.Spec(rank=1, experts=0), "alore.Spec: experts=0, expected at least 1"),
        (lambda: lily.Spec(rank=0, experts=2), "lily.Spec: rank=0, expected at least 1"),
        (lambda: lily.Spec(rank=1, experts=1), "lily.Spec: experts=1, expected at least 2"),
        (lambda: lily.Spec(rank=1, experts=2, stride=0), "lily.Spec: stride=0, expected at least 1"),
        (lambda: loramini.Spec(rank=1, outer_in=0, outer_out=1), "loramini.Spec: outer_in=0, expected at least 1"),
        (lambda: malora.Spec(rank=1, shared_rank=0, experts=1), "malora.Spec: shared_rank=0, expected at least 1"),
        (lambda: melora.Spec(rank=1, mini_loras=0), "melora.Spec: mini_loras=0, expected at least 1"),
        (lambda: mtllora.Spec(rank=1, tasks=0, projections=1), "mtllora.Spec: tasks=0, expected at least 1"),
        (
            lambda: mtllora.Spec(rank=1, tasks=1, projections=1, temperature=0),
            "mtllora.Spec: temperature=0, expected a positive number",
        ),
        (lambda: multilora.Spec(rank=1, parallel=0), "multilora.Spec: parallel=0, expected at least 1"),
        (lambda: nola.Spec(rank=1, bases=0), "nola.Spec: bases=0, expected at least 1"),
        (lambda: nola.Spec(rank=1, bases=1, bases_b=0), "nola.Spec: bases_b=0, expected at least 1, or None"),
        (lambda: tinylora.Spec(u=0), "tinylora.Spec: u=0, expected at least 1"),
        (lambda: tinylora.Spec(u=1, tied_layers=0), "tinylora.Spec: tied_layers=0, expected at least 1, or None"),
        (lambda: tinylora.Spec(u=1, sharing="some"), "tinylora.Spec: sharing='some', expected structured or tiled"),
        (
            lambda: tinylora.Spec(u=1, singular_values="input"),
            "tinylora.Spec: singular_values='input', expected output or both",
        ),
        (
            lambda: trained(melora.Spec(rank=1, mini_loras=4)),
            "melora.Spec: mini_loras=4 does not divide in=12 and out=18 of layers/up/kernel; nearest that does: 3",
        ),
        (
            lambda: trained(alore.Spec(rank=1, experts=5)),
            "alore.Spec: experts=5 does not divide in=12 of layers/up/kernel; nearest that does: 4",
        ),
    ],
)
def test_bad_hyper_parameters(make, message) -> None:
    with pytest.raises(ValueError, match=message):
        make()
