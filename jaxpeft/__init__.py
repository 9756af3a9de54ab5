"""Parameter-efficient fine-tuning for JAX and Flax by shared and structured updates."""

from jaxpeft import methods
from jaxpeft.adapter import Adapter, count, delta, init
from jaxpeft.apply import MaterializeWarning, adapt, explain
from jaxpeft.merge import merge, merge_with_report
from jaxpeft.sites import Sites, find
from jaxpeft.summary import summary

__all__ = [
    "Adapter",
    "MaterializeWarning",
    "Sites",
    "adapt",
    "count",
    "delta",
    "explain",
    "find",
    "init",
    "merge",
    "merge_with_report",
    "methods",
    "summary",
]
