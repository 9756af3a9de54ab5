"""Several processes as one: how they find each other, and what happens when one of them is gone."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import jax


class Lost(RuntimeError):
    """Another process is gone, so this one cannot go on."""


# What XLA's collectives and JAX's coordination service say of a process that is gone.
_GONE = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Gloo context initialization failed",
    "Failed to send RPC to coordination service",
    "Socket closed",
    "heartbeat timeout",
    "tasks are unhealthy",
)


@contextmanager
def together(orderly: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Joins the processes that the environment speaks of, if it does, and parts from them at the end.

    One that stops answering is found missing after JAXPEFT_HEARTBEAT_SECONDS, and JAX then aborts the others.

    Args:
      orderly: what all processes raise together: they part as at the end.

    Raises:
      Lost: another process is gone.
    """
    if not os.environ.get("JAX_COORDINATOR_ADDRESS"):
        yield
        return
    count, number = os.environ.get("JAX_NUM_PROCESSES"), os.environ.get("JAX_PROCESS_ID")
    jax.distributed.initialize(
        num_processes=int(count) if count else None,
        process_id=int(number) if number else None,
        heartbeat_timeout_seconds=int(os.environ.get("JAXPEFT_HEARTBEAT_SECONDS", "60")),
    )
    try:
        yield
    except orderly:
        jax.distributed.shutdown()
        raise
    except jax.errors.JaxRuntimeError as error:
        if not any(sign in str(error) for sign in _GONE):
            raise
        raise Lost(
            f"process {jax.process_index()} of {jax.process_count()}: another process is gone, so this one stops "
            f"({str(error).splitlines()[0][:200]}). Checkpoints are complete up to the newest: start all processes "
            "again to go on from there"
        ) from error
    else:
        jax.distributed.shutdown()


def leave(code: int) -> None:
    """Ends a process that did not part from the others, at once; returns if there are none.

    The ordinary way out would wait for all to reach their end, while they wait for this one. Like this their
    connections to it break, so they learn of it.
    """
    if jax.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
