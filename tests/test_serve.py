"""`train serve`: many requests at once get the answers that each gets alone, and OpenAI's client is content."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import jax
import jax.numpy as jnp
import numpy as np
import openai
import pytest
import tiny
import uvicorn
from moved import moved

import jaxpeft
from jaxpeft import models
from jaxpeft.methods import ia3, lora, mos
from train import serve
from train.__main__ import main
from train.engine import Engine
from train.request import Closed, QueueFull, Request, TooLong
from train.resident import Residents
from train.template import Template
from train.text import Text

KEY = "secret"
MOS = mos.Spec(rank=3, equivalent_rank=2, private_rank=1, shards_per_vector=2)
SPECS = {"red": lora.Spec(rank=2), "blue": lora.Spec(rank=2, rslora=True), "green": MOS, "thin": ia3.Spec()}
LONGEST = 96


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, the same with other weights, and a folder of adapters."""
    folder = tmp_path_factory.mktemp("serve")
    base = models.load(tiny.save_model(folder / "tiny"), tokenizer=False)
    for seed, (name, spec) in enumerate(SPECS.items()):
        made = jaxpeft.init(jax.random.key(seed), spec, jaxpeft.find(base.params, ["q_proj", "down_proj"]))
        jaxpeft.save(folder / "adapters" / name, moved(made, 0.3, seed), base=base.params)
    other = models.load(tiny.save_model(folder / "other", seed=1), tokenizer=False)
    strange = jaxpeft.init(jax.random.key(0), lora.Spec(rank=2), jaxpeft.find(other.params, ["q_proj"]))
    jaxpeft.save(folder / "adapters" / "strange", strange, base=other.params)
    (folder / "adapters" / "empty").mkdir()
    (folder / "adapters" / "notes.txt").write_text("no adapter")
    return folder


@pytest.fixture(scope="module")
def model(folder):
    return models.load(folder / "tiny")


@pytest.fixture(scope="module")
def adapters(folder, model):
    return {name: jaxpeft.load(folder / "adapters" / name, base=model.params) for name in SPECS}


@pytest.fixture(scope="module")
def alone(model):
    """What `LanguageModel.generate` writes of one prompt, with one adapter."""
    forward = jax.jit(jaxpeft.adapt(model.generate), static_argnames=("max_new_tokens", "temperature", "top_p"))

    def answer(tokens, adapter, count, seed=0, **how):
        padded = np.zeros((1, LONGEST), np.int32)
        padded[0, : len(tokens)] = tokens
        given = [] if adapter is None else [adapter]
        key = jax.random.key(seed)
        # One length for all, so that it compiles once; a shorter answer is the beginning of a longer one.
        found = forward(model.params, given, padded, jnp.array([len(tokens)]), max_new_tokens=24, key=key, **how)
        found = found[0, :count].tolist()
        end = next((at for at, token in enumerate(found) if token in model.end_ids), len(found))
        return found[:end]

    return answer


@pytest.fixture(scope="module")
def engine(model, adapters):
    made = Engine(model, rows=3, max_length=LONGEST)
    made.warm_up(list(adapters.values()))
    return made


class Heard:
    """What the engine delivers of one answer."""

    def __init__(self):
        self.tokens, self.ended = [], None

    def __call__(self, tokens, ended):
        assert self.ended is None
        self.tokens += tokens
        self.ended = ended


def finish(engine):
    while engine.step():
        pass
    assert engine.busy == engine.waiting == 0


def prompts(count, seed=0):
    random = np.random.default_rng(seed)
    return [random.integers(3, 250, random.integers(1, 70)).astype(np.int32) for _ in range(count)]


@pytest.fixture
def compiled():
    """The programs that XLA compiles from here on."""
    found, listening = [], True

    def heard(name, *_, **__):
        if listening and name.endswith("backend_compile_duration"):
            found.append(name)

    jax.monitoring.register_event_duration_secs_listener(heard)
    yield found
    listening = False


def test_every_request_is_answered_as_it_is_alone(engine, adapters, alone, compiled):
    names = [None, *SPECS]
    before, asked = dict(engine.traces), []
    for number, tokens in enumerate(prompts(14)):
        name = names[number % len(names)]
        adapter, count = adapters.get(name), 3 + number
        heard = Heard()
        engine.submit(Request(tokens=tokens, adapter=adapter, max_tokens=count), heard)
        asked.append((tokens, adapter, count, heard))
        if number % 4 == 3:  # They come while others are written.
            engine.step()
    finish(engine)
    # Nothing was compiled for them, neither traced again nor for arrays that lie elsewhere.
    assert dict(engine.traces) == before
    assert not compiled
    answers = set()
    for tokens, adapter, count, heard in asked:
        assert heard.tokens == alone(tokens, adapter, count)
        assert heard.ended == ("length" if len(heard.tokens) == count else "stop")
        answers.add(tuple(heard.tokens))
    assert len(answers) == len(asked)
    assert compiled  # by `generate`: they are counted


def test_adapters_of_equal_shapes_share_programs(engine, adapters, compiled):
    assert engine.traces["decode"] == 1
    # The base, two LoRAs as one, MoS, and IA3.
    assert {count for name, count in engine.traces.items() if name != "decode"} == {4}
    other = moved(adapters["green"], 0.5, 9).with_alpha(3.0)
    heard = Heard()
    engine.submit(Request(tokens=np.array([5, 6]), adapter=other, max_tokens=5), heard)
    finish(engine)
    assert len(heard.tokens) > 0
    assert engine.traces["decode"] == 1
    assert not [name for name in compiled if "decode" in name]


def test_sampling_is_data_and_a_seed_its_own(engine, adapters, alone, compiled):
    settings = [(0.7, 1.0, 5), (2.0, 0.8, 6), (0.0, 1.0, 0), (1.3, 0.5, 7)]
    asked = []
    for tokens, (temperature, top_p, seed) in zip(prompts(4, 1), settings, strict=True):
        heard = Heard()
        how = {"temperature": temperature, "top_p": top_p, "seed": seed}
        engine.submit(Request(tokens=tokens, adapter=adapters["red"], max_tokens=12, **how), heard)
        asked.append((tokens, how, heard))
    finish(engine)
    assert not compiled
    for tokens, how, heard in asked:
        if how["temperature"] == 0:
            del how["top_p"]
        assert heard.tokens == alone(tokens, adapters["red"], 12, **how)


def test_prompt_and_answer_fill_all_there_is(engine, alone):
    tokens = prompts(1)[0][:1].repeat(LONGEST - 9)
    heard = Heard()
    engine.submit(Request(tokens=tokens, max_tokens=9), heard)
    finish(engine)
    assert heard.tokens == alone(tokens, None, 9)
    with pytest.raises(TooLong, match=f"are {LONGEST + 1} together; at most {LONGEST} fit"):
        engine.submit(Request(tokens=tokens, max_tokens=10), heard)


def test_cancelled_requests_free_their_rows(engine, alone):
    heard = [Heard() for _ in range(5)]
    answers = [engine.submit(Request(tokens=np.array([7]), max_tokens=90), one) for one in heard]
    engine.step()
    assert (engine.busy, engine.waiting) == (3, 2)
    for number in (0, 1, 2, 3):
        answers[number].cancel()
    engine.step()
    assert [one.ended for one in heard] == ["cancelled"] * 4 + [None]
    assert (engine.busy, engine.waiting) == (1, 0)
    finish(engine)
    assert heard[4].tokens[:24] == alone(np.array([7]), None, 24)
    answers[4].cancel()  # Without effect.
    assert not engine.step()


def test_a_failure_ends_what_runs_and_nothing_else(model, adapters, capsys, alone):
    engine = Engine(model, rows=2, max_length=LONGEST, max_queue=2)
    for _ in range(2):
        engine.submit(Request(tokens=np.array([7]), max_tokens=5), Heard())
    with pytest.raises(QueueFull, match="2 requests wait already"):
        engine.submit(Request(tokens=np.array([7]), max_tokens=5), Heard())
    finish(engine)
    broken = jaxpeft.init(jax.random.key(0), lora.Spec(rank=2), jaxpeft.find({"up": {"kernel": jnp.ones((3, 4))}}))
    with pytest.raises(ValueError, match="the base has no array 'up/kernel'"):
        engine.check(broken)
    engine.start()
    ended = threading.Event()
    said = Heard()

    def deliver(tokens, reason):
        said(tokens, reason)
        if reason:
            ended.set()

    engine.submit(Request(tokens=np.array([7]), adapter=broken, max_tokens=5), deliver)
    assert ended.wait(60)
    assert said.ended.startswith("error: the base has no array")
    assert "the base has no array" in capsys.readouterr().err
    engine.close()
    with pytest.raises(Closed):
        engine.submit(Request(tokens=np.array([7]), max_tokens=5), Heard())


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"tokens": []}, "prompt is empty"),
        ({"max_tokens": 0}, "max_tokens=0"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_p": 0.0}, "top_p=0.0"),
    ],
)
def test_requests_out_of_range(how, message):
    with pytest.raises(ValueError, match=message):
        Request(**({"tokens": np.array([1]), "max_tokens": 1} | how))


@pytest.mark.parametrize("how", [{"rows": 0}, {"max_length": 1}, {"max_length": 513}, {"tokens_per_call": 0}])
def test_engines_out_of_range(model, how):
    with pytest.raises(ValueError, match=next(iter(how))):
        Engine(model, **how)


@pytest.mark.parametrize(
    ("stop", "wanted", "read"),
    [
        ((), "né 日 the end, and more", "né 日 the end, and more"),
        # The one that is complete first, and so the last token read is the one that completes it.
        (("end, and", "d, a"), "né 日 the en", "né 日 the end, a"),
        (("mores", "日x"), "né 日 the end, and more", "né 日 the end, and more"),
        (("né",), "", "né"),
    ],
)
def test_text_is_the_same_however_it_is_cut(stop, wanted, read):
    tokenizer = tiny.tokenizer()
    tokens = tokenizer("né 日 the end, and more", add_special_tokens=False).input_ids
    for size in (1, 2, 5, 100):
        text = Text(tokenizer, stop)
        pieces = [text.add(tokens[at : at + size]) for at in range(0, len(tokens), size)]
        assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
        assert "".join([*pieces, text.end()]) == wanted
        assert tokenizer.decode(text.tokens) == read
        assert text.stopped == (read.endswith(stop) if stop else False)


def test_what_may_become_a_stop_string_is_kept_back():
    tokenizer = tiny.tokenizer()
    text = Text(tokenizer, ["###"])
    assert text.add(tokenizer("a##", add_special_tokens=False).input_ids) == "a"
    assert text.add(tokenizer("b#", add_special_tokens=False).input_ids) == "##b"
    assert text.end() == "#"
