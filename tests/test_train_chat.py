"""`train chat`: answers as `generate` gives them, a history, few programs, and Ctrl-C that stops an answer only."""

import io

import pytest
import tiny
from moved import moved
from rich.console import Console

import jaxpeft
from train import chat, generate, job, run
from train import config as configuration
from train.__main__ import main

CONFIG = """
model: {name: MODEL}
method: {name: lora, rank: 2}
sites: {select: [q_proj, down_proj]}
data: {source: synthetic, held_out_rows: 8, max_length: 128}
train: {steps: 1, batch_size: 8}
output: {folder: FOLDER}
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat")
    model = tiny.save_model(folder / "model")
    return configuration.parse(CONFIG.replace("MODEL", str(model)).replace("FOLDER", str(folder / "run")))


@pytest.fixture(scope="module")
def subject(config):
    return job.subject(config)


@pytest.fixture(scope="module")
def adapter(subject):
    return moved(subject.adapter, 0.3)


def one_by_one(subject, adapter, *conversation, longest=6):
    """The answer of `train generate` to a conversation, which ends with the user's message."""
    roles = ["user", "assistant"] * len(conversation)
    messages = [{"role": role, "content": text} for role, text in zip(roles, conversation, strict=False)]
    prompt = subject.template.prompt(messages)
    (answer,) = generate.Generator(subject, batch_size=1, max_new_tokens=longest)(adapter, [prompt])
    return answer


def test_a_conversation(subject, adapter):
    talk = chat.Chat(subject, adapter, max_new_tokens=6)
    first = "".join(talk.say("hello")).strip()
    assert first == one_by_one(subject, adapter, "hello")
    second = "".join(talk.say("more")).strip()
    assert second == one_by_one(subject, adapter, "hello", first, "more")
    assert [message["role"] for message in talk.history] == ["user", "assistant"] * 2
    talk.adapted = False
    third = "".join(talk.say("and?")).strip()
    assert third == one_by_one(subject, subject.adapter, "hello", first, "more", second, "and?")
    talk.reset()
    assert "".join(talk.say("hello")).strip() == one_by_one(subject, subject.adapter, "hello") != first


def test_few_programs(subject, adapter):
    talk = chat.Chat(subject, adapter, max_new_tokens=4)
    lengths = set()
    for _ in range(5):
        "".join(talk.say("go"))
        width = chat.bucket(len(talk._prompt(talk.history[:-1])), talk.room)
        lengths.add(width)
        assert len(talk.read.executables) == len(talk.more.executables) == len(lengths)
    assert 1 < len(lengths) < 5


def test_the_system_message_and_the_seed(subject, adapter):
    plain = "".join(chat.Chat(subject, adapter, max_new_tokens=6).say("hello"))
    told = "".join(chat.Chat(subject, adapter, max_new_tokens=6, system="Be brief.").say("hello"))
    assert plain != told

    def sampled(seed):
        return "".join(chat.Chat(subject, adapter, max_new_tokens=6, temperature=2.0, seed=seed).say("hello"))

    assert sampled(0) == sampled(0) != sampled(1)


def test_pieces_come_as_they_are_written(subject, adapter):
    talk = chat.Chat(subject, adapter, max_new_tokens=6)
    answer = talk.say("hello")
    first = next(answer)
    answer.close()  # as Ctrl-C does
    assert talk.history[-1] == {"role": "assistant", "content": first.strip()}


def test_a_character_of_several_tokens_comes_whole(subject):
    talk = chat.Chat(subject, None, max_new_tokens=6)
    tokens = subject.template.tokenizer("né 日", add_special_tokens=False).input_ids
    assert len(tokens) > 4
    assert list(filter(None, talk._text(tokens))) == ["n", "é", " ", "日"]
    # One that is cut is still said at the end, as what it is.
    assert "".join(talk._text(tokens[:-1])) == "né \N{REPLACEMENT CHARACTER}"


def test_a_long_conversation_forgets_its_beginning(subject, adapter):
    talk = chat.Chat(subject, adapter, max_new_tokens=8)
    for _ in range(5):
        "".join(talk.say("x" * 150))
    assert len(talk.history) == 4
    assert len(talk._prompt(talk.history)) <= 512
    before = list(talk.history)
    with pytest.raises(ValueError, match="is room for 504"):
        "".join(talk.say("x" * 600))
    assert talk.history == before


@pytest.fixture(scope="module")
def folder(config, subject, adapter, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "run"
    folder.mkdir()
    run.write(folder / "config.yaml", configuration.dump(config))
    jaxpeft.save(folder / "adapter", adapter, base=subject.base, extra={"tokenizer": subject.template.fingerprint})
    return folder


def test_lines_of_a_pipe(folder, subject, adapter, capsys, monkeypatch):
    lines = ["hello", "", "/base", "more", "/rest", "/reset", "/base", "hello", "/quit", "never"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    assert main(["chat", str(folder), "--max-new-tokens", "6"]) == 0
    first = one_by_one(subject, adapter, "hello")
    shown = capsys.readouterr().out
    parts = shown.split("the base model alone\n")
    assert parts[0].strip() == first
    more, _, rest = parts[1].partition("unknown command /rest; did you mean /reset?\n")
    assert more.strip() == one_by_one(subject, subject.adapter, "hello", first, "more")
    assert rest.removeprefix("with the adapter\n").strip() == first


def test_the_end_of_a_pipe_ends_it(folder, config, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("/base"))
    assert main(["chat", str(folder / "config.yaml")]) == 0
    assert "there is no adapter" in capsys.readouterr().out


def test_ctrl_c_stops_an_answer_only(subject, adapter, monkeypatch):
    talk = chat.Chat(subject, adapter, max_new_tokens=400)
    "".join(talk.say("hi"))  # compiles
    talk.reset()
    wholes = talk.history
    out = io.StringIO()

    class Said(io.StringIO):
        """Where the first piece goes, Ctrl-C comes."""

        def write(self, text):
            first = not out.getvalue()
            written = out.write(text)
            if first:
                raise KeyboardInterrupt  # as the signal's handler does, in whatever runs when it comes
            return written

    monkeypatch.setattr("sys.stdin", io.StringIO("hi\nhi"))
    chat.converse(talk, Console(file=Said()))
    assert " …" in out.getvalue()
    assert [message["role"] for message in talk.history] == ["user", "assistant"] * 2
    assert wholes == []
    assert len(talk.history[1]["content"]) < 400


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max-new-tokens", "512"], "--max-new-tokens: expected 1 to 511, found 512"),
        (["--temperature", "-1"], "--temperature: temperature=-1.0 must not be negative"),
    ],
)
def test_mistakes(folder, capsys, options, message):
    assert main(["chat", str(folder), *options]) == 2
    assert message in capsys.readouterr().err
