"""How does a model with adapters answer the tasks of lm-evaluation-harness? As one of the harness' own models does.

The harness (https://github.com/EleutherAI/lm-evaluation-harness, the extra ``eval``) brings the tasks, the prompts and
the scores; `HarnessLM` answers its three kinds of request.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxpeft import checks
from jaxpeft.adapter import Adapter
from jaxpeft.apply import adapt
from jaxpeft.models.generate import Sampling, Writing, bucket
from jaxpeft.models.language_model import LanguageModel
from jaxpeft.sharding import BATCH, flatten_shardings, mesh_of

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
    from tqdm import tqdm
except ImportError as error:
    raise ImportError(
        f"lm-evaluation-harness is not installed ({error}): pip install 'jaxpeft[eval]', or 'lm-eval>=0.4.13'"
    ) from error

BLOCK = 16
"""Tokens that are written between two looks at the stop strings."""
SETTINGS = ("until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p")
"""What a task may say of its generation; its other names for `max_gen_toks` count as that."""


class RequestError(ValueError):
    """A request that does not fit the model, or a setting of generation that is not in `SETTINGS`."""


class HarnessLM(TemplateLM):
    """A language model with adapters, as the harness asks it.

    Everything that decides a score is as in the harness' model for PyTorch, ``HFLM``: how a context and its
    continuation are tokenised and cut from the left, what counts as greedy, the windows of a long text, where an answer
    stops. Requests are sorted by length and padded to few lengths and one number of rows, so few programs are compiled
    (`compilations`). Continuations that differ in their last token alone share one pass.

    Args:
      model: with a tokenizer; its `params` are the base.
      adapter: one, several, whose updates add up, or none.
      shardings: on a mesh, how the base lies on it (`jaxpeft.sharding.of`); rows are split over its axes of the batch.
      batch_size: rows of a pass; rounded up to a multiple of the devices they are split over.
      max_length: the longest context with its continuation, in tokens. Default: the model's.
      max_gen_toks: the longest answer where a task does not say.
      add_bos_token: whether texts begin with the tokenizer's special tokens. Default: what the tokenizer does.
      prefix_token_id: what stands before a text without context. Default: the token that begins a text, else ends one.
      seed: of the sampling.

    Raises:
      ImportError: the harness is not installed; says how to.
      ValueError: a model without a tokenizer, or a batch of no rows.
      RequestError: later, of a request.

    Examples::

        import lm_eval
        from jaxpeft import models
        from jaxpeft.evaluation import HarnessLM

        lm = models.pretrained("smollm2-135m-instruct")
        found = lm_eval.simple_evaluate(HarnessLM(lm, adapter), tasks=["arc_easy"], num_fewshot=0)
    """

    def __init__(
        self,
        model: LanguageModel,
        adapter: Adapter | Sequence[Adapter] = (),
        *,
        shardings: Any = None,
        batch_size: int = 8,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        seed: int = 0,
    ):
        super().__init__()
        if model.tokenizer is None:
            raise ValueError("the model has no tokenizer; load it with one, by models.load or models.pretrained")
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be at least 1")
        self.model = model
        self.tokenizer = model.tokenizer
        self.adapters = checks.adapters(adapter)
        self.max_length = max_length or model.config.max_position_embeddings
        self.max_gen_toks = max_gen_toks
        self.add_bos_token = add_bos_token
        self.seed = seed
        self._prefix = prefix_token_id
        self._shardings = shardings
        self._mesh = None if shardings is None else mesh_of(flatten_shardings(shardings))
        self._rows = () if self._mesh is None else tuple(axis for axis in BATCH if axis in self._mesh.axis_names)
        self._everywhere = None if self._mesh is None else NamedSharding(self._mesh, PartitionSpec())
        parts = math.prod(self._mesh.shape[axis] for axis in self._rows) if self._mesh is not None else 1
        self.batch_size = -(-batch_size // parts) * parts
        self._programs: dict[Any, Any] = {}

    @property
    def compilations(self) -> int:
        """Programs compiled so far."""
        return sum(program._cache_size() for program in self._programs.values())

    # --- what the harness asks of any model ---

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """The token that stands before a text without context."""
        begins = self.tokenizer.bos_token_id
        found = (self._prefix, begins, self.tokenizer.eos_token_id)
        return next(token for token in found if token is not None)

    @property
    def tokenizer_name(self) -> str:
        """Tells tokenizers apart in the harness' cache of requests."""
        return (self.tokenizer.name_or_path or self.model.source).replace("/", "__")

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes into its results."""
        return {
            "model_source": self.model.source,
            "model_num_parameters": self.model.num_params,
            "model_dtype": self.model.config.dtype,
            "adapters": [repr(adapter) for adapter in self.adapters],
        }

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation as text; without its system message where the tokenizer's template takes none."""
        from jinja2.exceptions import TemplateError

        def render(messages: list[dict[str, str]]) -> str:
            return self.tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )

        try:
            return render(chat_history)
        except TemplateError:
            return render([message for message in chat_history if message["role"] != "system"])

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """The tokens of a text; one that already begins as texts begin gets no second beginning."""
        special = self.add_bos_token if add_special_tokens is None else add_special_tokens
        if add_special_tokens is None and string.startswith(self.tokenizer.decode(self.prefix_token_id)):
            special = False
        found = self.tokenizer.encode(string, **({} if special is None else {"add_special_tokens": special}))
        if (largest := max(found, default=0)) >= self.model.config.vocab_size:
            raise RequestError(
                f"token {largest}, {self.tokenizer.convert_ids_to_tokens(largest)!r}, is beyond the "
                f"{self.model.config.vocab_size} tokens that the model embeds: the tokenizer is another model's"
            )
        return found

    def _loglikelihood_tokens(self, requests: Sequence[tuple], disable_tqdm: bool = False, **_: Any) -> list:
        """(log-probability, whether it is the greedy one) of each (strings, context's tokens, continuation's)."""
        found: list[Any] = [None] * len(requests)
        served = defaultdict(list)
        for number, (_strings, context, continuation) in enumerate(requests):
            if not 0 < len(continuation) <= self.max_length or not context:
                raise RequestError(
                    f"expected a context and a continuation of 1 to {self.max_length} tokens, found {len(context)} and "
                    f"{len(continuation)}: {_strings}"
                )
            served[tuple((context + continuation)[-(self.max_length + 1) : -1])].append(number)
        inputs = list(served)
        bar = tqdm(total=len(requests), desc="Running loglikelihood requests", disable=disable_tqdm)
        for rows in self._batches(inputs):
            scores = self._call(self._score(), *self._padded([inputs[row] for row in rows], self.max_length))
            following, likeliest, last = map(np.asarray, scores)
            for place, row in enumerate(rows):
                for number in served[inputs[row]]:
                    strings, _context, continuation = requests[number]
                    span = slice(len(inputs[row]) - len(continuation), len(inputs[row]))
                    total = following[place, span][:-1].sum() + last[place, continuation[-1]]
                    greedy = np.array_equal(likeliest[place, span], continuation)
                    found[number] = float(total), greedy
                    if strings is not None:
                        self.cache_hook.add_partial("loglikelihood", strings, found[number])
                    bar.update()
        bar.close()
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-probability of each text, its windows overlapping by one token."""
        windows, owners = [], []
        for number, request in enumerate(requests):
            for window in get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            ):
                windows.append((None, *make_disjoint_window(window)))
                owners.append(number)
        totals = [0.0] * len(requests)
        for number, (value, _greedy) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            totals[number] += value
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The answer to each context, up to its first stop string."""
        alike = defaultdict(list)
        for number, request in enumerate(requests):
            alike[json.dumps(request.args[1], sort_keys=True)].append(number)
        answers: list[Any] = [None] * len(requests)
        bar = tqdm(total=len(requests), desc="Running generate_until requests", disable=disable_tqdm)
        for numbers in alike.values():
            settings = self._settings(requests[numbers[0]].args[1])
            longest = self.max_length - settings["max_gen_toks"]
            # One without context begins as a text begins.
            contexts = [
                self.tok_encode(requests[number].args[0])[-longest:] or [self.prefix_token_id] for number in numbers
            ]
            for batch, rows in enumerate(self._batches(contexts)):
                texts = self._answers([contexts[row] for row in rows], longest, batch, **settings)
                for row, text in zip(rows, texts, strict=True):
                    answers[numbers[row]] = text
                    self.cache_hook.add_partial("generate_until", requests[numbers[row]].args, text)
                    bar.update()
        bar.close()
        return answers

    # --- how ---

    def _settings(self, given: dict[str, Any]) -> dict[str, Any]:
        """`until`, `max_gen_toks` and `sampling` of what a task says of its generation."""
        settings: dict[str, Any] = dict(normalize_gen_kwargs(given, self.max_gen_toks))
        if unknown := sorted(set(settings) - set(SETTINGS)):
            raise RequestError(
                f"generation_kwargs: {', '.join(unknown)} not supported; supported: {', '.join(SETTINGS)}"
            )
        if not 0 < settings["max_gen_toks"] < self.max_length:
            found, limit = settings["max_gen_toks"], self.max_length
            raise RequestError(f"max_gen_toks={found}: expected at least 1 and less than the model's length of {limit}")
        temperature = settings.get("temperature", 0.0)
        limits = {name: settings.get(name) for name in ("top_k", "top_p")} if temperature else {}
        try:
            sampling = Sampling(temperature=temperature, **limits)
        except ValueError as error:
            raise RequestError(f"generation_kwargs: {error}") from None
        return {
            "until": handle_stop_sequences(settings["until"], eos=self.tokenizer.decode(self.eot_token_id)),
            "max_gen_toks": settings["max_gen_toks"],
            "sampling": sampling,
        }

    def _answers(
        self, contexts: list, longest: int, batch: int, *, until: list[str], max_gen_toks: int, sampling: Sampling
    ) -> list[str]:
        # A stop string that is a token of its own vanishes from the text; it ends the row as the end of a text does.
        special = set(self.tokenizer.all_special_tokens) & set(until)
        ends = tuple(sorted({*self.model.end_ids, *self.tokenizer.convert_tokens_to_ids(sorted(special))}))
        blocks = -(-max_gen_toks // BLOCK)
        tokens, lengths = self._padded(contexts, longest)
        prefill, write = self._write(tokens.shape[1] + blocks * BLOCK + 1, sampling, ends)
        key = jax.random.fold_in(jax.random.key(self.seed), batch)
        writing = self._call(prefill, tokens, lengths, key)
        written = np.asarray(writing.token)[: len(contexts), None]
        while True:
            texts = [self._text(row, ends, max_gen_toks) for row in written]
            cut = [postprocess_generated_text(text, stop=until, think_end_token=None) for text in texts]
            ended = np.ones(len(tokens), bool)
            ended[: len(contexts)] = [
                text != short or bool(set(row) & set(ends))
                for text, short, row in zip(texts, cut, written, strict=True)
            ]
            if ended.all() or written.shape[1] >= max_gen_toks:
                return cut
            more, writing = self._call(write, writing._replace(ended=self._put(ended, split=False)), key)
            written = np.concatenate([written, np.asarray(more)[: len(contexts)]], axis=1)

    def _text(self, tokens: np.ndarray, ends: tuple[int, ...], longest: int) -> str:
        """The text of a row's tokens, up to the one that ends it."""
        kept = tokens[:longest].tolist()
        stop = next((place for place, token in enumerate(kept) if token in ends), len(kept))
        return self.tokenizer.decode(kept[:stop], skip_special_tokens=True)

    def _batches(self, rows: Sequence[Sequence[int]]) -> Iterator[list[int]]:
        """The numbers of the rows, longest first, `batch_size` at a time."""
        order = sorted(range(len(rows)), key=lambda row: -len(rows[row]))
        for start in range(0, len(order), self.batch_size):
            yield order[start : start + self.batch_size]

    def _padded(self, rows: Sequence[Sequence[int]], longest: int) -> tuple[Any, Any]:
        """Tokens (batch_size, bucket) and lengths (batch_size,) of the rows; rows that fill up have one token."""
        tokens = np.zeros((self.batch_size, bucket(max(map(len, rows)), longest)), np.int32)
        lengths = np.ones(self.batch_size, np.int32)
        for place, row in enumerate(rows):
            tokens[place, : len(row)] = row
            lengths[place] = len(row)
        return self._put(tokens, split=True), self._put(lengths, split=True)

    def _score(self) -> Any:
        if "score" not in self._programs:
            forward = adapt(self.model.scores, shardings=self._shardings)
            self._programs["score"] = jax.jit(forward, out_shardings=self._everywhere)
        return self._programs["score"]

    def _write(self, slots: int, sampling: Sampling, ends: tuple[int, ...]) -> tuple[Any, Any]:
        if (slots, sampling, ends) not in self._programs:
            how = {"sampling": sampling, "eos_ids": ends}
            prefill = adapt(functools.partial(self.model.prefill, slots=slots, **how), shardings=self._shardings)
            write = adapt(functools.partial(self.model.write, count=BLOCK, **how), shardings=self._shardings)
            whole = self._everywhere
            state: Any = Writing(*[whole] * 5, cache=None)  # pyright: ignore[reportArgumentType], a tree of shardings

            def read(base: Any, adapters: Any, tokens: jax.Array, lengths: jax.Array, key: jax.Array) -> Writing:
                return prefill(base, adapters, tokens, lengths, key=key)

            def more(base: Any, adapters: Any, writing: Writing, key: jax.Array) -> Any:
                return write(base, adapters, writing, key=key)

            self._programs[slots, sampling, ends] = jax.jit(read, out_shardings=state)
            self._programs["write", slots, sampling, ends] = jax.jit(
                more, out_shardings=(whole, state), donate_argnums=2
            )
        return self._programs[slots, sampling, ends], self._programs["write", slots, sampling, ends]

    # --- where ---

    def _put(self, array: np.ndarray, split: bool) -> Any:
        """An array that every process holds, on the mesh if there is one: split by rows, or whole everywhere."""
        if self._mesh is None:
            return array
        sharding = NamedSharding(self._mesh, PartitionSpec(self._rows) if split else PartitionSpec())
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    def _call(self, program: Any, *args: Any) -> Any:
        """A program on the base, the adapters and these arguments."""
        with contextlib.nullcontext() if self._mesh is None else jax.set_mesh(self._mesh):
            return program(self.model.params, self.adapters, *args)
