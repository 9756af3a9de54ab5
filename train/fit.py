"""A whole run: measure, train, measure, save, reload, report."""

import math
from pathlib import Path

import jax
from rich.console import Console
from rich.table import Table

import jaxpeft
from jaxpeft.adapter import Adapter
from train import card, devices, job, loop, metrics, optim, report, run
from train.config import Config


def fit(config: Config, console: Console) -> Path:
    """Runs what `config` says, or goes on with it, and returns the run folder.

    The saved adapter is loaded again and must give the identical held-out loss before the report is written.

    Raises:
      RunError: the run folder cannot be used, or the saved adapter is not the trained one.
      Diverged, Stopped: see `loop.train`.
    """
    folder = run.open_folder(config)
    _check_place(folder / "adapter")
    before = _before(folder / "before.json")
    made = job.assemble(config)
    console.print(str(jaxpeft.summary(made.adapter)), *made.notes, sep="\n", markup=False, highlight=False)
    if jax.process_index() == 0:
        run.claim(folder, config, _run_bytes(made, config.train.keep))

    evaluator = made.task.evaluator(made)
    if before is None:
        console.print("measuring before training …")
        before = evaluator(made.adapter)
        if jax.process_index() == 0:
            run.write_json(folder / "before.json", before)
    adapter = loop.train(made, folder, evaluator)
    console.print("measuring after training …")
    after = evaluator(adapter)
    if before.keys() != after.keys():
        held, wanted = ", ".join(before), ", ".join(after)
        raise run.RunError(f"{folder / 'before.json'}: holds {held}, expected {wanted}; delete it to measure again")

    # Of the same few rows in the same batches: only then is the same adapter bound to give the identical number.
    rows = config.train.evaluate_rows
    expected = evaluator.loss(adapter, rows)
    extra = {"tokenizer": made.template.fingerprint, "task": config.task.kind, "outputs": list(made.outputs)}
    jaxpeft.save(folder / "adapter", adapter, base=made.base, overwrite=True, extra=extra)
    found = evaluator.loss(trained(made, folder), rows)
    if found != expected:
        raise run.RunError(
            f"{folder / 'adapter'}: its held-out loss is {found!r} when reloaded, was {expected!r} before"
        )
    if jax.process_index() == 0:
        results = {f"{name}_before": value for name, value in before.items()}
        results |= {f"{name}_after": value for name, value in after.items()}
        results |= {
            "trainable_parameters": jaxpeft.count(adapter),
            "head_parameters": job.head_size(adapter),
            "adapter_bytes": sum(file.stat().st_size for file in (folder / "adapter").rglob("*") if file.is_file()),
            "peak_memory_bytes": devices.peak_memory_bytes(),
            "sites": adapter.sites.to_dict(),
        }
        run.write_json(folder / "summary.json", report.summary(folder, results))
        page = report.write(folder)
        card.write(folder)
        show(console, folder)
        console.print(f"adapter  {folder / 'adapter'}\nreport   {page}", highlight=False)
    return folder


def dry_run(config: Config, console: Console) -> None:
    """Prints sites, counts, steps and the memory of one training step; loads no weights, and writes nothing."""
    made = job.assemble(config, weights=False)
    console.print(str(made.adapter.sites), str(jaxpeft.summary(made.adapter)), *made.notes, sep="\n\n", markup=False)
    optimizer = optim.optimizer(config.optimizer, len(made.batches), config.method)
    longest = max(batch.length for batch in made.batches)
    shapes = optim.argument_shapes(config, optimizer, made, (config.train.batch_size, longest))
    # What the compiler itself says, for the longest batch.
    memory = optim.compiled_step(config, optimizer, made).lower(*shapes).compile().memory_analysis()
    base = sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(made.base)
    )
    total = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    console.print(
        f"\nmemory per device: {total / 1e6:,.1f} MB = base {base / 1e6:,.1f}"
        f" + adapter, optimizer and batch {(memory.argument_size_in_bytes - base) / 1e6:,.1f}"
        f" + activations and temporaries {memory.temp_size_in_bytes / 1e6:,.1f}",
        highlight=False,
    )


def trained(subject: job.Subject, folder: Path) -> Adapter:
    """The adapter that a finished run saved.

    Raises:
      RunError: the run is not finished, or its tokenizer was another.
      CheckpointError: the adapter is damaged, or of another base.
    """
    if not (folder / "adapter").exists():
        raise run.RunError(f"{folder}: no trained adapter yet; the run is not finished, start it again to go on")
    adapter = jaxpeft.load(folder / "adapter", base=subject.base, shardings=subject.shardings)
    run.check_tokenizer(folder / "adapter", jaxpeft.checkpoint.extra(folder / "adapter"), subject.template.fingerprint)
    return adapter


def show(console: Console, folder: Path) -> None:
    """Prints what a finished run measured."""
    summary = run.json_of(folder / "summary.json")
    table = Table("held out", "before", "after")
    for line in report.table(summary):
        table.add_row(*line)
    console.print(table)


def _check_place(path: Path) -> None:
    """Raises RunError if something else is where the trained adapter goes: it is written last, and would be refused."""
    try:
        found = [child.name for child in path.iterdir()] if path.exists() else []
    except OSError as error:
        raise run.RunError(f"{path}: expected a folder for the trained adapter: {error.strerror or error}") from None
    if found and not any(name.isdigit() for name in found):
        raise run.RunError(f"{path}: expected the trained adapter, found {', '.join(sorted(found))}; move them away")


def _before(path: Path) -> dict[str, float] | None:
    """What was measured before training, when the run was started first; None if it is not yet.

    Raises:
      RunError: the file is damaged.
    """
    if not path.exists():
        return None
    return metrics.numbers(metrics.content(path), str(path), ["eval_loss"])


def _run_bytes(made: job.Job, keep: int) -> int:
    """Disk space for the checkpoints and the adapter: parameters and two moments each, and one in the making."""
    trained = sum(leaf.nbytes for leaf in jax.tree.leaves(made.adapter.params))
    frozen = sum(leaf.nbytes for leaf in jax.tree.leaves(made.adapter.constants))
    return (3 * trained + frozen) * (keep + 2) + 10_000_000
