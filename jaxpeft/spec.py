"""Hyper-parameters that every method has."""

import dataclasses
import difflib
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from jaxpeft.sites import Group


@dataclass(frozen=True, kw_only=True)
class Spec:
    """Base of every method's `Spec`.

    Two specs that differ in `alpha` alone are equal: alpha reaches a compiled step as an array, so a new alpha never
    recompiles.

    Attributes:
        alpha: the update is scaled by alpha / rank, with the rank that is materialised.
        dropout: probability that an input feature of an adapter is dropped in training (`dropout_key` of `adapt`).
    """

    alpha: float = dataclasses.field(default=16.0, compare=False)
    dropout: float = 0.0

    def __post_init__(self) -> None:
        require(self.alpha > 0, self, "alpha", "a positive number")
        require(0 <= self.dropout < 1, self, "dropout", "in [0, 1)")

    def scale(self, group: Group) -> float:
        """Factor of the group's update: alpha / rank."""
        return self.alpha / self.materialized_rank(group)

    def materialized_rank(self, group: Group) -> int:
        """Rank of one weight's update."""
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able description, read back by `jaxpeft.methods.spec_from_dict`."""
        return {"method": method_of(self).__name__.removeprefix("jaxpeft.methods."), **dataclasses.asdict(self)}


def method_of(spec: Spec) -> ModuleType:
    """The method of a spec: the module that its class lives in."""
    return sys.modules[type(spec).__module__]


def require(condition: bool, spec: Spec, field: str, expected: str) -> None:
    """Raises a ValueError that names the method, the field, what was found and what was expected."""
    if not condition:
        method = type(spec).__module__.rpartition(".")[2]
        raise ValueError(f"{method}.Spec: {field}={getattr(spec, field)!r}, expected {expected}")


def nearest(wanted: str, known: Iterable[str]) -> str:
    """The known name most like the wanted one, and all of them, for an error message."""
    known = list(known)
    close = difflib.get_close_matches(wanted, known, n=1)
    return (f"did you mean {close[0]!r}? " if close else "") + f"known: {', '.join(known)}"
