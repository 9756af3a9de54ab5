"""Folders that jaxpeft writes, read by torch transformers: nothing missing, same logits, same greedy tokens."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from moved import moved

import jaxpeft
from jaxpeft import models
from jaxpeft.methods import lora, mos

torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'jaxpeft[parity]'")
transformers = pytest.importorskip("transformers")
parity = pytest.importorskip("test_models_parity")

pytestmark = pytest.mark.parity


def read(folder):
    reference, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, dtype="float32", attn_implementation="eager"
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    return reference.eval()


def greedy(reference, tokens, count):
    ids = torch.tensor(np.asarray(tokens))
    with torch.no_grad():
        found = reference.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, eos_token_id=None
        )
    return found[:, ids.shape[1] :].numpy()


@pytest.mark.parametrize("name", parity.MODELS)
def test_what_torch_saved_comes_back_to_torch(name, tmp_path):
    kind, fields = parity.MODELS[name]
    torch.manual_seed(0)
    reference = transformers.AutoModelForCausalLM.from_config(
        getattr(transformers, kind)(**parity.SIZES | fields), attn_implementation="eager"
    ).eval()
    reference.save_pretrained(tmp_path / "torch")
    lm = models.load(tmp_path / "torch", tokenizer=False)
    models.save(tmp_path / "plain", lm, max_shard_size="60KB")
    assert len(list((tmp_path / "plain").glob("*.safetensors"))) > 1
    plain = read(tmp_path / "plain")
    assert type(plain) is type(reference)
    assert plain.generation_config.to_dict() == reference.generation_config.to_dict()
    expected = reference.state_dict()
    for key, tensor in plain.state_dict().items():
        assert torch.equal(tensor, expected[key]), key

    adapter = moved(jaxpeft.init(jax.random.key(0), lora.Spec(rank=2), jaxpeft.find(lm.params)), 0.1)
    models.save(tmp_path / "merged", lm, adapter)
    merged = read(tmp_path / "merged")
    tokens = np.random.default_rng(0).integers(3, 97, (3, 24))
    logits = jaxpeft.adapt(lm.logits)(lm.params, adapter, jnp.asarray(tokens))
    with torch.no_grad():
        found = merged(torch.tensor(tokens)).logits.numpy()
        assert abs(found - plain(torch.tensor(tokens)).logits.numpy()).max() > 0.1, "the adapter changes nothing"
    np.testing.assert_allclose(found, logits, atol=1e-4)
    own = lm.generate(
        jaxpeft.merge(lm.params, adapter), jnp.asarray(tokens), jnp.full(3, 24), max_new_tokens=10, eos_ids=()
    )
    np.testing.assert_array_equal(greedy(merged, tokens, 10), own)


def test_a_configuration_written_anew(tmp_path):
    sizes = {name: value for name, value in parity.SIZES.items() if name in models.Config.__dataclass_fields__}
    lm = models.random(models.Config(**sizes, qk_norm=True, sliding_window=5), jax.random.key(0))
    models.save(tmp_path / "model", lm, dtype="float32")
    tokens = np.random.default_rng(0).integers(0, 97, (2, 24))
    with torch.no_grad():
        found = read(tmp_path / "model")(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(found, lm.logits(lm.params, jnp.asarray(tokens)), atol=1e-4)


@pytest.mark.slow
def test_smollm2(tmp_path):
    lm = models.pretrained("smollm2-135m-instruct")
    spec = mos.Spec(rank=16, equivalent_rank=2, private_rank=1, shards_per_vector=4)
    adapter = moved(jaxpeft.init(jax.random.key(0), spec, jaxpeft.find(lm.params)), 0.02)
    models.save(tmp_path / "merged", lm, adapter, max_shard_size="200MB")
    assert "lm_head" not in (tmp_path / "merged" / "model.safetensors.index.json").read_text()
    reference = read(tmp_path / "merged")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "merged")
    forward, generate = jax.jit(jaxpeft.adapt(lm.logits)), jaxpeft.adapt(lm.generate)
    for prompt in ("The capital of France is", "Name three primary colours."):
        tokens = np.array([tokenizer(prompt)["input_ids"]])
        np.testing.assert_array_equal(tokens[0], lm.tokenizer(prompt)["input_ids"])
        with torch.no_grad():
            found = reference(torch.tensor(tokens)).logits.numpy()
        np.testing.assert_allclose(found, forward(lm.params, adapter, tokens), atol=1e-4 * abs(found).max())
        own = generate(
            lm.params, adapter, jnp.asarray(tokens), jnp.array([tokens.shape[1]]), max_new_tokens=16, eos_ids=()
        )
        np.testing.assert_array_equal(greedy(reference, tokens, 16), own)
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert (config["model_type"], config["tie_word_embeddings"], config["dtype"]) == ("llama", True, "float32")
