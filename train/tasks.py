"""What do the tasks of lm-evaluation-harness say of a run's adapter, and of the base model beside it?"""

import copy
import dataclasses
import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from rich.table import Table

from jaxpeft.adapter import Adapter
from train import run
from train.config import ConfigError
from train.job import Subject
from train.run import RunError


class Tasks:
    """The tasks asked for, found before anything else is loaded.

    Args:
      names: tasks, groups or tags of the harness, or patterns with ``*``.
      include_path: a folder of further task files.
      num_fewshot: examples before each question. Default: what each task says.
      limit: only the first this many rows of each task.
      batch_size: rows of a pass.
      chat: write the prompts with the run's chat template.

    Raises:
      RunError: the harness is not installed.
      ConfigError: an unknown task, with the nearest ones, or a setting out of range.
    """

    def __init__(
        self,
        names: Sequence[str],
        *,
        include_path: str | None = None,
        num_fewshot: int | None = None,
        limit: int | None = None,
        batch_size: int = 8,
        chat: bool = False,
    ):
        problems = [
            f"{option}: expected at least {least}, found {value}"
            for option, value, least in (
                ("--num-fewshot", num_fewshot, 0),
                ("--limit", limit, 1),
                ("--tasks-batch-size", batch_size, 1),
            )
            if value is not None and value < least
        ]
        if include_path is not None and not Path(include_path).is_dir():
            problems.append(f"--include-path: {include_path} is no folder")
        if problems:
            raise ConfigError(problems, "evaluate --tasks")
        try:
            import jaxpeft.evaluation  # noqa: F401, says how to install the harness
        except ImportError as error:
            raise RunError(f"--tasks: {error}") from None
        from lm_eval.tasks import TaskManager

        self.manager = TaskManager(include_path=include_path)
        self.names = []
        for name in names:
            matches = self.manager.match_tasks([name])
            if not matches:
                near = difflib.get_close_matches(name, self.manager.all_tasks, n=3, cutoff=0.5)
                hint = f"; did you mean {', '.join(near)}?" if near else "; --include-path names a folder of task files"
                problems.append(f"--tasks: unknown task {name!r}{hint}")
            self.names += [match for match in matches if match not in self.names]
        if problems:
            raise ConfigError(problems, "evaluate --tasks")
        self.num_fewshot, self.limit, self.batch_size, self.chat = num_fewshot, limit, batch_size, chat

    def __call__(self, subject: Subject, adapter: Adapter | None) -> dict[str, Any]:
        """What the harness reports of the model with the adapter, or without one; single answers are left out.

        Raises:
          RunError: a task asks for what the model cannot do.
        """
        import lm_eval

        from jaxpeft.evaluation import HarnessLM, RequestError

        assert subject.template is not None
        # The tokenizer's own conversations are written as the run wrote them.
        tokenizer = copy.copy(subject.template.tokenizer)
        tokenizer.chat_template = subject.template.jinja
        lm = HarnessLM(
            dataclasses.replace(subject.model, tokenizer=tokenizer),
            [] if adapter is None else adapter,
            shardings=subject.shardings,
            batch_size=self.batch_size,
        )
        try:
            return lm_eval.simple_evaluate(
                lm,
                tasks=self.names,
                num_fewshot=self.num_fewshot,
                limit=self.limit,
                batch_size=lm.batch_size,
                apply_chat_template=self.chat,
                task_manager=self.manager,
                log_samples=False,
                torch_random_seed=None,  # sets it, and imports torch for that
            )
        except RequestError as error:
            raise RunError(f"--tasks {','.join(self.names)}: {error}") from error


def table(found: Mapping[str, Mapping[str, Any]]) -> Table:
    """Every measure of every task, a column of values with standard errors for each model that was measured."""
    shown = Table("task", "shots", "measure", *found)
    first, *_ = found.values()
    for task, measure in _measures(first):
        values = [_value(results["results"][task], measure) for results in found.values()]
        shots = first["n-shot"].get(task, "")
        shown.add_row(task, str(shots), measure.removesuffix(",none").replace(",", ", "), *values)
    return shown


def write(path: Path, found: Mapping[str, Mapping[str, Any]]) -> None:
    """Writes the results, by model, as JSON."""
    from lm_eval.utils import handle_non_serializable

    if jax.process_index() == 0:
        run.write(path, json.dumps(found, indent=2, default=handle_non_serializable) + "\n")


def _measures(results: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for task, measured in results["results"].items():
        for name, value in measured.items():
            if isinstance(value, int | float) and "," in name and "_stderr," not in name:
                yield task, name


def _value(measured: Mapping[str, Any], name: str) -> str:
    error = measured.get(name.replace(",", "_stderr,", 1))
    return f"{measured[name]:.4f}" + (f" ± {error:.4f}" if isinstance(error, float) else "")
