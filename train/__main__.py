"""The command line: fit, evaluate, generate, chat, serve, export, report, bench, plan, methods."""

import argparse
import logging
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any

from rich.console import Console

from train import commands
from train.bench import options as bench_options

NOTES = """exit codes: 0 done; 1 something could not be used (said on stderr); 2 mistakes in the configuration or
the command; 3 the loss is not finite; 4 another process is gone, the same commands go on; 143 stopped by SIGTERM or
Ctrl-C after a checkpoint, the same command goes on

several processes: set JAX_COORDINATOR_ADDRESS=host:port, JAX_NUM_PROCESSES and JAX_PROCESS_ID for each; the first one
writes, and all need the run folder. One that does not answer for JAXPEFT_HEARTBEAT_SECONDS (60) counts as gone"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    # argparse takes overrides only where it takes the file; here they may also come after an option.
    if unknown := [word for word in rest if word.startswith("-") or "=" not in word or "overrides" not in options]:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if rest:
        options.overrides += rest
    console = Console(soft_wrap=True)
    # Remarks on ordinary things: an adapter is read without wanting to change its folder; PyTorch is not installed.
    # And Orbax's threads print tracebacks of failed writes, which are raised, and named below, anyway.
    for logger in ("absl", "asyncio"):
        logging.getLogger(logger).setLevel(logging.CRITICAL)
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    if hasattr(options, "prepare"):
        options.prepare(options)
    # Below the parser: --help should not wait for JAX.
    import jax

    from jaxpeft.checkpoint import CheckpointError
    from jaxpeft.models.loading import ModelFileError
    from jaxpeft.models.pretrained import cache_folder
    from train import loop, processes
    from train.builtin import DownloadError
    from train.config import ConfigError
    from train.rows import DataError
    from train.run import RunError
    from train.template import TemplateError

    # What takes a second or more to compile is kept, but where compilation is measured; JAX's own variables win.
    if jax.config.jax_compilation_cache_dir is None and options.command not in (commands.bench, commands.plan):
        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "compiled"))
    try:
        with processes.together(orderly=(loop.Stopped, loop.Diverged)):
            console.quiet = jax.process_index() > 0
            options.command(options, console)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    except loop.Diverged as error:
        print(error, file=sys.stderr)
        return 3
    except processes.Lost as error:
        print(error, file=sys.stderr)
        return 4
    except loop.Stopped as error:
        print(error, file=sys.stderr)
        return 143
    except (
        CheckpointError,
        ConnectionError,
        DataError,
        DownloadError,
        FileNotFoundError,
        ModelFileError,
        RunError,
        TemplateError,
    ) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m train",
        description="Fine-tune a language model or an encoder with an adapter.",
        epilog=NOTES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    subparsers = parser.add_subparsers(required=True, metavar="command")

    def command(name: str, run, help: str, example: str) -> argparse.ArgumentParser:
        made = subparsers.add_parser(
            name,
            help=help,
            description=help,
            epilog=f"example:\n  python -m train {name} {example}\n\n{NOTES}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        made.set_defaults(command=run)
        return made

    overrides = {"nargs": "*", "metavar": "key=value", "help": "replaces a value of the configuration"}
    run_or_config = {
        "metavar": "RUN_OR_CONFIG",
        "help": "a run folder (its trained adapter), or a configuration (the base model)",
    }
    fit = command(
        "fit",
        commands.fit,
        "Measure, train, measure, save and report.",
        "configs/quickstart.yaml train.steps=20 output.folder=runs/20",
    )
    fit.add_argument("config", help="a YAML file, for instance configs/quickstart.yaml")
    fit.add_argument("overrides", **overrides)
    fit.add_argument("--dry-run", action="store_true", help="print sites, counts, steps and memory; load no weights")
    evaluate = command(
        "evaluate",
        commands.evaluate,
        "Measure on the held-out rows, or by the tasks of lm-evaluation-harness.",
        "runs/quickstart data.held_out_rows=1500\n"
        "  python -m train evaluate runs/quickstart --tasks arc_easy,hellaswag --limit 100 --base",
    )
    evaluate.add_argument("run", **run_or_config)
    evaluate.add_argument("overrides", **overrides)
    of_tasks = evaluate.add_argument_group("tasks of lm-evaluation-harness (pip install 'jaxpeft[eval]')")
    of_tasks.add_argument("--tasks", metavar="A,B", help="tasks, groups or tags, or patterns with *")
    of_tasks.add_argument("--include-path", metavar="FOLDER", help="of further task files (YAML)")
    of_tasks.add_argument("--num-fewshot", type=int, metavar="N", help="examples before each question")
    of_tasks.add_argument("--limit", type=int, metavar="N", help="only the first N rows of each task")
    of_tasks.add_argument("--tasks-batch-size", type=int, metavar="N", help="rows of a pass (default 8)")
    of_tasks.add_argument("--apply-chat-template", action="store_true", help="write prompts as conversations")
    of_tasks.add_argument("--base", action="store_true", help="also measure the base model, beside the adapter")
    of_tasks.add_argument("--json", metavar="FILE", help="write the results here, beside tasks.json of the run folder")
    generate = command(
        "generate",
        commands.generate,
        "Answer prompts.",
        "runs/quickstart --prompt 'Is the sentiment of …?' --max-new-tokens 4",
    )
    generate.add_argument("run", **run_or_config)
    generate.add_argument("overrides", **overrides)
    generate.add_argument(
        "--prompt", action="append", help="a user's message; may be repeated (default: lines of stdin)"
    )
    generate.add_argument("--max-new-tokens", type=int, default=128)
    generate.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token (default)")
    generate.add_argument("--seed", type=int, default=0, help="of the sampling")
    chat = command(
        "chat", commands.chat, "Talk to the model, a turn a line.", "runs/quickstart --system 'Answer in one word.'"
    )
    chat.add_argument("run", **run_or_config)
    chat.add_argument("overrides", **overrides)
    chat.add_argument("--system", metavar="TEXT", help="the system message")
    chat.add_argument("--max-new-tokens", type=int, default=256, help="of an answer (default 256)")
    chat.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token (default)")
    chat.add_argument("--seed", type=int, default=0, help="of the sampling")
    serve = command(
        "serve",
        commands.serve,
        "Serve a model and all adapters of a folder over HTTP, as OpenAI's API.",
        "smollm2-135m-instruct --adapters runs --port 8000",
    )
    serve.add_argument(
        "model", metavar="MODEL_OR_CONFIG", help="a model as in configurations, a configuration, or a run folder"
    )
    serve.add_argument("overrides", **overrides)
    serve.add_argument("--adapters", metavar="FOLDER", help="each of its folders with an adapter or run is a model")
    serve.add_argument("--name", help="of the base model (default: the last part of its path)")
    serve.add_argument("--host", default="127.0.0.1", help="default %(default)s: this machine alone")
    serve.add_argument("--port", type=int, default=8000, help="default %(default)s; 0 takes a free one")
    serve.add_argument("--rows", type=int, default=8, metavar="N", help="requests written at a time (default 8)")
    serve.add_argument(
        "--max-length", type=int, metavar="S", help="tokens of prompt and answer (default: the context, at most 2048)"
    )
    serve.add_argument("--tokens-per-call", type=int, default=4, metavar="N", help="between arrivals (default 4)")
    serve.add_argument("--max-queue", type=int, default=256, metavar="N", help="requests that may wait (default 256)")
    serve.add_argument("--timeout", type=float, default=600.0, metavar="SECONDS", help="of a request (default 600)")
    serve.add_argument("--grace", type=float, default=30.0, metavar="SECONDS", help="to end after SIGTERM (default 30)")
    serve.add_argument("--api-key", action="append", metavar="KEY", help="also $JAXPEFT_API_KEY; may be repeated")
    serve.add_argument("--warm-up", action="store_true", help="compile all programs before the first request")
    export = command(
        "export",
        commands.export,
        "Write the model with the trained adapter merged in, as a Hugging Face folder.",
        "runs/quickstart models/sentiment --dtype bfloat16",
    )
    export.add_argument("run", metavar="RUN", help="a run folder")
    export.add_argument("folder", metavar="FOLDER", help="where the model is written")
    export.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], help="of its weights (default: the base's)"
    )
    export.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="of one file (default %(default)s)")
    export.add_argument("--overwrite", action="store_true", help="replace a model that the folder holds")
    export.add_argument("--dequantize", action="store_true", help="write a base in few bits as floats")
    bench = command(
        "bench",
        commands.bench,
        "Measure what costs how much, side by side in one run.",
        "step --rounds 7 --out figures",
    )
    bench_options.add(bench)
    methods = command(
        "methods",
        commands.methods,
        "Print the table of methods at one budget.",
        "--model smollm2-135m-instruct --parameters 500000",
    )
    methods.add_argument(
        "--model",
        default="meta-llama/Llama-2-7b-hf",
        help="a model as in configurations; only its shapes count (default %(default)s)",
    )
    methods.add_argument(
        "--parameters",
        type=int,
        default=4_997_120,
        metavar="N",
        help="trained parameters wanted (default: LoRA rank 2)",
    )
    methods.add_argument("--method", action="append", metavar="NAME", help="only this one; may be repeated")
    methods.add_argument("--pages", metavar="FOLDER", help="write a page of documentation for each instead")
    plan = command(
        "plan",
        commands.plan,
        "Compile the training step for a machine that is not there: does it fit, and what bounds it?",
        "configs/llama2-7b-mos.yaml --topology v5e:4x4 --methods lora,mos,prolora,vera,full",
    )
    plan.set_defaults(prepare=commands.simulate)
    plan.add_argument("config", help="a YAML file; no weights, data or tokenizer are read")
    plan.add_argument("overrides", **overrides)
    plan.add_argument(
        "--topology",
        action="append",
        metavar="NAME",
        help="v5e:4x4, v5p:2x2x2, v6e:4x4, cuda:1x1x8 (slices x hosts x GPUs), …; may be repeated (default v5e:4x4)",
    )
    plan.add_argument("--cpu", type=_positive, metavar="N", help="simulated devices of this machine instead")
    plan.add_argument(
        "--effort",
        choices=("quick", "full"),
        default="quick",
        help="of a TPU's compiler. Full takes four times as long, and keeps in VMEM what a run keeps there: "
        "quick counts too many bytes to memory (default %(default)s)",
    )
    plan.add_argument("--methods", metavar="A,B", help="a table over these methods, at typical settings")
    plan.add_argument("--json", action="store_true", help="print the figures as JSON")
    report = command(
        "report", commands.report, "Write what there is to read of a finished run again.", "runs/quickstart"
    )
    report.add_argument("run", metavar="RUN", help="a run folder")
    return parser


def _positive(text: str) -> int:
    """A whole number of at least 1, as the type of an option."""
    if not text.isdecimal() or not text.strip("0") or len(text) > 9:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 to 999999999, found {text!r}")
    return int(text)


def _unraisable(unraisable: Any) -> None:
    # TensorStore tells an event loop that is gone of writes that were given up.
    if "Event loop is closed" not in str(unraisable.exc_value):
        sys.__unraisablehook__(unraisable)


def _exit() -> None:
    """Runs the command, and leaves the other processes, if there are any, as `processes.leave` says."""
    sys.unraisablehook = _unraisable
    try:
        code = main()
    except (KeyboardInterrupt, Exception):
        traceback.print_exc()
        code = 1
    if "jax" in sys.modules:
        from train import processes

        processes.leave(code)
    sys.exit(code)


if __name__ == "__main__":
    _exit()
