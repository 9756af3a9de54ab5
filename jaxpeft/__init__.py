"""Parameter-efficient fine-tuning for JAX and Flax by shared and structured updates."""

from jaxpeft import checkpoint, methods
from jaxpeft.adapter import Adapter, count, delta, init
from jaxpeft.apply import MaterializeWarning, adapt, explain
from jaxpeft.checkpoint import CheckpointError, load, save
from jaxpeft.merge import merge, merge_with_report
from jaxpeft.sites import Sites, find
from jaxpeft.summary import summary

__all__ = [
    "Adapter",
    "CheckpointError",
    "MaterializeWarning",
    "Sites",
    "adapt",
    "checkpoint",
    "count",
    "delta",
    "explain",
    "find",
    "init",
    "load",
    "merge",
    "merge_with_report",
    "methods",
    "save",
    "summary",
]
