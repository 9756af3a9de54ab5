"""One tiny model, written five ways with the same weights: what the common test adapts."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx

LAYERS, VOCAB, EMBED, HEADS, HEAD_DIM, HIDDEN = 4, 24, 12, 3, 4, 18
SITES = ("query", "out", "up", "down")


@dataclass(frozen=True)
class Model:
    """Parameters, a function of them, and what `jaxpeft.find` must be told."""

    params: Any
    apply: Callable[[Any, jax.Array], jax.Array]
    pattern: str = r".*(query|out|up|down)/kernel"
    layouts: tuple[tuple[str, str], ...] = ()


def weights() -> dict[str, jax.Array]:
    """Stacked weights of the model, by name."""
    shapes = {
        "embedding": (VOCAB, EMBED),
        "norm": (LAYERS, EMBED),
        "query": (LAYERS, EMBED, HEADS, HEAD_DIM),
        "out": (LAYERS, HEADS, HEAD_DIM, EMBED),
        "up": (LAYERS, EMBED, HIDDEN),
        "down": (LAYERS, HIDDEN, EMBED),
    }
    keys = jax.random.split(jax.random.key(0), len(shapes))
    made = {n: 0.4 * jax.random.normal(k, s) for (n, s), k in zip(shapes.items(), keys, strict=True)}
    return {**made, "norm": 1 + made["norm"]}


def rms_norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6) * scale


def plain_block(p: Any, x: jax.Array) -> jax.Array:
    h = rms_norm(x, p["norm"]["scale"])
    h = jnp.tanh(jnp.einsum("bsd,dhk->bshk", h, p["query"]["kernel"]))
    x = x + jnp.einsum("bshk,hkd->bsd", h, p["out"]["kernel"])
    return x + nn.gelu(x @ p["up"]["kernel"]) @ p["down"]["kernel"]


def layer_tree(w: dict[str, jax.Array]) -> dict[str, Any]:
    return {"norm": {"scale": w["norm"]}, **{name: {"kernel": w[name]} for name in SITES}}


def plain_scanned() -> Model:
    def apply(params: Any, ids: jax.Array) -> jax.Array:
        table = params["embed"]["embedding"]
        x, _ = jax.lax.scan(lambda x, p: (jax.checkpoint(plain_block)(p, x), None), table[ids], params["layers"])
        return x @ table.T

    w = weights()
    return Model({"embed": {"embedding": w["embedding"]}, "layers": layer_tree(w)}, apply)


def plain_unrolled() -> Model:
    def apply(params: Any, ids: jax.Array) -> jax.Array:
        x = params["embed"]["embedding"][ids]
        for p in params["layers"]:
            x = plain_block(p, x)
        return x @ params["embed"]["embedding"].T

    w = weights()
    layers = [layer_tree({name: leaf[i] for name, leaf in w.items()}) for i in range(LAYERS)]
    return Model({"embed": {"embedding": w["embedding"]}, "layers": layers}, apply)


class LinenBlock(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, _: None = None) -> tuple[jax.Array, None]:
        h = nn.RMSNorm(name="norm")(x)
        h = nn.tanh(nn.DenseGeneral((HEADS, HEAD_DIM), use_bias=False, name="query")(h))
        x = x + nn.DenseGeneral(EMBED, axis=(-2, -1), use_bias=False, name="out")(h)
        h = nn.gelu(nn.Dense(HIDDEN, use_bias=False, name="up")(x))
        return x + nn.Dense(EMBED, use_bias=False, name="down")(h), None


class LinenModel(nn.Module):
    scanned: bool

    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        embed = nn.Embed(VOCAB, EMBED, name="embed")
        x = embed(ids)
        block = nn.remat(LinenBlock, prevent_cse=False)
        if self.scanned:
            layers = nn.scan(block, variable_axes={"params": 0}, split_rngs={"params": True}, length=LAYERS)
            x, _ = layers(name="layers")(x, None)
        else:
            for i in range(LAYERS):
                x, _ = block(name=f"layers_{i}")(x)
        return embed.attend(x)


def linen(scanned: bool) -> Model:
    model = LinenModel(scanned)
    w = weights()
    params: dict[str, Any] = {"embed": {"embedding": w["embedding"]}}
    if scanned:
        params["layers"] = layer_tree(w)
    else:
        for i in range(LAYERS):
            params[f"layers_{i}"] = layer_tree({name: leaf[i] for name, leaf in w.items()})
    return Model(params, lambda params, ids: model.apply({"params": params}, ids))


class NnxBlock(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.norm = nnx.RMSNorm(EMBED, rngs=rngs)
        self.query = nnx.LinearGeneral(EMBED, (HEADS, HEAD_DIM), use_bias=False, rngs=rngs)
        self.out = nnx.LinearGeneral((HEADS, HEAD_DIM), EMBED, axis=(-2, -1), use_bias=False, rngs=rngs)
        self.up = nnx.Linear(EMBED, HIDDEN, use_bias=False, rngs=rngs)
        self.down = nnx.Linear(HIDDEN, EMBED, use_bias=False, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.out(nnx.tanh(self.query(self.norm(x))))
        return x + self.down(nnx.gelu(self.up(x)))


class NnxModel(nnx.Module):
    def __init__(self, rngs: nnx.Rngs, vmapped: bool) -> None:
        self.embed = nnx.Embed(VOCAB, EMBED, rngs=rngs)
        self.layers = nnx.vmap(NnxBlock, in_axes=0)(rngs.split(LAYERS))
        self.vmapped = vmapped

    def __call__(self, ids: jax.Array) -> jax.Array:
        x = self.embed(ids)
        if self.vmapped:  # An ensemble: every layer sees the same input.
            x = nnx.vmap(lambda layer, x: layer(x), in_axes=(0, None))(self.layers, x).mean(axis=0)
        else:
            step = nnx.scan(nnx.remat(lambda x, layer: layer(x)), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
            x = step(x, self.layers)
        return self.embed.attend(x)


def nnx_model(vmapped: bool) -> Model:
    graph, state = nnx.split(NnxModel(nnx.Rngs(0), vmapped))
    w = weights()

    def apply(params: Any, ids: jax.Array) -> jax.Array:
        filled = jax.tree.map(lambda leaf: leaf, state)
        nnx.replace_by_pure_dict(filled, params)
        return nnx.merge(graph, filled)(ids)

    return Model({"embed": {"embedding": w["embedding"]}, "layers": layer_tree(w)}, apply)


MODELS: dict[str, Callable[[], Model]] = {
    "plain scanned": cache(plain_scanned),
    "plain unrolled": cache(plain_unrolled),
    "linen scanned": cache(lambda: linen(True)),
    "linen unrolled": cache(lambda: linen(False)),
    "nnx scanned": cache(lambda: nnx_model(False)),
    "nnx vmapped": cache(lambda: nnx_model(True)),
}
