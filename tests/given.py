"""A method whose parameters are the updates themselves.

The model's part of a step depends on the structure and shapes of the updates alone, so with it one compiled function
serves all methods that yield the same structure.
"""

from dataclasses import dataclass, replace

import jaxpeft
from jaxpeft import spec as base

CARD = base.Card(title="given", formula="", parameters="", source="", budget="", vectors=True)


@dataclass(frozen=True, kw_only=True)
class Spec(base.Spec):
    """No hyper-parameters of its own."""


def updates(params, constants, spec, sites):
    del constants, spec
    return {group.name: params[group.name] for group in sites}


def given(adapter: jaxpeft.Adapter, updates, dropout: float = 0.0) -> jaxpeft.Adapter:
    """The adapter with its updates for parameters."""
    return replace(adapter, params=updates, constants={}, spec=Spec(dropout=dropout))
