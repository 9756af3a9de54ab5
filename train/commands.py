"""What does each command do, and in what words does it answer?"""

import argparse
import contextlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

TASK_OPTIONS = ("include_path", "num_fewshot", "limit", "tasks_batch_size", "apply_chat_template", "base", "json")
"""Options of `evaluate` that mean something with --tasks alone."""


def fit(options: argparse.Namespace, console: Console) -> None:
    """Measures, trains, measures, saves and reports; or says what it would do."""
    from train import config, fit

    parsed = config.load(options.config, options.overrides)
    if options.dry_run:
        fit.dry_run(parsed, console)
    else:
        fit.fit(parsed, console)


def evaluate(options: argparse.Namespace, console: Console) -> None:
    """Measures on the held-out rows, or on tasks of lm-evaluation-harness."""
    from train import fit, job
    from train.config import ConfigError

    config, folder = _run_or_config(options.run, options.overrides)
    if options.tasks:
        _evaluate_tasks(options, console, config, folder)
        return
    if given := [name for name in TASK_OPTIONS if getattr(options, name) not in (None, False)]:
        options_given = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise ConfigError([f"{options_given}: has no effect without --tasks"], "evaluate")
    made = job.assemble(config)
    for name, value in made.task.evaluator(made)(fit.trained(made, folder) if folder else made.adapter).items():
        console.print(f"{name:12} {value:.4f}", highlight=False)


def _evaluate_tasks(options: argparse.Namespace, console: Console, config: Any, folder: Path | None) -> None:
    from train import fit, job, tasks
    from train.config import ConfigError

    measure = tasks.Tasks(
        [name.strip() for name in options.tasks.split(",")],
        include_path=options.include_path,
        num_fewshot=options.num_fewshot,
        limit=options.limit,
        batch_size=8 if options.tasks_batch_size is None else options.tasks_batch_size,
        chat=options.apply_chat_template,
    )
    if options.json and not Path(options.json).absolute().parent.is_dir():
        raise ConfigError([f"--json: {Path(options.json).absolute().parent} is no folder"], "evaluate --tasks")
    subject = job.subject(config)
    models = {"base": None} if options.base or not folder else {}
    if folder:
        models["adapter"] = fit.trained(subject, folder)
    found = {name: measure(subject, adapter) for name, adapter in models.items()}
    console.print(tasks.table(found))
    if folder:
        tasks.write(folder / "tasks.json", found)
    if options.json:
        tasks.write(Path(options.json), found)


def chat(options: argparse.Namespace, console: Console) -> None:
    """A conversation with the model."""
    from train import chat, fit, job

    config, folder = _run_or_config(options.run, options.overrides)
    subject = job.subject(config)
    made = chat.Chat(
        subject,
        fit.trained(subject, folder) if folder else None,
        system=options.system,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        seed=options.seed,
    )
    chat.converse(made, console)


def generate(options: argparse.Namespace, console: Console) -> None:
    """Answers prompts."""
    from train import fit, generate, job

    config, folder = _run_or_config(options.run, options.overrides)
    job.check_generation(config)
    subject = job.subject(config)
    adapter = fit.trained(subject, folder) if folder else subject.adapter
    prompts = options.prompt or [line.rstrip("\n") for line in sys.stdin]
    for answer in generate.answers(
        subject,
        adapter,
        prompts,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        seed=options.seed,
    ):
        console.print(answer, markup=False, highlight=False)


def export(options: argparse.Namespace, console: Console) -> None:
    """Writes the merged model as a Hugging Face folder."""
    from jaxpeft import models
    from train import config, fit, job, run

    folder = _run_folder(options.run)
    subject = job.subject(config.load(folder / "config.yaml"))
    try:
        models.save(
            options.folder,
            subject.model,
            fit.trained(subject, folder),
            dtype=options.dtype,
            max_shard_size=options.max_shard_size,
            overwrite=options.overwrite,
            dequantize=options.dequantize,
        )
    except (ValueError, OSError) as error:
        raise run.RunError(str(error)) from None
    console.print(f"model  {options.folder}", highlight=False)


def report(options: argparse.Namespace, console: Console) -> None:
    """Writes what there is to read of a finished run again."""
    from train import card, fit, report

    folder = _run_folder(options.run)
    page = report.write(folder)
    card.write(folder)
    fit.show(console, folder)
    console.print(f"report  {page}", highlight=False)


def bench(options: argparse.Namespace, console: Console) -> None:
    """Measures what costs how much, side by side."""
    import importlib

    from train import config

    if options.rounds < 1:
        raise config.ConfigError([f"--rounds: at least 1, found {options.rounds}"], "bench")
    if options.out and not Path(options.out).is_dir():
        raise config.ConfigError([f"--out: {options.out} is no folder"], "bench")
    found = importlib.import_module(f"train.bench.{options.what}").measure(options, console)
    console.print(found.markdown(), markup=False, highlight=False, no_wrap=True, crop=False)
    if options.out:
        found.write(Path(options.out))


def methods(options: argparse.Namespace, console: Console) -> None:
    """Prints the table of methods at one budget, or writes their pages."""
    from train import methods

    if options.pages:
        methods.pages(Path(options.pages))
        return
    found = methods.sites(options.model)
    made = list(methods.rows(found, options.parameters, options.method or ()))
    console.print(
        methods.text(made, found, options.parameters), markup=False, highlight=False, no_wrap=True, crop=False
    )


def serve(options: argparse.Namespace, console: Console) -> None:
    """Serves the model and its adapters until it is stopped."""
    import logging

    from train import config

    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("train").setLevel(logging.INFO)
    try:
        from train import serve, served
    except ModuleNotFoundError as error:
        raise config.ConfigError([f"{error.name} is not installed: pip install 'jaxpeft[serve]'"], "serve") from None
    try:
        address = serve.bound(options.host, options.port)
    except (OSError, OverflowError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise config.ConfigError([f"--host {options.host} --port {options.port}: {why}"], "serve") from None
    with address:
        service = served.service(options)
        if options.warm_up:
            console.print("compiling …")
            service.engine.warm_up(
                [one.adapter for one in service.residents.found.values()] if service.residents else []
            )
        host, port = address.getsockname()[:2]
        names = list(service.names())
        said = f"serving {names[0]} and {len(names) - 1} adapters at http://{host}:{port}/v1"
        serve.run(service, address, options.grace, lambda: console.print(said, highlight=False))


def simulate(options: argparse.Namespace) -> None:
    """What has to be in the environment before JAX looks for devices."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    from train import topology

    # As many as the largest machine has: what no chip has room for is compiled for them.
    chips = [1]
    for name in _topologies(options):
        with contextlib.suppress(topology.TopologyError):  # which `plan` tells
            chips.append(topology.size(name))
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={max(chips)}"
    os.environ["XLA_FLAGS"] = flags.strip()


def _topologies(options: argparse.Namespace) -> list[str]:
    return options.topology or [f"cpu:{options.cpu}" if options.cpu else "v5e:4x4"]


def plan(options: argparse.Namespace, console: Console) -> None:
    """Compiles the training step for machines that are not there."""
    import json

    from train import config, plan, plan_text, topology

    parsed = config.load(options.config, options.overrides)
    if options.cpu and options.topology:
        raise config.ConfigError(["plan: give --topology or --cpu, not both"])
    try:
        machines = [topology.named(name) for name in _topologies(options)]
    except topology.TopologyError as error:
        raise config.ConfigError([f"--{'cpu' if options.cpu else 'topology'}: {error}"], "plan") from None
    methods = [name.strip() for name in options.methods.split(",")] if options.methods else ()
    found = []
    for one in plan.plans(parsed, machines, methods, effort=options.effort):
        found.append(one)
        if len(machines) * len(methods or "1") > 1:
            print(f"{one.topology} {one.method}: {one.compile_seconds:.0f} s", file=sys.stderr)
    if options.json:
        described = [one.to_dict() for one in found]
        print(json.dumps(described[0] if len(described) == 1 else described, indent=2))
    else:
        shown = plan_text.rows(found) if options.methods or len(found) > 1 else plan_text.page(found[0])
        console.print(shown, markup=False, highlight=False, no_wrap=True, crop=False)


def _run_or_config(path: str, overrides: Sequence[str]):
    """The configuration, and the run folder if `path` is one."""
    from train import config

    if Path(path).is_dir():
        folder = _run_folder(path)
        return config.load(folder / "config.yaml", overrides), folder
    return config.load(path, overrides), None


def _run_folder(path: str) -> Path:
    """The folder of a run; otherwise a RunError says what is there."""
    from jaxpeft.cli import inspecting, sources
    from train import run

    folder = Path(path)
    if (folder / "config.yaml").is_file():
        return folder
    try:
        kind = sources.find(folder).kind
    except (ValueError, FileNotFoundError) as error:
        raise run.RunError(str(error)) from None
    what = "training run without its configuration" if kind == "run" else inspecting.NAMES[kind]
    hint = f"; the run is {folder.parent}" if (folder.parent / "config.yaml").is_file() else ""
    raise run.RunError(f"{folder}: {what}; expected the folder of a training run, which has a config.yaml{hint}")
