"""Facts of SuperLoRA, LoTR and LoRTA: published counts, special cases, projections, and how slices are laid out."""

import dataclasses
from functools import reduce

import jax
import numpy as np
import pytest

import jaxpeft
from jaxpeft import hadamard
from jaxpeft.methods import lokr, lora, lorta, lotr, superlora
from jaxpeft.updates import Dense, Kronecker, LowRank


def sites_of(layers: int, **kernels: tuple[int, int]) -> jaxpeft.Sites:
    """Stacked kernels, by name."""
    tree = {name: {"kernel": jax.ShapeDtypeStruct((layers, *dims), "float32")} for name, dims in kernels.items()}
    return jaxpeft.find({"layers": tree}, layouts={".*": "lio"})


def start_of(spec, sites: jaxpeft.Sites) -> jaxpeft.Adapter:
    return jax.jit(lambda: jaxpeft.init(jax.random.key(0), spec, sites))()


def adapter_of(spec, sites: jaxpeft.Sites) -> jaxpeft.Adapter:
    """An adapter in which no trained entry is zero; drawn in numpy, which compiles nothing."""
    random = np.random.default_rng(0)

    def draw(path, leaf) -> np.ndarray:
        group, name = (key.key for key in path[1:])
        if name == "scale":
            return np.full(leaf.shape, spec.scale(sites[group]), np.float32)
        if name in ("permutation", "shuffle"):
            return random.permuted(np.tile(np.arange(leaf.shape[1], dtype=np.int32), (leaf.shape[0], 1)), axis=1)
        if name == "signs":
            return random.integers(2, size=leaf.shape, dtype=np.uint8)
        return random.normal(size=leaf.shape).astype(np.float32)

    shapes = jax.eval_shape(lambda: jaxpeft.init(jax.random.key(0), spec, sites))
    return jax.tree_util.tree_map_with_path(draw, shapes)


def deltas(adapter: jaxpeft.Adapter) -> list[np.ndarray]:
    """ΔW / scale of every group, (L, in, out), in the sites' order."""
    found = jax.jit(jaxpeft.delta)(adapter)
    return [np.asarray(found[g.name]) / float(adapter.constants[g.name]["scale"][0]) for g in adapter.sites]


def dense_hadamard(size: int) -> np.ndarray:
    """By its definition: the parity of the common bits of row and column."""
    parity = [[(i & j).bit_count() % 2 for j in range(size)] for i in range(size)]
    return (1 - 2.0 * np.array(parity)) / np.sqrt(size)


def dense_fastfood(frozen, row: int, inputs: int, outputs: int) -> np.ndarray:
    signs, order, gaussian = (np.asarray(frozen[name])[row] for name in ("signs", "permutation", "gaussian"))
    signs, h = np.where(signs, -1, 1), dense_hadamard(len(signs))
    return (h @ np.diag(gaussian) @ np.eye(len(signs))[order] @ h @ np.diag(signs))[:outputs, :inputs]


MIXED = sites_of(3, q=(6, 4), v=(6, 9), up=(4, 5))
"""N = 3 · (24 + 54 + 20) = 294."""

JOINT = superlora.Spec(groups=4, order=3, rank=2, core="zero")


# The Walsh–Hadamard transform


@pytest.mark.parametrize("size", [1, 2, 8, 16, 32, 256, 512])
def test_fast_transform_is_the_dense_one(size) -> None:
    x = jax.random.normal(jax.random.key(size), (2, 3, size))
    np.testing.assert_allclose(hadamard.transform(x), np.asarray(x) @ dense_hadamard(size), atol=1e-5)
    np.testing.assert_allclose(hadamard.transform(hadamard.transform(x)), x, atol=1e-5)


def test_transform_costs_p_log_p() -> None:
    def flops_by_p_log_p(log: int) -> float:
        lowered = jax.jit(hadamard.transform).lower(jax.ShapeDtypeStruct((1 << log,), "float32"))
        return lowered.cost_analysis()["flops"] / (log << log)

    assert flops_by_p_log_p(20) == pytest.approx(flops_by_p_log_p(8), rel=0.01)
    assert flops_by_p_log_p(20) < 10


def test_transform_of_another_length_is_an_error() -> None:
    with pytest.raises(ValueError, match="needs a power of two; found length 12"):
        hadamard.transform(np.ones(12))


def test_fastfood_is_the_dense_product_and_every_slice_has_its_own() -> None:
    frozen = jax.jit(lambda: hadamard.draw(jax.random.key(0), 3, 50))()
    assert {name: (leaf.shape, leaf.dtype.name) for name, leaf in frozen.items()} == {
        "signs": ((3, 64), "uint8"),
        "permutation": ((3, 64), "int32"),
        "gaussian": ((3, 64), "float32"),
    }
    x = jax.random.normal(jax.random.key(1), (3, 20))
    found = jax.jit(lambda x: hadamard.fastfood(x, frozen, 50))(x)
    for row, vector in enumerate(np.asarray(x)):
        np.testing.assert_allclose(found[row], dense_fastfood(frozen, row, 20, 50) @ vector, atol=1e-5)
    for leaf in map(np.asarray, frozen.values()):
        assert (leaf[0] != leaf[1]).any()
    hadamard.check_permutations("drawn", np.asarray(frozen["permutation"]))


def test_scaled_projection_keeps_the_size_of_entries() -> None:
    spec = superlora.Spec(
        groups=2, order=1, rank=1, compression=0.1, projection="fastfood", scaled_projection=True, alpha=1.0
    )
    sites = sites_of(1, up=(96, 70))
    adapter = adapter_of(spec, sites)
    assert deltas(adapter)[0].std() == pytest.approx(1, rel=0.1)
    unscaled = adapter.replace(spec=dataclasses.replace(spec, scaled_projection=False))
    np.testing.assert_allclose(deltas(adapter)[0], deltas(unscaled)[0] * np.sqrt(4096 / 336), rtol=1e-4)


# Published counts

PUBLISHED_N = sites_of(1, all=(736, 768))
"""N = 565,248."""
VIT = sites_of(12, q=(768, 768), v=(768, 768))


@pytest.mark.parametrize(
    ("sites", "fields", "published"),
    [
        (PUBLISHED_N, {"order": 3, "groups": 12, "rank": 5, "core": "zero"}, 8_160),
        (PUBLISHED_N, {"order": 4, "groups": 12, "rank": 5, "core": "zero"}, 11_100),
        (PUBLISHED_N, {"order": 3, "groups": 1, "rank": 4, "core": "zero"}, 1_060),
        (PUBLISHED_N, {"order": 5, "groups": 1, "rank": 1, "core": "trainable"}, 76),
        (
            PUBLISHED_N,
            {"order": 5, "groups": 1, "rank": 1, "core": "zero", "compression": 0.01, "projection": "fastfood"},
            31,
        ),
        (
            PUBLISHED_N,
            {"order": 3, "groups": 4, "rank": 4, "core": "zero", "compression": 0.01, "projection": "fastfood"},
            832,
        ),
        (PUBLISHED_N, {"order": 2, "groups": 4, "rank": 4, "compression": 0.5, "projection": "permutation"}, 8_512),
        (VIT, {"order": 2, "groups": "weight", "rank": 3, "fold": "matrix"}, 3 * 36_864),
        (VIT, {"order": 2, "groups": 24, "rank": 3, "fold": "matrix"}, 3 * 36_864),
        (VIT, {"order": 2, "groups": 1, "rank": 3, "fold": "matrix"}, 3 * (768 + 24 * 768)),
        (VIT, {"order": 2, "groups": 1, "rank": 2}, 2 * 7_526),
        (VIT, {"order": 3, "groups": 1, "rank": 1, "core": "zero"}, 727),
        (VIT, {"order": 3, "groups": 1, "rank": 2, "core": "zero"}, 1_460),
        (VIT, {"order": 3, "groups": 1, "rank": 4, "core": "zero"}, 2_968),
        (VIT, {"order": 3, "groups": 1, "rank": 8, "core": "zero"}, 6_320),
    ],
)
def test_published_counts_without_memory(sites, fields, published) -> None:
    spec = superlora.Spec(**fields)
    adapter = jax.eval_shape(lambda: jaxpeft.init(jax.random.key(0), spec, sites))
    assert jaxpeft.count(adapter) == superlora.count(spec, sites) == published


# The construction, step by step


def by_hand(adapter: jaxpeft.Adapter) -> list[np.ndarray]:
    """ΔW / scale of a joint adapter, slice by slice in numpy."""
    spec, sites = adapter.spec, adapter.sites
    trained = {name: np.asarray(leaf, np.float64) for name, leaf in adapter.params["shared"].items()}
    frozen = adapter.constants.get("shared", {})
    size = int(np.ceil(sites.size / spec.groups))
    folded = int(np.ceil(spec.compression * size))
    shape = [min(d for d in range(1, folded + 1) if d**spec.order >= folded)] * spec.order
    if spec.fold == "matrix":
        shape = [int(np.ceil(folded / sites.groups[0].out_dim)), sites.groups[0].out_dim]
    pieces_of = []
    for g in range(spec.groups):
        pieces = []
        for k in range(1, spec.splits + 1):
            if k <= spec.dense_splits:
                pieces.append(trained[f"dense_{k}"][g])
                continue
            core = np.zeros((spec.rank,) * spec.order)
            np.fill_diagonal(core, 1)  # On an array of any order, the superdiagonal.
            core = core if spec.core == "identity" else trained[f"core_{k}"][g]
            for m in range(spec.order):
                core = np.moveaxis(np.tensordot(core, trained[f"plane_{k}_{m + 1}"][g], (m, 0)), -1, m)
            pieces.append(core)
        pieces_of.append(reduce(np.kron, pieces))
    vector = []
    for g, tensor in enumerate(pieces_of):
        assert all(have >= want for have, want in zip(tensor.shape, shape, strict=True))
        entries = tensor[tuple(slice(side) for side in shape)].ravel()[:folded]
        if spec.projection == "fastfood":
            entries = dense_fastfood(frozen, g, folded, size) @ entries
        if spec.projection == "permutation":
            entries = np.concatenate([entries, np.zeros(size - folded)])
        if "shuffle" in frozen:
            entries = entries[np.asarray(frozen["shuffle"][g])]
        vector.append(entries)
    vector = np.concatenate(vector)
    found = []
    for g in sites:
        part, vector = np.split(vector, [g.layers * g.in_dim * g.out_dim])
        found.append(part.reshape(g.layers, g.in_dim, g.out_dim))
    return found


@pytest.mark.parametrize(
    "spec",
    [
        JOINT,
        superlora.Spec(groups=5, order=4, rank=3),
        superlora.Spec(groups=7, order=2, rank=2, splits=2, core="trainable"),
        superlora.Spec(groups=2, order=3, rank=2, splits=2, dense_splits=1),
        superlora.Spec(groups=3, order=2, rank=2, shuffle=True),
        superlora.Spec(groups=3, order=2, rank=2, compression=0.4, projection="permutation"),
        superlora.Spec(groups=4, order=3, rank=2, compression=0.4, projection="fastfood", core="zero"),
        superlora.Spec(groups=4, order=2, rank=2, projection="fastfood", shuffle=True),
    ],
    ids=["tucker", "cp", "kronecker", "dense piece", "shuffle", "permutation", "fastfood", "fastfood and shuffle"],
)
def test_slices_of_unequal_weights(spec) -> None:
    """Cuts fall inside weights, the last slice is padded, surplus entries of a fold are dropped."""
    adapter = adapter_of(spec, MIXED)
    for found, expected in zip(deltas(adapter), by_hand(adapter), strict=True):
        np.testing.assert_allclose(found, expected, atol=2e-4)


def test_matrix_fold_across_weights() -> None:
    adapter = adapter_of(superlora.Spec(groups=4, order=2, rank=2, fold="matrix"), sites_of(3, q=(6, 4), up=(5, 4)))
    for found, expected in zip(deltas(adapter), by_hand(adapter), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_permutation_without_compression_is_shuffle() -> None:
    shuffled = adapter_of(superlora.Spec(groups=3, order=2, rank=2, shuffle=True), MIXED)
    same = shuffled.replace(spec=superlora.Spec(groups=3, order=2, rank=2, projection="permutation"))
    for found, expected in zip(deltas(same), deltas(shuffled), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_one_batched_contraction_whatever_the_groups() -> None:
    def operations(groups: int) -> int:
        spec = dataclasses.replace(JOINT, groups=groups, projection="fastfood", compression=0.5)
        adapter = jax.eval_shape(lambda: jaxpeft.init(jax.random.key(0), spec, MIXED))
        return len(jax.make_jaxpr(jaxpeft.Adapter.updates)(adapter).eqns)

    assert operations(42) == operations(21)


def test_sides_are_exact_where_a_floating_point_root_is_not() -> None:
    for side in (6, 37, 1000, 4097):
        for order in (1, 2, 3, 5):
            assert superlora._root(side**order, order) == side
            assert superlora._root(side**order + 1, order) == side + 1
    assert superlora._balanced(37, 2) == [7, 6]
    assert superlora._divisors(768, 3) == [8, 8, 12]
    for side in (1, 2, 12, 127, 576):
        assert tuple(superlora._divisors(side, 2)) == lokr.factorize(side)


def test_start() -> None:
    """Exactly one zero piece, of the last tensor; plane factors as LoRA's first."""
    for spec, zero in [
        (superlora.Spec(groups=2, order=3, rank=2, splits=2, core="zero"), "core_2"),
        (superlora.Spec(groups=2, order=3, rank=2, splits=2, core="trainable"), "plane_2_3"),
        (superlora.Spec(groups=2, order=3, rank=2, splits=2), "plane_2_3"),
        (superlora.Spec(groups=2, order=3, rank=2, splits=2, dense_splits=2), "dense_2"),
    ]:
        adapter = start_of(spec, MIXED)
        leaves = adapter.params["shared"]
        assert [name for name, leaf in leaves.items() if not leaf.any()] == [zero]
        assert not any(delta.any() for delta in deltas(adapter))
    adapter = start_of(superlora.Spec(groups=1, order=2, rank=5), sites_of(1, up=(900, 900)))
    plane = adapter.params["shared"]["plane_1_1"]
    assert abs(np.asarray(plane)).max() <= 1 / 30
    assert plane.std() == pytest.approx(1 / 30 / np.sqrt(3), rel=0.03)


# Special cases, each against its own implementation

WEIGHT_WISE = {"groups": "weight", "order": 2, "fold": "matrix"}


def carry(adapter: jaxpeft.Adapter, spec, names: dict[str, str]) -> jaxpeft.Adapter:
    """The adapter of another method with the arrays of this one: {its name: the other's}."""
    params = {g.name: {new: adapter.params[g.name][old] for old, new in names.items()} for g in adapter.sites}
    other = adapter_of(spec, adapter.sites)
    assert jax.tree.map(np.shape, other.params) == jax.tree.map(np.shape, params)
    return other.replace(params=params)


def test_lora() -> None:
    adapter = adapter_of(superlora.Spec(**WEIGHT_WISE, rank=3), MIXED)
    other = carry(adapter, lora.Spec(rank=3), {"plane_1_1": "a", "plane_1_2": "b"})
    assert jaxpeft.count(adapter) == jaxpeft.count(other)
    jax.tree.map(np.testing.assert_array_equal, adapter.updates(), other.updates())
    start = start_of(adapter.spec, sites_of(200, up=(12, 8))).params["layers/up/kernel"]
    assert not start["plane_1_2"].any()
    assert start["plane_1_1"].std() == pytest.approx(1 / np.sqrt(12 * 3), rel=0.03)


@pytest.mark.parametrize("core", ["trainable", "zero"])
def test_weight_wise_with_a_core_is_factored_too(core) -> None:
    adapter = adapter_of(superlora.Spec(**WEIGHT_WISE, rank=3, core=core), MIXED)
    trained = adapter.params["layers/q/kernel"]
    expected = np.einsum("lri,lrs,lso->lio", trained["plane_1_1"], trained["core_1"], trained["plane_1_2"])
    assert isinstance(adapter.updates()["layers/q/kernel"], LowRank)
    np.testing.assert_allclose(deltas(adapter)[0], expected, atol=1e-4)


def test_lokr() -> None:
    sites = sites_of(3, q=(24, 24), up=(24, 54))
    adapter = adapter_of(superlora.Spec(**WEIGHT_WISE, rank=2, splits=2, dense_splits=1), sites)
    names = {"dense_1": "w1", "plane_2_1": "w2_a", "plane_2_2": "w2_b"}
    other = carry(adapter, lokr.Spec(rank=2), names)
    assert jaxpeft.count(adapter) == jaxpeft.count(other)
    jax.tree.map(np.testing.assert_array_equal, adapter.updates(), other.updates())


@pytest.mark.parametrize("groups", [1, 2])
def test_lotr(groups) -> None:
    """One group a module type, of weights of one shape: the first mode is the layer."""
    sites = sites_of(4, q=(6, 9), v=(6, 9)) if groups == 2 else sites_of(4, q=(6, 9))
    adapter = adapter_of(superlora.Spec(groups=groups, order=3, rank=2, core="zero", fold="stack", alpha=1.0), sites)
    shared = adapter.params["shared"]
    assert shared["core_1"].shape == (groups, 4, 2, 2)
    names = {"plane_1_2": "a", "plane_1_3": "b", "core_1": "core"}
    params = {g.name: {new: shared[old][i] for old, new in names.items()} for i, g in enumerate(sites)}
    other = adapter_of(lotr.Spec(rank=2), sites).replace(params=params)
    assert jaxpeft.count(adapter) == jaxpeft.count(other)
    for found, expected in zip(deltas(adapter), deltas(other), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-4)


def test_lonkr() -> None:
    """K > 2, group-wise: a slice of 64 entries is three 2 x 2 matrices, each of rank 2."""
    sites = sites_of(1, q=(8, 10), v=(6, 8))
    adapter = adapter_of(superlora.Spec(groups=2, order=2, rank=2, splits=3), sites)
    shared = adapter.params["shared"]
    assert shared["plane_3_2"].shape == (2, 2, 2)
    pieces = [shared[f"plane_{k}_1"].mT @ shared[f"plane_{k}_2"] for k in (1, 2, 3)]
    slices = [np.kron(np.kron(pieces[0][g], pieces[1][g]), pieces[2][g]).ravel() for g in range(2)]
    found = np.concatenate([delta.ravel() for delta in deltas(adapter)])
    np.testing.assert_allclose(found, np.concatenate(slices), atol=1e-4)


def test_lonkr_of_single_weights_is_not_formed() -> None:
    adapter = adapter_of(superlora.Spec(**WEIGHT_WISE, rank=2, splits=3), sites_of(2, up=(12, 30)))
    trained = adapter.params["layers/up/kernel"]
    update = adapter.updates()["layers/up/kernel"]
    assert isinstance(update, Kronecker)
    for layer in range(2):
        pieces = [trained[f"plane_{k}_1"][layer].T @ trained[f"plane_{k}_2"][layer] for k in (1, 2, 3)]
        np.testing.assert_allclose(deltas(adapter)[0][layer], reduce(np.kron, pieces), atol=1e-4)


def test_superloras_lorta() -> None:
    """K = 1, M > 2, group-wise."""
    adapter = adapter_of(JOINT, sites_of(1, q=(16, 8), up=(16, 8)))
    shared = adapter.params["shared"]
    planes = [shared[f"plane_1_{m}"] for m in (1, 2, 3)]
    expected = np.einsum("grst,gra,gsb,gtc->gabc", shared["core_1"], *planes)
    found = np.concatenate([delta.ravel() for delta in deltas(adapter)])
    np.testing.assert_allclose(found, expected.ravel(), atol=1e-4)


@pytest.mark.parametrize("fields", [{"core": "zero"}, {"core": "trainable"}, {"dense_splits": 1}])
def test_dense_groups_reach_any_target(fields) -> None:
    """At r = d with identity plane factors, or trained whole, a slice is its own core."""
    sites = sites_of(2, q=(6, 4), up=(4, 9))
    spec = superlora.Spec(groups=2, order=3, rank=4, **fields)
    adapter = adapter_of(spec, sites)
    target = np.random.default_rng(0).normal(size=(2, sites.size // 2)).astype(np.float32)
    free = np.pad(target, ((0, 0), (0, 64 - 60))).reshape(2, 4, 4, 4)
    if spec.dense_splits:
        shared = {"dense_1": free}
    else:
        planes = {f"plane_1_{m}": np.broadcast_to(np.eye(4), (2, 4, 4)) for m in (1, 2, 3)}
        shared = {"core_1": free, **planes}
    found = deltas(adapter.replace(params={**adapter.params, "shared": shared}))
    np.testing.assert_allclose(np.concatenate([delta.ravel() for delta in found]), target.ravel(), atol=1e-6)


def test_intrinsic_dimension() -> None:
    """M = 1: all weights are F·θ, with a dense F of fastfood's entries."""
    spec = superlora.Spec(groups=1, order=1, rank=1, compression=0.1, projection="fastfood")
    adapter = adapter_of(spec, MIXED)
    assert jaxpeft.count(adapter) == 30
    theta = np.asarray(adapter.params["shared"]["plane_1_1"]).ravel()
    dense = dense_fastfood(adapter.constants["shared"], 0, 30, 294)
    found = np.concatenate([delta.ravel() for delta in deltas(adapter)])
    np.testing.assert_allclose(found, dense @ theta, atol=1e-4)


def test_what_is_formed() -> None:
    """Slices that run across weights, or are folded, shuffled or projected, are formed; the others are not."""
    for fields, kind in [
        ({}, LowRank),
        ({"splits": 2}, Kronecker),
        ({"dense_splits": 1}, Dense),
        ({"shuffle": True}, Dense),
        ({"projection": "fastfood"}, Dense),
        ({"fold": "cube"}, Dense),
    ]:
        spec = superlora.Spec(**{**WEIGHT_WISE, "rank": 2, **fields})
        updates = jax.eval_shape(lambda spec=spec: adapter_of(spec, MIXED).updates())
        assert {type(update) for update in updates.values()} == {kind}, fields


def test_groups_of_weights_may_be_shuffled_and_projected_too() -> None:
    spec = superlora.Spec(groups="weight", order=3, rank=2, compression=0.5, projection="fastfood", shuffle=True)
    adapter = adapter_of(spec, MIXED)
    for g, found in zip(MIXED, deltas(adapter), strict=True):
        trained, frozen = adapter.params[g.name], adapter.constants[g.name]
        size = g.in_dim * g.out_dim
        for layer in range(g.layers):
            entries = np.einsum("ra,rb,rc->abc", *[trained[f"plane_1_{m}"][layer] for m in (1, 2, 3)]).ravel()
            projected = dense_fastfood(frozen, layer, size // 2, size) @ entries[: size // 2]
            np.testing.assert_allclose(found[layer].ravel(), projected[np.asarray(frozen["shuffle"][layer])], atol=1e-4)


# Errors


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"groups": 0}, "groups=0, expected at least 1, or 'weight'"),
        ({"groups": "layer"}, "groups='layer', expected at least 1, or 'weight'"),
        ({"order": 0}, "order=0, expected at least 1"),
        ({"rank": 0}, "rank=0, expected at least 1"),
        ({"splits": 0}, "splits=0, expected at least 1"),
        ({"dense_splits": 2}, "dense_splits=2, expected from 0 to splits=1"),
        ({"compression": 0.0}, r"compression=0.0, expected in \(0, 1\]"),
        ({"compression": 0.5}, "projection='none', expected permutation or fastfood below compression=1"),
        ({"core": "random"}, "core='random', expected identity, trainable or zero"),
        ({"fold": "row"}, "fold='row', expected cube, matrix or stack"),
        ({"projection": "gaussian"}, "projection='gaussian', expected none, permutation or fastfood"),
        ({"scaled_projection": True}, "projection='none', expected fastfood with scaled_projection=True"),
        ({"fold": "matrix"}, "order=3, expected 2 with fold='matrix'"),
        ({"fold": "stack", "order": 2}, "order=2, expected 3 with fold='stack'"),
        ({"fold": "stack", "groups": "weight"}, "groups='weight', expected a number with fold='stack'"),
        ({"fold": "stack", "splits": 2}, "splits=2, expected 1 with fold='stack'"),
        ({"fold": "stack"}, "core='identity', expected zero with fold='stack'"),
        (
            {"fold": "stack", "core": "zero", "compression": 0.5, "projection": "fastfood"},
            "compression=0.5, expected 1 with fold='stack'",
        ),
    ],
)
def test_bad_hyper_parameters(fields, message) -> None:
    with pytest.raises(ValueError, match=f"superlora.Spec: {message}"):
        superlora.Spec(**{"groups": 4, "order": 3, "rank": 2, **fields})


@pytest.mark.parametrize(
    ("fields", "sites", "message"),
    [
        ({"groups": 200}, MIXED, "groups=200 slices of ⌈N/G⌉=2 leave slices empty, N=294; nearest that does not: 147"),
        (
            {"order": 2, "fold": "matrix"},
            MIXED,
            "fold='matrix' across weights needs equal out; layers/q/kernel is 6x4, layers/up/kernel is 4x5",
        ),
        (
            {"fold": "stack", "core": "zero"},
            sites_of(3, q=(6, 4), up=(5, 4)),
            "fold='stack' across weights needs equal in and out; layers/q/kernel is 6x4, layers/up/kernel is 5x4",
        ),
        (
            {"fold": "stack", "core": "zero"},
            sites_of(3, q=(6, 4), up=(6, 4)),
            "groups=4 does not divide 6 weights; nearest that does: 3",
        ),
    ],
)
def test_specs_that_do_not_fit_the_sites(fields, sites, message) -> None:
    with pytest.raises(ValueError, match=f"superlora.Spec: {message}"):
        start_of(superlora.Spec(**{"groups": 4, "order": 3, "rank": 2, **fields}), sites)


def test_corrupted_constants_are_found() -> None:
    spec = superlora.Spec(groups=2, order=2, rank=2, projection="fastfood", shuffle=True)
    constants = adapter_of(spec, MIXED).constants
    superlora.check_constants(constants, spec, MIXED)
    for name, message in [
        ("permutation", r"shared/permutation: a row is not a permutation of 0\.\.255"),
        ("shuffle", r"shared/shuffle: a row is not a permutation of 0\.\.146"),
        ("signs", "shared/signs: an entry is neither 0 nor 1"),
    ]:
        broken = {**constants["shared"], name: np.full_like(constants["shared"][name], 2)}
        with pytest.raises(ValueError, match=message):
            superlora.check_constants({**constants, "shared": broken}, spec, MIXED)


# LoTR and LoRTA


def test_lotr_confines_all_layers_to_one_subspace() -> None:
    sites = sites_of(6, q=(20, 15))
    adapter = adapter_of(lotr.Spec(rank=3), sites)
    delta = deltas(adapter)[0]
    trained = adapter.params["layers/q/kernel"]
    np.testing.assert_allclose(delta[4], trained["a"].T @ trained["core"][4] @ trained["b"], atol=1e-4)
    assert np.linalg.matrix_rank(np.concatenate(delta, axis=0), tol=1e-3) == 3
    assert np.linalg.matrix_rank(np.concatenate(delta, axis=1), tol=1e-3) == 3
    assert jaxpeft.count(adapter) == 3 * (20 + 15) + 6 * 3**2
    start = start_of(lotr.Spec(rank=50), sites_of(1, q=(100, 100))).params["layers/q/kernel"]
    assert not start["core"].any()
    assert (float(start["a"].std()), float(start["b"].std())) == (pytest.approx(1, rel=0.03),) * 2


def test_lotr_count_of_the_authors_example() -> None:
    """RoBERTa-base, query and value, rank 2: their 595,298 - 592,130 are with one pair for both types."""
    sites = sites_of(12, query=(768, 768), value=(768, 768))
    assert lotr.count(lotr.Spec(rank=2), sites) == (595_298 - 592_130) + 2 * (768 + 768)


def test_lorta_is_a_tensor_of_order_five() -> None:
    sites = sites_of(3, q=(10, 12), v=(10, 12), up=(10, 18))
    adapter = adapter_of(lorta.Spec(rank=2, heads=3), sites)
    shared = adapter.params["shared"]
    assert set(shared) == {
        f"{name}_{shape}" for name in ("a", "b", "heads", "layers", "types") for shape in ("10x12x3", "10x18x3")
    }
    names = ("a", "b", "heads", "layers", "types")
    expected = np.einsum("ji,jd,jh,lj,tj->tlihd", *[shared[f"{name}_10x12x3"] for name in names])
    found = dict(zip((g.name.split("/")[1] for g in sites), deltas(adapter), strict=True))
    np.testing.assert_allclose(found["q"], expected[0].reshape(3, 10, 12), atol=1e-4)
    np.testing.assert_allclose(found["v"], expected[1].reshape(3, 10, 12), atol=1e-4)
    assert jaxpeft.count(adapter) == 2 * (10 + 4 + 3 + 3 + 2) + 2 * (10 + 6 + 3 + 3 + 1)


def test_lorta_start_and_count() -> None:
    """LLaMA2-7B's q, k, v, o: 4,292 numbers a rank for 128 weights."""
    square = (4096, 4096)
    sites = sites_of(32, q=square, k=square, v=square, o=square)
    assert lorta.count(lorta.Spec(rank=4, heads=32), sites) == 4 * (4096 + 128 + 32 + 32 + 4)
    start = start_of(lorta.Spec(rank=24, heads=20), sites_of(60, q=(600, 40))).params["shared"]
    assert [name for name, leaf in start.items() if not leaf.any()] == ["b_600x40x60"]
    assert abs(start["a_600x40x60"]).max() == pytest.approx(1 / np.sqrt(24), rel=0.02)
    for name in ("heads", "layers"):
        assert abs(start[f"{name}_600x40x60"]).max() == pytest.approx(0.5, rel=0.02)


def test_lorta_errors() -> None:
    with pytest.raises(ValueError, match=r"lorta.Spec: heads=0, expected at least 1"):
        lorta.Spec(rank=2, heads=0)
    with pytest.raises(ValueError, match="heads=5 does not divide out=4 of layers/q/kernel; nearest that does: 4"):
        start_of(lorta.Spec(rank=2, heads=5), sites_of(2, q=(6, 4)))
    for method in (lotr.Spec, lorta.Spec):
        with pytest.raises(ValueError, match="rank=0, expected at least 1"):
            method(**{"rank": 0} | ({"heads": 1} if method is lorta.Spec else {}))
