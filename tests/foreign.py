"""Models that this library did not write, tiny and with random weights: each a tree of parameters and a function of it.

Nothing in them knows of adapters. A maker imports its library when it is called.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx

BATCH, LENGTH, VOCAB, WIDTH, HEADS = 2, 6, 48, 16, 4


@dataclass(frozen=True)
class Foreign:
    """A model of another library.

    Attributes:
        package: what must be installed, and can be imported under this name.
        kind: what its parameters are a tree of.
        make: returns parameters, and a function of them alone that returns an array.
    """

    package: str
    kind: str
    make: Callable[[], tuple[Any, Callable[[Any], jax.Array]]]


def tokens() -> jax.Array:
    return jax.random.randint(jax.random.key(1), (BATCH, LENGTH), 2, VOCAB)


def pixels(*shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(2), (BATCH, *shape))


# transformers 4, the last with Flax: Linen modules, parameters as nested dicts.

SPREAD = {"initializer_range": 0.2}  # Theirs is for wide models; with it the outputs of these would vanish.
DECODER = {
    **SPREAD,
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": 32,
}
GPT2 = {**SPREAD, "vocab_size": VOCAB, "n_embd": WIDTH, "n_layer": 2, "n_head": HEADS, "n_positions": 32}
ENCODER = {
    **SPREAD,
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "max_position_embeddings": 32,
}
IMAGE = {
    **SPREAD,
    "hidden_size": WIDTH,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "image_size": 8,
    "patch_size": 4,
}


def transformers(
    name: str, settings: dict[str, Any], inputs: Callable[[], dict[str, jax.Array]], output: str
) -> Foreign:
    """A Flax class of transformers 4 with a configuration of its own class."""

    def make() -> tuple[Any, Callable[[Any], jax.Array]]:
        import transformers

        made = getattr(transformers, name)
        model = made(made.config_class(**settings))
        arguments = inputs()
        return model.params, lambda params: model(**arguments, params=params)[output]

    return Foreign("transformers", "Linen", make)


def clip() -> dict[str, Any]:
    vision = {**IMAGE, "projection_dim": WIDTH}
    return {
        "text_config": {**ENCODER, "eos_token_id": 1},
        "vision_config": vision,
        "projection_dim": WIDTH,
        "logit_scale_init_value": 0.0,
    }


WHISPER = {
    "init_std": 0.2,
    "vocab_size": VOCAB,
    "d_model": WIDTH,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "num_mel_bins": 8,
    "max_source_positions": 10,
    "max_target_positions": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
    "decoder_start_token_id": 1,
}
BART = {
    "init_std": 0.2,
    "vocab_size": VOCAB,
    "d_model": WIDTH,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "max_position_embeddings": 32,
}


def text() -> dict[str, jax.Array]:
    return {"input_ids": tokens()}


def ended() -> dict[str, jax.Array]:
    return {"input_ids": tokens().at[:, -1].set(1)}  # CLIP reads its text at the end token.


def image() -> dict[str, jax.Array]:
    return {"pixel_values": pixels(3, 8, 8)}


# tunix: NNX modules whose layers hold raw einsum parameters.


def pure(model: nnx.Module) -> tuple[Any, Callable[[Any], nnx.Module]]:
    """The parameters of an NNX module as a dict, and the module again from such a dict."""
    graph, state, rest = nnx.split(model, nnx.Param, ...)

    def filled(params: Any) -> nnx.Module:
        new = jax.tree.map(lambda leaf: leaf, state)
        nnx.replace_by_pure_dict(new, params)
        return nnx.merge(graph, new, rest)

    return nnx.to_pure_dict(state), filled


def random(params: Any) -> Any:
    """The same tree with other values: some weights start at zero, and have no gradient there."""
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(4), len(leaves))
    return structure.unflatten([x + 0.2 * jax.random.normal(key, x.shape) for x, key in zip(leaves, keys, strict=True)])


TUNIX = {"num_layers": 2, "embed_dim": WIDTH, "hidden_dim": 24, "num_heads": HEADS, "head_dim": 4, "num_kv_heads": 2}


def tunix(module: str, name: str, **settings: Any) -> Foreign:
    def make() -> tuple[Any, Callable[[Any], jax.Array]]:
        import importlib

        library = importlib.import_module(f"tunix.models.{module}.model")
        if module == "gemma":
            attention = (library.AttentionType.GLOBAL,) * 2
            settings.update(attention_types=attention)
        model = getattr(library, name)(library.ModelConfig(**TUNIX, **settings), rngs=nnx.Rngs(0))
        params, filled = pure(model)
        params = random(params)
        positions = jnp.broadcast_to(jnp.arange(LENGTH), (BATCH, LENGTH))
        mask = jnp.broadcast_to(jnp.tril(jnp.ones((LENGTH, LENGTH), bool)), (BATCH, LENGTH, LENGTH))
        return params, lambda params: filled(params)(tokens(), positions, None, mask)[0]

    return Foreign("tunix", "NNX", make)


# Equinox: modules are the trees, and weights are stored as (out, in).


def equinox_parts(model: Any, run: Callable[[Any], jax.Array]) -> tuple[Any, Callable[[Any], jax.Array]]:
    import equinox as eqx

    params, static = eqx.partition(model, eqx.is_inexact_array)
    return params, lambda params: run(eqx.combine(params, static))


def equinox_mlp() -> tuple[Any, Callable[[Any], jax.Array]]:
    import equinox as eqx

    model = eqx.nn.MLP(in_size=WIDTH, out_size=8, width_size=24, depth=2, key=jax.random.key(0))
    return equinox_parts(model, lambda model: jax.vmap(model)(pixels(WIDTH)))


def equinox_attention() -> tuple[Any, Callable[[Any], jax.Array]]:
    import equinox as eqx

    model = eqx.nn.MultiheadAttention(HEADS, WIDTH, key=jax.random.key(0))
    return equinox_parts(model, lambda model: jax.vmap(lambda x: model(x, x, x))(pixels(LENGTH, WIDTH)))


# Haiku: two levels of dicts, whose names hold slashes.


def haiku() -> tuple[Any, Callable[[Any], jax.Array]]:
    import haiku as hk

    def forward(ids: jax.Array) -> jax.Array:
        x = hk.Embed(VOCAB, WIDTH)(ids)
        for _ in range(2):
            h = hk.LayerNorm(-1, True, True)(x)
            x = x + hk.MultiHeadAttention(HEADS, 4, w_init=hk.initializers.VarianceScaling())(h, h, h)
            x = x + hk.nets.MLP([24, WIDTH])(hk.LayerNorm(-1, True, True)(x))
        return hk.Linear(VOCAB, name="head")(x)

    model = hk.without_apply_rng(hk.transform(forward))
    return model.init(jax.random.key(0), tokens()), lambda params: model.apply(params, tokens())


# Linen modules with raw einsum parameters, as DeepMind's Gemma has them.


class Einsum(nn.Module):
    shape: tuple[int, ...]

    @nn.compact
    def __call__(self, equation: str, x: jax.Array) -> jax.Array:
        return jnp.einsum(equation, x, self.param("w", nn.initializers.normal(0.3), self.shape))


class EinsumBlock(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        h = nn.LayerNorm()(x)
        q = Einsum((HEADS, WIDTH, 4), name="q_einsum")("BTD,NDH->BTNH", h)
        k, v = Einsum((2, 2, WIDTH, 4), name="kv_einsum")("BSD,CKDH->CBSKH", h)
        attended = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        x = x + Einsum((HEADS, 4, WIDTH), name="attn_vec_einsum")("BTNH,NHD->BTD", attended)
        gate = Einsum((2, 24, WIDTH), name="gating_einsum")("BTD,CFD->CBTF", nn.LayerNorm()(x))
        return x + Einsum((24, WIDTH), name="linear")("BTF,FD->BTD", nn.gelu(gate[0]) * gate[1])


class EinsumModel(nn.Module):
    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        table = self.param("input_embedding", nn.initializers.normal(1.0), (VOCAB, WIDTH))
        x = table[ids]
        for layer in range(2):
            x = EinsumBlock(name=f"layer_{layer}")(x)
        return nn.LayerNorm()(x) @ table.T


def linen_einsum() -> tuple[Any, Callable[[Any], jax.Array]]:
    model = EinsumModel()
    return model.init(jax.random.key(0), tokens())["params"], lambda params: model.apply({"params": params}, tokens())


# A dict and a function, with a stack of layers, experts, and names that mean nothing.


def plain() -> tuple[Any, Callable[[Any], jax.Array]]:
    random = np.random.default_rng(0)

    def weight(*shape: int) -> jax.Array:
        return jnp.asarray(random.normal(0, 0.3, shape), jnp.float32)

    params = {
        "table": weight(VOCAB, WIDTH),
        "blocks": {"mix": weight(3, WIDTH, WIDTH), "up": weight(3, 4, WIDTH, 24), "down": weight(3, 4, WIDTH, 24)},
        "out": weight(VOCAB, WIDTH),
    }

    def block(x: jax.Array, layer: Any) -> tuple[jax.Array, None]:
        x = x + jnp.tanh(x @ layer["mix"].T)
        shares = jax.nn.softmax(x[..., :4])
        hidden = jnp.einsum("ebtd,edf->ebtf", jnp.stack([x] * 4), layer["up"])
        experts = jnp.einsum("ebtf,edf->ebtd", jax.nn.gelu(hidden), layer["down"])
        return x + jnp.einsum("bte,ebtd->btd", shares, experts), None

    def apply(params: Any) -> jax.Array:
        x, _ = jax.lax.scan(jax.checkpoint(block), params["table"][tokens()], params["blocks"])
        return x @ params["out"].T

    return params, apply


MODELS: dict[str, Foreign] = {
    "FlaxLlamaForCausalLM": transformers("FlaxLlamaForCausalLM", DECODER, text, "logits"),
    "FlaxMistralForCausalLM": transformers("FlaxMistralForCausalLM", DECODER, text, "logits"),
    "FlaxGemmaForCausalLM": transformers("FlaxGemmaForCausalLM", DECODER, text, "logits"),
    "FlaxGPT2LMHeadModel": transformers("FlaxGPT2LMHeadModel", GPT2, text, "logits"),
    "FlaxBertForSequenceClassification": transformers("FlaxBertForSequenceClassification", ENCODER, text, "logits"),
    "FlaxRobertaForSequenceClassification": transformers(
        "FlaxRobertaForSequenceClassification", ENCODER, text, "logits"
    ),
    "FlaxDistilBertForSequenceClassification": transformers(
        "FlaxDistilBertForSequenceClassification",
        {**SPREAD, "vocab_size": VOCAB, "dim": WIDTH, "hidden_dim": 24, "n_layers": 2, "n_heads": HEADS},
        text,
        "logits",
    ),
    "FlaxBartForConditionalGeneration": transformers("FlaxBartForConditionalGeneration", BART, text, "logits"),
    "FlaxViTForImageClassification": transformers("FlaxViTForImageClassification", IMAGE, image, "logits"),
    "FlaxDinov2ForImageClassification": transformers("FlaxDinov2ForImageClassification", IMAGE, image, "logits"),
    "FlaxCLIPModel": transformers("FlaxCLIPModel", clip(), lambda: {**ended(), **image()}, "logits_per_image"),
    "FlaxWhisperForConditionalGeneration": transformers(
        "FlaxWhisperForConditionalGeneration",
        WHISPER,
        lambda: {"input_features": pixels(8, 20), "decoder_input_ids": tokens()},
        "logits",
    ),
    "tunix Llama3": tunix("llama3", "Llama3", vocab_size=VOCAB, rope_theta=10_000, norm_eps=1e-5),
    "tunix Qwen2": tunix("qwen2", "Qwen2", vocab_size=VOCAB, rope_theta=10_000, norm_eps=1e-6),
    "tunix Qwen3": tunix("qwen3", "Qwen3", vocab_size=VOCAB, rope_theta=10_000, norm_eps=1e-6),
    "tunix Gemma": tunix(
        "gemma", "Gemma", num_embed=VOCAB, final_logit_softcap=None, use_post_attn_norm=False, use_post_ffw_norm=False
    ),
    "tunix Gemma3": tunix("gemma3", "Gemma3", num_embed=VOCAB, sliding_window_size=4, param_dtype=jnp.float32),
    "eqx.nn.MLP": Foreign("equinox", "Equinox", equinox_mlp),
    "eqx.nn.MultiheadAttention": Foreign("equinox", "Equinox", equinox_attention),
    "Haiku transformer": Foreign("haiku", "Haiku", haiku),
    "Linen with raw einsum parameters": Foreign("flax", "Linen", linen_einsum),
    "dict and function: scanned experts": Foreign("jax", "dict", plain),
}
