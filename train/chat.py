"""How does one talk to a run's model? A turn a line, and its words as they come."""

import difflib
import itertools
import sys
from collections.abc import Iterable, Iterator

import jax
import numpy as np
from rich.console import Console

import jaxpeft
from jaxpeft.adapter import Adapter
from jaxpeft.models.generate import Sampling, Writing, bucket
from train import devices
from train.config import ConfigError
from train.job import Subject
from train.text import Text

COMMANDS = {
    "/reset": "forget the conversation",
    "/base": "switch the adapter off, and on again",
    "/quit": "end, as Ctrl-D does",
}


class Chat:
    """A conversation, with an adapter or without.

    Each turn reads the whole conversation again, padded to one of few lengths, and then writes token by token; nothing
    is compiled for a turn of a length that was met before.

    Args:
      subject: model, base and tokenizer.
      adapter: None for the base model alone.
      system: the system message.
      max_new_tokens: the longest answer.
      temperature: 0 takes the likeliest token.
      seed: of the sampling.

    Attributes:
      history: the messages so far.
      adapted: whether the adapter is on.

    Raises:
      ConfigError: an answer that long does not fit the model, or a negative temperature.
    """

    def __init__(
        self,
        subject: Subject,
        adapter: Adapter | None,
        *,
        system: str | None = None,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        seed: int = 0,
    ):
        context = subject.model.config.max_position_embeddings
        if not 0 < max_new_tokens < context:
            raise ConfigError([f"--max-new-tokens: expected 1 to {context - 1}, found {max_new_tokens}"], "chat")
        try:
            how = {"sampling": Sampling(temperature=temperature), "eos_ids": tuple(sorted(subject.template.end_ids))}
        except ValueError as error:
            raise ConfigError([f"--temperature: {error}"], "chat") from None
        self.subject, self.adapter, self.adapted = subject, adapter, adapter is not None
        self.max_new_tokens, self.room = max_new_tokens, context - max_new_tokens
        self.begin = [{"role": "system", "content": system}] if system else []
        self.history: list[dict[str, str]] = []
        self.keys = (jax.random.fold_in(jax.random.key(seed), turn) for turn in itertools.count())
        prefill = jaxpeft.adapt(subject.model.prefill, shardings=subject.shardings)
        write = jaxpeft.adapt(subject.model.write, shardings=subject.shardings)

        def read(base, adapters, tokens, lengths, key):
            return prefill(base, adapters, tokens, lengths, slots=tokens.shape[1] + max_new_tokens, key=key, **how)

        def more(base, adapters, writing, key):
            return write(base, adapters, writing, count=1, key=key, **how)

        whole = devices.everywhere(subject.mesh)
        state = Writing(*[whole] * 5, cache=None)
        self.read = devices.Compiled(read, subject.mesh, out_shardings=state)
        self.more = devices.Compiled(more, subject.mesh, out_shardings=(whole, state), donate_argnums=2)

    def say(self, message: str) -> Iterator[str]:
        """The answer to a message, piece by piece; what was written of it, when it is stopped too, enters the history.

        Raises:
          ValueError: a message too long for the model; the history is as before.
        """
        turn = [*self.history, {"role": "user", "content": message}]
        prompt = self._prompt(turn)
        while len(prompt) > self.room and len(turn) > 1:  # The oldest exchange is forgotten.
            turn = turn[2:]
            prompt = self._prompt(turn)
        if len(prompt) > self.room:
            raise ValueError(
                f"a message of {len(prompt)} tokens with its template; beside an answer of {self.max_new_tokens} there "
                f"is room for {self.room}"
            )
        self.history = turn
        answer = ""
        try:
            for piece in self._text(self._tokens(prompt)):
                answer += piece
                yield piece
        finally:
            self.history = [*turn, {"role": "assistant", "content": answer.strip()}]

    def reset(self) -> None:
        """Forgets the conversation."""
        self.history = []

    def _prompt(self, messages: list[dict[str, str]]) -> np.ndarray:
        return self.subject.template.prompt([*self.begin, *messages])

    def _tokens(self, prompt: np.ndarray) -> Iterator[int]:
        # As many rows as devices that share a batch; all of them are the same.
        rows = devices.whole_batches(1, self.subject.mesh)
        tokens = np.zeros((rows, bucket(len(prompt), self.room)), np.int32)
        tokens[:, : len(prompt)] = prompt
        inputs = devices.put((tokens, np.full(rows, len(prompt), np.int32)), self.subject.mesh)
        base, adapters, key = self.subject.base, [self.adapter] if self.adapted else [], next(self.keys)
        writing = self.read(base, adapters, *inputs, key)
        yield int(writing.token[0])
        for _ in range(self.max_new_tokens - 1):
            if bool(writing.ended[0]):
                return
            written, writing = self.more(base, adapters, writing, key)
            yield int(written[0, 0])

    def _text(self, tokens: Iterable[int]) -> Iterator[str]:
        """The pieces of the tokens' text; a character of several tokens comes whole."""
        text = Text(self.subject.template.tokenizer)
        for token in tokens:
            if token in self.subject.template.end_ids:
                break
            if piece := text.add([token]):
                yield piece
        if piece := text.end():
            yield piece


def converse(chat: Chat, console: Console) -> None:
    """Answers the lines of stdin until it ends, typed or piped; Ctrl-C stops an answer."""
    typed = sys.stdin.isatty()
    if typed:
        console.out(", ".join(f"{name} to {what}" for name, what in COMMANDS.items()), highlight=False)
    while True:
        try:
            line = input("> " if typed else "").strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            console.out("\n/quit ends", highlight=False)
            continue
        if line == "/quit":
            return
        if line == "/reset":
            chat.reset()
        elif line == "/base":
            if chat.adapter is None:
                console.out("there is no adapter: this is the base model", highlight=False)
            else:
                chat.adapted = not chat.adapted
                console.out("with the adapter" if chat.adapted else "the base model alone", highlight=False)
        elif line.startswith("/"):
            near = difflib.get_close_matches(line, COMMANDS, n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]}?" if near else f"; the commands are {', '.join(COMMANDS)}"
            console.out(f"unknown command {line}{hint}", highlight=False)
        elif line:
            try:
                for piece in chat.say(line):
                    console.out(piece, end="", highlight=False)
                    console.file.flush()
                console.out()
            except KeyboardInterrupt:
                console.out(" …", highlight=False)
            except ValueError as error:
                console.out(f"error: {error}", highlight=False)
