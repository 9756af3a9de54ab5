"""Facts of the MoS paper: pools, index tables, special cases and published counts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

import jaxpeft
from jaxpeft import models, pools
from jaxpeft.methods import lora, mos, prolora


def tree(layers: int, **kernels: tuple[int, int]) -> dict:
    """Shapes of stacked kernels."""
    return {
        "layers": {name: {"kernel": jax.ShapeDtypeStruct((layers, *dims), "float32")} for name, dims in kernels.items()}
    }


def decoder(layers: int, width: int, hidden: int, kv: int) -> jaxpeft.Sites:
    """The seven linear layers of a Llama-like decoder."""
    square, narrow = (width, width), (width, kv)
    return jaxpeft.find(
        tree(
            layers,
            q=square,
            k=narrow,
            v=narrow,
            o=square,
            gate=(width, hidden),
            up=(width, hidden),
            down=(hidden, width),
        ),
        layouts={".*": "lio"},
    )


LLAMA2_7B = decoder(32, 4096, 11008, 4096)
LLAMA2_13B = decoder(40, 5120, 13824, 5120)
LLAMA3_8B = decoder(32, 4096, 14336, 1024)
LLAMA32_3B = decoder(28, 3072, 8192, 1024)
SMOLLM2 = decoder(30, 576, 1536, 192)


@pytest.mark.parametrize(
    ("sites", "spec", "published"),
    [
        (LLAMA2_7B, mos.Spec(rank=8, equivalent_rank=2, shards_per_vector=4), 4_997_120),
        (LLAMA2_7B, mos.Spec(rank=32, equivalent_rank=8, shards_per_vector=4), 19_988_480),
        (LLAMA2_7B, lora.Spec(rank=2), 4_997_120),
        (LLAMA2_13B, mos.Spec(rank=8, equivalent_rank=2, shards_per_vector=4), 7_823_360),
        (LLAMA3_8B, mos.Spec(rank=4, equivalent_rank=1, private_rank=0, shards_per_vector=4), 2_621_440),
        (LLAMA3_8B, mos.Spec(rank=8, equivalent_rank=2, shards_per_vector=4), 5_242_880),
        (LLAMA32_3B, mos.Spec(rank=8, equivalent_rank=2, shards_per_vector=4), 3_039_232),
        (SMOLLM2, mos.Spec(rank=16, equivalent_rank=2, shards_per_vector=4), 610_560),
        (LLAMA2_7B, prolora.Spec(rank=8, unshared_rank=1, sharing_in=7, sharing_out=7), 4_999_520),
        (LLAMA2_7B, prolora.Spec(rank=32, unshared_rank=4, sharing_in=7, sharing_out=7), 19_998_080),
        (LLAMA2_7B, prolora.Spec(rank=16, unshared_rank=4, sharing_in=3, sharing_out=3), 19_992_064),
    ],
)
def test_published_counts_without_memory(sites, spec, published) -> None:
    adapter = jax.eval_shape(lambda: jaxpeft.init(jax.random.key(0), spec, sites))
    assert jaxpeft.count(adapter) == published


def test_all_linear_of_a_shipped_decoder_is_the_papers_seven() -> None:
    """LLaMA2-7B from its configuration alone: nothing is declared, and nothing is held in memory."""
    config = models.Config(
        vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32
    )
    sites = jaxpeft.find(models.abstract(config), "all-linear")
    assert sites.size == 6_476_005_376
    spec = mos.Spec(rank=8, equivalent_rank=2, shards_per_vector=4)
    adapter = jax.eval_shape(lambda: jaxpeft.init(jax.random.key(0), spec, sites))
    assert jaxpeft.count(adapter) == 4_997_120
    assert "4,997,120 trained parameters" in str(jaxpeft.summary(adapter))


def adapter_of(spec: mos.Spec, layers: int = 6, seed: int = 0) -> jaxpeft.Adapter:
    return jaxpeft.init(jax.random.key(seed), spec, jaxpeft.find(tree(layers, up=(12, 8)), layouts={".*": "lio"}))


NAME = "layers/up/kernel"
SPEC = mos.Spec(rank=5, equivalent_rank=3, private_rank=1, shards_per_vector=2)


def test_index_tables() -> None:
    adapter = adapter_of(SPEC)
    frozen = adapter.constants[NAME]
    public, private = (3 - 1) * 6 * 2, 1 * 2
    for table in (frozen["a_index"], frozen["b_index"]):
        assert table.shape == (6, 5, 2)
        assert table.dtype == jnp.int32
        for layer, index in enumerate(np.asarray(table)):
            assert (index[:4] < public).all(), "public ranks come first"
            own = public + layer * private + np.arange(private)
            np.testing.assert_array_equal(index[4:].ravel(), own)
            assert len(np.unique(index)) == index.size, "no shard twice in one module"
    assert (frozen["a_index"][:, :4] != frozen["b_index"][:, :4]).any(), "pair dissociation"
    np.testing.assert_array_equal(frozen["a_index"][:, 4:], frozen["b_index"][:, 4:])
    assert (np.diff(np.asarray(frozen["a_index"][:, :4]).reshape(6, -1), axis=0) != 0).any(), "layers differ"


def test_factors_are_shards_side_by_side() -> None:
    adapter = adapter_of(SPEC)
    pool, index = np.asarray(adapter.params[NAME]["a"]), np.asarray(adapter.constants[NAME]["a_index"])
    a = np.asarray(adapter.updates()[NAME].a)
    for layer in range(6):
        for row in range(5):
            np.testing.assert_array_equal(a[layer, row], np.concatenate([pool[i] for i in index[layer, row]]))


def test_all_ranks_private_is_lora_with_its_start() -> None:
    adapter = adapter_of(mos.Spec(rank=2, equivalent_rank=2, private_rank=2, shards_per_vector=2), layers=200)
    update = adapter.updates()[NAME]
    pool = np.asarray(adapter.params[NAME]["a"])
    np.testing.assert_array_equal(np.asarray(update.a).reshape(pool.shape), pool)
    bound = 1 / np.sqrt(12)
    same = jaxpeft.init(jax.random.key(1), lora.Spec(rank=2), adapter.sites)
    assert jaxpeft.count(adapter) == jaxpeft.count(same)
    for a in (pool, np.asarray(same.params[NAME]["a"])):
        assert abs(a).max() <= bound
        assert a.std() == pytest.approx(bound / np.sqrt(3), rel=0.03)


def test_tied_indices_without_sharding_select_ranks_of_one_pair() -> None:
    """l = 1, tied: ΔW = B_pool Λ A_pool with a Boolean diagonal Λ (subset selection)."""
    spec = mos.Spec(rank=7, equivalent_rank=2, private_rank=0, shards_per_vector=1, pair_dissociation=False)
    adapter = adapter_of(spec)
    params = {NAME: {k: jax.random.normal(jax.random.key(3), v.shape) for k, v in adapter.params[NAME].items()}}
    adapter = adapter.replace(params=params)
    delta = jaxpeft.delta(adapter)[NAME]
    for layer in range(6):
        chosen = np.zeros(12)
        chosen[np.asarray(adapter.constants[NAME]["a_index"][layer]).ravel()] = 1
        expected = params[NAME]["a"].T @ np.diag(chosen) @ params[NAME]["b"] * 16 / 7
        np.testing.assert_allclose(delta[layer], expected, atol=1e-4)


def test_pure_sharing_and_random_scaling() -> None:
    shared = mos.Spec(rank=None, equivalent_rank=2, private_rank=0, shards_per_vector=1, pair_dissociation=False)
    adapter = adapter_of(shared)
    adapter = adapter.replace(params=jax.tree.map(lambda leaf: leaf + 1.0, adapter.params))
    delta = jaxpeft.delta(adapter)[NAME]
    np.testing.assert_allclose(delta, jnp.broadcast_to(delta[0], delta.shape), atol=1e-4)
    expected = adapter.params[NAME]["a"].T @ adapter.params[NAME]["b"] * 16 / 12
    np.testing.assert_allclose(delta[0], expected, rtol=1e-4)
    for scaling, owner in (("frozen", "constants"), ("trained", "params")):
        spec = mos.Spec(
            rank=None, equivalent_rank=2, private_rank=0, shards_per_vector=1, scaling=scaling, scaling_std=0.5
        )
        scaled = adapter_of(spec, layers=60)
        vector = getattr(scaled, owner)[NAME]["scaling"]
        assert vector.shape == (60, 120)
        assert vector.mean() == pytest.approx(1, abs=0.02)
        assert vector.std() == pytest.approx(0.5, rel=0.05)


def _loss(gather):
    return lambda pool, index: jnp.sum(jnp.sin(gather(pool, index)) * jnp.arange(5.0))


INDEX = pools.draw(jax.random.key(0), layers=3, slots=4, public=6, private=1)
POOL = jax.random.normal(jax.random.key(1), (9, 5))
POOLS, INDICES = jnp.stack([POOL, 2 * POOL]), jnp.stack([INDEX, INDEX[::-1]])
MAPPED = {"both": ((0, 0), (POOLS, INDICES)), "pool": ((1, None), (jnp.swapaxes(POOLS, 0, 1), INDEX))} | {
    "index": ((None, 0), (POOL, INDICES))
}
GATHERED = {
    "gradient": lambda gather: jax.grad(_loss(gather))(POOL, INDEX),
    "forward over reverse": lambda gather: jax.hessian(_loss(gather))(POOL, INDEX),
    "reverse over reverse": lambda gather: jax.jacrev(jax.grad(_loss(gather)))(POOL, INDEX),
    "forward mode": lambda gather: jax.jacfwd(_loss(gather))(POOL, INDEX),
    **{
        f"vmap of the gradient, {name}": lambda gather, axes=axes, given=given: jax.vmap(jax.grad(_loss(gather)), axes)(
            *given
        )
        for name, (axes, given) in MAPPED.items()
    },
    **{
        f"gradient of vmap, {name}": lambda gather, axes=axes, given=given: jax.grad(
            lambda pool, index: jnp.sum(jax.vmap(_loss(gather), axes)(pool, index))
        )(*given)
        for name, (axes, given) in MAPPED.items()
    },
}


@pytest.mark.parametrize("case", GATHERED)
def test_gather_is_linear_in_every_transformation(case) -> None:
    found, expected = (GATHERED[case](gather) for gather in (pools.gather, lambda pool, index: pool[index]))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_gather_of_a_pool_that_varies_over_a_mesh() -> None:
    """In `jax.shard_map`, where every device has a gradient of its own."""
    mesh = jax.make_mesh((2,), ("data",), devices=jax.devices()[:2], axis_types=(AxisType.Auto,))

    def gradient(pool, scale):
        own = jax.lax.pcast(pool, ("data",), to="varying")
        return jax.grad(lambda pool: jnp.sum(jnp.sin(pools.gather(pool, INDEX) * scale)))(own)[None]

    specs = {"in_specs": (PartitionSpec(), PartitionSpec("data")), "out_specs": PartitionSpec("data")}
    found = jax.jit(jax.shard_map(gradient, mesh=mesh, **specs))(POOL, jnp.array([1.0, 2.0]))
    for scale, own in zip((1.0, 2.0), found, strict=True):
        expected = jax.grad(lambda pool, scale=scale: jnp.sum(jnp.sin(pool[INDEX] * scale)))(POOL)
        np.testing.assert_allclose(own, expected, atol=1e-5)


def test_gather_backward_is_the_scatter_and_repeats_to_the_bit() -> None:
    index = pools.draw(jax.random.key(0), layers=7, slots=9, public=20, private=2)
    pool = jax.random.normal(jax.random.key(1), (34, 5))
    cotangent = jax.random.normal(jax.random.key(2), (7, 11, 5))
    np.testing.assert_array_equal(pools.gather(pool, index), pool[index])
    backward = jax.jit(lambda c: jax.vjp(lambda p: pools.gather(p, index), pool)[1](c)[0])
    found = backward(cotangent)
    np.testing.assert_allclose(found, jnp.zeros_like(pool).at[index].add(cotangent), atol=1e-5)
    assert (backward(cotangent) == found).all()


def test_dead_shards_are_reported_and_as_many_as_expected() -> None:
    """(1 - (r-p)/((e-p)L))^L of the public shards: 4.3 % at e=2, p=1, r=4, L=32, so half of it of all."""
    spec = mos.Spec(rank=4, equivalent_rank=2, private_rank=1, shards_per_vector=4)
    found = []
    for seed in range(12):
        adapter = adapter_of(spec, layers=32, seed=seed)
        found.append(jaxpeft.summary(adapter).rows[0].dead)
    assert np.mean(found) == pytest.approx(0.043 / 2, rel=0.25)
    assert "dead" in str(jaxpeft.summary(adapter))
    assert f"{found[-1]:.1%}" in str(jaxpeft.summary(adapter))


def test_a_corrupted_table_is_found() -> None:
    good = np.arange(12).reshape(2, 3, 2)
    pools.check("t", good, 12)
    with pytest.raises(ValueError, match=r"t: indices 0\.\.11 leave the pool of 11 shards"):
        pools.check("t", good, 11)
    with pytest.raises(ValueError, match="t: a layer uses the same shard twice"):
        pools.check("t", np.zeros((2, 3, 2), int), 12)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rank": 0}, "rank=0, expected at least 1"),
        ({"private_rank": 4}, "private_rank=4, expected from 0 to equivalent_rank=3"),
        ({"private_rank": 3}, "rank=5, expected 3 when every rank is private"),
        ({"rank": 1, "private_rank": 2}, "private_rank=2, expected at most rank=1"),
        ({"shards_per_vector": 0}, "shards_per_vector=0, expected at least 1"),
        ({"scaling": "both"}, "scaling='both', expected none, frozen or trained"),
        ({"alpha": 0.0}, "alpha=0.0, expected a positive number"),
        ({"dropout": 1.0}, r"dropout=1.0, expected in \[0, 1\)"),
        ({"rank": None}, "private_rank=1, expected 0 with rank=None"),
    ],
)
def test_bad_hyper_parameters(fields, message) -> None:
    with pytest.raises(ValueError, match=f"mos.Spec: {message}"):
        mos.Spec(**{"rank": 5, "equivalent_rank": 3, "private_rank": 1, "shards_per_vector": 2, **fields})


def test_specs_that_do_not_fit_the_sites() -> None:
    with pytest.raises(
        ValueError, match=r"shards_per_vector=3 does not divide in=12 and out=8.*nearest that does: (2|4)"
    ):
        adapter_of(mos.Spec(rank=5, equivalent_rank=3, shards_per_vector=3))
    with pytest.raises(ValueError, match=r"needs 14 public ranks.*its 6 layers share 12; largest rank here: 13"):
        adapter_of(mos.Spec(rank=15, equivalent_rank=3, shards_per_vector=2))
