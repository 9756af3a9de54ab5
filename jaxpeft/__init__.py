"""Parameter-efficient fine-tuning for JAX and Flax by shared and structured updates."""

import importlib
from typing import TYPE_CHECKING, Any

from jaxpeft import batch, checkpoint, loko, methods, quantize, sharding
from jaxpeft.adapter import Adapter, count, delta, init
from jaxpeft.apply import MaterializeWarning, adapt, explain
from jaxpeft.budget import Budget, fit_budget
from jaxpeft.checkpoint import CheckpointError, load, save
from jaxpeft.combine import combine
from jaxpeft.convert import to_lora
from jaxpeft.diagnose import diagnose
from jaxpeft.hf import from_peft, to_peft
from jaxpeft.merge import merge, merge_with_report
from jaxpeft.rates import labels, scale_rates
from jaxpeft.rite import rite
from jaxpeft.sites import Sites, find
from jaxpeft.summary import summary

if TYPE_CHECKING:
    from jaxpeft import allocate

__all__ = [
    "Adapter",
    "Budget",
    "CheckpointError",
    "MaterializeWarning",
    "Sites",
    "adapt",
    "allocate",
    "batch",
    "checkpoint",
    "combine",
    "count",
    "delta",
    "diagnose",
    "explain",
    "find",
    "fit_budget",
    "from_peft",
    "init",
    "labels",
    "load",
    "loko",
    "merge",
    "merge_with_report",
    "methods",
    "quantize",
    "rite",
    "save",
    "scale_rates",
    "sharding",
    "summary",
    "to_lora",
    "to_peft",
]


def __getattr__(name: str) -> Any:
    """Imports `jaxpeft.allocate` where it is used, because optax takes long to import."""
    if name == "allocate":
        return importlib.import_module("jaxpeft.allocate")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
