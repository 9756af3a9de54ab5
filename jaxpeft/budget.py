"""Equal budgets: which hyper-parameter gives a method a wanted number of trained parameters?"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import jax

from jaxpeft import adapter, switches
from jaxpeft.sites import Sites
from jaxpeft.spec import Spec, method_of, name_of

SCANNED = 4096
"""Values that are tried one by one; larger ones are reached by doubling and bisection."""

MOST = 2
"""Times the budget that the smallest value may train; beyond that there is no setting for it."""


@dataclass(frozen=True)
class Budget:
    """What `fit_budget` returns.

    Attributes:
        spec: the spec that comes closest.
        parameters: what it trains.
        wanted: the budget.
    """

    spec: Spec
    parameters: int
    wanted: int

    @property
    def error(self) -> float:
        """How far off the budget is, as a signed share of it."""
        return self.parameters / self.wanted - 1

    def __str__(self) -> str:
        field = method_of(self.spec).CARD.budget
        off = f"{self.error:+.2%} of the budget"
        return f"{field}={getattr(self.spec, field)}: {self.parameters:,} trained parameters, {off}"


def fit_budget(spec: Spec, sites: Sites, parameters: int) -> Budget:
    """The spec, with its budget's hyper-parameter changed, whose trained parameters come closest to a number.

    Args:
        spec: the method and its other hyper-parameters, which stay. The one that changes is the `budget` of the
            method's card: LoRA's `rank`, MoS's `equivalent_rank`.
        sites: the adapted weights; shapes will do.
        parameters: the wanted number of trained parameters.

    Raises:
        ValueError: the method has no such hyper-parameter, no value of it fits the other ones and the sites, or even
            the smallest count is more than twice the budget.

    Examples:
        >>> import jax, jaxpeft
        >>> from jaxpeft.methods import lora
        >>> sites = jaxpeft.find({"up": {"kernel": jax.ShapeDtypeStruct((64, 32), "float32")}})
        >>> print(jaxpeft.fit_budget(lora.Spec(rank=1), sites, 1000))
        rank=10: 960 trained parameters, -4.00% of the budget
    """
    name, field = name_of(spec), method_of(spec).CARD.budget
    if not field:
        found = f"it trains {count(spec, sites):,} parameters here"
        raise ValueError(f"{name} has no hyper-parameter for a budget: {found}")
    if parameters < 1:
        raise ValueError(f"fit_budget: parameters={parameters}, expected at least 1")
    counts = dict(_counts(spec, field, sites, parameters))
    for value in sorted(counts, key=lambda value: (abs(counts[value] - parameters), value)):
        if (candidate := _with(spec, field, value)) is not None and fits(candidate, sites):
            if counts[value] > MOST * parameters:  # And so are all others that fit: none comes closer.
                raise ValueError(
                    f"{name}.Spec: parameters={parameters:,} is too few at these sites; "
                    f"the smallest count that fits is {counts[value]:,}, of {field}={value}"
                )
            return Budget(candidate, counts[value], parameters)
    raise ValueError(f"{name}.Spec: no {field} from 1 to {max(counts, default=SCANNED)} fits {spec} at these sites")


def count(spec: Spec, sites: Sites) -> int:
    """Trained parameters of a spec, by its method's formula and its switches'."""
    return method_of(spec).count(spec, sites) + switches.count(spec, sites)


def fits(spec: Spec, sites: Sites) -> bool:
    """Whether an adapter can be made of a spec, found out from shapes alone."""
    try:
        jax.eval_shape(partial(adapter.abstract, spec, sites))
    except ValueError:
        return False
    return True


def _counts(spec: Spec, field: str, sites: Sites, parameters: int) -> Iterator[tuple[int, int]]:
    """(value, trained parameters): all small values, and the two around the budget if it lies beyond them."""
    largest = 0
    for value in range(1, SCANNED + 1):
        if (made := _counted(spec, field, value, sites)) is not None:
            largest = made
            yield value, made
    if not 0 < largest < parameters:
        return
    low, high, reached = SCANNED, 2 * SCANNED, largest
    while (made := _counted(spec, field, high, sites)) is not None and reached < made < parameters:
        low, high, reached = high, 2 * high, made
    while high - low > 1:
        middle = (low + high) // 2
        made = _counted(spec, field, middle, sites)
        low, high = (middle, high) if made is not None and made < parameters else (low, middle)
    for value in (low, high):
        if (made := _counted(spec, field, value, sites)) is not None:
            yield value, made


def _counted(spec: Spec, field: str, value: int, sites: Sites) -> int | None:
    candidate = _with(spec, field, value)
    try:
        return None if candidate is None else count(candidate, sites)
    except ValueError:  # A value that does not fit the sites.
        return None


def _with(spec: Spec, field: str, value: int) -> Spec | None:
    try:
        return dataclasses.replace(spec, **{field: value})
    except ValueError:  # A value that does not fit the other hyper-parameters.
        return None
