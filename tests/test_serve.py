"""`train serve`: many requests at once get the answers that each gets alone, and OpenAI's client is content."""

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import jax
import jax.numpy as jnp
import numpy as np
import openai
import pytest
import tiny
import tokenizers
from moved import moved
from transformers import PreTrainedTokenizerFast

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
BEARER = {"Authorization": f"Bearer {KEY}"}
MOS = mos.Spec(rank=3, equivalent_rank=2, private_rank=1, shards_per_vector=2)
SPECS = {"red": lora.Spec(rank=2), "blue": lora.Spec(rank=2, rslora=True), "green": MOS, "thin": ia3.Spec()}
RUN = """
model: {name: MODEL}
method: {name: lora, rank: 2}
data: {source: synthetic, template: plain}
train: {steps: 1}
output: {folder: unused}
"""
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


class Waited(Heard):
    """The same, from the engine's thread."""

    def __init__(self):
        super().__init__()
        self.over = threading.Event()

    def __call__(self, tokens, ended):
        super().__call__(tokens, ended)
        if ended:
            self.over.set()

    def wait(self):
        assert self.over.wait(60)
        return self.ended


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
    for _ in range(4):  # Two have rows to go to, and two wait.
        engine.submit(Request(tokens=np.array([7]), max_tokens=5), Heard())
    with pytest.raises(QueueFull, match="4 requests wait already"):
        engine.submit(Request(tokens=np.array([7]), max_tokens=5), Heard())
    finish(engine)
    broken = jaxpeft.init(jax.random.key(0), lora.Spec(rank=2), jaxpeft.find({"up": {"kernel": jnp.ones((3, 4))}}))
    with pytest.raises(ValueError, match="the base has no array 'up/kernel'"):
        engine.check(broken)
    # One that was not checked fails by itself; what runs beside it goes on.
    first, second = Heard(), Heard()
    engine.submit(Request(tokens=np.array([7]), max_tokens=20), first)
    engine.submit(Request(tokens=np.array([7]), adapter=broken, max_tokens=5), second)
    finish(engine)
    assert second.ended.startswith("error: the base has no array")
    assert "the base has no array" in capsys.readouterr().err
    assert first.tokens == alone(np.array([7]), None, 20)
    # A program that fails takes with it what runs, but not what comes later.
    works, engine._decode = engine._decode, lambda *_: 1 / 0
    engine.start()
    first, third = Waited(), Waited()
    engine.submit(Request(tokens=np.array([7]), max_tokens=20), first)
    assert first.wait() == "error: division by zero"
    assert "ZeroDivisionError" in capsys.readouterr().err
    engine._decode = works
    engine.submit(Request(tokens=np.array([7]), adapter=adapters["red"], max_tokens=20), third)
    assert third.wait() in ("length", "stop")
    assert third.tokens == alone(np.array([7]), adapters["red"], 20)
    assert engine.alive
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


class Running:
    """A server in a thread, on a free port."""

    def __init__(self, service, grace=5):
        self.address = serve.bound("127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self.address.getsockname()[1]}"
        self.server = serve.Server(service, grace)
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.address]})
        self.service = service

    def __enter__(self):
        self.thread.start()
        wait_for(lambda: self.server.started)
        return self

    def __exit__(self, *_):
        self.server.should_exit = True
        self.thread.join()
        self.address.close()

    def client(self, key=KEY):
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60)


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def service_of(model, folder, engine, **how):
    template = Template(model.tokenizer, embedded=model.config.vocab_size)
    residents = Residents(
        folder / "adapters", engine.base, tokenizer=template.fingerprint, check=engine.check, reserved=("tiny",)
    )
    residents.scan()
    return serve.Service(engine, template, residents, "tiny", **({"api_keys": ["other", KEY]} | how))


@pytest.fixture(scope="module")
def running(folder, model, adapters):
    engine = Engine(model, rows=4, max_length=LONGEST, max_queue=64, end_ids=tuple(range(3)))
    engine.warm_up(list(adapters.values()))
    with Running(service_of(model, folder, engine)) as running:
        yield running


@pytest.fixture(scope="module")
def client(running):
    with running.client() as client:
        yield client


def said(model, alone, prompt, adapter, count):
    """The text that a prompt is continued with, alone; and the number of its tokens."""
    tokens = alone(model.tokenizer(prompt, add_special_tokens=False).input_ids, adapter, count)
    tokens = tokens[: next((at for at, token in enumerate(tokens) if token < 3), len(tokens))]
    return model.tokenizer.decode(tokens), len(tokens)


def test_models_are_the_base_and_the_adapters(client, running):
    listed = client.models.list().data
    assert [one.id for one in listed] == ["tiny", *sorted(SPECS)]
    assert client.models.retrieve("red").id == "red"
    refused = running.service.residents.refused
    assert "another base" in refused["strange"]
    assert "holds neither" in refused["empty"]


def test_completions(client, model, adapters, alone):
    for name in ("tiny", "red", "green"):
        answer = client.completions.create(model=name, prompt="Once upon", max_tokens=20, temperature=0)
        wanted, tokens = said(model, alone, "Once upon", adapters.get(name), 20)
        assert answer.choices[0].text == wanted
        assert answer.choices[0].finish_reason == ("length" if tokens == 20 else "stop")
        assert answer.usage.prompt_tokens == 9
        assert answer.usage.completion_tokens == tokens
        assert answer.model == name
    same = model.tokenizer("Once upon", add_special_tokens=False).input_ids
    assert client.completions.create(model="green", prompt=same, max_tokens=20, temperature=0).choices[0].text == wanted


def test_conversations_and_streams(client, model, adapters, alone):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "hi"}]},
    ]
    how = {"model": "blue", "messages": messages, "max_completion_tokens": 16, "temperature": 0}
    whole = client.chat.completions.create(**how)
    prompt = Template(model.tokenizer).prompt([messages[0], {"role": "user", "content": "hi"}])
    written = alone(prompt, adapters["blue"], 16)
    assert whole.usage.prompt_tokens == len(prompt)
    assert whole.choices[0].message.content == model.tokenizer.decode(written[: whole.usage.completion_tokens])
    assert whole.choices[0].message.role == "assistant"
    events = list(client.chat.completions.create(**how, stream=True, stream_options={"include_usage": True}))
    assert events[0].choices[0].delta.role == "assistant"
    assert "".join(one.choices[0].delta.content or "" for one in events[:-1]) == whole.choices[0].message.content
    assert events[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert events[-1].usage == whole.usage
    assert len(events) > 3
    # Without a number of tokens as many as fit, here with sampling, which a seed repeats.
    answers = [
        client.chat.completions.create(model="blue", messages=messages, temperature=1.5, top_p=0.9, seed=seed)
        for seed in (1, 1, 2)
    ]
    texts = [answer.choices[0].message.content for answer in answers]
    assert texts[0] == texts[1] != texts[2]


def test_stop_strings(client, model, alone):
    whole, _ = said(model, alone, "abc", None, 24)
    stop = whole[5:7]
    how = {"model": "tiny", "prompt": "abc", "max_tokens": 24, "temperature": 0, "stop": ["never", stop]}
    answer = client.completions.create(**how)
    assert answer.choices[0].text == whole[: whole.index(stop)]
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens < 24
    streamed = client.completions.create(**how, stream=True)
    assert "".join(event.choices[0].text for event in streamed) == answer.choices[0].text


def test_many_at_once_are_all_answered_each_by_its_own(running, model, adapters, alone):
    names = ["tiny", *SPECS]
    asked = [(names[number % 5], f"{number} and so on", 8 + number % 9) for number in range(40)]

    async def ask():
        async with openai.AsyncOpenAI(base_url=f"{running.url}/v1", api_key=KEY, max_retries=0) as client:
            return await asyncio.gather(
                *(
                    client.completions.create(model=name, prompt=prompt, max_tokens=count, temperature=0)
                    for name, prompt, count in asked
                )
            )

    answers = asyncio.run(ask())
    for (name, prompt, count), answer in zip(asked, answers, strict=True):
        assert answer.choices[0].text == said(model, alone, prompt, adapters.get(name), count)[0]
    assert len({answer.choices[0].text for answer in answers}) > 30
    assert running.service.engine.busy == 0


def test_adapters_come_change_and_go(folder, client, running, adapters, model, alone):
    def answer(name):
        return client.completions.create(model=name, prompt="new", max_tokens=8, temperature=0).choices[0].text

    before = running.service.engine.traces.total()
    try:
        shutil.copytree(folder / "adapters" / "red", folder / "adapters" / "late")
        assert answer("late") == answer("red") != answer("green")
        changed = moved(adapters["red"], 0.5, 7)
        jaxpeft.save(folder / "adapters" / "late", changed, base=model.params, overwrite=True)
        reloaded = httpx.post(f"{running.url}/v1/adapters/reload", headers=BEARER).json()
        assert "late" in reloaded["adapters"]
        assert "strange" in reloaded["refused"]
        assert answer("late") == said(model, alone, "new", changed, 8)[0] != answer("red")
    finally:
        shutil.rmtree(folder / "adapters" / "late", ignore_errors=True)
    assert "late" not in [one.id for one in client.models.list()]
    with pytest.raises(openai.NotFoundError):
        answer("late")
    assert running.service.engine.traces.total() == before


def test_odd_folders_disturb_no_one(folder, client, model):
    """One that loops, and one that goes while it is looked at."""
    odd, going = folder / "adapters" / "odd", folder / "adapters" / "going"
    over = threading.Event()

    def comes_and_goes():
        while not over.is_set():
            shutil.copytree(folder / "adapters" / "red", going)
            shutil.rmtree(going)

    thread = threading.Thread(target=comes_and_goes)
    odd.mkdir()
    try:
        (odd / "loop").symlink_to("loop")
        thread.start()
        for _ in range(100):
            names = [one.id for one in client.models.list()]
            assert {"red", "blue"} <= {*names}
            assert "odd" not in names
    finally:
        over.set()
        thread.join()
        shutil.rmtree(odd)


def test_a_text_goes_on_from_its_prompt():
    """Tokens of SentencePiece begin with their space, which a tokenizer leaves out at the start of a text."""
    characters = {name: number for number, name in enumerate(["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))])}
    vocabulary = characters | {word: 257 + number for number, word in enumerate(["▁a", "a", "日"])}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [], byte_fallback=True, unk_token="<unk>"))
    made.decoder = tokenizers.decoders.Sequence(
        [
            tokenizers.decoders.Replace("▁", " "),
            tokenizers.decoders.ByteFallback(),
            tokenizers.decoders.Fuse(),
            tokenizers.decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>")
    word = vocabulary["▁a"]
    assert Text(tokenizer).add([word, word]) == "a a"
    assert Text(tokenizer, after=[word] * 20).add([word, word]) == " a a"
    # Bytes that are no character spoil none before them, however they are cut.
    emoji = [vocabulary[f"<0x{byte:02X}>"] for byte in "🙂é🙂".encode()]
    tokens = [*emoji[:-2], vocabulary["a"], vocabulary["日"]]
    said = set()
    for size in (1, 2, 3, len(tokens)):
        text = Text(tokenizer)
        pieces = [text.add(tokens[at : at + size]) for at in range(0, len(tokens), size)]
        said.add("".join([*pieces, text.end()]))
    (only,) = said
    assert only.startswith("🙂é\N{REPLACEMENT CHARACTER}")
    assert only.endswith("a日")


def test_a_run_reads_conversations_as_it_was_trained_to(folder, client, model, adapters, alone):
    run = folder / "adapters" / "run"
    messages = [{"role": "user", "content": "hi"}]
    try:
        shutil.copytree(folder / "adapters" / "red", run / "adapter")
        (run / "config.yaml").write_text(RUN.replace("MODEL", str(folder / "tiny")))
        answer = client.chat.completions.create(model="run", messages=messages, max_tokens=8, temperature=0)
        prompt = model.tokenizer.decode(Template(model.tokenizer, "plain").prompt(messages))
        assert answer.choices[0].message.content == said(model, alone, prompt, adapters["red"], 8)[0]
        assert answer.usage.prompt_tokens == len(prompt) < len(Template(model.tokenizer).prompt(messages))
        (run / "config.yaml").write_text("nonsense: 1")
        client.models.list()
        with pytest.raises(openai.NotFoundError, match="its adapter cannot be used: ConfigError"):
            client.chat.completions.create(model="run", messages=messages)
    finally:
        shutil.rmtree(run)


@pytest.mark.parametrize(
    ("how", "kind", "message"),
    [
        ({"model": "rad"}, openai.NotFoundError, "there is no model 'rad'; the nearest names are red"),
        ({"model": "strange"}, openai.NotFoundError, "its adapter cannot be used: CheckpointError: .*another base"),
        ({"prompt": "long " * 40}, openai.BadRequestError, "200 tokens and max_tokens=4 are 204 together; at most 96"),
        ({"prompt": ""}, openai.BadRequestError, "the prompt is empty"),
        ({"prompt": [1, 5000]}, openai.BadRequestError, "token 5000 is not of 0 to"),
        ({"prompt": ["a", "b"]}, openai.BadRequestError, "found 2 prompts; one a request"),
        ({"logprobs": 0}, openai.BadRequestError, "logprobs=0: no value other than False"),
        ({"n": 2}, openai.BadRequestError, "n=2: no value other than 1 is supported"),
        ({"echo": True}, openai.BadRequestError, "echo=True: no value other than False"),
        ({"temperature": 3.0}, openai.BadRequestError, "temperature: Input should be less than or equal to 2"),
        ({"max_tokens": 0}, openai.BadRequestError, "max_tokens"),
        ({"stop": ["a", ""]}, openai.BadRequestError, "stop: an empty string"),
        (
            {"extra_body": {"temprature": 0}},
            openai.BadRequestError,
            "'temprature'; did you mean temperature",
        ),
    ],
)
def test_mistakes_are_named(client, how, kind, message):
    with pytest.raises(kind, match=message) as raised:
        client.completions.create(**({"model": "red", "prompt": "a", "max_tokens": 4} | how))
    assert raised.value.body["type"] == "invalid_request_error"


def test_a_conversation_of_unknown_roles(client):
    with pytest.raises(openai.BadRequestError, match=r"messages.0.role: Input should be 'system'"):
        client.chat.completions.create(model="red", messages=[{"role": "tool", "content": "a"}])


def test_half_of_a_character(running):
    """Which JSON can spell, but OpenAI's client does not."""
    body = b'{"model": "red", "prompt": "a\\ud800"}'
    answer = httpx.post(
        f"{running.url}/v1/completions", content=body, headers=BEARER | {"Content-Type": "application/json"}
    )
    assert answer.status_code == 400
    assert r"half of a character, '\ud800'" in answer.json()["error"]["message"]


def test_a_conversation_with_calls_of_tools(client):
    asked = {"role": "assistant", "content": "a", "refusal": None, "tool_calls": None}
    client.chat.completions.create(model="red", messages=[asked], max_tokens=1)
    asked["tool_calls"] = [{"id": "1", "type": "function", "function": {"name": "f", "arguments": ""}}]
    with pytest.raises(openai.BadRequestError, match=r"messages.0.tool_calls: not supported"):
        client.chat.completions.create(model="red", messages=[asked], max_tokens=1)


def test_keys(running):
    with running.client("wrong") as client, pytest.raises(openai.AuthenticationError, match="missing or wrong"):
        client.models.list()
    for headers in (
        {},
        {b"Authorization": b"Bearer s\xe9c"},
        {"Authorization": f"Basic {KEY}"},
        {"Authorization": KEY},
    ):
        assert httpx.get(f"{running.url}/v1/models", headers=headers).status_code == 401
    assert httpx.get(f"{running.url}/v1/nothing").json()["error"]["message"] == "GET /v1/nothing: Not Found"


def test_health_and_metrics(running, client):
    client.completions.create(model="red", prompt="a", max_tokens=3, temperature=0)
    assert httpx.get(f"{running.url}/health").json() == {"status": "ok"}
    shown = httpx.get(f"{running.url}/metrics").text
    figures = dict(line.rsplit(" ", 1) for line in shown.splitlines() if not line.startswith("#"))
    assert float(figures['jaxpeft_requests_total{path="/v1/completions",status="200"}']) >= 1
    assert float(figures['jaxpeft_tokens_total{kind="completion"}']) >= 1
    assert float(figures["jaxpeft_request_seconds_count"]) >= 1
    assert float(figures["jaxpeft_adapters"]) == len(SPECS)
    assert float(figures["jaxpeft_rows"]) == 4
    assert float(figures["jaxpeft_queue_length"]) == float(figures["jaxpeft_rows_in_use"]) == 0
    # One series for all names and paths that there are not.
    for name in ("none", "no/such", "x" * 1000):
        assert httpx.get(f"{running.url}/v1/models/{name}", headers=BEARER).status_code == 404
        assert httpx.get(f"{running.url}/{name}").status_code == 404
    shown = httpx.get(f"{running.url}/metrics").text
    assert 'jaxpeft_requests_total{path="/v1/models/{name:path}",status="404"} 3.0' in shown
    assert "no/such" not in shown


def test_a_failure_of_the_server_has_its_form(running, monkeypatch):
    def fails(*_):
        raise KeyError("x")

    monkeypatch.setattr(running.service.residents, "scan", fails)
    answer = httpx.get(f"{running.url}/v1/models", headers=BEARER)
    assert answer.status_code == 500
    assert answer.json()["error"]["message"] == "the server failed; KeyError"
    counted = 'jaxpeft_requests_total{path="/v1/models",status="500"} 1.0'
    wait_for(lambda: counted in httpx.get(f"{running.url}/metrics").text)


class Slow(Engine):
    """An engine whose answers last until they are cancelled."""

    def _deliver(self, row, written):
        time.sleep(0.01)
        answer = self._answers[row]
        answer.deliver([5] * len(written), None)


@pytest.fixture
def slow(folder, model):
    engine = Slow(model, rows=1, max_length=LONGEST, max_queue=1)
    return lambda grace=5, **how: Running(service_of(model, folder, engine, **how), grace)


def test_a_client_that_leaves_frees_its_row(slow):
    with slow(api_keys=[]) as running:
        engine, url = running.service.engine, f"{running.url}/v1/completions"
        body = {"model": "tiny", "prompt": "a", "max_tokens": 50}
        with httpx.stream("POST", url, json=body | {"stream": True}, timeout=60) as response:
            next(response.iter_text())
            assert engine.busy == 1
        wait_for(lambda: engine.busy == 0)
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(url, json=body, timeout=httpx.Timeout(60, read=1))
        wait_for(lambda: engine.busy == 0)
        wait_for(lambda: 'status="499"} 2.0' in httpx.get(f"{running.url}/metrics").text)


def test_a_full_queue_and_a_timeout(slow):
    async def ask(url, count):
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as client:
            asked = (client.completions.create(model="tiny", prompt="a", max_tokens=50) for _ in range(count))
            return await asyncio.gather(*asked, return_exceptions=True)

    with slow(api_keys=[], timeout=2.0) as running:
        found = asyncio.run(ask(running.url, 6))
        status = sorted(error.status_code for error in found)
        assert set(status) == {429, 504}
        assert "no answer within 2 seconds" in str([error for error in found if error.status_code == 504])
        assert "requests wait already" in str([error for error in found if error.status_code == 429])
        wait_for(lambda: running.service.engine.busy == 0)
        # A stream has begun when the time is over: the error is its last event.
        with running.client() as client, pytest.raises(openai.APIError, match="no answer within"):
            list(client.completions.create(model="tiny", prompt="a", max_tokens=50, stream=True))


def test_what_does_not_end_in_time_is_told_so(slow, capsys):
    body = {"model": "tiny", "prompt": "a", "max_tokens": 50}
    with slow(grace=1, api_keys=[]) as running, httpx.Client(timeout=60) as client, ThreadPoolExecutor() as threads:
        url = f"{running.url}/v1/completions"
        with client.stream("POST", url, json=body | {"stream": True}) as response:
            pieces = response.iter_text()
            next(pieces)
            waits = threads.submit(httpx.post, url, json=body, timeout=60)
            wait_for(lambda: running.service.engine.waiting == 1)
            began = time.monotonic()
            running.server.should_exit = True
            assert '"code": "shutting_down"' in list(pieces)[-1]
        assert waits.result().status_code == 503
        assert waits.result().json()["error"]["code"] == "shutting_down"
        running.thread.join()
        assert 0.5 < time.monotonic() - began < 30
        assert running.service.engine.busy == 0
        assert not running.service.engine.alive
    assert "Traceback" not in capsys.readouterr().err


def test_sigterm_lets_what_runs_end(folder):
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "JAXPEFT_API_KEY": KEY}
    command = [sys.executable, "-m", "train", "serve", str(folder / "tiny"), "--adapters", str(folder / "adapters")]
    options = ["--port", "0", "--rows", "2", "--max-length", "512", "--tokens-per-call", "1"]
    process = subprocess.Popen(
        [*command, *options], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        line = process.stdout.readline()
        assert line.startswith("serving tiny and 4 adapters at http://127.0.0.1:"), process.communicate()
        url = line.split()[-1]
        with openai.OpenAI(base_url=url, api_key=KEY, timeout=120) as client:
            stream = client.completions.create(model="red", prompt="a", max_tokens=400, temperature=0, stream=True)
            events = [next(stream)]
            process.send_signal(signal.SIGTERM)
            events += list(stream)
        assert events[-1].choices[0].finish_reason in ("length", "stop")
        with pytest.raises(httpx.ConnectError):
            httpx.get(url.replace("/v1", "/health"))
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
        assert "adapter strange is not served: CheckpointError" in errors
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["MODEL", "--adapters", "nowhere"], "--adapters: nowhere is no folder"),
        (["MODEL", "--max-length", "513"], "max_length=513: expected 2 to 512"),
        (["MODEL", "--timeout", "0"], "--timeout: expected more than 0 seconds"),
        (["MODEL", "--grace", "inf"], "--grace: expected more than 0 seconds, found inf"),
        (["MODEL", "--api-key", ""], "--api-key: a key is blank"),
        (["MODEL", "--port", "70000"], "--port 70000: "),
        (["MODEL", "data.template=chats"], "data.template: expected"),
        (["smollm2-135m"], "smollm2-135m-instruct"),
    ],
)
def test_options_out_of_range(folder, capsys, options, message):
    words = [word.replace("MODEL", str(folder / "tiny")) for word in options]
    assert main(["serve", "--port", "0", *words]) == 2
    assert message in capsys.readouterr().err


def test_a_port_that_is_taken(running, folder, capsys):
    port = running.url.rsplit(":", 1)[1]
    assert main(["serve", str(folder / "tiny"), "--port", port]) == 2
    assert f"--port {port}: Address already in use" in capsys.readouterr().err


def test_without_its_extra_it_says_what_to_install(folder, capsys, monkeypatch):
    for name in ("serve", "served"):
        monkeypatch.delitem(sys.modules, f"train.{name}", raising=False)
        monkeypatch.delattr(f"train.{name}", raising=False)
    monkeypatch.setitem(sys.modules, "fastapi", None)
    assert main(["serve", str(folder / "tiny")]) == 2
    assert "fastapi is not installed: pip install 'jaxpeft[serve]'" in capsys.readouterr().err


def test_all_is_compiled_before_the_first_request(folder, monkeypatch, capsys):
    """`--warm-up`, with the options of a command line, up to where it would serve."""
    asked = []

    def run(service, address, grace, ready):
        asked.append((service, grace))
        ready()

    monkeypatch.setattr(serve, "run", run)
    monkeypatch.setenv("JAXPEFT_API_KEY", "first,second")
    options = [
        "--adapters",
        str(folder / "adapters"),
        "--max-length",
        "32",
        "--rows",
        "2",
        "--port",
        "0",
        "--grace",
        "7",
    ]
    command = ["serve", str(folder / "tiny"), "data.template=plain", *options, "--warm-up", "--api-key", KEY]
    assert main(command) == 0
    ((service, grace),) = asked
    assert grace == 7
    assert service.template.kind == "plain"
    assert service.api_keys == [KEY, "first", "second"]
    assert service.engine.traces == {"prefill 31": 4, "decode": 1}
    assert "serving tiny and 4 adapters at http://127.0.0.1:" in capsys.readouterr().out
