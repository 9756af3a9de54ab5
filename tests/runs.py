"""A training run in processes of its own: started, killed, stopped, and what it left."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax

import jaxpeft
from train import metrics

CONFIG = """
model: {name: MODEL}
method: {name: mos, rank: 3, equivalent_rank: 2, private_rank: 1, shards_per_vector: 2, dropout: 0.1}
sites: {select: [q_proj, down_proj]}
data: {source: synthetic, held_out_rows: 12, max_length: 128, buckets: 1}
optimizer: {learning_rate: 2e-2, schedule: cosine}
train: {steps: 6, batch_size: 16, log_every: 2, evaluate_every: 3, evaluate_rows: 8, checkpoint_every: 2}
evaluate: {batch_size: 8, choices: [rising, falling], exact_match: whole, exact_match_rows: 8, max_new_tokens: 4}
output: {folder: FOLDER}
"""


class Run:
    """A run in processes of its own.

    Args:
        model: the folder of the model.
        folder: the run's.
        cache: of compiled programs. Kills fall into training rather than into compilation when that is read from it.
        overrides: of `CONFIG`.
        devices: simulated devices of each process.
        processes: how many run it together.
        environment: further variables.

    Attributes:
        folders: where each process is started.
        processes: those that were started last.
    """

    def __init__(self, model, folder, cache, *overrides, devices=1, processes=1, **environment):
        path = folder.parent / f"{folder.name}.yaml"
        path.write_text(CONFIG.replace("MODEL", str(model)).replace("FOLDER", str(folder)))
        self.folder, self.count = folder, processes
        self.folders = [folder.parent] * processes
        self.command = [sys.executable, "-m", "train", "fit", str(path), *overrides]
        self.environment = os.environ | {
            "XLA_FLAGS": f"--xla_backend_optimization_level=0 --xla_force_host_platform_device_count={devices}",
            "PYTHONPATH": str(Path(__file__).parents[1]),
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            **environment,
        }
        self.processes = []

    def __enter__(self):
        """Starts it. In the end none of its processes is left, also where a test fails."""
        environment = dict(self.environment)
        if self.count > 1:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                environment["JAX_COORDINATOR_ADDRESS"] = f"127.0.0.1:{free.getsockname()[1]}"
            environment["JAX_NUM_PROCESSES"] = str(self.count)
        self.processes = []
        for number in range(self.count):
            # A file, not a pipe: nobody reads what one process says while the test waits for another.
            with self._stderr(number).open("w") as said:
                self.processes.append(
                    subprocess.Popen(
                        self.command,
                        cwd=self.folders[number],
                        env=environment | {"JAX_PROCESS_ID": str(number)},
                        stdout=subprocess.DEVNULL,
                        stderr=said,
                    )
                )
        return self

    def __exit__(self, *_):
        for process in self.processes:
            process.kill()  # also ends one that SIGSTOP has stopped
            process.wait()

    def wait(self, seconds=300):
        """The exit code and what was said on stderr, of every process."""
        deadline = time.monotonic() + seconds
        codes = [process.wait(max(deadline - time.monotonic(), 0.1)) for process in self.processes]
        return [(code, self.said(number)) for number, code in enumerate(codes)]

    def finish(self):
        with self:
            for code, errors in self.wait():
                assert code == 0, errors
        return self

    def reach(self, steps, count=None, seconds=None):
        """Waits until so many steps are recorded, or what `count` counts, or the run is over, or for some seconds."""
        count, deadline = count or Run.steps, time.monotonic() + (120 if seconds is None else seconds)
        while count(self) < steps and all(process.poll() is None for process in self.processes):
            if time.monotonic() > deadline:
                assert seconds is not None, f"{count(self)} of {steps} steps after two minutes"
                return
            time.sleep(0.01)

    def interrupt(self, number, after_steps, after_seconds=0.0):
        """Sends a signal to all when so many steps are recorded; the exit code and stderr of the first."""
        with self:
            self.reach(after_steps)
            time.sleep(after_seconds)
            for process in self.processes:
                process.send_signal(number)
            return self.wait(120)[0]

    def steps(self):
        path = self.folder / "metrics.jsonl"
        return len(metrics.read(path)) if path.exists() else 0

    def result(self):
        """The arrays of the trained adapter, and the records of the steps without their times."""
        adapter = jaxpeft.load(self.folder / "adapter")
        records = [
            {name: value for name, value in record.items() if name not in ("seconds", "compile_seconds")}
            for record in metrics.read(self.folder / "metrics.jsonl")
        ]
        return jax.tree.leaves(adapter), records

    def said(self, number):
        """What a process wrote to stderr so far."""
        return self._stderr(number).read_text()

    def _stderr(self, number):
        return self.folder.parent / f"{self.folder.name}.{number}.stderr"
