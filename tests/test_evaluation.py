"""The harness' own tasks machinery on tiny models: same numbers as from plain logits, few programs, real task files."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import AxisType
from moved import moved

import jaxpeft
from jaxpeft import models
from jaxpeft.methods import lora
from jaxpeft.models.generate import Sampling

lm_eval = pytest.importorskip("lm_eval", reason="the harness is not installed: pip install 'jaxpeft[eval]'")

from lm_eval.api.instance import Instance  # noqa: E402, needs the harness
from lm_eval.tasks import TaskManager  # noqa: E402

from jaxpeft.evaluation import BLOCK, HarnessLM  # noqa: E402


def ask(kind, *arguments):
    return [Instance(request_type=kind, doc={}, arguments=args, idx=i) for i, args in enumerate(arguments)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return models.load(tiny.save_model(tmp_path_factory.mktemp("model") / "tiny"))


@pytest.fixture(scope="module")
def adapter(model):
    sites = jaxpeft.find(model.params, [r"q_proj", r"down_proj"])
    return moved(jaxpeft.init(jax.random.key(0), lora.Spec(rank=2), sites), 0.3)


@pytest.fixture(scope="module")
def harness(model):
    return HarnessLM(model, batch_size=4)


def expected(model, params, context, continuation):
    """(log-probability, whether greedy) from the plain logits of one row."""
    tokens = context + continuation
    logits = jax.nn.log_softmax(model.logits(params, jnp.array([tokens[:-1]]))[0])[len(context) - 1 :]
    total = sum(float(row[token]) for row, token in zip(logits, continuation, strict=True))
    return total, [int(row.argmax()) for row in logits] == continuation


PAIRS = [("ab", "cd"), ("the price is ", "rising"), ("", "alone"), ("x" * 70, "y"), ("spaces  ", "z"), ("ab", "ce")]


def test_loglikelihood(model, harness):
    found = harness.loglikelihood(ask("loglikelihood", *PAIRS), disable_tqdm=True)
    for (context, continuation), (value, greedy) in zip(PAIRS, found, strict=True):
        spaces = len(context) - len(context.rstrip())
        moved_to = context[len(context) - spaces :] + continuation
        before = model.tokenizer.encode(context.rstrip()) or [model.tokenizer.bos_token_id]
        total, likeliest = expected(model, model.params, before, model.tokenizer.encode(moved_to))
        assert value == pytest.approx(total, rel=1e-4)
        assert greedy == likeliest


def test_a_greedy_continuation_is_recognised(model, harness):
    prompt = model.tokenizer.encode("abc")
    lengths = jnp.array([len(prompt)])
    tokens = model.generate(model.params, jnp.array([prompt]), lengths, max_new_tokens=3, eos_ids=[]).tolist()[0]
    requests = [(None, prompt, tokens), (None, prompt, [*tokens[:-1], tokens[-1] - 1])]
    (_, first), (_, second) = harness._loglikelihood_tokens(requests, disable_tqdm=True)
    assert first
    assert not second


def test_with_adapters(model, adapter):
    merged = jaxpeft.merge(jaxpeft.merge(model.params, adapter), adapter)
    alone, adapted = HarnessLM(model, batch_size=4), HarnessLM(model, [adapter, adapter], batch_size=4)
    of_merged = HarnessLM(dataclasses.replace(model, params=merged), batch_size=4)
    requests = ask("loglikelihood", *PAIRS)
    values = [np.array(lm.loglikelihood(requests, disable_tqdm=True)) for lm in (alone, adapted, of_merged)]
    np.testing.assert_allclose(values[1], values[2], rtol=1e-4)
    assert np.abs(values[0] - values[1]).max() > 0.1
    prompts = ask("generate_until", *[(text, {"until": [], "max_gen_toks": 12}) for text in ("ab", "the price")])
    texts = [lm.generate_until(prompts, disable_tqdm=True) for lm in (alone, adapted, of_merged)]
    assert texts[1] == texts[2]
    assert texts[0] != texts[1]


def test_few_programs(model):
    harness = HarnessLM(model, batch_size=4)
    requests = ask("loglikelihood", *[("a" * n, "b" * (1 + n % 3)) for n in range(1, 60)])
    harness.loglikelihood(requests, disable_tqdm=True)
    assert harness.compilations == 3  # lengths of 32, 48 and 64
    harness.loglikelihood(requests[:7], disable_tqdm=True)
    assert harness.compilations == 3
    settings = {"until": ["q"], "max_gen_toks": 20}
    harness.generate_until(ask("generate_until", *[("a" * n, settings) for n in range(1, 60)]), disable_tqdm=True)
    assert harness.compilations == 3 + 2 * 3  # reading and writing at each
    harness.generate_until(ask("generate_until", ("abc", settings), ("b" * 50, settings)), disable_tqdm=True)
    assert harness.compilations == 3 + 2 * 3


def test_continuations_that_differ_in_the_last_token_share_a_pass(model):
    harness = HarnessLM(model, batch_size=4)
    passes = []
    call = harness._call
    harness._call = lambda *args: passes.append(args) or call(*args)
    harness.loglikelihood(ask("loglikelihood", *[("answer:", letter) for letter in "ABCDEFGH"]), disable_tqdm=True)
    assert len(passes) == 1
    harness.loglikelihood(ask("loglikelihood", *[("answer" + x, "A") for x in "ABCDEFGH"]), disable_tqdm=True)
    assert len(passes) == 3


def test_long_requests_are_cut_from_the_left(model):
    harness = HarnessLM(model, batch_size=2, max_length=40)
    tokens = model.tokenizer.encode("0123456789" * 8)
    found = harness._loglikelihood_tokens([(None, tokens[:70], tokens[70:80])], disable_tqdm=True)
    # 41 tokens are read or predicted, the last 10 of them the continuation.
    assert found[0][0] == pytest.approx(expected(model, model.params, tokens[39:70], tokens[70:80])[0], rel=1e-4)
    (long,) = harness.generate_until(ask("generate_until", ("0123456789" * 8, {"max_gen_toks": 10})), disable_tqdm=True)
    short = harness.generate_until(
        ask("generate_until", (("0123456789" * 8)[-30:], {"max_gen_toks": 10})), disable_tqdm=True
    )
    assert [long] == short
    with pytest.raises(ValueError, match="1 to 40 tokens, found 5 and 41"):
        harness._loglikelihood_tokens([(None, tokens[:5], tokens[:41])])


def test_rolling(model):
    harness = HarnessLM(model, batch_size=2, max_length=16)
    text = "It was a bright cold day in April"
    tokens = [model.tokenizer.bos_token_id, *model.tokenizer.encode(text)]
    total, start = 0.0, 1
    while start < len(tokens):
        end = min(start + 16, len(tokens))
        # A window holds 16 tokens; only those that none before held are counted.
        total += expected(model, model.params, tokens[max(0, end - 17) : start], tokens[start:end])[0]
        start = end
    assert len(tokens) > 2 * 16
    found = harness.loglikelihood_rolling(ask("loglikelihood_rolling", (text,), ("",), (text,)), disable_tqdm=True)
    assert found == [pytest.approx(total, rel=1e-4), 0.0, found[0]]


def greedy(model, prompt, count):
    tokens = model.tokenizer.encode(prompt)
    out = model.generate(model.params, jnp.array([tokens]), jnp.array([len(tokens)]), max_new_tokens=count)[0].tolist()
    ends = [place for place, token in enumerate(out) if token in model.end_ids]
    return model.tokenizer.decode(out[: ends[0]] if ends else out, skip_special_tokens=True)


def test_generation_stops_where_it_is_told(model, harness):
    prompts = ["ab", "the price is ", "x" * 40, "q", "hello"]
    wholes = [greedy(model, prompt, 2 * BLOCK + 5) for prompt in prompts]
    requests = [(prompt, {"until": [], "max_gen_toks": 2 * BLOCK + 5}) for prompt in prompts]
    assert harness.generate_until(ask("generate_until", *requests), disable_tqdm=True) == wholes
    # Of one character and of two, and within the first block of tokens and behind it.
    for start, size in ((3, 1), (5, 2), (BLOCK + 3, 2)):
        stop = wholes[0][start : start + size]
        requests = [(prompt, {"until": [stop], "max_gen_toks": 2 * BLOCK + 5}) for prompt in prompts]
        found = harness.generate_until(ask("generate_until", *requests), disable_tqdm=True)
        assert found == [whole.split(stop)[0] for whole in wholes]
        assert len(found[0]) < len(wholes[0])


def test_generation_without_context(model, harness):
    begin = model.tokenizer.decode(model.tokenizer.bos_token_id)
    settings = {"until": [], "max_gen_toks": 8}
    found = harness.generate_until(ask("generate_until", ("", settings), ("ab", settings)), disable_tqdm=True)
    assert found == [greedy(model, begin, 8), greedy(model, "ab", 8)]


def test_generation_stops_early(model):
    harness = HarnessLM(model, batch_size=2)
    passes = []
    call = harness._call
    harness._call = lambda *args: passes.append(args) or call(*args)
    stop = greedy(model, "ab", 8)[2]
    harness.generate_until(ask("generate_until", ("ab", {"until": [stop], "max_gen_toks": 200})), disable_tqdm=True)
    assert len(passes) == 2  # the prompt and one block


def test_different_settings_are_not_mixed(model, harness):
    requests = [("ab", {"until": [], "max_gen_toks": n}) for n in (3, 9, 3)]
    found = harness.generate_until(ask("generate_until", *requests), disable_tqdm=True)
    assert found == [greedy(model, "ab", n) for n in (3, 9, 3)]


def test_sampling(model):
    settings = {"until": [], "max_gen_toks": 12, "do_sample": True, "temperature": 1.5}
    request = ask("generate_until", *[("ab", settings)] * 3)
    first, again, other = (
        HarnessLM(model, batch_size=2, seed=seed).generate_until(request, disable_tqdm=True) for seed in (0, 0, 1)
    )
    assert first == again
    assert first != other
    assert len(set(first)) == 3
    harness = HarnessLM(model)
    assert harness._settings(settings | {"top_k": 3})["sampling"] == Sampling(temperature=1.5, top_k=3)
    assert harness._settings({"do_sample": False, "temperature": 0.7})["sampling"] == Sampling()


def test_chat_template(model, harness):
    conversation = [{"role": "user", "content": "hi"}]
    assert harness.apply_chat_template(conversation) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    begun = [*conversation, {"role": "assistant", "content": "he"}]
    assert harness.apply_chat_template(begun, add_generation_prompt=False).endswith("assistant\nhe")
    assert harness.chat_template(True) == model.tokenizer.chat_template
    assert "/" not in harness.tokenizer_name
    refuses = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    strict = tiny.tokenizer(refuses + "{{ messages[0]['content'] }}")
    without = HarnessLM(dataclasses.replace(model, tokenizer=strict))
    assert without.apply_chat_template([{"role": "system", "content": "be"}, *conversation]) == "hi"


def test_on_a_mesh(model, adapter, harness):
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    params = jaxpeft.sharding.from_rules(model.params, mesh, models.DEFAULT_RULES)
    placed = dataclasses.replace(model, params=jax.device_put(model.params, params))
    shardings = jaxpeft.sharding.of(placed.params)
    at = jaxpeft.sharding.adapter(adapter, shardings)
    on_mesh = HarnessLM(placed, jax.device_put(adapter, at), shardings=shardings, batch_size=3)
    assert on_mesh.batch_size == 4
    alone = HarnessLM(model, adapter, batch_size=4)
    requests = ask("loglikelihood", *PAIRS)
    found, wanted = (np.array(lm.loglikelihood(requests, disable_tqdm=True)) for lm in (on_mesh, alone))
    np.testing.assert_allclose(found, wanted, rtol=1e-4)
    settings = {"until": [], "max_gen_toks": 3 * BLOCK}
    prompts = ask("generate_until", *[(text, settings) for text in ("ab", "the price is", "c")])
    before = on_mesh.compilations
    assert on_mesh.generate_until(prompts, disable_tqdm=True) == alone.generate_until(prompts, disable_tqdm=True)
    assert on_mesh.compilations == before + 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_beams": 4}, "num_beams not supported; supported: until, max_gen_toks"),
        ({"max_gen_toks": 512}, "max_gen_toks=512: expected at least 1 and less than the model's length of 512"),
        ({"do_sample": True, "temperature": -1.0}, "temperature=-1.0 must not be negative"),
    ],
)
def test_settings_that_are_refused(harness, settings, message):
    with pytest.raises(ValueError, match=message):
        harness.generate_until(ask("generate_until", ("ab", settings)), disable_tqdm=True)


def test_models_that_are_refused(model):
    with pytest.raises(ValueError, match="no tokenizer"):
        HarnessLM(dataclasses.replace(model, tokenizer=None))
    with pytest.raises(ValueError, match="batch_size=0"):
        HarnessLM(model, batch_size=0)
    small = dataclasses.replace(model, config=dataclasses.replace(model.config, vocab_size=50))
    with pytest.raises(ValueError, match="beyond the 50 tokens"):
        HarnessLM(small).tok_encode("zebra")


# --- whole tasks of the harness, from files ---


TASKS = {
    "direction": """
task: direction
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/direction.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{series}}\\nThe series is"
doc_to_choice: [rising, falling, flat]
doc_to_target: label
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "continue": """
task: continue
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/direction.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{series}}"
doc_to_target: "{{next}}"
generation_kwargs: {until: ["\\n", ","], max_gen_toks: 8}
metric_list: [{metric: exact_match}]
""",
    "perplexity": """
task: perplexity
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/direction.jsonl}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{series}}"
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]
""",
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder of task files, and their rows."""
    folder = tmp_path_factory.mktemp("tasks")
    random = np.random.default_rng(0)
    rows = []
    for _ in range(12):
        label = int(random.integers(3))
        step, start = (1, -1, 0)[label], int(random.integers(10, 50))
        values = [start + step * i for i in range(4)]
        rows.append({"series": " ".join(map(str, values[:3])), "next": str(values[3]), "label": label})
    (folder / "direction.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in TASKS.items():
        (folder / f"{name}.yaml").write_text(text.replace("FOLDER", str(folder)))
    return folder, rows


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """Data sets are cached here, and nothing is looked up elsewhere."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    # Asks the machine for its drivers and compilers, for seconds.
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda storage: None)


def test_tasks_of_the_harness(model, adapter, tasks, offline):
    folder, rows = tasks
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    lm = HarnessLM(model, adapter, batch_size=4)
    found = lm_eval.simple_evaluate(
        lm, tasks=list(TASKS), task_manager=manager, bootstrap_iters=0, torch_random_seed=None
    )
    merged = jaxpeft.merge(model.params, adapter)
    tokens = model.tokenizer.encode

    def scores(row):
        before = f"{row['series']}\nThe series is"
        choices = [tokens(f"{before} {choice}")[len(tokens(before)) :] for choice in ("rising", "falling", "flat")]
        return [expected(model, merged, tokens(before), choice)[0] for choice in choices]

    right = np.mean([np.argmax(scores(row)) == row["label"] for row in rows])
    assert found["results"]["direction"]["acc,none"] == pytest.approx(right)
    plain = dataclasses.replace(model, params=merged)
    texts = [greedy(plain, row["series"], 8).split("\n")[0].split(",")[0] for row in rows]
    answers = [sample["resps"][0][0] for sample in found["samples"]["continue"]]
    assert answers == texts
    begins = [model.tokenizer.bos_token_id]
    total = sum(expected(model, merged, begins, tokens(row["series"]))[0] for row in rows)
    bits = -total / sum(len(row["series"]) for row in rows) / np.log(2)
    assert found["results"]["perplexity"]["bits_per_byte,none"] == pytest.approx(bits, rel=1e-4)
    assert found["config"]["adapters"] == [repr(adapter)]
