"""How a conversation becomes tokens, and which of them are learned."""

import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from train.rows import Row

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# No roles: what stands before an answer, a newline, the answer.
PLAIN = (
    "{{ start }}{% for message in messages %}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% else %}{{ '\\n' }}{% endif %}{% endfor %}"
)
Messages = Sequence[Mapping[str, str]]


PROBE = "The 12,345 naïve cafés — don't\nreturn x_1 != 0;\n\n  日本語 🙂"
"""What tokenizers of one vocabulary, but of other merges or another normalisation, split differently. It has to stay as
it is: with another text, runs of before would not be recognised."""


class TemplateError(ValueError):
    """A tokenizer that does not fit the model, or a chat template that does not tell answers from prompts."""


@dataclass(frozen=True)
class Example:
    """A tokenised row.

    Attributes:
      tokens: (n,) int32.
      learned: (n,) bool, true where predicting the token counts in the loss.
    """

    tokens: np.ndarray
    learned: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def positions(self) -> int:
        """Positions of a sequence that it takes: all its tokens but the last, which is only a target."""
        return len(self.tokens) - 1

    @property
    def content(self) -> bytes:
        """What tells it from other examples."""
        return np.int64(len(self)).tobytes() + self.tokens.tobytes() + self.learned.tobytes()


@dataclass(frozen=True)
class Template:
    """A tokenizer and the way it writes conversations.

    Attributes:
      tokenizer: a fast Hugging Face tokenizer.
      kind: `chat` (the tokenizer's own chat template), `chatml` or `plain`.
      embedded: how many tokens the model knows; None if that does not matter.
    """

    tokenizer: PreTrainedTokenizerBase
    kind: str = "chat"
    embedded: int | None = None

    def __post_init__(self):
        if self.kind == "chat" and not self.tokenizer.chat_template:
            raise TemplateError("data.template: this tokenizer has no chat template; choose chatml or plain")
        if self.tokenizer.eos_token_id is None:
            raise TemplateError("the tokenizer has no end-of-sequence token, so answers would have no end to learn")
        self._check([self.tokenizer.eos_token_id])

    def prompt(self, messages: Messages) -> np.ndarray:
        """The tokens of `messages` up to where the next answer begins, (n,) int32."""
        return np.asarray(self._tokens(self._render(messages, answer_next=True)), np.int32)

    def plain(self, text: str) -> np.ndarray:
        """The tokens of a text that is no conversation, (n,) int32, after the one that text begins with, if any."""
        return np.asarray(self._tokens(self._start + text), np.int32)

    def encode(self, row: Row) -> Example:
        """The tokens of a row; learned is every answer with its end-of-turn token, or all of a plain text."""
        if not row.messages:
            tokens = np.append(self.plain(row.text), np.int32(self.tokenizer.eos_token_id))
            return Example(tokens, np.ones(len(tokens), bool))
        tokens: list[int] = []
        learned: list[bool] = []
        text = ""
        for i, message in enumerate(row.messages):
            if message["role"] != "assistant":
                continue
            before = self._render(row.messages[:i], answer_next=True)
            after = self._render(row.messages[: i + 1])
            if not (before.startswith(text) and after.startswith(before)):
                raise TemplateError(
                    "the chat template rewrites earlier turns when a turn is added, so answers cannot be told from "
                    f"prompts: {after[-60:]!r} does not begin with {before[-60:]!r}; use data.template: chatml"
                )
            # Prompt and answer are tokenised apart only if the tokenizer would merge across their border: at
            # generation the prompt stands alone, so that is the split to learn.
            prompt, answer = self._tokens(before[len(text) :]), self._tokens(after[len(before) :])
            whole = self._tokens(after[len(text) :])
            if whole[: len(prompt)] == prompt:
                answer = whole[len(prompt) :]
            answer, rest = self._turn(answer)
            last = i == len(row.messages) - 1
            if last and (not answer or answer[-1] not in self.end_ids):
                answer.append(self.tokenizer.eos_token_id)
            tokens += prompt + answer + ([] if last else rest)
            learned += [False] * len(prompt) + [True] * len(answer) + ([] if last else [False] * len(rest))
            text = after
        return Example(np.asarray(tokens, np.int32), np.asarray(learned, bool))

    def decode(self, tokens: np.ndarray) -> str:
        """Generated tokens as text, up to the first end-of-turn token."""
        tokens = list(tokens)
        stop = next((i for i, token in enumerate(tokens) if token in self.end_ids), len(tokens))
        return self.tokenizer.decode(tokens[:stop], skip_special_tokens=True).strip()

    @functools.cached_property
    def end_ids(self) -> frozenset[int]:
        """The tokens that end an answer."""
        # Some chat models end a turn with a token that is not the tokenizer's end of sequence. All that can be meant
        # are special tokens, and no special token occurs inside an answer.
        return frozenset(self.tokenizer.all_special_ids)

    @functools.cached_property
    def fingerprint(self) -> str:
        """As `tokenizer_fingerprint`."""
        return tokenizer_fingerprint(self.tokenizer)

    @property
    def jinja(self) -> str:
        """How conversations are written, as a chat template of Hugging Face."""
        return {"chat": self.tokenizer.chat_template, "chatml": CHATML, "plain": PLAIN}[self.kind]

    @functools.cached_property
    def _start(self) -> str:
        """The token that text begins with, where the tokenizer adds one by itself."""
        tokens = self.tokenizer("a").input_ids
        return self.tokenizer.bos_token if tokens[0] == self.tokenizer.bos_token_id else ""

    def _turn(self, answer: list[int]) -> tuple[list[int], list[int]]:
        """An answer's tokens up to its end-of-turn token, and the template's tokens after that (a newline, mostly)."""
        stop = max((i + 1 for i, token in enumerate(answer) if token in self.end_ids), default=len(answer))
        return answer[:stop], answer[stop:]

    def _tokens(self, text: str) -> list[int]:
        # Templates write every special token themselves.
        return self._check(self.tokenizer(text, add_special_tokens=False).input_ids)

    def _check(self, tokens: list[int]) -> list[int]:
        return check_tokens(self.tokenizer, tokens, self.embedded)

    def _render(self, messages: Messages, answer_next: bool = False) -> str:
        return self.tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            chat_template=self.jinja,
            add_generation_prompt=answer_next,
            tokenize=False,
            start=self._start,
        )


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """What tells a tokenizer from others: how many tokens it has, and a checksum of them and of some text's."""
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    content = json.dumps([vocabulary, tokenizer(PROBE, add_special_tokens=False).input_ids])
    return f"{len(vocabulary)} tokens, checksum {hashlib.sha256(content.encode()).hexdigest()[:16]}"


def check_tokens(tokenizer: PreTrainedTokenizerBase, tokens: list[int], embedded: int | None) -> list[int]:
    """The tokens, if the model embeds them all.

    Raises:
      TemplateError: one is beyond the `embedded` tokens that it knows.
    """
    # Not the size of the vocabulary: some models' tokenizers have tokens that only their larger sisters know.
    if embedded is not None and tokens and (largest := max(tokens)) >= embedded:
        raise TemplateError(
            f"token {largest}, {tokenizer.convert_ids_to_tokens(largest)!r}, is beyond the {embedded} "
            f"tokens (0 to {embedded - 1}) that the model embeds: the tokenizer is another model's; use the "
            "tokenizer's files that came with the weights"
        )
    return tokens


def choices(row: Row, answers: Sequence[str]) -> list[Row]:
    """The row once for each possible answer, the answer in place of its own."""
    return [Row((*row.prompt, {"role": "assistant", "content": answer})) for answer in answers]
