"""What does merging cost beside copying the weights?"""

import argparse
from typing import Any

from rich.console import Console

from train.bench import movement
from train.bench.figures import Figures
from train.bench.specs import SPECS, check
from train.bench.workers import Entry, Work

PLAIN = "plain copy of the adapted weights"
ROWS = tuple(SPECS)


def measure(options: argparse.Namespace, console: Console) -> Figures:
    """Times `jaxpeft.merge` of one adapter of each kind, and a copy of the weights it changes."""
    check(options.model, "bench merge")
    work = "train.bench.merge:work"
    entries = {name: Entry(work, {"model": options.model, "row": name}) for name in (PLAIN, *ROWS)}
    title = f"Merging an adapter of all linear layers into {options.model}, float32"
    notes = (
        "moved: every adapted weight read and written, and the trained and constant arrays of the adapter read",
        "on top: the merged weights themselves, and what forming them takes; the base stays, none is changed in place",
    )
    return movement.measure("merge", title, entries, dict.fromkeys(ROWS, PLAIN), options.rounds, console, notes)


def work(model: str, row: str) -> Work:
    """One row."""
    import jax
    import jax.numpy as jnp

    import jaxpeft
    from jaxpeft import models
    from jaxpeft.sites import flatten

    base = models.pretrained(model, dtype="float32").params
    sites = jaxpeft.find(base)
    leaves = flatten(base)
    adapted = [leaves[path] for group in sites for path in group.paths]
    moved = 2 * sum(leaf.nbytes for leaf in adapted)
    if row == PLAIN:
        return Work(lambda: _done([jnp.copy(leaf) for leaf in adapted]), {"bytes": moved})
    adapter = jaxpeft.init(jax.random.key(0), SPECS[row], sites, weights=base)
    read = sum(leaf.nbytes for leaf in jax.tree.leaves((adapter.params, adapter.constants)))
    return Work(lambda: _done(jaxpeft.merge(base, adapter)), {"bytes": moved + read})


def _done(arrays: Any) -> None:
    import jax

    jax.block_until_ready(arrays)
