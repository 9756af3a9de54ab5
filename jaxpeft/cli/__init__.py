"""What can be done with adapter and model files from a shell? inspect, merge, convert, combine, diff."""

import argparse
import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, get_args

import jax

from jaxpeft.cli.parsing import Parser
from jaxpeft.combine import How
from jaxpeft.models.shards import DTYPES

NOTES = """exit codes: 0 done; 1 diff: the adapters differ; 2 bad input or a mistake in the command (said on stderr)"""

Result = tuple[dict[str, Any], str]
"""What a command found: as JSON, and as text."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    options = _parser().parse_args(arguments)
    # Remarks on ordinary things: an adapter is read without wanting to change its folder; PyTorch is not installed.
    for logger in ("absl", "asyncio"):
        logging.getLogger(logger).setLevel(logging.CRITICAL)
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    if "JAX_PLATFORMS" not in os.environ:
        jax.config.update("jax_platforms", "cpu")  # files pass through the host; its memory is the larger
    try:
        found, text = options.command(options)
    except (ValueError, OSError) as error:
        print(f"jaxpeft {options.name}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(json.dumps(found, indent=2, allow_nan=False, ensure_ascii=False) if options.json else text)
    return 1 if found.get("same") is False else 0


def _inspect(options: argparse.Namespace) -> Result:
    from jaxpeft.cli import inspecting

    return inspecting.inspect(options.path, arrays=options.arrays)


def _merge(options: argparse.Namespace) -> Result:
    from jaxpeft.cli import writing

    return writing.merge(
        options.model,
        options.adapter,
        options.out,
        dtype=options.dtype,
        max_shard_size=options.max_shard_size,
        overwrite=options.overwrite,
    )


def _convert(options: argparse.Namespace) -> Result:
    from jaxpeft.cli import writing

    return writing.convert(
        options.adapter,
        options.out,
        options.to,
        rank=options.rank,
        energy=options.energy,
        model=options.model,
        base_model=options.base_model,
        dtype=options.dtype,
        overwrite=options.overwrite,
    )


def _combine(options: argparse.Namespace) -> Result:
    from jaxpeft.cli import writing

    return writing.combine(
        options.out,
        options.adapters,
        options.weights,
        options.method,
        rank=options.rank,
        energy=options.energy,
        density=options.density,
        majority_sign=options.majority_sign,
        seed=options.seed,
        model=options.model,
        overwrite=options.overwrite,
    )


def _diff(options: argparse.Namespace) -> Result:
    from jaxpeft.cli import comparing

    return comparing.diff(options.a, options.b, tolerance=options.tolerance, model=options.model)


def _weights(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r}: expected numbers with commas between them, as in 0.7,0.3"
        ) from None


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="jaxpeft",
        description="Work with adapter and model files.",
        epilog=NOTES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="command", dest="name")

    def command(name: str, run: Callable, help: str, example: str) -> argparse.ArgumentParser:
        made = commands.add_parser(
            name,
            help=help,
            description=help,
            epilog=f"example:\n  jaxpeft {name} {example}\n\n{NOTES}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        made.set_defaults(command=run)
        made.add_argument("--json", action="store_true", help="print the result as JSON")
        return made

    adapter: dict[str, Any] = {
        "metavar": "ADAPTER",
        "help": "a folder of jaxpeft.save, a run folder (its trained adapter, or else its newest checkpoint), or a "
        "folder of Hugging Face PEFT",
    }
    model: dict[str, Any] = {
        "metavar": "MODEL",
        "help": "the base: a folder in the Hugging Face format, a hub name, or a name that jaxpeft.models knows",
    }
    needed = "; needed by updates that depend on the weight they change (DoRA, IA3, OFT, …), and to read PEFT's files"

    def writes(made: argparse.ArgumentParser, what: str) -> None:
        made.add_argument("--overwrite", action="store_true", help=f"replace {what} that OUT holds")

    def sizes(made: argparse.ArgumentParser) -> None:
        made.add_argument("--rank", type=int, metavar="K", help="most rank of a weight's update; the nearest is taken")
        made.add_argument(
            "--energy", type=float, metavar="F", help="or the smallest rank that keeps this share of ‖ΔW‖², up to 1"
        )

    inspect = command(
        "inspect", _inspect, "Say what lies in a folder: an adapter, a run or a model.", "runs/quickstart"
    )
    inspect.add_argument(
        "path", metavar="PATH", help="an adapter (as elsewhere), or a model in the Hugging Face format"
    )
    inspect.add_argument("--arrays", action="store_true", help="also list every array: shape, dtype, norm; reads them")

    merge = command(
        "merge",
        _merge,
        "Write a model with an adapter merged in, as a Hugging Face folder.",
        "smollm2-135m-instruct runs/quickstart merged --dtype bfloat16",
    )
    merge.add_argument("model", **model)
    merge.add_argument("adapter", **adapter)
    merge.add_argument("out", metavar="OUT", help="where the model is written")
    merge.add_argument("--dtype", choices=DTYPES, help="of its weights (default: the base's)")
    merge.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="of one file (default %(default)s)")
    writes(merge, "a model")

    convert = command(
        "convert",
        _convert,
        "Write an adapter in another form.",
        "runs/quickstart adapter-for-peft --to peft --model smollm2-135m-instruct",
    )
    convert.add_argument("adapter", **adapter)
    convert.add_argument("out", metavar="OUT", help="where the adapter is written")
    convert.add_argument(
        "--to",
        required=True,
        choices=["peft", "jaxpeft", "lora"],
        help="peft: Hugging Face PEFT's files; jaxpeft: jaxpeft's own; lora: jaxpeft's own, as plain LoRA",
    )
    sizes(convert)
    convert.add_argument("--model", metavar="MODEL", help=model["help"] + needed)
    convert.add_argument("--base-model", metavar="NAME", help="what PEFT's files call the base (default: MODEL)")
    convert.add_argument("--dtype", choices=DTYPES, help="of PEFT's tensors (default float32)")
    writes(convert, "an adapter")

    combine = command(
        "combine",
        _combine,
        "Write several adapters of one base as one.",
        "both runs/one runs/two --weights 0.7,0.3 --method ties --density 0.5 --rank 16",
    )
    combine.add_argument("out", metavar="OUT", help="where the adapter is written")
    combine.add_argument("adapters", nargs="+", **adapter)
    combine.add_argument("--weights", type=_weights, metavar="W,W", help="one for each adapter (default: 1 / number)")
    combine.add_argument("--method", choices=get_args(How), default="linear", help="see jaxpeft.combine")
    sizes(combine)
    combine.add_argument("--density", type=float, metavar="F", help="share of entries that pruning keeps")
    combine.add_argument("--majority-sign", choices=["total", "frequency"], default="total", help="of TIES")
    combine.add_argument("--seed", type=int, default=0, help="of the methods that draw (default %(default)s)")
    combine.add_argument("--model", metavar="MODEL", help=model["help"] + needed)
    writes(combine, "an adapter")

    diff = command(
        "diff",
        _diff,
        "Compare what two adapters do to the weights, of the same method or of two.",
        "runs/one runs/two --tolerance 1e-3",
    )
    diff.add_argument("a", metavar="A", help=adapter["help"])
    diff.add_argument("b", metavar="B", help="another, likewise")
    diff.add_argument(
        "--tolerance", type=float, default=1e-6, metavar="F", help="most ‖ΔA - ΔB‖ / ‖ΔA‖ (default %(default)s)"
    )
    diff.add_argument("--model", metavar="MODEL", help=model["help"] + needed)
    return parser
