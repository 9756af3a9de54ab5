"""How should shards become factors? Ways to expand a pool, with their backward, on the CPU and compiled for a TPU."""

import argparse
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from rich.console import Console

import jaxpeft
from jaxpeft import models, pools
from jaxpeft.methods import mos
from jaxpeft.updates import LowRank
from train import costs, topology
from train.bench.figures import Column, Figures, ratio, spread
from train.bench.specs import MOS, SPECS, check

TOKENS = 1024
CHIP = "v5e:1x1"

Gather = Callable[[Array, Array], Array]
"""(pool (N, width), index (L, n)) -> (L, n, width)."""

Tables = Mapping[str, Mapping[str, np.ndarray]]
"""{group: {a_index, b_index: (L, r, l)}}."""


def by_layer(pool: Array, index: Array) -> Array:
    """The library's own: a gather, and in the backward a scatter of one layer after the other."""
    return pools.gather(pool, index)


def scatter_add(pool: Array, index: Array) -> Array:
    """Plain indexing, with JAX's own backward."""
    return pool[index]


def sorted_sum(pool: Array, index: Array) -> Array:
    """A gather, and in the backward a sum over runs of cotangents that were sorted by their shard."""
    used = np.asarray(index).reshape(-1)
    order = np.argsort(used, kind="stable")

    @jax.custom_vjp
    def gather(pool: Array) -> Array:
        return pool[index]

    def backward(_: None, cotangent: Array) -> tuple[Array]:
        flat = cotangent.reshape(-1, cotangent.shape[-1])
        return (jax.ops.segment_sum(flat[order], used[order], pool.shape[0], indices_are_sorted=True),)

    gather.defvjp(lambda pool: (gather(pool), None), backward)
    return gather(pool)


def inverse_table(pool: Array, index: Array) -> Array:
    """A gather, and in the backward one too: each shard sums the slots that used it, by a table padded to the most."""
    used = np.asarray(index).reshape(-1)
    slots = [np.flatnonzero(used == shard) for shard in range(pool.shape[0])]
    table = np.full((len(slots), max(map(len, slots))), used.size)
    for shard, found in enumerate(slots):
        table[shard, : len(found)] = found

    @jax.custom_vjp
    def gather(pool: Array) -> Array:
        return pool[index]

    def backward(_: None, cotangent: Array) -> tuple[Array]:
        flat = cotangent.reshape(-1, cotangent.shape[-1])
        return (jnp.sum(jnp.pad(flat, ((0, 1), (0, 0)))[jnp.asarray(table)], axis=1),)

    gather.defvjp(lambda pool: (gather(pool), None), backward)
    return gather(pool)


def one_hot(pool: Array, index: Array) -> Array:
    """A product with the one-hot matrix of the index, whose backward is the transposed product."""
    return jax.nn.one_hot(index, pool.shape[0], dtype=pool.dtype) @ pool


VARIANTS: dict[str, Gather] = {
    "gather, scatter layer by layer (jaxpeft)": by_layer,
    "gather, scatter-add": scatter_add,
    "gather, sorted segment sum": sorted_sum,
    "gather, inverse table": inverse_table,
    "one-hot product": one_hot,
}
MILLISECONDS = {"milliseconds": "median", "least_milliseconds": "least", "greatest_milliseconds": "greatest"}
APPLIED = ("expanded once a step (jaxpeft)", "unexpanded: gathered inside each layer")


def expansion(gather: Gather, tables: Tables) -> Callable[[Any, Any], Any]:
    """(pools, cotangents) -> (factors, gradients of the pools), for all groups."""

    def expand(params: Any) -> Any:
        return {
            group: {name: gather(pool, tables[group][f"{name}_index"]) for name, pool in found.items()}
            for group, found in params.items()
        }

    def run(params: Any, cotangents: Any) -> Any:
        factors, pull = jax.vjp(expand, params)
        return factors, pull(cotangents)[0]

    return run


def application(once: bool, index: Mapping[str, np.ndarray]) -> Callable[[Any, Array], Any]:
    """(pools of one group, x (L, tokens, in)) -> gradients of the pools, through x·ΔW of every layer in a scan."""

    def layer(a: Array, b: Array, x: Array) -> Array:
        return jnp.sum(jnp.square(LowRank(a, b, jnp.float32(1)).delta_matmul(x)))

    def loss(params: Any, x: Array) -> Array:
        tables = {name: jnp.asarray(table) for name, table in index.items()}
        if once:
            factors = {name: mos.assemble(params[name], tables[f"{name}_index"]) for name in ("a", "b")}
            step = lambda total, at: (total + layer(at[0]["a"], at[0]["b"], at[1]), None)  # noqa: E731
            return jax.lax.scan(step, jnp.float32(0), (factors, x))[0]

        def gathered(total: Array, at: Any) -> tuple[Array, None]:
            a, b = (params[n][at[0][f"{n}_index"]].reshape(len(at[0][f"{n}_index"]), -1) for n in ("a", "b"))
            return total + layer(a, b, at[1]), None

        return jax.lax.scan(gathered, jnp.float32(0), (tables, x))[0]

    return jax.grad(loss)


def measure(options: argparse.Namespace, console: Console) -> Figures:
    """Times every way on the CPU, in turn, and compiles each for a TPU if its compiler is there."""
    check(options.model, "bench pools", [MOS])
    sites = jaxpeft.find(models.pretrained(options.model, weights=False).params)
    adapter = jaxpeft.init(jax.random.key(0), SPECS[MOS], sites)
    names = {group.name: group for group in sites}
    tables = {
        name: {key: np.asarray(found[key]).reshape(len(found[key]), -1) for key in ("a_index", "b_index")}
        for name, found in adapter.constants.items()
        if name in names
    }
    params = {name: {key: adapter.params[name][key] + 0.01 for key in ("a", "b")} for name in tables}
    cotangents = jax.tree.map(
        lambda shape: jnp.ones(shape.shape),
        jax.eval_shape(expansion(scatter_add, tables), params, _factors(params, tables))[0],
    )
    widest = max(tables, key=lambda name: names[name].in_dim * names[name].out_dim)
    index = {key: adapter.constants[widest][key] for key in ("a_index", "b_index")}
    x = jax.random.normal(jax.random.key(1), (names[widest].layers, TOKENS, names[widest].in_dim))
    works = {name: (expansion(gather, tables), (params, cotangents)) for name, gather in VARIANTS.items()}
    works |= {name: (application(name == APPLIED[0], index), (params[widest], x)) for name in APPLIED}
    runs, rows = {}, []
    for name, (function, arguments) in works.items():
        console.print(f"compiling {name} …", highlight=False)
        runs[name] = (jax.jit(function).lower(*arguments).compile(), arguments)
    seconds = _times(runs, options.rounds)
    chip, why = _chip()
    for name, (function, arguments) in works.items():
        kind = "x·ΔW" if name in APPLIED else "factors"
        first = APPLIED[0] if name in APPLIED else next(iter(VARIANTS))
        row = {"name": name, "kind": kind, **spread(seconds[name]), "ratio": ratio(seconds[name], seconds[first])}
        row |= {key: 1e3 * row[f"{of}_seconds"] for key, of in MILLISECONDS.items()}
        rows.append(row | ({} if chip is None else _on(chip, function, arguments)))
    ways = [
        "factors: all pools of the model expanded, and the cotangents of all factors added back",
        f"x·ΔW: the update of {widest} applied to {TOKENS} tokens in every layer, and the gradients of its pools",
        "unexpanded: the scan over the layers holds the pools and each layer's indices; a layer gathers its own shards "
        "into its two factors, and its backward adds to gradients of the whole pools, which the scan carries",
        "the index tables are constants of every program, as the sorted sum and the inverse table need them to be",
        "ratios are medians over the rounds, to the first row of the same kind",
        f"TPU: bytes that the compiled program moves to and from memory, {CHIP}" if chip else f"no TPU figures: {why}",
    ]
    columns = (
        Column("name", "way"),
        Column("kind", "makes"),
        Column("milliseconds", "ms on the CPU", ".2f"),
        Column("least_milliseconds", "least", ".2f"),
        Column("greatest_milliseconds", "greatest", ".2f"),
        Column("ratio", "x first", ".2f"),
        Column("tpu_megabytes", "TPU MB", ".1f"),
        Column("tpu_temporary_megabytes", "TPU temporaries MB", ".1f"),
    )
    title = f"Expanding the pools of MoS (rank 16, e = 2, 4 shards) over {options.model}, forward and backward"
    return Figures("pools", title, columns, rows, "ratio", ways)


def _factors(params: Any, tables: Tables) -> Any:
    return {
        group: {
            name: jax.ShapeDtypeStruct((*tables[group][f"{name}_index"].shape, pool.shape[-1]), pool.dtype)
            for name, pool in found.items()
        }
        for group, found in params.items()
    }


def _times(runs: Mapping[str, tuple[Any, tuple]], rounds: int) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, (run, arguments) in runs.items():
            start = time.perf_counter()
            jax.block_until_ready(run(*arguments))
            if number:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def _chip() -> tuple[topology.Topology | None, str]:
    try:
        return topology.named(CHIP), ""
    except topology.TopologyError as error:
        return None, str(error)


def _on(chip: topology.Topology, function: Callable, arguments: tuple) -> dict[str, float]:
    place = jax.sharding.NamedSharding(topology.mesh(chip, {"data": 1}), jax.sharding.PartitionSpec())
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), arguments)
    compiled = topology.compile(jax.jit(function), *shapes, topology=chip).compiled
    return {
        "tpu_megabytes": costs.analyse(compiled.as_text()).memory_bytes / 1e6,
        "tpu_temporary_megabytes": compiled.memory_analysis().temp_size_in_bytes / 1e6,
    }
