"""Which adapters does a folder hold now? What came is loaded, what went is dropped, while others serve."""

import contextlib
import difflib
import logging
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxpeft import checkpoint
from jaxpeft.adapter import Adapter
from jaxpeft.cli import sources
from train import config, run

LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Resident:
    """An adapter in memory, as its pools.

    Attributes:
      adapter: its arrays.
      signature: of the files it was read from; another one means that they changed.
      created: when they were written, in seconds since 1970.
      template: how conversations were written that a run was trained with, `data.template`; None if that is not known.
    """

    adapter: Adapter
    signature: tuple[Any, ...]
    created: int
    template: str | None = None


class Residents:
    """The adapters in the subfolders of a folder: those of jaxpeft, training runs, and PEFT's; named as the subfolders.

    Args:
      folder: that holds them.
      base: the parameters; adapters of another base are refused by their fingerprint.
      tokenizer: the fingerprint of the model's tokenizer; None for any.
      check: raises ValueError for an adapter that cannot be used.
      reserved: names that no adapter may have.

    Attributes:
      found: {name: adapter}, replaced as a whole by each `scan`.
      refused: {name: why}, of the last scan.

    Raises:
      FileNotFoundError: there is no such folder.
    """

    def __init__(
        self,
        folder: str | Path,
        base: Any,
        *,
        tokenizer: str | None = None,
        check: Callable[[Adapter], None] = lambda _: None,
        reserved: Sequence[str] = (),
    ):
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise FileNotFoundError(f"{self.folder}: no such folder of adapters")
        self.base, self.tokenizer, self.check, self.reserved = base, tokenizer, check, tuple(reserved)
        self.found: dict[str, Resident] = {}
        self.refused: dict[str, str] = {}
        self._refused: dict[str, tuple[Any, ...]] = {}  # signatures
        self._lock = threading.Lock()

    def scan(self) -> None:
        """Looks at the folder again; reads what is new or changed, and keeps the rest."""
        with self._lock:
            found: dict[str, Resident] = {}
            refused: dict[str, str] = {}
            signatures: dict[str, tuple[Any, ...]] = {}
            for folder in sorted(self.folder.iterdir()) if self.folder.is_dir() else []:
                name = folder.name
                if name.startswith(".") or not folder.is_dir():
                    continue
                signatures[name] = _signature(folder)
                old = self.found.get(name)
                if old is not None and old.signature == signatures[name]:
                    found[name] = old
                    continue
                if self._refused.get(name) == signatures[name]:
                    refused[name] = self.refused[name]
                    continue
                try:
                    found[name] = self._read(folder, signatures[name])
                    LOG.info("adapter %s is served", name)
                except Exception as error:  # Whatever is wrong with one folder, the others are served.
                    refused[name] = f"{type(error).__name__}: {error}"
                    LOG.warning("adapter %s is not served: %s", name, refused[name])
            for name in self.found.keys() - found.keys() - refused.keys():
                LOG.info("adapter %s is gone", name)
            self.found, self.refused = found, refused
            self._refused = {name: signatures[name] for name in refused}

    def nearest(self, name: str) -> list[str]:
        """Up to three names that are like one that is not there."""
        return difflib.get_close_matches(name, [*self.reserved, *self.found], n=3, cutoff=0.4)

    def _read(self, folder: Path, signature: tuple[Any, ...]) -> Resident:
        if folder.name in self.reserved:
            raise ValueError(f"{folder.name} is the base model's name; rename the folder")
        source = sources.find_adapter(folder)
        if self.tokenizer is not None and source.adapter is not None:
            run.check_tokenizer(source.adapter, checkpoint.extra(source.adapter), self.tokenizer)
        adapter = sources.adapter(folder, self.base)
        self.check(adapter)
        template = config.load(folder / "config.yaml").data.template if source.kind == "run" else None
        return Resident(adapter, signature, max(nanoseconds for _, nanoseconds, _ in signature) // 10**9, template)


def _signature(folder: Path) -> tuple[tuple[str, int, int], ...]:
    """Name, time and size of every file: what differs once an adapter is written again, or copied to its end."""
    found = []
    for parent, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = os.path.join(parent, name)
            # It went while we looked, which the next scan sees, or cannot be read, which who reads it says.
            with contextlib.suppress(OSError):
                status = os.stat(path)
                found.append((path, status.st_mtime_ns, status.st_size))
    return tuple(sorted(found))
