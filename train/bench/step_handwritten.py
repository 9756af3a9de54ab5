"""What does one write for LoRA in JAX without a library of adapters? One file for one architecture and one method."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from safetensors.numpy import load_file

from train.bench import step_jax
from train.bench.step_tokens import tokens
from train.bench.workers import Work

Tree = dict[str, Any]

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
PROJECTIONS = {f"self_attn.{name}": name for name in ATTENTION} | {
    f"mlp.{name}": name for name in ("gate_proj", "up_proj", "down_proj")
}
NORMS = {name: name for name in ("input_layernorm", "post_attention_layernorm")}


def lora(folder: str, batch: int, length: int, rank: int) -> Work:
    """LoRA on every linear weight of the layers, alpha equal to the rank."""
    config, params = read(folder)
    adapter = start(params["layers"], rank)

    def step(state: tuple[Any, Any], params: Tree, read: jax.Array, targets: jax.Array) -> tuple[Any, jax.Array]:
        adapter, moments = state
        found, gradients = jax.value_and_grad(loss)(adapter, params, read, targets, config)
        return step_jax.updated(gradients, adapter, moments), found

    inputs = (params, *tokens(config.vocab_size, batch, length))
    trained = sum(leaf.size for leaf in jax.tree.leaves(adapter))
    return step_jax.work(step, (adapter, step_jax.OPTIMIZER.init(adapter)), inputs, trained)


def read(folder: str) -> tuple[Any, Tree]:
    """The configuration and the parameters of a Llama in the Hugging Face format, the layers stacked."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    tensors: Tree = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        tensors |= load_file(file)
    layers = {
        name: jnp.stack([tensors[f"model.layers.{i}.{path}.weight"].T for i in range(config.num_hidden_layers)])
        for path, name in (PROJECTIONS | NORMS).items()
    }
    embed = jnp.asarray(tensors["model.embed_tokens.weight"])
    head = embed if config.tie_word_embeddings else jnp.asarray(tensors["lm_head.weight"])
    return config, {"embed": embed, "layers": layers, "norm": jnp.asarray(tensors["model.norm.weight"]), "head": head}


def start(layers: Tree, rank: int) -> Tree:
    """LoRA's factors of every projection: a uniform, b zero."""
    found, keys = {}, jax.random.split(jax.random.key(0), len(PROJECTIONS))
    for name, key in zip(PROJECTIONS.values(), keys, strict=True):
        count, inputs, outputs = layers[name].shape
        a = jax.random.uniform(key, (count, inputs, rank), minval=-1, maxval=1) / inputs**0.5
        found[name] = {"a": a, "b": jnp.zeros((count, rank, outputs))}
    return found


def loss(adapter: Tree, params: Tree, read: jax.Array, targets: jax.Array, config: Any) -> jax.Array:
    """Mean negative log-likelihood of the targets."""
    rotary, eps = rotary_table(config, read.shape[1]), config.rms_norm_eps

    def run(x: jax.Array, scanned: tuple[Tree, Tree]) -> tuple[jax.Array, None]:
        layer, own = scanned

        def linear(name: str, x: jax.Array) -> jax.Array:
            return x @ layer[name] + (x @ own[name]["a"]) @ own[name]["b"]

        y = rms_norm(x, layer["input_layernorm"], eps)
        heads = (*y.shape[:2], -1, rotary[0].shape[-1] * 2)
        query, key, value = (linear(name, y).reshape(heads) for name in ATTENTION[:3])
        seen = jax.nn.dot_product_attention(rotate(query, rotary), rotate(key, rotary), value, is_causal=True)
        x = x + linear("o_proj", seen.reshape(*x.shape[:2], -1))
        y = rms_norm(x, layer["post_attention_layernorm"], eps)
        return x + linear("down_proj", jax.nn.silu(linear("gate_proj", y)) * linear("up_proj", y)), None

    x, _ = jax.lax.scan(run, params["embed"][read], (params["layers"], adapter))
    return cross_entropy(rms_norm(x, params["norm"], eps) @ params["head"].T, targets)


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Mean over all positions."""
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return (jax.nn.logsumexp(logits, axis=-1) - picked).mean()


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """Over the last axis."""
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + eps) * scale


def rotary_table(config: Any, length: int) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines, each (length, 1, head_dim / 2)."""
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    frequencies = config.rope_parameters["rope_theta"] ** (-jnp.arange(0, size, 2) / size)
    angles = jnp.arange(length)[:, None, None] * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, table: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates (B, S, heads, head_dim) by position."""
    (cos, sin), (left, right) = table, jnp.split(x, 2, axis=-1)
    return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)
