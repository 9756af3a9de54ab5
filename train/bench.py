"""Step times side by side: adapters and the frozen bound, interleaved in one process on the same batch."""

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

import jaxpeft
from jaxpeft.methods import lora, mos, prolora
from jaxpeft.spec import Spec
from train import data, devices, job, optim
from train.config import Config, ConfigError

FROZEN = "frozen bound"
SPECS: dict[str, Spec] = {
    "lora r=2": lora.Spec(rank=2),
    "lora r=16": lora.Spec(rank=16),
    "mos r=16 e=2": mos.Spec(rank=16, equivalent_rank=2, private_rank=1, shards_per_vector=4),
    "prolora r=8 u=1 m=n=7": prolora.Spec(rank=8, unshared_rank=1, sharing_in=7, sharing_out=7),
    "prolora unexpanded": prolora.Spec(rank=8, unshared_rank=1, sharing_in=7, sharing_out=7, expand=False),
}


@dataclass(frozen=True)
class Row:
    """One variant's figures.

    Attributes:
      name: the variant.
      trained: trained parameters.
      seconds: of each timed step, in the order of the rounds.
      gflops: of one step, by XLA's analysis of the compiled program; it counts the body of a loop over layers once.
      compile_seconds: tracing and compiling.
      tokens: tokens of the batch, without padding.
    """

    name: str
    trained: int
    seconds: tuple[float, ...]
    gflops: float
    compile_seconds: float
    tokens: int

    @property
    def median(self) -> float:
        """Median seconds a step."""
        return statistics.median(self.seconds)

    def to_dict(self) -> dict[str, Any]:
        """The figures, JSON-able."""
        return {
            "name": self.name,
            "trained_parameters": self.trained,
            "median_seconds": self.median,
            "seconds": list(self.seconds),
            "tokens_per_second": self.tokens / self.median,
            "gflops_by_xla": self.gflops,
            "compile_seconds": self.compile_seconds,
        }


def steps(config: Config, console: Console, *, rounds: int = 7, names: Sequence[str] = ()) -> list[Row]:
    """Times one training step of each variant, in turn, over several rounds.

    The frozen bound is the forward pass and the gradient of the activations down to the first layer, with no adapter:
    the gradient with respect to the layers' norm scales, which adds next to nothing.

    Args:
      config: model, sites, data and optimizer; its method is not used.
      console: says what is being compiled.
      rounds: timed steps of each variant, after one that is not timed.
      names: which of `SPECS`; all by default. The frozen bound is always there.
    """
    if unknown := [name for name in names if name not in SPECS]:
        raise ConfigError([f"--only: unknown adapter {name!r}; expected one of {', '.join(SPECS)}" for name in unknown])
    made = job.assemble(config)
    batch = max(made.batches, key=lambda batch: sum(batch.length == other.length for other in made.batches))
    arrays = devices.shard(made.collate(batch), made.mesh, len(batch.sequences))
    tokens = data.tokens(batch, made.lengths)
    runs: dict[str, Callable[[], Any]] = {}
    facts: dict[str, tuple[int, float, float]] = {}
    for name in [FROZEN, *(names or SPECS)]:
        console.print(f"compiling {name} …", highlight=False)
        start = time.perf_counter()
        if name == FROZEN:
            compiled, arguments, trained = _frozen_step(made, arrays)
        else:
            compiled, arguments, trained = _adapter_step(made, SPECS[name], arrays)
        facts[name] = trained, compiled.cost_analysis()["flops"] / 1e9, time.perf_counter() - start
        runs[name] = lambda compiled=compiled, arguments=arguments: jax.block_until_ready(compiled(*arguments))
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for round_ in range(rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if round_:
                seconds[name].append(time.perf_counter() - start)
    return [
        Row(name, trained, tuple(seconds[name]), gflops, compile_seconds, tokens)
        for name, (trained, gflops, compile_seconds) in facts.items()
    ]


def table(rows: Sequence[Row]) -> str:
    """The figures as a Markdown table; "x frozen" is the median over the rounds of the ratio to the frozen bound."""
    bound = next(row.seconds for row in rows if row.name == FROZEN)
    lines = [
        "| step | trained parameters | median s | spread s | x frozen | tokens/s | GFLOP (XLA) | compile s |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        cells = [
            row.name,
            f"{row.trained:,}",
            f"{row.median:.3f}",
            f"{min(row.seconds):.3f}-{max(row.seconds):.3f}",
            f"{statistics.median(a / b for a, b in zip(row.seconds, bound, strict=True)):.3f}",
            f"{row.tokens / row.median:.0f}",
            f"{row.gflops:.1f}",
            f"{row.compile_seconds:.1f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _adapter_step(made: job.Job, spec: Spec, batch: dict[str, jax.Array]) -> tuple[Any, tuple, int]:
    whole = job.with_head(spec, made.outputs)
    subject = dataclasses.replace(made, adapter=jaxpeft.init(jax.random.key(0), whole, made.adapter.sites))
    adapter = jax.device_put(subject.adapter, subject.stored)
    optimizer = optim.optimizer(made.config.optimizer, 1000, spec)
    state = jax.device_put(optimizer.init(adapter.params), optim.state_shardings(optimizer, subject))
    # Nothing is donated, so that every round starts from the same arrays.
    step = optim.compiled_step(made.config, optimizer, subject, donate=False)
    arguments = (adapter, state, made.base, batch, made.key, np.int32(1))
    return step.lower(*arguments).compile(), arguments, jaxpeft.count(adapter)


def _frozen_step(made: job.Job, batch: dict[str, jax.Array]) -> tuple[Any, tuple, int]:
    norms = {path: leaf for path, leaf in jaxpeft.sites.flatten(made.base).items() if "norm" in path and leaf.ndim == 2}

    def loss(norms: dict[str, jax.Array], base: Any, batch: dict[str, jax.Array]) -> jax.Array:
        leaves = [norms.get(path, leaf) for path, leaf in jaxpeft.sites.paths_and_leaves(base)]
        inputs = {name: array for name, array in batch.items() if name != "weights"}
        losses = jaxpeft.adapt(made.losses)(jaxpeft.sites.with_leaves(base, leaves), [], **inputs)
        return jnp.sum(losses * batch["weights"]) / jnp.sum(batch["weights"])

    arguments = (norms, made.base, batch)
    return devices.Compiled(jax.value_and_grad(loss), made.mesh).lower(*arguments).compile(), arguments, 0
