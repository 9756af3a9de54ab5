"""Different specs for different weights: rank and alpha patterns, heads and norms trained whole."""

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
from jax import Array

from jaxpeft import spec as base
from jaxpeft.selection import nearest_paths
from jaxpeft.sites import Group, Sites
from jaxpeft.updates import Update

CARD = base.Card(
    title="mixed",
    formula="each part's own",
    parameters="Σ of the parts",
    source="PEFT's `rank_pattern`, `alpha_pattern`, `modules_to_save`",
    budget="",
    vectors=True,
)


@dataclass(frozen=True, kw_only=True)
class Spec(base.Spec):
    """One spec for most groups of weights, and others for the groups whose paths match a pattern.

    Every part is a method on its own groups: what it shares is shared among them. Trained and frozen arrays are those
    of the parts; what belongs to all groups of a part is under ``shared/<number of the part>``. Switches (dropout,
    `dora`, …) are the parts' own, and `alpha` multiplies all of them.

    Attributes:
        default: the spec of the groups that no pattern matches.
        overrides: {regular expression over whole paths: spec, or the fields in which it differs from `default`}; the
            first match counts. A rank pattern is ``{r".*down_proj.*": {"rank": 16}}``, `modules_to_save` is
            ``{r"lm_head/.*": full.Spec()}`` at ``find(params, ["all-linear", "lm_head"])``.

    Examples:
        >>> import jax, jax.numpy as jnp, jaxpeft
        >>> from jaxpeft.methods import full, lora, mixed
        >>> params = {"up": {"kernel": jnp.ones((64, 32))}, "norm": {"scale": jnp.ones(64)}}
        >>> spec = mixed.Spec(default=lora.Spec(rank=4), overrides={r"norm/.*": full.Spec()})
        >>> adapter = jaxpeft.init(jax.random.key(0), spec, jaxpeft.find(params, ".*"))
        >>> {name: list(leaves) for name, leaves in adapter.params.items()}
        {'up/kernel': ['a', 'b'], 'norm/scale': ['w']}
    """

    alpha: float = dataclasses.field(default=1.0, compare=False)
    default: Any
    overrides: Any

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in dataclasses.fields(base.Spec):
            if field.name != "alpha":
                base.require(getattr(self, field.name) == field.default, self, field.name, "it in the parts' own specs")
        default = _spec(self.default, None)
        pairs = self.overrides.items() if isinstance(self.overrides, Mapping) else self.overrides
        overrides = tuple((_compiles(pattern), _spec(given, default)) for pattern, given in pairs)
        for part in (default, *(part for _, part in overrides)):
            base.require(not isinstance(part, Spec), self, "overrides", "no mixed spec inside a mixed spec")
        object.__setattr__(self, "default", default)
        object.__setattr__(self, "overrides", overrides)

    def part(self, group: Group) -> base.Spec:  # noqa: D102
        return self.parts[self.number(group)]

    def scale(self, group: Group) -> float:  # noqa: D102
        return self.alpha * self.part(group).scale(group)

    def materialized_rank(self, group: Group) -> int | None:  # noqa: D102
        return self.part(group).materialized_rank(group)

    @property
    def parts(self) -> tuple[base.Spec, ...]:
        """`default`, then the overrides' specs in order."""
        return self.default, *(part for _, part in self.overrides)

    def number(self, group: Group) -> int:
        """Which of `parts` rules a group.

        Raises:
            ValueError: a pattern matches some layers of the group only.
        """
        for number, (pattern, _) in enumerate(self.overrides, 1):
            matched = [path for path in group.paths if re.fullmatch(pattern, path)]
            if len(matched) == len(group.paths):
                return number
            if matched:
                raise ValueError(
                    f"mixed.Spec: {pattern!r} matches {len(matched)} of the {len(group.paths)} layers of {group.name}; "
                    "expected all or none. Adapt the others with an adapter of their own (jaxpeft.find(…, layers=…)) "
                    "and pass both"
                )
        return 0

    def to_dict(self) -> dict[str, Any]:  # noqa: D102
        overrides = [[pattern, part.to_dict()] for pattern, part in self.overrides]
        return {"method": "mixed", "alpha": self.alpha, "default": self.default.to_dict(), "overrides": overrides}


def pattern(group: Group, *sites: Sites) -> str:
    """A regular expression for the paths of a group and of no others, for `overrides`."""
    named = re.escape(group.name).replace(r"\*", "[0-9]+")
    matched = [path for each in sites for other in each for path in other.paths if re.fullmatch(named, path)]
    return named if matched == list(group.paths) else "|".join(map(re.escape, group.paths))


def _compiles(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"mixed.Spec: {pattern!r} is not a regular expression: {error}") from None
    return pattern


def _spec(given: Any, default: base.Spec | None) -> base.Spec:
    """A spec from a spec, from its description, or from the fields in which it differs from the default."""
    if isinstance(given, base.Spec):
        return given
    from jaxpeft.methods import spec_from_dict  # The table holds this module too.

    fields = dict(given)
    if default is not None and not {"method", "name"} & fields.keys():
        fields = {**default.to_dict(), **fields}
    return spec_from_dict({"method": fields.pop("name", None), **fields})


def split(spec: Spec, sites: Sites) -> list[tuple[base.Spec, Sites]]:
    """Every part with its groups.

    Raises:
        ValueError: a pattern rules no group.
    """
    numbers = {group.name: spec.number(group) for group in sites}
    for number, (pattern, _) in enumerate(spec.overrides, 1):
        if number not in numbers.values():
            paths = [path for group in sites for path in group.paths]
            earlier = any(re.fullmatch(pattern, path) for path in paths)
            near = nearest_paths(pattern, paths)
            why = "an earlier pattern takes all it matches" if earlier else f"it matches no site; {near}"
            raise ValueError(f"mixed.Spec: the pattern {pattern!r} rules nothing: {why}")
    return [
        (part, Sites(tuple(group for group in sites if numbers[group.name] == number)))
        for number, part in enumerate(spec.parts)
    ]


def count(spec: Spec, sites: Sites) -> int:
    """Trained parameters: the sum of the parts'."""
    return sum(base.method_of(part).count(part, own) for part, own in split(spec, sites))


def init(key: Array, spec: Spec, sites: Sites, weights: Any = None) -> tuple[dict, dict]:
    """Trained and frozen arrays of all parts."""
    params, constants = {}, {}
    for number, (part, own) in enumerate(split(spec, sites)):
        if len(own):
            made = base.method_of(part).init(jax.random.fold_in(key, number), part, own, weights)
            for tree, arrays in zip((params, constants), made, strict=True):
                if base.SHARED in arrays:
                    tree.setdefault(base.SHARED, {})[str(number)] = arrays[base.SHARED]
                tree |= {name: leaves for name, leaves in arrays.items() if name != base.SHARED}
    return params, constants


def updates(params: Mapping, constants: Mapping, spec: Spec, sites: Sites) -> dict[str, Update]:
    """The updates of all parts."""
    made = {}
    for number, (part, own) in enumerate(split(spec, sites)):
        if len(own):
            trees = [_of_part(tree, own, number) for tree in (params, constants)]
            made |= base.method_of(part).updates(*trees, part, own)
    return {group.name: made[group.name] for group in sites}


def check_constants(constants: Mapping, spec: Spec, sites: Sites) -> None:
    """Raises ValueError if the frozen arrays of a part are not what it accepts."""
    for number, (part, own) in enumerate(split(spec, sites)):
        if check := getattr(base.method_of(part), "check_constants", None):
            check(_of_part(constants, own, number), part, own)


def _of_part(tree: Mapping, sites: Sites, number: int) -> dict:
    """The arrays of one part, as its method knows them."""
    shared = tree.get(base.SHARED, {}).get(str(number))
    return {group.name: tree[group.name] for group in sites} | ({} if shared is None else {base.SHARED: shared})
