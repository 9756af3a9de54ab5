"""What `find` matches, how it groups, and what it says when it cannot."""

import jax
import numpy as np
import pytest
import zoo
from flax import nnx
from moved import moved

import jaxpeft
from jaxpeft.methods import lora
from jaxpeft.sites import Sites


def shape(*sizes: int, dtype: str = "float32") -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, dtype)


def unrolled(layers: int = 3) -> dict:
    block = {
        "q_proj": {"kernel": shape(8, 4), "bias": shape(4)},
        "v_proj": {"kernel": shape(8, 4)},
        "norm": {"scale": shape(8)},
    }
    return {"embed": {"embedding": shape(20, 8)}, "layers": [block] * layers, "lm_head": {"kernel": shape(8, 20)}}


def stacked(layers: int = 3) -> dict:
    return {
        "layers": {
            "q_proj": {"kernel": shape(layers, 8, 4)},
            "query": {"kernel": shape(layers, 8, 2, 2)},
            "norm": {"scale": shape(layers, 8)},
        },
        "lm_head": {"kernel": shape(8, 20)},
    }


def test_four_ways_to_select_agree() -> None:
    params = unrolled()
    ways = [
        r".*/(q|v)_proj/kernel",
        ["q_proj", "v_proj"],
        ["q_proj/kernel", "layers/0/v_proj/kernel", "layers/1/v_proj/kernel", "v_proj"],
        "all-linear",
        lambda path, leaf: path.endswith("_proj/kernel"),
    ]
    found = [jaxpeft.find(params, way) for way in ways]
    assert all(sites == found[0] for sites in found)
    group = found[0]["layers/*/q_proj/kernel"]
    assert group.paths == tuple(f"layers/{i}/q_proj/kernel" for i in range(3))
    assert (group.layers, group.in_dim, group.out_dim, group.layout) == (3, 8, 4, "io")


def test_more_than_ten_layers_keep_their_order() -> None:
    (group,) = jaxpeft.find({f"block_{i}": {"up": {"kernel": shape(2, 2)}} for i in range(12)})
    assert group.name == "block_*/up/kernel"
    assert group.paths == tuple(f"block_{i}/up/kernel" for i in range(12))


def test_stacked_layers_are_read_off_the_tree() -> None:
    sites = jaxpeft.find(stacked())
    assert [(g.name, g.layout, g.layers) for g in sites] == [
        ("layers/q_proj/kernel", "lio", 3),
        ("layers/query/kernel", "lioo", 3),
    ]


def test_attention_kernels_are_not_taken_for_stacks() -> None:
    params = {"attn": {"query": {"kernel": shape(8, 2, 4)}, "out": {"kernel": shape(2, 4, 8)}}}
    assert [(g.layout, g.in_dim, g.out_dim) for g in jaxpeft.find(params)] == [("iio", 8, 8), ("ioo", 8, 8)]


def test_layers_without_norms_show_their_stack_by_a_bias() -> None:
    (group,) = jaxpeft.find({"layers": {"up": {"kernel": shape(3, 8, 4), "bias": shape(3, 4)}}})
    assert group.layout == "lio"


def test_an_uncertain_kernel_asks_for_a_declaration() -> None:
    params = {"experts": {"up": {"kernel": shape(4, 8, 16)}}}
    with pytest.raises(ValueError, match=r"not certain from its name.*layouts=\{'experts/up/kernel': 'lio'\}"):
        jaxpeft.find(params)
    (group,) = jaxpeft.find(params, layouts={"experts/.*": "lio"})
    assert (group.layers, group.in_dim, group.out_dim) == (4, 8, 16)
    (other,) = jaxpeft.find(params, layouts={"experts/.*": "ilo"})
    assert (other.layers, other.in_dim) == (8, 4)


@pytest.mark.parametrize(
    ("layouts", "message"),
    [
        ({".*": "li"}, "expected letters i"),
        ({".*": "xio"}, "expected letters i"),
        ({".*q_proj/kernel": "lio"}, "has 3 letters, but layers/0/q_proj/kernel has shape"),
        ({".*k_proj/kernel": "oi"}, "matches none of"),
    ],
)
def test_bad_layouts(layouts, message) -> None:
    with pytest.raises(ValueError, match=message):
        jaxpeft.find(unrolled(), layouts=layouts)


def test_nothing_matches_names_near_misses() -> None:
    with pytest.raises(ValueError, match=r"matches none of \d+ arrays; nearest: layers/\*/q_proj/kernel"):
        jaxpeft.find(unrolled(), r".*/qproj/kernel")
    with pytest.raises(ValueError, match=r"names that match nothing: 'k_proj': nearest:"):
        jaxpeft.find(unrolled(), ["q_proj", "k_proj"])
    with pytest.raises(ValueError, match="is not a regular expression"):
        jaxpeft.find(unrolled(), r"(q_proj")


OWN = {"w1": shape(4, 4), "w2": shape(4, 4)}
STATE = nnx.eval_shape(lambda: nnx.state(nnx.Sequential(nnx.Linear(4, 8, rngs=nnx.Rngs(0)))))


@pytest.mark.parametrize(
    ("params", "selection", "options", "remedy"),
    [
        (OWN, "all-linear", {}, r"nearest: w1, w2; 'all-linear' takes .* by Flax's names; .* model=.* layouts="),
        (OWN, ["all-linear"], {}, "by Flax's names"),
        (OWN, "all-linear", {"model": lambda params: params["w1"] + 1}, "no product of the model is with one of them"),
        (OWN, ".*/kernel", {}, "nearest: w1, w2$"),
        (OWN, lambda path, leaf: False, {}, "arrays; nearest: w1, w2$"),
        (unrolled(), "all_linear", {}, "did you mean 'all-linear'\\?$"),
        (unrolled(), "AllLinear", {}, "did you mean 'all-linear'\\?$"),
        (unrolled(), "q_proj", {}, r"regular expression of the whole path.*list: selection=\['q_proj'\]$"),
        (unrolled(), "q_proj/kernel", {}, r"list: selection=\['q_proj/kernel'\]$"),
        (unrolled(), ".*", {"exclude": "norm/scale"}, r"list: exclude=\['norm/scale'\]$"),
        (STATE, "all-linear", {}, r"nnx\.to_pure_dict\(state\), or .* model="),
        (STATE, ".*/kernel", {}, r"nnx\.to_pure_dict\(state\)"),
        (STATE, ["kernel"], {}, r"nnx\.to_pure_dict\(state\)"),
        ({}, "all-linear", {}, "the tree holds no arrays$"),
    ],
)
def test_nothing_matches_says_what_to_do(params, selection, options, remedy) -> None:
    with pytest.raises(ValueError, match=remedy):
        jaxpeft.find(params, selection, **options)


def test_an_nnx_state_is_adapted_as_it_is() -> None:
    class Model(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.up, self.lm_head = nnx.Linear(4, 8, rngs=rngs), nnx.Linear(8, 6, rngs=rngs)

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.lm_head(jax.nn.relu(self.up(x)))

    graph, state = nnx.split(Model(nnx.Rngs(0)))
    x = jax.random.normal(jax.random.key(0), (3, 4))

    def model(state: nnx.State, x: jax.Array) -> jax.Array:
        return nnx.merge(graph, state)(x)

    sites = jaxpeft.find(state, model=lambda state: model(state, x))
    assert [(group.name, group.layout) for group in sites] == [("up/kernel/value", "io")]  # and not the head
    adapter = moved(jaxpeft.init(jax.random.key(1), lora.Spec(rank=2), sites), 0.1)
    found, base = jaxpeft.adapt(model)(state, adapter, x), model(state, x)
    np.testing.assert_allclose(found, model(jaxpeft.merge(state, adapter), x), atol=1e-6)
    assert not np.allclose(found, base, atol=1e-3)


def test_exclude_and_layers() -> None:
    params = unrolled()
    assert [g.name for g in jaxpeft.find(params, exclude=["v_proj"])] == ["layers/*/q_proj/kernel"]
    with pytest.raises(ValueError, match="leaves out nothing"):
        jaxpeft.find(params, ["q_proj"], exclude=["v_proj"])
    with pytest.raises(ValueError, match="leaves out everything"):
        jaxpeft.find(params, ["q_proj"], exclude=".*")
    (group,) = jaxpeft.find(params, ["q_proj"], layers=[2, 0])
    assert group.paths == ("layers/0/q_proj/kernel", "layers/2/q_proj/kernel")
    (group,) = jaxpeft.find(stacked(), ["q_proj"], layers=range(1, 3))
    assert (group.entries, group.layers) == ((1, 2), 2)
    for tree in (params, stacked()):
        with pytest.raises(ValueError, match=r"layers \[7\] do not exist.*there are 0 to 2$"):
            jaxpeft.find(tree, ["q_proj"], layers=[1, 7])
        with pytest.raises(ValueError, match="leaves no layer"):
            jaxpeft.find(tree, ["q_proj"], layers=[])
    for tree in (unrolled(2), stacked(2)):
        with pytest.raises(ValueError, match=r"layers \[2\] do not exist.*there are 0, 1$"):
            jaxpeft.find(tree, ["q_proj"], layers=[2])
    with pytest.raises(ValueError, match="no layer number and no stack axis"):
        jaxpeft.find(params, ["embed", "q_proj"], layers=[1])


def test_vectors_are_weights_of_one_input_for_the_methods_that_adapt_them() -> None:
    sites = jaxpeft.find(unrolled(), ".*bias")
    assert {(group.layout, group.in_dim) for group in sites} == {("o", 1)}
    with pytest.raises(ValueError, match="is a vector, which lora cannot adapt"):
        jaxpeft.init(jax.random.key(0), lora.Spec(rank=1), sites)


def test_names_next_to_all_linear_kernels() -> None:
    params = {**unrolled(), "lm_head": {"kernel": shape(8, 20)}}
    linear, more = jaxpeft.find(params), jaxpeft.find(params, ["all-linear", "lm_head", "norm/scale"])
    extra = [group.name for group in more if group not in linear.groups]
    assert extra == ["layers/*/norm/scale", "lm_head/kernel"]


def test_integers_and_single_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="a single number is no site"):
        jaxpeft.find({"up": {"scale": shape()}}, ".*")
    with pytest.raises(ValueError, match="only floating-point"):
        jaxpeft.find({"up": {"kernel": shape(2, 2, dtype="int8")}})


def test_types_of_one_name_but_two_shapes_are_two_groups() -> None:
    sites = jaxpeft.find({"layers": [{"up": {"kernel": shape(4, n)}} for n in (8, 8, 16)]})
    assert [(g.name, g.layers) for g in sites] == [
        ("layers/*/up/kernel [4x8]", 2),
        ("layers/*/up/kernel [4x16]", 1),
    ]


def test_description_is_read_back() -> None:
    sites = jaxpeft.find(stacked(), "all-linear", layers=[1])
    assert Sites.from_dict(sites.to_dict()) == sites
    with pytest.raises(KeyError, match="nearest: layers/q_proj/kernel"):
        sites["layers/qproj/kernel"]


def test_every_model_of_the_zoo_is_understood() -> None:
    for name, make in zoo.MODELS.items():
        model = make()
        assert jaxpeft.find(model.params).size == jaxpeft.find(model.params, model.pattern).size, name
