"""What can be asked of each benchmark? Read without JAX, for --help."""

import argparse

MODEL = "smollm2-135m-instruct"


def add(parser: argparse.ArgumentParser) -> None:
    """Adds the benchmarks and their options to the parser of ``bench``."""
    benchmarks = parser.add_subparsers(required=True, dest="what", metavar="WHAT")

    def benchmark(name: str, help: str) -> argparse.ArgumentParser:
        made = benchmarks.add_parser(name, help=help, description=help)
        made.add_argument("--model", default=MODEL, help="a model as in configurations (default %(default)s)")
        made.add_argument(
            "--rounds", type=int, default=7, help="of all that is compared, in turn (default %(default)s)"
        )
        made.add_argument("--out", metavar="FOLDER", help=f"write {name}.md, {name}.json and {name}.png here")
        return made

    step = benchmark("step", "A training step: adapters, full fine-tuning, other libraries, and what bounds them.")
    step.add_argument("--batch", type=int, default=4, help="sequences (default %(default)s)")
    step.add_argument("--length", type=int, default=256, help="tokens of a sequence (default %(default)s)")
    step.add_argument("--only", action="append", metavar="ROW", help="one of the rows; may be repeated")
    step.add_argument("--eager", action="store_true", help="torch without torch.compile, which takes minutes")

    compiling = benchmark("compile", "Compilation of a training step by the number of layers.")
    compiling.add_argument("--batch", type=int, default=4, help="sequences (default %(default)s)")
    compiling.add_argument("--length", type=int, default=256, help="tokens of a sequence (default %(default)s)")
    compiling.add_argument(
        "--depths", default="15,30,60", metavar="N,N", help="numbers of layers (default %(default)s)"
    )
    benchmark("pools", "Ways to expand the pools of MoS into factors, and their backward.")
    benchmark("merge", "Merging adapters into the base, beside a copy of the weights.")
    benchmark("load", "Loading models and an adapter, beside reading their bytes.")
    benchmark("checkpoint", "Saving and restoring adapters with their optimizer's state, beside writing their bytes.")
    adapters = benchmark("adapters", "Many adapters in one batch: prompts read, tokens written, adapters trained.")
    adapters.add_argument("--adapters", type=int, default=32, metavar="N", help="and rows (default %(default)s)")
    adapters.add_argument(
        "--prompt", type=int, default=64, metavar="N", help="tokens of a prompt (default %(default)s)"
    )
    adapters.add_argument("--new", type=int, default=16, metavar="N", help="tokens written (default %(default)s)")
