"""What is asked of the engine, and how does it answer?"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from jaxpeft.adapter import Adapter


class QueueFull(RuntimeError):
    """As many requests wait as may."""


class TooLong(ValueError):
    """Prompt and answer do not fit together."""


class Closed(RuntimeError):
    """The engine takes no requests any more."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is to be written.

    Attributes:
      tokens: (n,) int32, the prompt, at least one token.
      max_tokens: the longest answer; prompt and answer together fit the engine's `max_length`.
      adapter: None for the base model alone.
      temperature: 0 takes the likeliest token.
      top_p: samples among the fewest likeliest tokens whose probabilities sum to at least this.
      seed: of the sampling; the same request with the same seed gets the same answer, whoever its neighbours are.

    Raises:
      ValueError: a number is out of range.
    """

    tokens: np.ndarray
    max_tokens: int
    adapter: Adapter | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self):
        if len(self.tokens) < 1:
            raise ValueError("the prompt is empty; expected at least one token")
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens={self.max_tokens} must be at least 1")
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature={self.temperature} must be finite and not negative")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must be above 0 and at most 1")


Deliver = Callable[[list[int], str | None], None]
"""Called in the engine's thread with the newest tokens, and with why it ended, at the end: ``stop`` (an ending token,
which is not among the tokens), ``length``, ``cancelled``, or ``error: …``."""


class Answer:
    """A request on its way; `cancel` frees its row."""

    def __init__(self, request: Request, deliver: Deliver):
        self.request, self.deliver = request, deliver
        self.written = 0
        self.cancelled = False

    def cancel(self) -> None:
        """Asks for no more tokens; without effect where it has ended."""
        self.cancelled = True
