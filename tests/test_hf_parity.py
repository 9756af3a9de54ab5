"""Adapters cross over to Hugging Face PEFT and back with the same logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from moved import moved

import jaxpeft
from jaxpeft import models
from jaxpeft.methods import (
    boft,
    c3a,
    fourierft,
    full,
    hira,
    ia3,
    loha,
    lokr,
    lora,
    miss,
    mixed,
    mos,
    oft,
    prolora,
    randlora,
    superlora,
    vblora,
    vera,
)
from jaxpeft.models.pretrained import _packaged, cache_folder

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'jaxpeft[parity]'")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")
peft = pytest.importorskip("peft", reason="peft is not installed: pip install 'jaxpeft[parity]'")

TOKENS = np.random.default_rng(0).integers(0, 40, (2, 9))
QUIET = [
    "ignore:Failed to load the CUDA extension",
    "ignore:Setting boft_n_butterfly_factor to 1",
    "ignore:Could not find a config file in",
    "ignore:`is_gradient_checkpointing` is deprecated",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Llama with biases and a head of its own, as transformers saves it."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=40,
        hidden_size=24,
        intermediate_size=36,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        attention_bias=True,
        tie_word_embeddings=False,
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    path = tmp_path_factory.mktemp("llama")
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def lm(folder):
    return models.load(folder, tokenizer=False)


def torch_model(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()


def logits_of_peft(folder, adapter):
    model = peft.PeftModel.from_pretrained(torch_model(folder), adapter).eval()
    with torch.no_grad():
        return model(torch.tensor(TOKENS)).logits.numpy()


def logits_of_ours(lm, adapter):
    return jaxpeft.adapt(lm.logits)(lm.params, adapter, jnp.asarray(TOKENS))


def assert_equal(found, expected, plain, tolerance=1e-4) -> None:
    """The same logits, and other ones than the base model's."""
    assert np.abs(expected - plain).max() > 100 * tolerance
    np.testing.assert_allclose(found, expected, atol=tolerance, rtol=0)


QV, LINEAR = r".*/(q|v)_proj/kernel", r"layers/.*_proj/kernel"
FROM_US = {
    "lora": (lora.Spec(rank=3), LINEAR, "LORA"),
    "lora rslora dora": (lora.Spec(rank=3, rslora=True, dora=True), LINEAR, "LORA"),
    "lora pissa": (lora.Spec(rank=3, start="pissa"), LINEAR, "LORA"),
    "lora embedding": (lora.Spec(rank=3), r"embed/embedding|.*/q_proj/kernel|lm_head/kernel", "LORA"),
    "mos": (mos.Spec(rank=4, equivalent_rank=2, private_rank=1, shards_per_vector=4), LINEAR, "LORA"),
    "mos dora": (mos.Spec(rank=4, equivalent_rank=2, shards_per_vector=4, dora=True), LINEAR, "LORA"),
    "prolora": (prolora.Spec(rank=4, unshared_rank=1, sharing_in=3, sharing_out=3), LINEAR, "LORA"),
    "vera": (vera.Spec(rank=5, alpha=2.0), LINEAR, "VERA"),
    "vblora": (vblora.Spec(rank=3, num_vectors=7, vector_length=6), LINEAR, "VBLORA"),
    "loha": (loha.Spec(rank=2, alpha=3), LINEAR, "LOHA"),
    "loha rslora": (loha.Spec(rank=2, alpha=3, rslora=True), LINEAR, "LOHA"),
    "lokr": (lokr.Spec(rank=2, alpha=3), LINEAR, "LOKR"),
    "lokr both": (lokr.Spec(rank=1, alpha=3, decompose_both=True, decompose_factor=4), LINEAR, "LOKR"),
    "ia3": (
        mixed.Spec(default=ia3.Spec(), overrides={".*/down_proj/kernel": {"on": "input"}}),
        r".*/(gate|down)_proj/kernel",
        "IA3",
    ),
    "oft": (oft.Spec(block_size=4), LINEAR, "OFT"),
    "oft neumann": (oft.Spec(block_size=4, cayley="neumann"), LINEAR, "OFT"),
    "boft": (boft.Spec(block_size=4), LINEAR, "BOFT"),
    "randlora": (randlora.Spec(rank=5, alpha=5, order="peft"), LINEAR, "RANDLORA"),
    "c3a": (c3a.Spec(block_size=6, alpha=3.0), QV, "C3A"),
    "miss": (miss.Spec(rank=5, alpha=0.5), LINEAR, "MISS"),
    "miss bat": (miss.Spec(rank=4, variant="bat"), LINEAR, "MISS"),
    "hira": (hira.Spec(rank=3), LINEAR, "HIRA"),
    "fourierft": (fourierft.Spec(n_frequency=30, alpha=50), QV, "LORA"),
    "superlora": (superlora.Spec(groups=3, order=3, rank=5, core="trainable"), QV, "LORA"),
    "ranks and heads": (
        mixed.Spec(
            default=lora.Spec(rank=3),
            overrides={
                r".*/v_proj/kernel": {"rank": 2, "alpha": 3.0},
                r".*/down_proj/kernel": mos.Spec(rank=4, equivalent_rank=2, shards_per_vector=4),
                r"lm_head/kernel|norm/scale|layers/input_norm/scale": full.Spec(),
            },
        ),
        r".*(q|v|down)_proj/kernel|lm_head/kernel|norm/scale|layers/input_norm/scale",
        "LORA",
    ),
    "vera and biases": (
        mixed.Spec(default=vera.Spec(rank=5), overrides={r".*bias": full.Spec()}),
        r".*q_proj/(kernel|bias)",
        "VERA",
    ),
    "all biases": (
        mixed.Spec(default=lora.Spec(rank=3), overrides={r".*bias": full.Spec()}),
        r".*q_proj/kernel|.*bias",
        "LORA",
    ),
}


# PEFT 0.21 asks for RandLoRA's shared bases once for every module, though one copy serves them all.
COPIES = r"ignore:Found missing adapter keys while loading the checkpoint. \['base_model.*randlora_A.default"


@pytest.mark.filterwarnings(*QUIET, COPIES)
@pytest.mark.parametrize(("spec", "selection", "kind"), FROM_US.values(), ids=FROM_US.keys())
def test_ours_in_peft(spec, selection, kind, folder, lm, tmp_path) -> None:
    sites = jaxpeft.find(lm.params, selection)
    adapter = moved(jaxpeft.init(jax.random.key(0), spec, sites, lm.params), 0.1)
    rank = None if spec != FROM_US["superlora"][0] and spec != FROM_US["fourierft"][0] else 24
    report = jaxpeft.to_peft(tmp_path / "a", adapter, base_model=str(folder), base=lm.params, rank=rank)
    assert report.peft_type == kind
    ours = logits_of_ours(lm, adapter)
    assert_equal(ours, logits_of_peft(folder, tmp_path / "a"), lm.logits(lm.params, TOKENS))
    again = jaxpeft.from_peft(tmp_path / "a", lm.params)
    np.testing.assert_allclose(logits_of_ours(lm, again), ours, atol=1e-4)


def trained(model):
    """A PEFT model with no trained number as it was at the start."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


Q_DOWN = {"target_modules": ["q_proj", "down_proj"]}
FROM_PEFT = {
    "lora": ("LoraConfig", {"r": 3, "lora_alpha": 5, **Q_DOWN}),
    "rslora": ("LoraConfig", {"r": 3, "use_rslora": True, **Q_DOWN}),
    "dora": ("LoraConfig", {"r": 3, "use_dora": True, **Q_DOWN}),
    "all-linear": ("LoraConfig", {"r": 2, "target_modules": "all-linear"}),
    "regex": ("LoraConfig", {"r": 2, "target_modules": r".*layers\.[02]\..*(q|down)_proj"}),
    "some layers": ("LoraConfig", {"r": 2, "layers_to_transform": [0, 2], "layers_pattern": "layers", **Q_DOWN}),
    "excluded": ("LoraConfig", {"r": 2, "exclude_modules": r".*\.1\..*", **Q_DOWN}),
    "patterns": (
        "LoraConfig",
        {
            "r": 3,
            "rank_pattern": {"down_proj": 5, r"layers\.1\.self_attn\.q_proj": 6},
            "alpha_pattern": {r"layers\.2.*q_proj": 20, "down_proj": 3},
            **Q_DOWN,
        },
    ),
    "dora patterns": ("LoraConfig", {"r": 3, "rank_pattern": {r"1\.self_attn\.q_proj": 6}, "use_dora": True, **Q_DOWN}),
    "rslora patterns": (
        "LoraConfig",
        {"r": 3, "rank_pattern": {r"1\.self_attn\.q_proj": 6}, "use_rslora": True, **Q_DOWN},
    ),
    "modules to save": ("LoraConfig", {"r": 2, "modules_to_save": ["lm_head", "input_layernorm", "k_proj"], **Q_DOWN}),
    "bias all": ("LoraConfig", {"r": 2, "bias": "all", **Q_DOWN}),
    "bias lora_only": ("LoraConfig", {"r": 2, "bias": "lora_only", "use_dora": True, **Q_DOWN}),
    "embeddings": ("LoraConfig", {"r": 2, "target_modules": ["embed_tokens", "lm_head", "q_proj"]}),
    "pissa": ("LoraConfig", {"r": 3, "init_lora_weights": "pissa", **Q_DOWN}),
    "olora": ("LoraConfig", {"r": 3, "init_lora_weights": "olora", "use_rslora": True, **Q_DOWN}),
    "vera": ("VeraConfig", {"r": 4, **Q_DOWN}),
    "vera head": ("VeraConfig", {"r": 4, "modules_to_save": ["lm_head"], "bias": "vera_only", **Q_DOWN}),
    "vblora": ("VBLoRAConfig", {"r": 2, "num_vectors": 6, "vector_length": 6, **Q_DOWN}),
    "loha": ("LoHaConfig", {"r": 2, "rank_pattern": {"down_proj": 3}, "alpha_pattern": {"q_proj": 2}, **Q_DOWN}),
    "lokr": ("LoKrConfig", {"r": 2, "rank_pattern": {"down_proj": 1}, **Q_DOWN}),
    "lokr both": ("LoKrConfig", {"r": 1, "decompose_both": True, "decompose_factor": 4, **Q_DOWN}),
    "ia3": ("IA3Config", {"target_modules": ["gate_proj", "down_proj"], "feedforward_modules": ["down_proj"]}),
    "oft": ("OFTConfig", {"oft_block_size": 4, **Q_DOWN}),
    "oft exact": ("OFTConfig", {"oft_block_size": 6, "use_cayley_neumann": False, "block_share": True, **Q_DOWN}),
    "boft": ("BOFTConfig", {"boft_block_size": 4, **Q_DOWN}),
    "randlora": ("RandLoraConfig", {"r": 5, "randlora_alpha": 10, **Q_DOWN}),
    "c3a": ("C3AConfig", {"block_size": 6, **Q_DOWN}),
    "miss": ("MissConfig", {"r": 5, **Q_DOWN}),
    "miss mini": ("MissConfig", {"r": 5, "init_weights": "mini", "mini_r": 6, **Q_DOWN}),
    "miss bat": ("MissConfig", {"r": 4, "init_weights": "bat", **Q_DOWN}),
    "hira": ("HiraConfig", {"r": 4, "rank_pattern": {"down_proj": 2}, **Q_DOWN}),
}


@pytest.mark.filterwarnings(*QUIET, COPIES)
@pytest.mark.parametrize(("config", "fields"), FROM_PEFT.values(), ids=FROM_PEFT.keys())
def test_theirs_in_jax(config, fields, folder, lm, tmp_path) -> None:
    torch.manual_seed(0)
    model = trained(peft.get_peft_model(torch_model(folder), getattr(peft, config)(task_type="CAUSAL_LM", **fields)))
    with torch.no_grad():
        expected = model(torch.tensor(TOKENS)).logits.numpy()
    model.save_pretrained(tmp_path / "a", save_embedding_layers=False)
    adapter = jaxpeft.from_peft(tmp_path / "a", lm.params)
    assert_equal(logits_of_ours(lm, adapter), expected, lm.logits(lm.params, TOKENS))
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    padded = "patterns" in str(fields) or "rank_pattern" in fields
    assert jaxpeft.count(adapter) == trainable or padded
    jaxpeft.to_peft(tmp_path / "b", adapter, base_model=str(folder), base=lm.params)
    assert_equal(logits_of_peft(folder, tmp_path / "b"), expected, lm.logits(lm.params, TOKENS))


@pytest.mark.filterwarnings(*QUIET)
def test_conv1d(tmp_path) -> None:
    """GPT-2's layers, (in, out) in torch and (out, in) in Flax: the merged weights agree, both ways."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=40, n_positions=16, n_embd=12, n_layer=2, n_head=2)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    config.save_pretrained(tmp_path)
    blocks = {}
    for name, weight in model.state_dict().items():
        if "c_fc" in name or "c_attn" in name:
            *path, leaf = name.split(".")
            node = blocks
            for step in path:
                node = node.setdefault(step, {})
            node["kernel" if leaf == "weight" else leaf] = jnp.asarray(weight.numpy().T)
    layouts = {".*kernel": "oi"}
    sites = jaxpeft.find(blocks, ".*(c_fc|c_attn)/kernel", layouts=layouts)
    adapter = jaxpeft.init(jax.random.key(0), lora.Spec(rank=3, dora=True), sites, blocks)
    adapter = moved(adapter, 0.1)
    jaxpeft.to_peft(tmp_path / "a", adapter, base_model=str(tmp_path), base=blocks)
    theirs = peft.PeftModel.from_pretrained(model, tmp_path / "a")
    theirs.save_pretrained(tmp_path / "b")
    merged = theirs.merge_and_unload().state_dict()
    for back in (adapter, jaxpeft.from_peft(tmp_path / "b", blocks, layouts=layouts)):
        for path, leaf in jaxpeft.sites.flatten(jaxpeft.merge(blocks, back)).items():
            name = path.replace("/", ".").replace(".kernel", ".weight")
            np.testing.assert_allclose(leaf.T, merged[name].numpy(), atol=1e-5, err_msg=path)


@pytest.mark.filterwarnings(*QUIET)
def test_a_tied_embedding_is_refused(tmp_path) -> None:
    """PEFT changes torch's embedding and not the head that is tied to it; ours is one array."""
    config = models.Config(
        vocab_size=40, hidden_size=24, intermediate_size=36, num_hidden_layers=2, num_attention_heads=4
    )
    params = models.random(config, jax.random.key(0)).params
    adapter = jaxpeft.init(jax.random.key(0), lora.Spec(rank=3), jaxpeft.find(params, "embed/embedding"))
    jaxpeft.to_peft(tmp_path / "a", adapter, base_model="m", base=params)
    tied = {name: tree for name, tree in params.items() if name != "lm_head"}
    with pytest.raises(ValueError, match="head is tied"):
        jaxpeft.from_peft(tmp_path / "a", tied)
    with pytest.raises(ValueError, match="head is tied"):
        jaxpeft.to_peft(tmp_path / "b", adapter, base_model="m", base=tied)
    with pytest.raises(ValueError, match="pass base="):
        jaxpeft.to_peft(tmp_path / "b", adapter, base_model="m")


def batch_of(lm):
    text = [
        "The capital of France is Paris. The Seine runs through it.",
        "Water boils at 100 degrees Celsius, and at less on a mountain.",
    ]
    lists = [lm.tokenizer(line)["input_ids"][:12] for line in text]
    assert {len(ids) for ids in lists} == {12}
    return np.array(lists)


@pytest.mark.slow
@pytest.mark.filterwarnings(*QUIET)
def test_smollm2_both_ways(tmp_path) -> None:
    """Some steps of training here, the same logits there; and some steps there, the same logits here."""
    try:
        lm = models.pretrained("smollm2-135m-instruct")
    except ConnectionError as error:
        pytest.skip(f"SmolLM2 is neither cached nor to be had: {error}")
    folder = _packaged(lm.source, cache_folder(), offline=True)
    tokens = batch_of(lm)
    spec = mos.Spec(rank=8, equivalent_rank=2, private_rank=1, shards_per_vector=4)
    adapter = jaxpeft.init(jax.random.key(0), spec, jaxpeft.find(lm.params))
    forward = jaxpeft.adapt(lm.token_losses)

    @jax.jit
    def step(params, base):
        gradients = jax.grad(lambda p: forward(base, adapter.replace(params=p), tokens[:, :-1], tokens[:, 1:]).mean())(
            params
        )
        return jax.tree.map(lambda leaf, gradient: leaf - 0.01 * jnp.sign(gradient), params, gradients)

    params = adapter.params
    for _ in range(3):
        params = step(params, lm.params)
    adapter = adapter.replace(params=params)
    report = jaxpeft.to_peft(tmp_path / "ours", adapter, base_model=str(folder), base=lm.params)
    assert (report.how, len(report.modules)) == ("lossless", 210)
    plain = torch_model(folder)
    with torch.no_grad():
        unadapted = plain(torch.tensor(tokens)).logits.numpy()
    # Two float32 implementations of 30 layers: a few units in the last place of the largest logit.
    tolerance = 1e-5 * float(np.abs(unadapted).max())
    logits = jax.jit(jaxpeft.adapt(lm.logits))
    model = peft.PeftModel.from_pretrained(plain, tmp_path / "ours").eval()
    with torch.no_grad():
        theirs = model(torch.tensor(tokens)).logits.numpy()
    assert_equal(logits(lm.params, adapter, tokens), theirs, unadapted, tolerance)

    settings = {"r": 4, "use_rslora": True, "target_modules": ["q_proj", "v_proj", "down_proj"]}
    model = peft.get_peft_model(model.unload(), peft.LoraConfig(task_type="CAUSAL_LM", **settings))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.tensor(tokens), labels=torch.tensor(tokens)).loss.backward()
        optimizer.step()
    model.eval().save_pretrained(tmp_path / "theirs")
    with torch.no_grad():
        theirs = model(torch.tensor(tokens)).logits.numpy()
    adapter = jaxpeft.from_peft(tmp_path / "theirs", lm.params)
    assert_equal(logits(lm.params, adapter, tokens), theirs, unadapted, tolerance)
