"""Kronecker, Hadamard and multiplicative updates merge as Hugging Face PEFT merges them."""

import jax
import jax.numpy as jnp
import numpy as np
import peft_oracle as oracle
import pytest

import jaxpeft
from jaxpeft.methods import boft, glora, hira, ia3, loha, lokr, oft

pytestmark = pytest.mark.parity
peft = pytest.importorskip("peft", reason="peft is not installed: pip install 'jaxpeft[parity]'")

LAYERS, IN, OUT = 2, 12, 18


def transposed(**names: str):
    """PEFT's matrices {its name: ours}, all stored the other way round."""
    return lambda leaves: {f"{theirs}.default": leaves[ours].T for theirs, ours in names.items()}


def glora_of(leaves):
    names = {"a_in": "glora_A.default.Xu", "a_out": "glora_A.default.Xd"}
    names |= {"b_in": "glora_B.default.Xu", "b_out": "glora_B.default.Xd"}
    return {name: leaves[leaf] if leaf.endswith("in") else leaves[leaf].T for leaf, name in names.items()}


def glora_vectors(leaves):
    return {"glora_A.default.X": leaves["a_out"].T, "glora_B.default.X": leaves["b_out"].T}


def glora_scalars(leaves):
    return {"glora_A.default.X": leaves["a_out"][0], "glora_B.default.X": leaves["b_out"][0]}


def boft_of(leaves):
    return {"boft_R.default": jnp.swapaxes(leaves["q"], -1, -2), "boft_s.default": 1 + leaves["s"][:, None]}


def loha_of(leaves):
    names = {"hada_w1_a": "b1", "hada_w2_a": "b2"}
    return transposed(**names)(leaves) | {f"hada_w{k}_b.default": leaves[f"a{k}"] for k in (1, 2)}


def lokr_low_rank(*sides: str):
    def fill(leaves):
        whole = {f"lokr_{name}.default": leaf.T for name, leaf in leaves.items() if name in ("w1", "w2")}
        outs = {f"lokr_{side}_a.default": leaves[f"{side}_b"].T for side in sides}
        return whole | outs | {f"lokr_{side}_b.default": leaves[f"{side}_a"] for side in sides}

    return fill


CASES = {
    "lokr": (lokr.Spec(rank=2, alpha=3), "LoKrConfig", {"r": 2, "alpha": 3}, lokr_low_rank("w2")),
    "lokr dense": (lokr.Spec(rank=8, alpha=3), "LoKrConfig", {"r": 8, "alpha": 3}, lokr_low_rank()),
    "lokr factor": (
        lokr.Spec(rank=2, alpha=3, decompose_factor=2),
        "LoKrConfig",
        {"r": 2, "alpha": 3, "decompose_factor": 2},
        lokr_low_rank("w2"),
    ),
    "lokr both": (
        lokr.Spec(rank=1, alpha=3, decompose_both=True),
        "LoKrConfig",
        {"r": 1, "alpha": 3, "decompose_both": True},
        lokr_low_rank("w1", "w2"),
    ),
    "loha": (loha.Spec(rank=3, alpha=2), "LoHaConfig", {"r": 3, "alpha": 2}, loha_of),
    "ia3": (ia3.Spec(), "IA3Config", {"feedforward_modules": []}, lambda p: {"ia3_l.default": 1 + p["g"][:, None]}),
    "ia3 input": (
        ia3.Spec(on="input"),
        "IA3Config",
        {"feedforward_modules": ["proj"]},
        lambda p: {"ia3_l.default": 1 + p["g"][None]},
    ),
    "oft neumann": (
        oft.Spec(block_size=4, cayley="neumann"),
        "OFTConfig",
        {"oft_block_size": 4, "use_cayley_neumann": True},
        lambda p: {"oft_R.default.weight": p["q"]},
    ),
    "oft exact": (
        oft.Spec(block_size=4),
        "OFTConfig",
        {"oft_block_size": 4, "use_cayley_neumann": False},
        lambda p: {"oft_R.default.weight": -p["q"]},
    ),
    "oft shared": (
        oft.Spec(block_size=6, block_share=True),
        "OFTConfig",
        {"oft_block_size": 6, "use_cayley_neumann": False, "block_share": True},
        lambda p: {"oft_R.default.weight": -p["q"]},
    ),
    "glora": (glora.Spec(rank=3), "GloraConfig", {"r": 3, "config_A_B": "lora"}, glora_of),
    "glora vectors": (
        glora.Spec(rank=3, a="vector", b="vector"),
        "GloraConfig",
        {"r": 3, "config_A_B": "vector"},
        glora_vectors,
    ),
    "glora scalars": (
        glora.Spec(rank=3, a="scalar", b="scalar"),
        "GloraConfig",
        {"r": 3, "config_A_B": "constant"},
        glora_scalars,
    ),
    "hira": (
        hira.Spec(rank=3),
        "HiraConfig",
        {"r": 3},
        lambda p: {"hira_A.default": p["a"], "hira_B.default": p["b"].T},
    ),
    "boft": (
        boft.Spec(block_size=4),
        "BOFTConfig",
        {"boft_block_size": 4, "boft_block_num": 0},
        boft_of,
    ),
}


def filled(leaves, entries):
    """PEFT's state of all layers, from `entries` of one layer's leaves."""
    return {
        f"base_model.model.layers.{layer}.proj.{name}": array
        for layer in range(LAYERS)
        for name, array in entries({leaf: value[layer] for leaf, value in leaves.items()}).items()
    }


@pytest.mark.filterwarnings("ignore:Failed to load the CUDA extension", "ignore:Setting boft_n_butterfly_factor to 1")
@pytest.mark.parametrize(("spec", "config", "fields", "entries"), CASES.values(), ids=CASES.keys())
def test_merged_weight(spec, config, fields, entries) -> None:
    params = oracle.base(LAYERS, IN, OUT)
    adapter = oracle.trained(jaxpeft.init(jax.random.key(0), spec, jaxpeft.find(params)))
    (leaves,) = adapter.params.values()
    theirs = oracle.merged_by_peft(
        getattr(peft, config)(target_modules=["proj"], **fields), params, lambda state: filled(leaves, entries)
    )
    oracle.assert_equal(oracle.merged_by_us(adapter, params), theirs)


@pytest.mark.parametrize(
    ("dim", "factor"), [(d, f) for d in (1, 12, 18, 30, 64, 127, 768) for f in (None, 2, 5, 8, 16)]
)
def test_lokr_splits_dimensions_alike(dim, factor) -> None:
    from peft.tuners.lokr.layer import factorization

    assert lokr.factorize(dim, factor) == factorization(dim, -1 if factor is None else factor)


@pytest.mark.parametrize("factors", [1, 2, 3])
def test_boft_permutes_alike(factors) -> None:
    """PEFT's own permutations and product of factors, which without its CUDA kernel it builds but does not use."""
    import torch
    from peft.tuners.boft.layer import BOFTLayer

    block, dim, out = 4, 32, 6
    params = oracle.base(1, dim, out)
    spec = boft.Spec(block_size=block, butterfly_factors=factors)
    adapter = oracle.trained(jaxpeft.init(jax.random.key(0), spec, jaxpeft.find(params)))
    (leaves,) = adapter.params.values()
    skewed = torch.tensor(np.array(boft_of({name: leaf[0] for name, leaf in leaves.items()})["boft_R.default"]))
    rotation = torch.eye(dim)
    for level, blocks in enumerate(skewed):
        order = BOFTLayer.block_butterfly_perm(None, dim, dim // block // 2**level, block // 2, factors - 1)
        permutation = BOFTLayer.perm2mat(None, order)
        diagonal = torch.block_diag(*BOFTLayer.cayley_batch(None, blocks))
        rotation = permutation @ diagonal @ permutation.T @ rotation
    weight = np.asarray(params["layers"][0]["proj"]["kernel"])
    theirs = rotation.numpy() @ weight * (1 + np.asarray(leaves["s"][0]))
    oracle.assert_equal(oracle.merged_by_us(adapter, params), [theirs])
