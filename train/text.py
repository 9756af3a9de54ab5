"""Which text do new tokens add? Whole characters only, and nothing from a stop string on."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""What a tokenizer writes for a character that lacks tokens."""


class Text:
    """The text of tokens that come in pieces; the pieces together are the same however the tokens are cut.

    Args:
      tokenizer: that decodes them.
      stop: strings that end the text; they are no part of it.

    Attributes:
      tokens: those so far; none after the one that completes a stop string.
      stopped: whether a stop string came.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = ()):
        self.tokenizer, self.stop = tokenizer, tuple(stop)
        self.tokens: list[int] = []
        self.stopped = False
        self._said = 0

    def add(self, tokens: Sequence[int]) -> str:
        """The text that these tokens complete; what may yet become a stop string or a character is kept back."""
        # Which stop string comes first must not depend on how many tokens come at once.
        steps = [[token] for token in tokens] if self.stop else [list(tokens)]
        piece = ""
        for step in steps:
            if self.stopped:
                break
            self.tokens += step
            text = self.tokenizer.decode(self.tokens)
            found = [at for string in self.stop if (at := text.find(string)) >= 0]
            self.stopped = bool(found)
            piece += self._say(text[: min(found)] if found else self._sure(text))
        return piece

    def end(self) -> str:
        """The rest of the text, when no token follows."""
        return "" if self.stopped else self._say(self.tokenizer.decode(self.tokens))

    def _say(self, text: str) -> str:
        piece, self._said = text[self._said :], max(self._said, len(text))
        return piece

    def _sure(self, text: str) -> str:
        text = text.rstrip(UNFINISHED)
        kept = (size for string in self.stop for size in range(len(string) - 1, 0, -1) if text.endswith(string[:size]))
        return text[: len(text) - max(kept, default=0)]
