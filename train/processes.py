"""Several processes as one: how they find each other, and what happens when one of them is gone."""

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

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

_GO_ON = "Checkpoints are complete up to the newest: start all processes again to go on from there"


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
    _explain_aborts()
    try:
        yield
    except orderly:
        jax.distributed.shutdown()
        raise
    except jax.errors.JaxRuntimeError as error:
        if not any(sign in str(error) for sign in _GONE):
            raise
        raise Lost(
            f"{_who()}: another process is gone, so this one stops ({str(error).splitlines()[0][:200]}). {_GO_ON}"
        ) from error
    else:
        jax.distributed.shutdown()


def _who() -> str:
    return f"process {jax.process_index()} of {jax.process_count()}"


_kept: list[Any] = []  # What C++ calls, and Python would free.


def _explain_aborts() -> None:
    """Has this process, if C++ aborts it, first say what has happened.

    Gloo, which carries the collectives of CPUs, raises in a thread of its own when only a part of a message has come
    from a process that is gone. Nobody can catch that, and std::terminate ends the process.
    """
    if sys.platform != "linux" or _kept:
        return
    handler = ctypes.CFUNCTYPE(None)
    set_terminate = ctypes.CDLL("libstdc++.so.6")._ZSt13set_terminatePFvvE
    set_terminate.argtypes, set_terminate.restype = [handler], handler
    who = _who()

    @handler
    def explain() -> None:
        message = f"{who}: a connection to another process broke, most likely because that is gone, so this one stops"
        os.write(2, f"{message}. {_GO_ON}. The connection's own words:\n".encode())
        before()

    before = set_terminate(explain)
    _kept.append(explain)


def leave(code: int) -> None:
    """Ends a process that did not part from the others, at once; returns if there are none.

    The ordinary way out would wait for all to reach their end, while they wait for this one. Like this their
    connections to it break, so they learn of it.
    """
    if jax.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
