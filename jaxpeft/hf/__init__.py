"""Hugging Face PEFT's adapter files, out and in."""

from jaxpeft.hf.exporting import Report, to_peft
from jaxpeft.hf.importing import from_peft

__all__ = ["Report", "from_peft", "to_peft"]
