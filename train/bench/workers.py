"""Processes that each measure one thing, in turn: nothing is shared, and the peak memory is the thing's own."""

import contextlib
import ctypes
import gc
import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

READY = "\x1fworker "
"""Begins the lines of a worker's output that are answers."""


@dataclass(frozen=True)
class Work:
    """What a worker was asked to prepare.

    Attributes:
      run: does the thing once and waits for its result, which it may return if JSON can hold it.
      facts: what is known before, JSON-able.
      before: what each `run` needs done first; it is not measured.
      steady: it is the body of a long loop, which finds caches and memory as its last turn left them; others ran since,
        so each turn that is measured follows one that is not.
    """

    run: Callable[[], Any]
    facts: Mapping[str, Any]
    before: Callable[[], Any] = lambda: None
    steady: bool = False


class Entry(NamedTuple):
    """What a worker runs.

    Attributes:
      function: ``module:function``, which takes `arguments` and returns `Work`.
      arguments: by name, JSON-able.
      environment: variables on top of this process's own.
    """

    function: str
    arguments: Mapping[str, Any]
    environment: Mapping[str, str] = {}


TORCH = {
    # Threads of OpenMP that spin for one that has to wait for a core take seconds for milliseconds of work.
    "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE"),
    # Large pages, which XLA's steps gain from, cost torch's 3 %: it keeps what it frees.
    "GLIBC_TUNABLES": "",
}
"""The variables under which torch is fastest."""


class Worker:
    """A process that has prepared one thing and does it when asked.

    Args:
      name: for messages.
      entry: what it runs.

    Raises:
      RunError: it could not be prepared; with the last lines that the process wrote.
    """

    def __init__(self, name: str, entry: Entry):
        self.name = name
        root = str(Path(__file__).parents[2])
        paths = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
        self.process = subprocess.Popen(
            [sys.executable, "-m", "train.bench.workers", entry.function, json.dumps(entry.arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "PYTHONPATH": paths, **entry.environment},
        )
        self.facts: dict[str, Any] = self._answer()

    def run(self) -> dict[str, Any]:
        """Does the thing once: ``seconds``, ``resident_bytes`` before, ``peak_bytes`` while doing it, ``result``."""
        return self._ask("run")

    def close(self) -> None:
        """Ends the process."""
        self.process.kill()
        self.process.communicate()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _ask(self, word: str) -> dict[str, Any]:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # It is gone, and `_answer` tells what it said last.
            self.process.stdin.write(f"{word}\n")
            self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        from train.run import RunError  # Below, because it needs JAX, which a worker may do without.

        assert self.process.stdout is not None
        said: list[str] = []
        for line in self.process.stdout:
            if line.startswith(READY):
                return json.loads(line.removeprefix(READY))
            said.append(line)
        raise RunError(f"{self.name}: the process ended with {self.process.wait()}:\n{''.join(said[-15:])}")


def rounds(workers: Sequence[Worker], count: int) -> dict[str, list[dict[str, Any]]]:
    """{name: answers}: every worker in turn, `count` times after once that is not kept."""
    found: dict[str, list[dict[str, Any]]] = {worker.name: [] for worker in workers}
    for number in range(count + 1):
        for worker in workers:
            answer = worker.run()
            if number:
                found[worker.name].append(answer)
    return found


def started(stack: ExitStack, entries: Mapping[str, Entry], console: Console) -> list[Worker]:
    """A worker for every {name: entry}, one after the other, that ends with `stack`."""
    workers = []
    for name, entry in entries.items():
        console.print(f"preparing {name} …", highlight=False, markup=False)
        workers.append(stack.enter_context(Worker(name, entry)))
    return workers


def peak_mib(answers: Sequence[Mapping[str, Any]]) -> float | None:
    """The most memory that was resident in any round; None where the system cannot tell."""
    known = [answer["peak_bytes"] for answer in answers if answer["peak_bytes"] is not None]
    return max(known) / 2**20 if known else None


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def peak_bytes(of: Callable[[], Any]) -> tuple[Any, int | None]:
    """What a function returns, and the most memory that was resident meanwhile; None where the system cannot tell."""
    try:
        Path("/proc/self/clear_refs").write_text("5")  # Forgets the peak until now.
    except OSError:
        return of(), None
    result = of()
    status = Path("/proc/self/status").read_text()
    return result, int(status.split("VmHWM:")[1].split()[0]) * 1024


def resident_bytes() -> int | None:
    """Memory that is resident now; None where the system cannot tell."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    return int(status.split("VmRSS:")[1].split()[0]) * 1024


def release() -> None:
    """Gives memory that was freed back to the system: what stays resident would hide as much of the next peak."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)


def _serve(entry: str, arguments: str) -> None:
    module, _, function = entry.partition(":")
    work: Work = getattr(importlib.import_module(module), function)(**json.loads(arguments))
    _say(work.facts)
    for _ in sys.stdin:
        work.before()
        if work.steady:
            work.run()
        else:
            release()
        resident, start = resident_bytes(), time.perf_counter()
        result, peak = peak_bytes(work.run)
        seconds = time.perf_counter() - start
        _say({"seconds": seconds, "resident_bytes": resident, "peak_bytes": peak, "result": result})


def _say(answer: Any) -> None:
    print(f"{READY}{json.dumps(answer)}", flush=True)


if __name__ == "__main__":
    _serve(*sys.argv[1:])
