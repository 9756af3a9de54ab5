"""Which of the methods does PEFT have, and how do its config fields and tensors correspond to ours?"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from jaxpeft.methods import boft, c3a, hira, ia3, loha, lokr, lora, miss, oft, randlora, vblora, vera
from jaxpeft.spec import Spec, name_of

Turn = Callable[[np.ndarray], np.ndarray]


class View(NamedTuple):
    """How PEFT keeps one layer's array: `write` makes its array of ours, `read` ours of its."""

    write: Turn
    read: Turn


def _flip(array: np.ndarray) -> np.ndarray:
    return np.swapaxes(array, -1, -2)


def _swap_first(array: np.ndarray) -> np.ndarray:
    return np.swapaxes(array, 0, 1)


SAME = View(lambda x: x, lambda x: x)
FLIPPED = View(_flip, _flip)
SWAPPED = View(_swap_first, _swap_first)
NEGATED = View(np.negative, np.negative)
GAIN_COLUMN = View(lambda g: 1 + g[:, None], lambda x: x[:, 0] - 1)
GAIN_ROW = View(lambda g: 1 + g[None], lambda x: x[0] - 1)


@dataclass(frozen=True)
class Tensor:
    """One array of the file, of a module or shared by all.

    Attributes:
        name: what follows the module's name, or "base_model." if it is shared.
        leaf: ours, in the group's or the shared arrays; where an adapter has no such leaf the file has none.
        view: how the file keeps it.
        frozen: whether it is one of our constants.
        embedding: its name on an embedding.
    """

    name: str
    leaf: str
    view: View = SAME
    frozen: bool = False
    embedding: str = ""


@dataclass(frozen=True, eq=False)
class Format:
    """A method as PEFT has it.

    Attributes:
        peft_type: its name in the config.
        method: our module's name.
        config: the fields of a spec, without alpha; None if PEFT cannot say it.
        spec: the spec of the fields, defaults filled in.
        tensors: the arrays of a module.
        shared: arrays that all modules share.
        alpha: the field that is alpha; empty if there is none.
        fold: the leaf that takes a scale other than 1 where there is no such field.
        scale_free: whether our alpha has no effect.
        dropout: the field of dropout on the input.
        patterns: {field of a pattern over modules: the field it varies}.
        listed: {field that lists modules: the true-or-false field of `config` that it says}.
        defaults: PEFT's defaults of the fields that `spec` reads.
        fixed: {field: the one value that is supported}; other values are refused.
        ignored: fields that do not change what the adapter computes.
        rescales_bias: whether PEFT rescales the layer's bias too, which we do not.
        repeated: whether PEFT repeats the shared arrays under every module.
        conv1d: whether it knows GPT-2's Conv1D, by the field ``fan_in_fan_out``.
        biases: whether it trains biases, by the field ``bias``.
    """

    peft_type: str
    method: str
    config: Callable[[Any], dict[str, Any] | None]
    spec: Callable[[Mapping[str, Any]], Spec]
    tensors: Callable[[Any], tuple[Tensor, ...]]
    shared: tuple[Tensor, ...] = ()
    alpha: str = ""
    fold: str = ""
    scale_free: bool = False
    dropout: str = ""
    patterns: Mapping[str, str] = dataclasses.field(default_factory=dict)
    listed: Mapping[str, str] = dataclasses.field(default_factory=dict)
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    rescales_bias: bool = False
    repeated: bool = False
    conv1d: bool = False
    biases: bool = False

    @property
    def bias_only(self) -> str:
        """The value of ``bias`` for the biases of the adapted modules."""
        return f"{self.peft_type.lower()}_only"


def _lora(config: Mapping[str, Any]) -> Spec:
    start = str(config["init_lora_weights"]).lower()
    return lora.Spec(
        rank=config["r"],
        alpha=config["lora_alpha"],
        rslora=config["use_rslora"],
        dora=config["use_dora"],
        start=start if start in ("pissa", "olora") else "method",
        dropout=config["lora_dropout"],
    )


def _ranked(spec: Any) -> dict[str, Any]:
    return {"r": spec.rank}


def _lokr(config: Mapping[str, Any]) -> Spec:
    factor = config["decompose_factor"]
    return lokr.Spec(
        rank=config["r"],
        alpha=config["alpha"],
        decompose_both=config["decompose_both"],
        decompose_factor=None if factor == -1 else factor,
    )


def _lokr_config(spec: lokr.Spec) -> dict[str, Any]:
    factor = -1 if spec.decompose_factor is None else spec.decompose_factor
    return {"r": spec.rank, "decompose_both": spec.decompose_both, "decompose_factor": factor}


def _vblora_config(spec: vblora.Spec) -> dict[str, Any]:
    fields = {"r": spec.rank, "topk": spec.top_k}
    fields |= {"num_vectors": spec.num_vectors, "vector_length": spec.vector_length}
    return {**fields, "init_vector_bank_bound": spec.bank_bound, "init_logits_std": spec.logits_std}


def _vblora(config: Mapping[str, Any]) -> Spec:
    return vblora.Spec(
        rank=config["r"],
        num_vectors=config["num_vectors"],
        vector_length=config["vector_length"],
        top_k=config["topk"],
        bank_bound=config["init_vector_bank_bound"],
        logits_std=config["init_logits_std"],
        dropout=config["vblora_dropout"],
    )


def _randlora_config(spec: randlora.Spec) -> dict[str, Any] | None:
    if spec.order != "peft" or spec.num_bases is not None:
        return None
    return {"r": spec.rank, "sparse": spec.distribution == "sparse", "very_sparse": spec.distribution == "very_sparse"}


def _randlora(config: Mapping[str, Any]) -> Spec:
    kind = "very_sparse" if config["very_sparse"] else "sparse" if config["sparse"] else "uniform"
    return randlora.Spec(
        rank=config["r"],
        alpha=config["randlora_alpha"],
        distribution=kind,
        order="peft",
        dropout=config["randlora_dropout"],
    )


def _miss_config(spec: miss.Spec) -> dict[str, Any]:
    start = {"standard": True}.get(spec.variant, spec.variant)
    return {"r": spec.rank, "init_weights": start, "mini_r": spec.mini_rank or 1}


def _miss(config: Mapping[str, Any]) -> Spec:
    start = config["init_weights"]
    variant = start if start in ("bat", "mini") else "standard"
    mini = config["mini_r"] if variant == "mini" else None
    return miss.Spec(rank=config["r"], variant=variant, mini_rank=mini, dropout=config["miss_dropout"])


def _oft(config: Mapping[str, Any]) -> Spec:
    cayley = "neumann" if config["use_cayley_neumann"] else "exact"
    return oft.Spec(block_size=config["oft_block_size"], block_share=config["block_share"], cayley=cayley)


def _oft_config(spec: oft.Spec) -> dict[str, Any]:
    neumann = spec.cayley == "neumann"
    return {"oft_block_size": spec.block_size, "block_share": spec.block_share, "use_cayley_neumann": neumann}


def _boft_config(spec: boft.Spec) -> dict[str, Any] | None:
    # With more factors PEFT needs a GPU; without one it takes one factor, and other weights.
    return {"boft_block_size": spec.block_size} if spec.butterfly_factors == 1 else None


def _lokr_tensors(spec: lokr.Spec) -> tuple[Tensor, ...]:
    del spec
    tensors = [Tensor(f"lokr_{side}", side, FLIPPED) for side in ("w1", "w2")]
    for side in ("w1", "w2"):
        tensors += [Tensor(f"lokr_{side}_a", f"{side}_b", FLIPPED), Tensor(f"lokr_{side}_b", f"{side}_a")]
    return tuple(tensors)


def _always(*tensors: Tensor) -> Callable[[Any], tuple[Tensor, ...]]:
    return lambda spec: tensors


_LYCORIS = {"rank_pattern": "r", "alpha_pattern": "alpha"}
_DROPOUTS = ("rank_dropout", "module_dropout", "rank_dropout_scale")

FORMATS = (
    Format(
        "LORA",
        "lora",
        config=lambda s: {"r": s.rank, "use_rslora": s.rslora, "use_dora": s.dora},
        spec=_lora,
        tensors=_always(
            Tensor("lora_A.weight", "a", embedding="lora_embedding_A"),
            Tensor("lora_B.weight", "b", FLIPPED, embedding="lora_embedding_B"),
            Tensor("lora_magnitude_vector", "magnitude"),
        ),
        alpha="lora_alpha",
        dropout="lora_dropout",
        patterns={"rank_pattern": "r", "alpha_pattern": "lora_alpha"},
        defaults={
            "r": 8,
            "lora_alpha": 8,
            "use_rslora": False,
            "use_dora": False,
            "init_lora_weights": True,
            "lora_dropout": 0.0,
        },
        ignored=("megatron_core", "qalora_group_size", "velora_config", "eva_config", "runtime_config"),
        conv1d=True,
        biases=True,
    ),
    Format(
        "VERA",
        "vera",
        config=lambda s: {"r": s.rank, "d_initial": s.d_initial},
        spec=lambda c: vera.Spec(rank=c["r"], d_initial=c["d_initial"], dropout=c["vera_dropout"]),
        tensors=_always(Tensor("vera_lambda_d", "lambda_d"), Tensor("vera_lambda_b", "lambda_b")),
        shared=(Tensor("vera_A", "a", frozen=True), Tensor("vera_B", "b", FLIPPED, frozen=True)),
        fold="lambda_b",
        dropout="vera_dropout",
        defaults={"r": 256, "d_initial": 0.1, "vera_dropout": 0.0},
        fixed={"save_projection": True},
        ignored=("projection_prng_key",),
        conv1d=True,
        biases=True,
    ),
    Format(
        "VBLORA",
        "vblora",
        config=_vblora_config,
        spec=_vblora,
        tensors=_always(Tensor("vblora_logits_A", "logits_a"), Tensor("vblora_logits_B", "logits_b", SWAPPED)),
        shared=(Tensor("vblora_vector_bank", "bank"),),
        dropout="vblora_dropout",
        defaults={
            "r": 4,
            "num_vectors": 256,
            "vector_length": 256,
            "topk": 2,
            "init_vector_bank_bound": 0.02,
            "init_logits_std": 0.1,
            "vblora_dropout": 0.0,
        },
        fixed={"save_only_topk_weights": False},
        conv1d=True,
        biases=True,
    ),
    Format(
        "LOHA",
        "loha",
        config=_ranked,
        spec=lambda c: loha.Spec(rank=c["r"], alpha=c["alpha"]),
        tensors=_always(
            *(Tensor(f"hada_w{k}_a", f"b{k}", FLIPPED) for k in (1, 2)),
            *(Tensor(f"hada_w{k}_b", f"a{k}") for k in (1, 2)),
        ),
        alpha="alpha",
        patterns=_LYCORIS,
        defaults={"r": 8, "alpha": 8},
        ignored=(*_DROPOUTS, "use_effective_conv2d"),
    ),
    Format(
        "LOKR",
        "lokr",
        config=_lokr_config,
        spec=_lokr,
        tensors=_lokr_tensors,
        alpha="alpha",
        patterns=_LYCORIS,
        defaults={"r": 8, "alpha": 8, "decompose_both": False, "decompose_factor": -1},
        ignored=(*_DROPOUTS, "use_effective_conv2d"),
    ),
    Format(
        "IA3",
        "ia3",
        config=lambda s: {"feedforward": s.on == "input"},
        spec=lambda c: ia3.Spec(on="input" if c["feedforward"] else "output"),
        tensors=lambda s: (Tensor("ia3_l", "g", GAIN_ROW if s.on == "input" else GAIN_COLUMN),),
        fold="g",
        listed={"feedforward_modules": "feedforward"},
        rescales_bias=True,
        conv1d=True,
    ),
    Format(
        "OFT",
        "oft",
        config=_oft_config,
        spec=_oft,
        tensors=lambda s: (Tensor("oft_R.weight", "q", SAME if s.cayley == "neumann" else NEGATED),),
        scale_free=True,
        defaults={"oft_block_size": 32, "block_share": False, "use_cayley_neumann": True},
        fixed={"r": 0, "coft": False, "num_cayley_neumann_terms": 5},
        ignored=("module_dropout", "eps"),
        biases=True,
    ),
    Format(
        "BOFT",
        "boft",
        config=_boft_config,
        spec=lambda c: boft.Spec(block_size=c["boft_block_size"], butterfly_factors=c["boft_n_butterfly_factor"]),
        tensors=_always(Tensor("boft_R", "q", FLIPPED), Tensor("boft_s", "s", GAIN_COLUMN)),
        scale_free=True,
        defaults={"boft_block_size": 4, "boft_n_butterfly_factor": 1},
        fixed={"boft_block_num": 0},
        ignored=("boft_dropout",),
        biases=True,
    ),
    Format(
        "RANDLORA",
        "randlora",
        config=_randlora_config,
        spec=_randlora,
        tensors=_always(Tensor("randlora_lambda", "lam", FLIPPED), Tensor("randlora_gamma", "gam")),
        shared=(
            Tensor("randlora_A", "a", View(lambda a: a[:, None], lambda a: a[:, 0]), frozen=True),
            Tensor(
                "randlora_B",
                "b",
                View(lambda b: np.transpose(b, (2, 0, 1)), lambda b: np.transpose(b, (1, 2, 0))),
                frozen=True,
            ),
        ),
        alpha="randlora_alpha",
        dropout="randlora_dropout",
        defaults={"r": 32, "randlora_alpha": 640, "sparse": False, "very_sparse": False, "randlora_dropout": 0.0},
        fixed={"save_projection": True},
        ignored=("projection_prng_key",),
        repeated=True,
        conv1d=True,
        biases=True,
    ),
    Format(
        "C3A",
        "c3a",
        config=lambda s: {"block_size": s.block_size},
        spec=lambda c: c3a.Spec(block_size=c["block_size"]),
        tensors=_always(Tensor("c3a_kernel", "w")),
        fold="w",
        patterns={"block_size_pattern": "block_size"},
        defaults={"block_size": 256},
        biases=True,
    ),
    Format(
        "MISS",
        "miss",
        config=_miss_config,
        spec=_miss,
        tensors=_always(Tensor("miss_block", "d")),
        fold="d",
        dropout="miss_dropout",
        defaults={"r": 64, "init_weights": True, "mini_r": 1, "miss_dropout": 0.0},
        ignored=("mini_r",),
    ),
    Format(
        "HIRA",
        "hira",
        config=_ranked,
        spec=lambda c: hira.Spec(rank=c["r"], dropout=c["hira_dropout"]),
        tensors=_always(Tensor("hira_A", "a"), Tensor("hira_B", "b", FLIPPED)),
        fold="b",
        dropout="hira_dropout",
        defaults={"r": 32, "hira_dropout": 0.0},
        ignored=("rank_pattern",),  # as PEFT does
        conv1d=True,
    ),
)
"""What PEFT has; LoRA stands first, and is also what all other low-rank methods are written as."""

LORA = FORMATS[0]


def format_of(spec: Spec) -> Format | None:
    """How PEFT has a spec's method; None if it has not."""
    return next((each for each in FORMATS if each.method == name_of(spec)), None)
