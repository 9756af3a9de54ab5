"""Against torch transformers, on random models saved by it: same logits, same greedy tokens."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxpeft import models

torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'jaxpeft[parity]'")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.parity

SIZES = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
MODELS = {
    "llama": ("LlamaConfig", {"rope_parameters": LLAMA3_ROPE}),
    "llama-tied-linear": ("LlamaConfig", {"rope_parameters": LINEAR_ROPE, "tie_word_embeddings": True}),
    "llama-biases": ("LlamaConfig", {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("MistralConfig", {"sliding_window": 7}),
    "mistral-head-dim": ("MistralConfig", {"sliding_window": None, "head_dim": 32}),
    "qwen2": ("Qwen2Config", {}),
    "qwen2-windowed": ("Qwen2Config", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0}),
    "qwen3": ("Qwen3Config", {"head_dim": 24, "tie_word_embeddings": True}),
}


@pytest.fixture(scope="module", params=MODELS)
def pair(request, tmp_path_factory):
    kind, fields = MODELS[request.param]
    torch.manual_seed(0)
    config = getattr(transformers, kind)(**SIZES | fields)
    reference = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in reference.parameters():
            # Biases and norms that are not at their initial zeros and ones.
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    folder = tmp_path_factory.mktemp(request.param)
    reference.save_pretrained(folder, max_shard_size="60KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return reference, models.load(folder, tokenizer=False)


def test_logits(pair):
    reference, lm = pair
    tokens = np.random.default_rng(0).integers(0, 97, (3, 40))
    with torch.no_grad():
        expected = reference(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(lm.logits(lm.params, jnp.asarray(tokens)), expected, atol=1e-4)


def test_greedy(pair):
    reference, lm = pair
    tokens = torch.tensor(np.random.default_rng(1).integers(3, 97, (2, 9)))
    expected = reference.generate(
        tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=12, do_sample=False, eos_token_id=None
    )
    found = lm.generate(lm.params, jnp.asarray(tokens.numpy()), jnp.array([9, 9]), max_new_tokens=12)
    np.testing.assert_array_equal(found, expected[:, 9:].numpy())
