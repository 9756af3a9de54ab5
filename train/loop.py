"""The training loop: steps, held-out losses, checkpoints, and stopping in an orderly way."""

import math
import signal
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from jaxpeft.adapter import Adapter
from jaxpeft.checkpoint import CheckpointError, Checkpoints
from jaxpeft.fingerprint import fingerprint
from train import data, devices, optim
from train.job import Job
from train.metrics import Metrics
from train.run import RunError, check_tokenizer


class Diverged(RuntimeError):
    """The loss or its gradient is no longer finite."""


class Stopped(RuntimeError):
    """SIGTERM or Ctrl-C came; the step was finished and a checkpoint written."""


class Signals:
    """While entered, SIGTERM and the first Ctrl-C only ask for a stop after the current step."""

    def __enter__(self) -> "Signals":
        self.asked = False
        # With several processes JAX's coordination service owns SIGTERM, so that all stop after the same step.
        numbers = [signal.SIGINT] + ([signal.SIGTERM] if jax.process_count() == 1 else [])
        self.previous = {number: signal.signal(number, self._ask) for number in numbers}
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _ask(self, number: int, _: Any) -> None:
        self.asked = True
        if number == signal.SIGINT:
            signal.signal(number, signal.default_int_handler)

    def stop(self, step: int) -> bool:
        """Whether to stop after this step; the same answer on every process."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self.asked


def train(job: Job, folder: Path, evaluator: Any) -> Adapter:
    """Trains the job's adapter, going on from the newest checkpoint in the run folder if there is one.

    A run that is killed at any moment and started again ends with bit for bit the adapter of a run that was not: the
    checkpoint holds the adapter, the optimizer's state, the random key and the position in the data, and nothing else
    changes between steps.

    Raises:
      Diverged: at the first step whose loss or gradient is not finite; it is not saved.
      Stopped: after SIGTERM or Ctrl-C.
      RunError: the checkpoint was written with another tokenizer or other data, or metrics cannot be written.
      CheckpointError: a checkpoint cannot be read or written.
    """
    config, steps = job.config.train, len(job.batches)
    schedule = optim.schedule(job.config.optimizer, steps)
    optimizer = optim.optimizer(job.config.optimizer, steps, job.config.method)
    step_function = optim.compiled_step(job.config, optimizer, job)

    # A copy: the step donates its adapter, and the job keeps the one it started from.
    adapter = jax.tree.map(jnp.copy, job.adapter)
    opt_state = jax.jit(optimizer.init, out_shardings=optim.state_shardings(optimizer, job))(adapter.params)
    state = {"optimizer": opt_state, "key": job.key}
    rows = devices.rows_here(job.mesh, config.batch_size)
    batches = data.iterate(job.batches, lambda batch: job.collate(batch, rows))
    data_fingerprint = data.fingerprint(job.examples)
    base_fingerprint = fingerprint(job.base)

    with Checkpoints(folder / "checkpoints", keep=config.keep) as checkpoints:
        done = checkpoints.latest() or 0
        if done:
            adapter, state, extra = _newest(checkpoints, adapter, state, job.base)
            check_tokenizer(checkpoints.folder / str(done), extra, job.template.fingerprint)
            if extra["data_fingerprint"] != data_fingerprint:
                raise RunError(
                    f"{folder}: the training data or its tokens are not those of the checkpoint of step {done}"
                )
            batches.set_state(extra["data"])
        opt_state, key = state["optimizer"], state["key"]

        with Metrics(folder, done, steps) as metrics, Signals() as signals:
            pending: list[tuple[int, dict[str, jax.Array]]] = []
            start, compiled = time.perf_counter(), 0.0
            for step in range(done + 1, steps + 1):
                batch = devices.shard(next(batches), job.mesh, config.batch_size)
                adapter, opt_state, measured = step_function(adapter, opt_state, job.base, batch, key, np.int32(step))
                pending.append((step, measured))

                stop = signals.stop(step)
                save = stop or step == steps or step % config.checkpoint_every == 0
                measure = config.evaluate_every and step % config.evaluate_every == 0
                # The device is asked only now and then, so that it never waits for Python between steps.
                if not (save or measure or step % config.log_every == 0):
                    continue
                records = _records(pending, checkpoints)
                seconds = time.perf_counter() - start - (step_function.seconds - compiled)
                for record in records:
                    record["learning_rate"] = float(schedule(record["step"] - 1))
                    record["tokens"] = data.tokens(job.batches[record["step"] - 1], job.lengths)
                    record["seconds"] = seconds / len(records)
                if step_function.seconds > compiled:
                    records[-1]["compile_seconds"] = step_function.seconds - compiled
                if measure:
                    records[-1]["held_out_loss"] = evaluator.loss(adapter, config.evaluate_rows)
                metrics.write(records)
                if save:
                    metrics.flush()
                    extra = {
                        "data": batches.get_state(),
                        "data_fingerprint": data_fingerprint,
                        "tokenizer": job.template.fingerprint,
                    }
                    checkpoints.save(
                        step,
                        adapter,
                        base_fingerprint=base_fingerprint,
                        state={"optimizer": opt_state, "key": key},
                        extra=extra,
                        metrics={"loss": records[-1]["loss"]},
                    )
                if stop and step < steps:
                    raise Stopped(f"stopped after step {step} of {steps}; the same command goes on from there")
                pending = []
                start, compiled = time.perf_counter(), step_function.seconds
    return adapter


def _newest(checkpoints: Checkpoints, adapter: Adapter, state: Any, base: Any) -> tuple[Adapter, Any, dict[str, Any]]:
    """Reads the newest step. It is not passed over if it is damaged: what to lose is for the user to say."""
    *older, newest = checkpoints.steps()
    try:
        return checkpoints.restore(newest, adapter, state, base=base)
    except CheckpointError as error:
        good = next((step for step in reversed(older) if _readable(checkpoints, step, adapter, state, base)), None)
        if good is None:
            raise
        damaged = checkpoints.folder / str(newest)
        raise CheckpointError(f"{error}. Step {good} is whole: delete {damaged} to go on from there") from error


def _readable(checkpoints: Checkpoints, step: int, adapter: Adapter, state: Any, base: Any) -> bool:
    try:
        checkpoints.restore(step, adapter, state, base=base)
    except CheckpointError:
        return False
    return True


def _records(pending: list[tuple[int, dict[str, jax.Array]]], checkpoints: Checkpoints) -> list[dict[str, Any]]:
    """The measurements of the pending steps as numbers; waits for the device."""
    records = [{"step": step} | {name: float(value) for name, value in measured.items()} for step, measured in pending]
    for record in records:
        for name in ("loss", "grad_norm"):
            if not math.isfinite(record[name]):
                raise Diverged(
                    f"step {record['step']}: {name} is {record[name]}; stopped, and nothing of this step is saved. "
                    f"{_last_good(checkpoints, record['step'])}. Try a lower optimizer.learning_rate"
                )
    return records


def _last_good(checkpoints: Checkpoints, bad: int) -> str:
    """Which checkpoint to go back to when step `bad` failed."""
    checkpoints.wait()
    saved = sorted(int(path.name) for path in checkpoints.folder.iterdir() if path.name.isdigit())
    # The parameters after step n are proven by the loss of step n + 1, so those of the step just before are suspect.
    good = [step for step in saved if step < bad - 1]
    text = (
        f"The last good checkpoint is {checkpoints.folder / str(good[-1])}" if good else "There is no good checkpoint"
    )
    return text + (f"; delete {checkpoints.folder / str(bad - 1)} to go on from there" if bad - 1 in saved else "")
