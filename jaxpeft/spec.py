"""Hyper-parameters that every method has."""

import dataclasses
import difflib
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import ModuleType, NoneType, UnionType
from typing import Any, Literal, Self, get_args

import numpy as np

from jaxpeft.sites import Group, Sites

SHARED = "shared"
"""Key beside the groups, in an adapter's trees, of arrays that belong to all groups together."""


@dataclass(frozen=True)
class Card:
    """What the table of methods says about one; every method's module has its `CARD`.

    Attributes:
        title: the method's name in its paper.
        formula: ΔW of one (in, out) weight, in one line.
        parameters: trained parameters, in the letters of the formula; L is the number of layers of a group.
        source: paper and section.
        budget: the hyper-parameter that `jaxpeft.fit_budget` varies: an integer in which the count grows.
        shared: what the layers of a group, or all groups, have in common; empty for nothing.
        zero_start: whether the adapted model starts as the base model.
        mergeable: whether W + ΔW exists as an array.
        scaled: whether ΔW is proportional to alpha.
        vectors: whether it also adapts vectors (biases, a norm's scale).
    """

    title: str
    formula: str
    parameters: str
    source: str
    budget: str
    shared: str = ""
    zero_start: bool = True
    mergeable: bool = True
    scaled: bool = True
    vectors: bool = False


@dataclass(frozen=True, kw_only=True)
class Spec:
    """Base of every method's `Spec`; its fields are switches that every method has.

    Two specs that differ in `alpha` alone are equal: alpha reaches a compiled step as an array, so a new alpha never
    recompiles.

    Attributes:
        alpha: the update is scaled by alpha / rank, with the rank that is materialised.
        dropout: probability that something is dropped in training (`dropout_key` of `adapt`).
        dropout_on: what is dropped: the adapter's ``input`` x, its two ``factors``, or its ``update`` x·ΔW.
        dropout_pattern: each ``element``, a feature of all tokens (``column``), or a token with all its features
            (``key``); the unified view of arXiv 2403.00812 §3.
        rslora: scale by alpha / √rank instead (rsLoRA, arXiv 2312.03732).
        dora: train the norm of every output's weights apart from their direction (DoRA, arXiv 2402.09353): a leaf
            ``magnitude`` (L, out) more in every group.
        start: ``pissa`` (arXiv 2404.02948) and ``olora`` (arXiv 2406.01775) start the factors from the weight's SVD or
            QR and subtract that start from ΔW, so that ΔW = 0 and the base stays as it is; ``method`` is its own.
    """

    alpha: float = dataclasses.field(default=16.0, compare=False)
    dropout: float = 0.0
    dropout_on: Literal["input", "factors", "update"] = "input"
    dropout_pattern: Literal["element", "column", "key"] = "element"
    rslora: bool = False
    dora: bool = False
    start: Literal["method", "pissa", "olora"] = "method"

    def __new__(cls, *args: Any, **fields: Any) -> Self:
        """Names fields that there are not, as the dataclass would without their method or what there is."""
        del args
        known = [field.name for field in dataclasses.fields(cls)]
        if unknown := [name for name in fields if name not in known]:
            name = cls.__module__.rpartition(".")[2]
            raise TypeError(f"{name}.Spec has no field {unknown[0]!r}; {nearest(unknown[0], known)}")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if isinstance(value := getattr(self, field.name), np.generic):  # JSON knows no others than Python's.
                object.__setattr__(self, field.name, value.item())
            kinds = {*(get_args(field.type) if isinstance(field.type, UnionType) else (field.type,))} - {NoneType}
            if kinds <= {bool, int, float} and getattr(self, field.name) is not None:
                expected = "a number" if float in kinds else "an integer" if int in kinds else "True or False"
                require(_is_one_of(getattr(self, field.name), kinds), self, field.name, expected)
        require(self.alpha > 0, self, "alpha", "a positive number")
        require(0 <= self.dropout < 1, self, "dropout", "in [0, 1)")
        require(self.dropout_on in ("input", "factors", "update"), self, "dropout_on", "input, factors or update")
        require(self.dropout_pattern in ("element", "column", "key"), self, "dropout_pattern", "element, column or key")
        if self.dropout_on == "factors":
            require(self.dropout_pattern != "key", self, "dropout_pattern", "element or column: factors see no tokens")
        require(self.start in ("method", "pissa", "olora"), self, "start", "method, pissa or olora")

    def part(self, group: Group) -> "Spec":
        """The spec that rules a group; another one only where a spec is made of several."""
        del group
        return self

    def scale(self, group: Group) -> float:
        """Factor of the group's update: alpha / rank, alpha / √rank with `rslora`, alpha where no rank scales it."""
        rank = self.materialized_rank(group)
        if rank is None:
            require(not self.rslora, self, "rslora", "False: this method's scale does not depend on a rank")
            return self.alpha
        return self.alpha / (math.sqrt(rank) if self.rslora else rank)

    def materialized_rank(self, group: Group) -> int | None:
        """The rank of one weight's update that alpha is divided by; None if the method's scale knows no rank."""
        del group
        return None

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able description, read back by `jaxpeft.methods.spec_from_dict`."""
        return {"method": method_of(self).__name__.removeprefix("jaxpeft.methods."), **dataclasses.asdict(self)}


def _is_one_of(value: Any, kinds: set[Any]) -> bool:
    """Whether a value is of a type; a bool is no number, and an integer is one."""
    if isinstance(value, bool):
        return bool in kinds
    return (isinstance(value, int) and bool({int, float} & kinds)) or (isinstance(value, float) and float in kinds)


def alpha_of(scale: float, divisor: float) -> float:
    """The shortest alpha whose alpha / divisor is this float32 scale."""
    for digits in range(1, 10):
        alpha = float(f"{scale * divisor:.{digits}g}")
        if np.float32(alpha / divisor) == np.float32(scale):
            return int(alpha) if alpha.is_integer() else alpha
    return scale * divisor


def method_of(spec: Spec) -> ModuleType:
    """The method of a spec: the module that its class lives in."""
    return sys.modules[type(spec).__module__]


def name_of(spec: Spec) -> str:
    """The short name of a spec's method, for messages."""
    return method_of(spec).__name__.rpartition(".")[2]


def kind_of(value: Any) -> str:
    """What a value is, for messages on one that is not what it should be."""
    if isinstance(value, ModuleType):
        return f"the module {value.__name__}"
    return f"the class {value.__qualname__}" if isinstance(value, type) else f"a {type(value).__name__}"


def check_kinds(spec: Any, sites: Any) -> None:
    """Raises TypeError unless they are a spec and what `find` returns."""
    if not isinstance(spec, Spec):
        hint = ""
        if isinstance(spec, ModuleType) and hasattr(spec, "Spec"):
            hint = f"; its hyper-parameters are {spec.__name__.rpartition('.')[2]}.Spec(…)"
        elif isinstance(spec, type) and issubclass(spec, Spec):
            hint = "; call it with hyper-parameters"
        raise TypeError(f"spec: expected for instance lora.Spec(rank=8), found {kind_of(spec)}{hint}")
    if not isinstance(sites, Sites):
        raise TypeError(f"sites: expected what jaxpeft.find(params) returns, found {kind_of(sites)}")


def require(condition: bool, spec: Spec, field: str, expected: str) -> None:
    """Raises a ValueError that names the method, the field, what was found and what was expected."""
    if not condition:
        raise ValueError(f"{name_of(spec)}.Spec: {field}={getattr(spec, field)!r}, expected {expected}")


def require_divides(
    spec: Spec, field: str, group: Group, sides: Sequence[str] = ("in", "out"), smallest: int = 1
) -> None:
    """Raises a ValueError, with the nearest valid value, unless a field divides the sides of a group's weights.

    Args:
        spec: any spec.
        field: the hyper-parameter.
        group: the weights.
        sides: ``in``, ``out`` or both.
        smallest: the smallest value the field may have.
    """
    size, dims = getattr(spec, field), {side: getattr(group, f"{side}_dim") for side in sides}
    common = math.gcd(*dims.values())
    if common % size:
        near = min((n for n in range(smallest, common + 1) if common % n == 0), key=lambda n: abs(n - size))
        found = " and ".join(f"{side}={dim}" for side, dim in dims.items())
        raise ValueError(
            f"{name_of(spec)}.Spec: {field}={size} does not divide {found} of {group.name}; nearest that does: {near}"
        )


def nearest(wanted: str, known: Iterable[str]) -> str:
    """The known name most like the wanted one, and all of them, for an error message."""
    known = list(known)
    close = difflib.get_close_matches(wanted, known, n=1)
    return (f"did you mean {close[0]!r}? " if close else "") + f"known: {', '.join(known)}"
