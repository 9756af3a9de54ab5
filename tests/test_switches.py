"""What every method can have: starts from the weights, DoRA, dropout, patterns, whole weights, token rows."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zoo
from moved import moved

import jaxpeft
from jaxpeft.methods import full, lora, mixed, mos, rows, spec_from_dict
from jaxpeft.updates import Decomposed, Dropout, LowRank

KEY = jax.random.key(0)


def base(layers: int = 3, in_dim: int = 12, out_dim: int = 8):
    keys = jax.random.split(jax.random.key(1), layers)
    blocks = [{"up": {"kernel": jax.random.normal(key, (in_dim, out_dim)), "bias": jnp.ones(out_dim)}} for key in keys]
    return {"embed": {"embedding": jnp.ones((20, in_dim))}, "layers": blocks, "norm": {"scale": jnp.ones(out_dim)}}


BASE = base()
KERNELS = jaxpeft.find(BASE, ".*kernel")
UP = "layers/*/up/kernel"


def trained(adapter):
    return moved(adapter, 0.1)


class TestStart:
    def test_pissa_holds_the_largest_singular_components(self) -> None:
        adapter = jaxpeft.init(KEY, lora.Spec(rank=3, alpha=7.0, start="pissa"), KERNELS, BASE)
        update = jax.tree.map(lambda leaf: leaf[0], LowRank(**adapter.params[UP], scale=adapter.constants[UP]["scale"]))
        weight = np.asarray(BASE["layers"][0]["up"]["kernel"])
        u, s, v = np.linalg.svd(weight, full_matrices=False)
        np.testing.assert_allclose(update.delta(), (u[:, :3] * s[:3]) @ v[:3], atol=1e-5)
        residual = jnp.linalg.svd(weight - update.delta(), compute_uv=False)
        np.testing.assert_allclose(residual[:5], s[3:], atol=1e-5)

    def test_olora_is_orthonormal_on_the_output_side(self) -> None:
        adapter = jaxpeft.init(KEY, lora.Spec(rank=3, start="olora"), KERNELS, BASE)
        b = adapter.params[UP]["b"]
        np.testing.assert_allclose(b @ b.swapaxes(1, 2), jnp.tile(jnp.eye(3), (3, 1, 1)), atol=1e-5)

    def test_the_base_stays_and_the_start_is_the_base(self) -> None:
        for start in ("pissa", "olora"):
            adapter = jaxpeft.init(KEY, lora.Spec(rank=3, start=start), KERNELS, BASE)
            for path, delta in jaxpeft.delta(adapter).items():
                assert jnp.abs(delta).max() < 1e-6, path

    def test_where_it_cannot_be(self) -> None:
        pooled = mos.Spec(rank=3, equivalent_rank=2, shards_per_vector=2, start="pissa")
        with pytest.raises(ValueError, match=r"mos.Spec: start='pissa'.*layer by layer.*layers/\*/up/kernel trains"):
            jaxpeft.init(KEY, pooled, KERNELS, BASE)
        with pytest.raises(ValueError, match=r"start='pissa', expected weights=base"):
            jaxpeft.init(KEY, lora.Spec(rank=3, start="pissa"), KERNELS)
        with pytest.raises(ValueError, match=r"rank=9, expected at most 8, the singular values"):
            jaxpeft.init(KEY, lora.Spec(rank=9, start="olora"), KERNELS, BASE)


class TestDora:
    @pytest.mark.parametrize("spec", [lora.Spec(rank=3, dora=True), full.Spec(dora=True)], ids=["factors", "formed"])
    def test_the_norms_are_those_of_the_sum(self, spec) -> None:
        adapter = trained(jaxpeft.init(KEY, spec, KERNELS, BASE))
        merged = jaxpeft.merge(BASE, adapter)
        for layer in range(3):
            norms = jnp.linalg.norm(merged["layers"][layer]["up"]["kernel"], axis=0)
            np.testing.assert_allclose(norms, jnp.abs(adapter.params[UP]["magnitude"][layer]), rtol=1e-5)

    def test_no_update_is_formed(self) -> None:
        """The norms come from the factors: nothing as large as a kernel but the kernel's own squares."""
        update = LowRank(jnp.ones((2, 12)), jnp.ones((2, 8)), jnp.float32(1))
        jaxpr = jax.make_jaxpr(Decomposed(update, jnp.ones(8), jnp.float32(1)).norm)(jnp.ones((12, 8)))
        made = [(e.primitive.name, v.aval.shape) for e in jaxpr.jaxpr.eqns for v in e.outvars]
        assert [name for name, shape in made if shape == (12, 8)] in (["integer_pow"], ["square"])

    def test_the_norm_carries_no_gradient(self) -> None:
        update = LowRank(jnp.ones((2, 12)), 0.1 * jnp.ones((2, 8)), jnp.float32(1))
        weight = jax.random.normal(KEY, (12, 8))
        decomposed = Decomposed(update, jnp.ones(8), jnp.float32(1))

        def out(b):
            return jnp.sum(dataclasses.replace(decomposed, update=dataclasses.replace(update, b=b)).materialize(weight))

        expected = 12 * (1 / decomposed.norm(weight))
        np.testing.assert_allclose(jax.grad(out)(update.b)[0], expected, rtol=1e-4)

    def test_where_it_cannot_be(self) -> None:
        with pytest.raises(ValueError, match="dora=True, expected weights=base"):
            jaxpeft.init(KEY, lora.Spec(rank=3, dora=True), KERNELS)
        with pytest.raises(ValueError, match="dora=True, expected False: norm/scale is a vector"):
            jaxpeft.init(KEY, full.Spec(dora=True), jaxpeft.find(BASE, "norm/scale"), BASE)

    def test_with_dropout_it_keeps_the_undropped_norm(self) -> None:
        adapter = trained(jaxpeft.init(KEY, lora.Spec(rank=3, dora=True, dropout=0.5), KERNELS, BASE))
        forward = jaxpeft.adapt(lambda base, x: x @ base["layers"][0]["up"]["kernel"])
        x = jnp.ones((1, 12))
        sites = jaxpeft.find({"layers": BASE["layers"][:1]}, ".*kernel")
        first = jax.tree.map(lambda leaf: leaf[:1], (adapter.params, adapter.constants))
        one = jaxpeft.Adapter(*first, adapter.spec, sites)
        one = dataclasses.replace(one, sites=sites)
        means = jnp.mean(jax.vmap(lambda key: forward(BASE, one, x, dropout_key=key))(jax.random.split(KEY, 4000)), 0)
        np.testing.assert_allclose(means, forward(BASE, one, x), atol=0.1)


class TestDropout:
    X = jax.random.normal(jax.random.key(2), (4, 6, 12))
    UPDATE = LowRank(
        jax.random.normal(jax.random.key(3), (2, 12)), jax.random.normal(jax.random.key(4), (2, 8)), jnp.float32(1)
    )

    @pytest.mark.parametrize("on", ["input", "factors", "update"])
    @pytest.mark.parametrize("pattern", ["element", "column", "key"])
    def test_the_mean_stays(self, on, pattern) -> None:
        if (on, pattern) == ("factors", "key"):
            with pytest.raises(ValueError, match="factors see no tokens"):
                lora.Spec(rank=2, dropout_on=on, dropout_pattern=pattern)
            return
        keys = jax.random.split(KEY, 4000)
        dropped = jax.vmap(lambda key: Dropout(self.UPDATE, key, 0.3, on, pattern).delta_matmul(self.X))(keys)
        expected = self.UPDATE.delta_matmul(self.X)
        np.testing.assert_allclose(dropped.mean(0), expected, atol=0.08 * float(jnp.abs(expected).max()))
        assert bool((dropped[0] != dropped[1]).any())

    def test_patterns(self) -> None:
        def kept(pattern: str) -> jax.Array:
            ones = LowRank(jnp.eye(12), jnp.eye(12), jnp.float32(1))
            return Dropout(ones, KEY, 0.5, "update", pattern).delta_matmul(jnp.ones((4, 6, 12))) > 0

        columns, tokens, elements = kept("column"), kept("key"), kept("element")
        assert bool((columns == columns[:, :1]).all())
        assert bool(columns.any())
        assert not bool(columns.all())
        assert bool((tokens == tokens[..., :1]).all())
        assert not bool((elements == elements[:, :1]).all() | (elements == elements[..., :1]).all())

    def test_factors_must_exist(self) -> None:
        adapter = jaxpeft.init(KEY, full.Spec(dropout=0.1, dropout_on="factors"), KERNELS)
        forward = jaxpeft.adapt(lambda base, x: sum(x @ p["up"]["kernel"] for p in base["layers"]))
        half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), BASE)
        with pytest.raises(ValueError, match="needs a product of two factors, not Dense"):
            forward(half, adapter, jnp.ones((2, 12), jnp.bfloat16), dropout_key=KEY)


class TestMixed:
    def test_patterns_change_rank_and_alpha(self) -> None:
        sites = jaxpeft.find(zoo.MODELS["plain scanned"]().params, r".*(up|down)/kernel")
        spec = mixed.Spec(default=lora.Spec(rank=2), overrides={r".*down/kernel": {"rank": 4, "alpha": 2.0}})
        adapter = jaxpeft.init(KEY, spec, sites)
        assert {name: leaves["a"].shape[1] for name, leaves in adapter.params.items()} == {
            "layers/up/kernel": 2,
            "layers/down/kernel": 4,
        }
        assert [float(adapter.constants[f"layers/{name}/kernel"]["scale"][0]) for name in ("up", "down")] == [8, 0.5]
        assert spec_from_dict(spec.to_dict()) == spec

    def test_heads_norms_and_biases_are_trained_whole(self) -> None:
        def apply(base, x):
            for p in base["layers"]:
                x = jnp.tanh(x @ p["up"]["kernel"] + p["up"]["bias"])
            return x * base["norm"]["scale"]

        params = base(in_dim=8)
        sites = jaxpeft.find(params, r"layers/.*|norm/scale")
        spec = mixed.Spec(default=lora.Spec(rank=2), overrides={r".*bias|norm/scale": full.Spec()})
        adapter = trained(jaxpeft.init(KEY, spec, sites))
        x = jnp.ones((3, 8))
        np.testing.assert_allclose(
            jaxpeft.adapt(apply)(params, adapter, x), apply(jaxpeft.merge(params, adapter), x), atol=1e-5
        )
        assert not jaxpeft.explain(apply, params, adapter, x).materialized

    def test_shared_arrays_of_each_part_stay_apart(self) -> None:
        sites = jaxpeft.find(zoo.MODELS["plain scanned"]().params, r".*(up|down)/kernel")
        spec = mixed.Spec(
            default=spec_from_dict({"method": "vera", "rank": 4}),
            overrides={r".*down/kernel": {"method": "vera", "rank": 2}},
        )
        adapter = jaxpeft.init(KEY, spec, sites)
        assert set(adapter.constants["shared"]) == {"0", "1"}

    def test_errors(self) -> None:
        default = lora.Spec(rank=2)
        with pytest.raises(ValueError, match=r"matches 1 of the 3 layers of layers/\*/up/kernel"):
            jaxpeft.init(KEY, mixed.Spec(default=default, overrides={"layers/0/up/kernel": {"rank": 4}}), KERNELS)
        with pytest.raises(ValueError, match=r"'.\*dwon.\*' rules nothing: it matches no site; nearest"):
            jaxpeft.init(KEY, mixed.Spec(default=default, overrides={".*dwon.*": {"rank": 4}}), KERNELS)
        overrides = {".*": {"rank": 4}, ".*up.*": {"rank": 3}}
        with pytest.raises(ValueError, match="an earlier pattern takes all it matches"):
            jaxpeft.init(KEY, mixed.Spec(default=default, overrides=overrides), KERNELS)
        with pytest.raises(ValueError, match="'rnak': did you mean 'rank'"):
            mixed.Spec(default=default, overrides={".*": {"rnak": 4}})
        with pytest.raises(ValueError, match=r"dropout=0\.1, expected it in the parts' own specs"):
            mixed.Spec(default=default, overrides={}, dropout=0.1)


class TestRows:
    def test_only_the_named_rows_change(self) -> None:
        sites = jaxpeft.find(BASE, "embed/embedding")
        adapter = trained(jaxpeft.init(KEY, rows.Spec(indices=(19, 3)), sites))
        moved = jaxpeft.delta(adapter)["embed/embedding"].any(axis=1)
        assert jnp.flatnonzero(moved).tolist() == [3, 19]

    def test_lookup_and_tied_head(self) -> None:
        def apply(base, ids):
            x = base["embed"]["embedding"][ids]
            return x, x @ base["embed"]["embedding"].T

        adapter = trained(jaxpeft.init(KEY, rows.Spec(indices=(19, 3)), jaxpeft.find(BASE, "embed/embedding")))
        ids = jnp.array([[3, 4, 19, 0]])
        found = jaxpeft.adapt(apply)(BASE, adapter, ids)
        assert not jaxpeft.explain(apply, BASE, adapter, ids).materialized
        for ours, expected in zip(found, apply(jaxpeft.merge(BASE, adapter), ids), strict=True):
            np.testing.assert_allclose(ours, expected, atol=1e-5)

    def test_errors(self) -> None:
        with pytest.raises(ValueError, match="expected each row once"):
            rows.Spec(indices=(1, 1))
        with pytest.raises(ValueError, match="rows of embed/embedding, 0 to 19"):
            jaxpeft.init(KEY, rows.Spec(indices=(20,)), jaxpeft.find(BASE, "embed/embedding"))
