"""How do many requests, each with an adapter of its own, share one model? In rows that are filled and freed in turn.

The model writes in a fixed number of rows. Each has a cache of its own, and its adapter's updates lie where the row's
are; so whose turn it is, and with which adapter, is data. One program writes in all rows, and one a length of prompt
reads a prompt into a row; requests and adapters that come and go compile nothing.
"""

import collections
import dataclasses
import functools
import threading
import traceback
from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxpeft
from jaxpeft import batch
from jaxpeft.adapter import Adapter
from jaxpeft.batch import Expanded, Rows
from jaxpeft.models import LanguageModel
from jaxpeft.models.generate import RowSampling, Writing, bucket
from train.request import Answer, Closed, Deliver, QueueFull, Request, TooLong


@dataclass
class Structure:
    """Adapters whose updates have the same types and shapes, whatever their method: they share programs.

    Attributes:
      updates: of every row; zero where an adapter of another structure answers, or none.
      filled: rows whose updates are not zero.
    """

    updates: Rows
    filled: set[int] = field(default_factory=set)


class Engine:
    """Continuous batching of many adapters over one base.

    `start` runs it in a thread; `step` is one turn of it, for who calls it by himself.

    Args:
      model: the language model; `params` of it are the base.
      rows: requests that are written at a time.
      max_length: most tokens of a prompt and its answer. Default: the model's context, at most 2048.
      end_ids: tokens that end an answer. Default: the model's.
      tokens_per_call: tokens that every row writes before requests come and go.
      max_queue: requests that may wait when all rows are in use.

    Attributes:
      traces: how often each program that reads or writes was compiled, by its name.

    Raises:
      ValueError: a size below 1, or a length beyond the model's context.

    Example:
      >>> from jaxpeft.models import Config, random
      >>> lm = random(Config(vocab_size=64, hidden_size=32, intermediate_size=96, num_hidden_layers=2,
      ...                    num_attention_heads=4, num_key_value_heads=2), jax.random.key(0))
      >>> engine, said = Engine(lm, rows=2, max_length=64), []
      >>> request = Request(tokens=np.array([5, 9, 2]), max_tokens=6)
      >>> _ = engine.submit(request, lambda tokens, ended: said.extend(tokens))
      >>> while engine.step():
      ...     pass
      >>> said == lm.generate(lm.params, jnp.array([[5, 9, 2]]), jnp.array([3]), max_new_tokens=6)[0].tolist()
      True
    """

    def __init__(
        self,
        model: LanguageModel,
        *,
        rows: int = 8,
        max_length: int | None = None,
        end_ids: tuple[int, ...] | None = None,
        tokens_per_call: int = 4,
        max_queue: int = 256,
    ):
        context = model.config.max_position_embeddings
        max_length = min(context, 2048) if max_length is None else max_length
        for name, value in {"rows": rows, "tokens_per_call": tokens_per_call, "max_queue": max_queue}.items():
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        if not 2 <= max_length <= context:
            raise ValueError(f"max_length={max_length}: expected 2 to {context}, the model's context")
        devices = {device for leaf in jax.tree.leaves(model.params) for device in leaf.devices()}
        if len(devices) > 1:
            raise ValueError(f"the base lies on {len(devices)} devices; expected one")
        # All is committed to it from the start: a program is compiled again for arrays that are committed otherwise.
        (self._device,) = devices
        self.base = jax.device_put(model.params, self._device)
        self.model, self.rows, self.max_length, self.max_queue = model, rows, max_length, max_queue
        self.end_ids = model.end_ids if end_ids is None else end_ids
        self.tokens_per_call = tokens_per_call
        self.traces: Counter[str] = Counter()
        self._prefill = jax.jit(self._prefilled, donate_argnums=(1, 2))
        self._decode = jax.jit(self._decoded, donate_argnums=1)
        self._clear = jax.jit(functools.partial(batch.place, updates=None), donate_argnums=0)
        self._structures: dict[Hashable, Structure] = {}
        self._lock = threading.Condition()
        self._queue: collections.deque[Answer] = collections.deque()
        self._answers: list[Answer | None] = [None] * rows
        self._thread: threading.Thread | None = None
        self._closed = False
        self._reset()

    def submit(self, request: Request, deliver: Deliver) -> Answer:
        """Puts a request into the queue.

        Raises:
          TooLong: it does not fit `max_length`.
          QueueFull: too many wait.
          Closed: the engine is closed.
        """
        length = len(request.tokens) + request.max_tokens
        if length > self.max_length:
            raise TooLong(
                f"a prompt of {len(request.tokens)} tokens and max_tokens={request.max_tokens} are {length} together; "
                f"at most {self.max_length} fit"
            )
        answer = Answer(request, deliver)
        with self._lock:
            if self._closed:
                raise Closed("the server is shutting down")
            if len(self._queue) >= self.max_queue + self._answers.count(None):
                raise QueueFull(f"{len(self._queue)} requests wait already, and no more may; try again later")
            self._queue.append(answer)
            self._lock.notify()
        return answer

    def check(self, adapter: Adapter) -> None:
        """Makes sure that this model runs with an adapter; computes nothing.

        Raises:
          ValueError: it is of other weights.
        """
        expanded = jax.eval_shape(batch.expand, adapter)
        if _structure(expanded) not in self._structures:
            tokens = jax.ShapeDtypeStruct((1, 2), jnp.int32)
            jax.eval_shape(jaxpeft.adapt(self.model.logits), self.base, [expanded], tokens)

    def warm_up(self, adapters: list[Adapter]) -> None:
        """Compiles all programs that the base and these adapters need, so that no request waits for one.

        Call it before `start`.
        """
        largest = self.max_length - 1
        known: dict[int | None, Adapter | None] = {None: None}
        for adapter in adapters:  # All structures first: the program that writes is of all of them.
            structure, _ = self._expanded(adapter)
            known.setdefault(id(structure), adapter)
        for size in sorted({bucket(length, largest) for length in range(1, largest + 1)}):
            for adapter in known.values():
                self.submit(Request(tokens=np.zeros(size, np.int32), max_tokens=1, adapter=adapter), lambda *_: None)
                while self.step():
                    pass
        self._write()
        for structure in self._structures.values():
            self._clear(structure.updates, np.int32(0))
        self._reset()

    @property
    def waiting(self) -> int:
        """Requests without a row."""
        return len(self._queue)

    @property
    def busy(self) -> int:
        """Rows in use."""
        return sum(answer is not None for answer in self._answers)

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread is not None and self._thread.is_alive()

    def start(self) -> None:
        """Runs `step` in a thread, whenever there is something to do, until `close`."""
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends the thread and cancels what is not finished; takes no further requests."""
        with self._lock:
            self._closed = True
            self._lock.notify()
        if self._thread is not None:
            self._thread.join()
        with self._lock:
            left = [*self._queue, *filter(None, self._answers)]
            self._queue.clear()
        self._answers = [None] * self.rows
        for answer in left:
            answer.deliver([], "cancelled")

    def step(self) -> bool:
        """Frees the rows of cancelled requests, fills free rows from the queue, and writes in all.

        Returns:
          Whether there was anything to do.
        """
        admitted: list[int] = []
        for row, answer in enumerate(self._answers):
            if answer is not None and answer.cancelled:
                self._finish(row, "cancelled")
        with self._lock:
            gone = [answer for answer in self._queue if answer.cancelled]
            for answer in gone:
                self._queue.remove(answer)
            # A row is the answer's before it is filled: if that fails, the answer fails with the others.
            for row, answer in enumerate(self._answers):
                if answer is None and self._queue:
                    self._answers[row] = self._queue.popleft()
                    admitted.append(row)
        for answer in gone:
            answer.deliver([], "cancelled")
        for row in admitted:
            try:
                self._admit(row)
            except Exception as error:
                if any(leaf.is_deleted() for leaf in jax.tree.leaves(self._writing)):
                    raise
                traceback.print_exc()  # Nothing was donated yet, so the others go on.
                self._finish(row, f"error: {error}")
        if self.busy:
            for row, written in enumerate(self._write()):
                if self._answers[row] is not None:
                    self._deliver(row, written)
        return bool(self.busy or self._queue or admitted)

    def _write(self) -> list[list[int]]:
        """The next tokens of every row."""
        drawn = np.bool_((self._temperatures > 0).any())
        updates = [structure.updates for structure in self._structures.values()]
        # Copies: a program may read its arguments after this thread has gone on to change them.
        rows = [array.copy() for array in (self._seeds, self._temperatures, self._top_ps)]
        tokens, self._writing = self._decode(self.base, self._writing, updates, *rows, drawn)
        return np.asarray(tokens).tolist()

    def _run(self) -> None:
        while True:
            with self._lock:
                self._lock.wait_for(lambda: self._closed or self._queue or self.busy)
                if self._closed:
                    return
            try:
                self.step()
            except Exception as error:
                # What was donated to a program that failed is gone, so no row can go on. The next requests can.
                traceback.print_exc()
                for row in range(self.rows):
                    self._finish(row, f"error: {error}")
                self._reset()

    def _admit(self, row: int) -> None:
        """Reads the prompt of a row's new answer."""
        answer = self._answers[row]
        assert answer is not None
        request = answer.request
        structure, expanded = self._expanded(request.adapter)
        size = len(request.tokens)
        tokens = np.zeros((1, bucket(size, self.max_length - 1)), np.int32)
        tokens[0, :size] = request.tokens
        self._seeds[row] = request.seed % 2**32
        self._temperatures[row], self._top_ps[row] = request.temperature, request.top_p
        for other in self._structures.values():
            if row in other.filled and other is not structure:
                other.updates = self._clear(other.updates, np.int32(row))
                other.filled.remove(row)
        token, self._writing, updates = self._prefill(
            self.base,
            self._writing,
            structure and structure.updates,
            expanded,
            np.int32(row),
            tokens,
            np.array([size], np.int32),
            self._seeds[row],
            self._temperatures[row : row + 1].copy(),
            self._top_ps[row : row + 1].copy(),
        )
        if structure is not None:
            structure.updates = updates
            structure.filled.add(row)
        self._deliver(row, [int(token)])

    def _deliver(self, row: int, written: list[int]) -> None:
        answer = self._answers[row]
        assert answer is not None
        room = answer.request.max_tokens - answer.written
        end = next((at for at, token in enumerate(written) if token in self.end_ids), len(written))
        kept = written[: min(end, room)]
        answer.written += len(kept)
        if end < len(written) and end < room:
            self._finish(row, "stop", kept)
        elif answer.written == answer.request.max_tokens:
            self._finish(row, "length", kept)
        else:
            answer.deliver(kept, None)

    def _finish(self, row: int, reason: str, tokens: list[int] | None = None) -> None:
        answer, self._answers[row] = self._answers[row], None
        self._temperatures[row] = 0.0
        if answer is not None:
            answer.deliver(tokens or [], reason)

    def _expanded(self, adapter: Adapter | None) -> tuple[Structure | None, Expanded | None]:
        """The structure of an adapter, new if need be, and its updates, as that structure's."""
        if adapter is None:
            return None, None
        expanded = batch.expand(jax.device_put(adapter, self._device))
        key = _structure(expanded)
        if key not in self._structures:
            self.check(adapter)
            made = jax.tree.map(
                lambda leaf: self._zeros(len(leaf), self.rows, *leaf.shape[1:], dtype=leaf.dtype), expanded.made
            )
            self._structures[key] = Structure(Rows(made, expanded.spec, expanded.sites))
        structure = self._structures[key]
        return structure, dataclasses.replace(expanded, spec=structure.updates.spec)

    def _reset(self) -> None:
        """Empty rows."""
        self._seeds = np.zeros(self.rows, np.uint32)
        self._temperatures, self._top_ps = np.zeros(self.rows, np.float32), np.ones(self.rows, np.float32)
        prompt, lengths = jax.ShapeDtypeStruct((1, 1), jnp.int32), jax.ShapeDtypeStruct((1,), jnp.int32)
        prefill = functools.partial(self.model.prefill, slots=self.max_length)
        empty = jax.eval_shape(jaxpeft.adapt(prefill), self.base, [], prompt, lengths)
        self._writing = jax.tree.map(lambda leaf: self._zeros(self.rows, *leaf.shape, dtype=leaf.dtype), empty)
        for structure in self._structures.values():
            empty = jax.tree.map(lambda leaf: self._zeros(*leaf.shape, dtype=leaf.dtype), structure.updates)
            structure.updates, structure.filled = empty, set()

    def _zeros(self, *shape: int, dtype: Any) -> jax.Array:
        return jnp.zeros(shape, dtype, device=self._device)

    def _prefilled(
        self,
        base: Any,
        writing: Writing,
        updates: Rows | None,
        expanded: Expanded | None,
        row: jax.Array,
        tokens: jax.Array,
        lengths: jax.Array,
        seed: jax.Array,
        temperature: jax.Array,
        top_p: jax.Array,
    ) -> tuple[jax.Array, Writing, Rows | None]:
        """Reads a prompt into a row; its first token, all rows, and the updates with the row's among them."""
        self.traces[f"prefill {tokens.shape[1]}"] += 1
        own = jaxpeft.adapt(self.model.prefill)(
            base,
            [] if expanded is None else [expanded],
            tokens,
            lengths,
            slots=self.max_length,
            sampling=RowSampling(temperature, top_p, jnp.any(temperature > 0)),
            key=jax.random.key(seed),
            eos_ids=self.end_ids,
        )
        # The prompt ends where the bucket does. Moved to the first slots it leaves the others to the answer; what wraps
        # around is the bucket's padding, which lies beyond what is read, and is written over.
        begins = own.begins[0, 0]
        cache = jax.tree.map(lambda array: jnp.roll(array, -begins, axis=2), own.cache)
        own = own._replace(begins=jnp.zeros_like(own.begins), slot=own.slot - begins, cache=cache)

        def placed(all_rows: jax.Array, one: jax.Array) -> jax.Array:
            return jax.lax.dynamic_update_index_in_dim(all_rows, one, row, 0)

        return own.token[0], jax.tree.map(placed, writing, own), updates and batch.place(updates, row, expanded)

    def _decoded(
        self,
        base: Any,
        writing: Writing,
        updates: list[Rows],
        seeds: jax.Array,
        temperatures: jax.Array,
        top_ps: jax.Array,
        drawn: jax.Array,
    ) -> tuple[jax.Array, Writing]:
        """The next tokens (R, N) of all rows."""
        self.traces["decode"] += 1

        def step(base: Any, writing: Writing, seed: Any, temperature: Any, top_p: Any, *, drawn: Any) -> Writing:
            sampling, key = RowSampling(temperature, top_p, drawn), jax.random.key(seed[0])
            own = jax.tree.map(lambda leaf: leaf[0], writing)
            own = self.model.step(base, own, sampling=sampling, key=key, eos_ids=self.end_ids)
            return jax.tree.map(lambda leaf: leaf[None], own)

        # The loop is around the rows: one inside them would move their updates into another order for every token.
        def one(writing: Writing, _: None) -> tuple[Writing, jax.Array]:
            forward = batch.batched(step)
            writing = forward(base, updates, None, writing, seeds, temperatures, top_ps, drawn=drawn)
            return writing, writing.token[:, 0]

        writing, tokens = jax.lax.scan(one, writing, length=self.tokens_per_call)
        return tokens.T, writing


def _structure(expanded: Expanded) -> Hashable:
    """What adapters that share programs have in common: the updates' types and shapes, and the weights they change."""
    leaves, structure = jax.tree.flatten(expanded.made)
    return structure, tuple((leaf.shape, str(leaf.dtype)) for leaf in leaves), expanded.sites
