"""How does a file or a folder appear whole, or not at all?"""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


def check_free(path: Path, overwrite: bool, kind: str, is_one: Callable[[Path], bool]) -> None:
    """Makes sure that a folder can be written.

    Args:
      path: of the folder.
      overwrite: whether it may take the place of one of the same kind.
      kind: what is to be written, for instance "model".
      is_one: whether a folder holds one.

    Raises:
      FileExistsError: it holds something that may not be replaced.
    """
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    if not overwrite:
        replace = "replace it: --overwrite on the command line, overwrite=True in Python"
        raise FileExistsError(f"{path} holds something already; choose another folder, or {replace}")
    if not is_one(path):
        raise FileExistsError(f"{path} holds files that are no {kind}; choose another folder")


@contextmanager
def whole(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """A path to fill, a file or a folder, which takes the place of `path` at the end, or vanishes.

    Args:
      path: where it is to appear; its parents are made.
      replace: whether it takes the place of what is there. Otherwise that stays: another process was faster, and its
        result is as good.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     with whole(Path(folder) / "model") as partial:
    ...         partial.mkdir()
    ...         before = [path.name for path in Path(folder).glob("model")]
    ...     after = [path.name for path in Path(folder).iterdir()]
    >>> before, after
    ([], ['model'])
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=path.parent) as scratch:
        partial = Path(scratch) / "partial"
        yield partial
        replaced = Path(scratch) / "replaced"
        if replace and path.exists():
            path.rename(replaced)
        try:
            partial.rename(path)
        except OSError:
            if not path.exists():
                if replaced.exists():
                    replaced.rename(path)
                raise
