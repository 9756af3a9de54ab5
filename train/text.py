"""Which text do new tokens add? Whole characters only, and nothing from a stop string on."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""What a tokenizer writes for a character that lacks tokens."""
CONTEXT = 8
"""Tokens of what was there before that the first ones are decoded after."""


class Text:
    """The text of tokens that come in pieces; the pieces together are the same however the tokens are cut.

    A token is decoded after those whose text is known, so that the space it begins with is not lost, and its text is
    known once it ends with a whole character.

    Args:
      tokenizer: that decodes them.
      stop: strings that end the text; they are no part of it.
      after: tokens that the text goes on from; nothing if it stands for itself, as an answer does.

    Attributes:
      tokens: those so far; none after the one that completes a stop string.
      stopped: whether a stop string came.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = (), after: Sequence[int] = ()):
        self.tokenizer, self.stop = tokenizer, tuple(stop)
        self.tokens: list[int] = []
        self.stopped = False
        self._window = [int(token) for token in after[-CONTEXT:]]
        self._known = len(self._window)  # So many tokens of the window have their text in `_text` or before it.
        self._text = ""
        self._said = 0

    def add(self, tokens: Sequence[int]) -> str:
        """The text that these tokens complete; what may yet become a stop string or a character is kept back."""
        piece = ""
        for token in tokens:
            if self.stopped:
                break
            self.tokens.append(token)
            self._window.append(token)
            new = self._new()
            if new and not new.endswith(UNFINISHED):
                self._text += new
                self._window, self._known = self._window[self._known :], len(self._window) - self._known
            piece += self._say(held_back=True)
        return piece

    def end(self) -> str:
        """The rest of the text, when no token follows."""
        if self.stopped:
            return ""
        self._text += self._new()
        return self._say(held_back=False)

    def _new(self) -> str:
        known, every = (
            self.tokenizer.decode(tokens, clean_up_tokenization_spaces=False)
            for tokens in (self._window[: self._known], self._window)
        )
        return every[len(known) :]

    def _say(self, held_back: bool) -> str:
        """What is sure and was not said: up to a stop string, or to what may become one."""
        found = [at for string in self.stop if (at := self._text.find(string)) >= 0]
        self.stopped = bool(found)
        sure = min(found, default=len(self._text))
        if held_back and not found:
            sizes = (size for string in self.stop for size in range(len(string)) if self._text.endswith(string[:size]))
            sure -= max(sizes, default=0)
        piece, self._said = self._text[self._said : sure], max(self._said, sure)
        return piece
