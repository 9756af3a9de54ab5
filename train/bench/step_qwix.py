"""qwix's row of the step benchmark: its LoRA on a plain decoder of Flax NNX modules, the layers one after the other."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from train.bench import step_jax
from train.bench.step_handwritten import ATTENTION, NORMS, cross_entropy, read, rms_norm, rotary_table, rotate
from train.bench.step_tokens import tokens
from train.bench.workers import Work

Tree = dict[str, Any]


class Layer(nnx.Module):
    """A layer of a Llama with the given weights."""

    def __init__(self, weights: Tree, eps: float):
        self.eps = eps
        for name, weight in weights.items():
            setattr(self, name, nnx.Param(weight) if name in NORMS else linear(weight))

    def __call__(self, x: jax.Array, rotary: tuple[jax.Array, jax.Array]) -> jax.Array:
        """The residual stream after this layer."""
        y = rms_norm(x, self.input_layernorm[...], self.eps)
        heads = (*y.shape[:2], -1, rotary[0].shape[-1] * 2)
        query, key, value = (getattr(self, name)(y).reshape(heads) for name in ATTENTION[:3])
        seen = jax.nn.dot_product_attention(rotate(query, rotary), rotate(key, rotary), value, is_causal=True)
        x = x + self.o_proj(seen.reshape(*x.shape[:2], -1))
        y = rms_norm(x, self.post_attention_layernorm[...], self.eps)
        return x + self.down_proj(jax.nn.silu(self.gate_proj(y)) * self.up_proj(y))


class Llama(nnx.Module):
    """Tokens in, logits out."""

    def __init__(self, config: Any, params: Tree):
        self.config = config
        self.embed, self.norm = nnx.Param(params["embed"]), nnx.Param(params["norm"])
        self.head = None if config.tie_word_embeddings else nnx.Param(params["head"])
        self.layers = nnx.List(
            Layer({name: stacked[i] for name, stacked in params["layers"].items()}, config.rms_norm_eps)
            for i in range(config.num_hidden_layers)
        )

    def __call__(self, read: jax.Array) -> jax.Array:
        """Logits of (B, S) tokens."""
        rotary, x = rotary_table(self.config, read.shape[1]), self.embed[...][read]
        for layer in self.layers:
            x = layer(x, rotary)
        head = self.embed if self.head is None else self.head
        return rms_norm(x, self.norm[...], self.config.rms_norm_eps) @ head[...].T


def linear(weight: jax.Array) -> nnx.Linear:
    """A layer of the given (in, out) kernel, without a bias."""
    return nnx.Linear(*weight.shape, use_bias=False, kernel_init=lambda *_: weight, rngs=nnx.Rngs(0))


def lora(folder: str, batch: int, length: int, rank: int) -> Work:
    """LoRA on every linear weight of the layers, alpha equal to the rank."""
    import qwix

    config, params = read(folder)
    provider = qwix.LoraProvider(module_path=".*_proj", rank=rank, alpha=float(rank))
    plain = Llama(config, params)
    model = qwix.apply_lora_to_model(plain, provider, jnp.zeros((1, 2), jnp.int32), rngs=nnx.Rngs(0))
    graph, adapter, base = nnx.split(model, nnx.LoRAParam, ...)

    def step(state: tuple[Any, Any], base: Any, read: jax.Array, targets: jax.Array) -> tuple[Any, jax.Array]:
        adapter, moments = state

        def loss(adapter: Any) -> jax.Array:
            return cross_entropy(nnx.merge(graph, adapter, base)(read), targets)

        found, gradients = jax.value_and_grad(loss)(adapter)
        return step_jax.updated(gradients, adapter, moments), found

    trained = sum(leaf.size for leaf in jax.tree.leaves(adapter))
    inputs = (base, *tokens(config.vocab_size, batch, length))
    return step_jax.work(step, (adapter, step_jax.OPTIMIZER.init(adapter)), inputs, trained)
