"""Does compiling a training step take longer for a deeper model? Layers are scanned, so it should not."""

import argparse
import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console

import jaxpeft
from jaxpeft import methods, models
from train import hlo
from train.bench import step_jax, step_jaxpeft
from train.bench.figures import Column, Figures, ratio, spread
from train.bench.specs import LORA, MOS, SPECS, decoder, misfit
from train.bench.step import busy, too_small
from train.bench.workers import Entry, Work, rounds, started
from train.config import ConfigError

COLUMNS = (
    Column("row", "step"),
    Column("median_seconds", "median s", ".2f"),
    Column("spread", "spread s"),
    Column("times_first", "x first depth", ".3f"),
    Column("instructions", "instructions", ","),
)


def measure(options: argparse.Namespace, console: Console) -> Figures:
    """Compiles the step of each method at each depth, in turn, without the compilation cache.

    Raises:
      ConfigError: a bad option, an encoder, or an adapter that does not fit a depth.
      RunError: a worker failed.
    """
    numbers = _depths(options)
    model = decoder(options.model, "bench compile")
    shapes = {depth: models.shapes(_deep(model.config, depth)) for depth in numbers}
    names = (LORA, MOS)
    if problems := [f"--depths {n}: {bad}" for n in numbers for name in names if (bad := misfit(name, shapes[n]))]:
        raise ConfigError(problems, "bench compile")
    remarks = busy()
    for line in remarks:
        console.print(line, highlight=False, markup=False)
    environment = {"JAX_ENABLE_COMPILATION_CACHE": "false", "TF_CPP_MIN_LOG_LEVEL": "3"}
    with contextlib.ExitStack() as stack:
        wanted = {f"{name}, {depth} layers": (name, depth) for name in names for depth in numbers}
        size = {"batch": options.batch, "length": options.length}
        entries = {
            title: Entry(
                "train.bench.compile:compiling",
                {"config": dataclasses.asdict(_deep(model.config, depth)), "spec": SPECS[name].to_dict(), **size},
                environment,
            )
            for title, (name, depth) in wanted.items()
        }
        workers = started(stack, entries, console)
        found = rounds(workers, options.rounds)
    made = []
    for worker in workers:
        name, depth = wanted[worker.name]
        first = [answer["seconds"] for answer in found[f"{name}, {numbers[0]} layers"]]
        seconds = [answer["seconds"] for answer in found[worker.name]]
        row = {"row": worker.name, "method": name, "layers": depth, "seconds": seconds, **spread(seconds)}
        row |= {"spread": f"{min(seconds):.2f}-{max(seconds):.2f}", "times_first": ratio(seconds, first)}
        made.append({**row, "instructions": worker.facts["instructions"]})
    return Figures(
        "compile",
        f"Tracing and compiling a training step of {options.model} at {' / '.join(map(str, numbers))} layers: "
        f"{options.batch} x {options.length} tokens, from shapes, without a cache; median of {options.rounds} rounds",
        COLUMNS,
        made,
        "median_seconds",
        ["instructions: those of the optimised program, in all of its computations", *remarks],
    )


def compiling(config: Mapping[str, Any], spec: Mapping[str, Any], batch: int, length: int) -> Work:
    """Traces, lowers and compiles from shapes, anew each time."""
    scaling = config["rope_scaling"] and models.RopeScaling(**config["rope_scaling"])
    lm = models.shapes(models.Config(**{**config, "rope_scaling": scaling}))
    assert isinstance(lm, models.LanguageModel)
    make = partial(jaxpeft.init, spec=methods.spec_from_dict(spec), sites=jaxpeft.find(lm.params))
    adapter = jax.eval_shape(lambda key: make(key), jax.random.key(0))
    state = (adapter, jax.eval_shape(step_jax.OPTIMIZER.init, adapter.params))
    tokens = jax.ShapeDtypeStruct((batch, length), jnp.int32)

    def program() -> jax.stages.Compiled:
        jax.clear_caches()
        return step_jax.compiled(step_jaxpeft.adapter_step(lm), state, (lm.params, tokens, tokens))

    def run() -> None:
        program()

    computations = hlo.parse(program().as_text()).computations.values()
    return Work(run, {"instructions": sum(len(computation.instructions) for computation in computations)})


def _deep(config: models.Config, depth: int) -> models.Config:
    return dataclasses.replace(config, num_hidden_layers=depth, dtype="float32", param_dtype="float32")


def _depths(options: argparse.Namespace) -> Sequence[int]:
    words = [word.strip() for word in options.depths.split(",")]
    problems = too_small(options)
    problems += [
        f"--depths: numbers of layers, at least 1, found {word!r}"
        for word in words
        if not word.isdecimal() or int(word) < 1
    ]
    if len(set(words)) < len(words):
        problems.append(f"--depths: each once, found {options.depths}")
    if problems:
        raise ConfigError(problems, "bench compile")
    return [int(word) for word in words]
