"""Large pages for the large arrays of a step on the CPU."""

import os
import sys
from pathlib import Path

TUNABLE = "glibc.malloc.hugetlb"
SYSTEM = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def wanted(environment: dict[str, str], system: Path = SYSTEM) -> str | None:
    """The value of GLIBC_TUNABLES that asks for large pages; None if they are not to be had, or something is chosen.

    XLA's CPU backend takes the arrays of every step from the system and gives them back. A page of 4 KiB each, the
    system hands over 280,000 pages a step of SmolLM2-135M at 4 x 256 tokens, half a second of the two cores' eight.
    """
    given = environment.get("GLIBC_TUNABLES", "")
    try:
        on_request = "[madvise]" in system.read_text()
    except OSError:
        return None
    return ":".join(filter(None, [given, f"{TUNABLE}=1"])) if on_request and TUNABLE not in given else None


def begin_again() -> None:
    """Starts this process's program anew with large pages, if it does not have them; returns if there is no need.

    glibc reads the variable when a process starts, so it cannot be set from inside. `GLIBC_TUNABLES` that names
    ``glibc.malloc.hugetlb``, whatever its value, is left as it is: ``=0`` switches this off.
    """
    value = wanted(dict(os.environ))
    if value is not None and sys.executable:
        os.execve(sys.executable, sys.orig_argv, {**os.environ, "GLIBC_TUNABLES": value})
