import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_models_decoder import TINY, VARIANTS

import jaxpeft
from jaxpeft import models
from jaxpeft.methods import lora
from jaxpeft.models.generate import Sampling

PROMPTS = [[5, 9, 2, 41, 7, 7], [3], [60, 1, 17]]
LENGTHS = jnp.array([len(prompt) for prompt in PROMPTS])


def padded(side, filler):
    rows = [prompt + [filler] * (6 - len(prompt)) for prompt in PROMPTS]
    if side == "left":
        rows = [[filler] * (6 - len(prompt)) + prompt for prompt in PROMPTS]
    return jnp.array(rows)


def by_full_forward(lm, steps):
    """Greedy continuation, each token from a full pass over its row alone."""
    logits = jax.jit(lm.logits)
    rows = [list(prompt) for prompt in PROMPTS]
    for row in rows:
        for _ in range(steps):
            # Padded on the right to one length, so that it compiles once.
            tokens = jnp.array([row + [0] * (6 + steps - len(row))])
            row.append(int(jnp.argmax(logits(lm.params, tokens)[0, len(row) - 1])))
    return np.array([row[len(prompt) :] for row, prompt in zip(rows, PROMPTS, strict=True)])


@pytest.fixture(scope="module")
def lm():
    lm = models.random(TINY, jax.random.key(3))
    # Larger weights than at a usual start, so that the tokens differ from step to step.
    return dataclasses.replace(lm, params=jax.tree.map(lambda x: 8 * x if x.ndim == 3 else x, lm.params))


@pytest.mark.parametrize("variant", ["tied", "untied", "qwen2", "qwen3", "windowed"])
def test_cache_equals_full_forward(variant):
    lm = models.random(VARIANTS[variant], jax.random.key(3))
    lm = dataclasses.replace(lm, params=jax.tree.map(lambda x: 8 * x if x.ndim == 3 else x, lm.params))
    expected = by_full_forward(lm, 7)
    assert len(np.unique(expected)) > 3
    found = lm.generate(lm.params, padded("right", 0), LENGTHS, max_new_tokens=7)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("filler", [0, 1000])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_matter(lm, side, filler):
    expected = lm.generate(lm.params, padded("right", 0), LENGTHS, max_new_tokens=5)
    found = lm.generate(lm.params, padded(side, filler), LENGTHS, max_new_tokens=5, padding_side=side)
    np.testing.assert_array_equal(found, expected)


def test_end_of_sequence(lm):
    free = np.asarray(lm.generate(lm.params, padded("right", 0), LENGTHS, max_new_tokens=8))
    eos = int(free[0, 2])
    ended = np.asarray(
        lm.generate(lm.params, padded("right", 0), LENGTHS, max_new_tokens=8, eos_ids=[eos, 1000], pad_id=60)
    )
    for before, after in zip(free, ended, strict=True):
        stop = list(before).index(eos) + 1 if eos in before else 8
        np.testing.assert_array_equal(after[:stop], before[:stop])
        assert (after[stop:] == 60).all()
    assert (ended[0] == 60).any()


def test_sampling(lm):
    def sample(seed, **how):
        return np.asarray(
            lm.generate(lm.params, padded("right", 0), LENGTHS, max_new_tokens=6, key=jax.random.key(seed), **how)
        )

    greedy = np.asarray(lm.generate(lm.params, padded("right", 0), LENGTHS, max_new_tokens=6))
    np.testing.assert_array_equal(sample(0, temperature=1.0, top_k=1), greedy)
    np.testing.assert_array_equal(sample(0, temperature=1.0, top_p=1e-6), greedy)
    np.testing.assert_array_equal(sample(0, temperature=2.0), sample(0, temperature=2.0))
    assert (sample(0, temperature=2.0) != sample(1, temperature=2.0)).any()


def test_truncated_distributions():
    logits = jnp.log(jnp.array([[0.1, 0.5, 0.15, 0.25]]))

    def drawn(**how):
        keys = jax.random.split(jax.random.key(0), 400)
        return set(np.asarray(jax.vmap(lambda key: Sampling(temperature=1.0, **how).choose(key, logits))(keys)).flat)

    assert drawn() == {0, 1, 2, 3}
    assert drawn(top_k=2) == {1, 3}
    assert drawn(top_k=100) == {0, 1, 2, 3}
    assert drawn(top_p=0.5) == {1}
    assert drawn(top_p=0.74) == {1, 3}
    assert drawn(top_p=0.76) == {1, 2, 3}


def test_with_an_adapter(lm):
    adapter = jaxpeft.init(jax.random.key(1), lora.Spec(rank=2), jaxpeft.find(lm.params, "all-linear"))
    adapter = adapter.replace(params=jax.tree.map(lambda x: x + 0.2, adapter.params))
    merged = jaxpeft.merge(lm.params, adapter)
    forward = jax.jit(jaxpeft.adapt(lm.generate), static_argnames="max_new_tokens")
    found = forward(lm.params, adapter, padded("right", 0), LENGTHS, max_new_tokens=5)
    np.testing.assert_array_equal(found, lm.generate(merged, padded("right", 0), LENGTHS, max_new_tokens=5))
    assert (found != lm.generate(lm.params, padded("right", 0), LENGTHS, max_new_tokens=5)).any()


def test_bfloat16(lm):
    low = lm.with_config(dtype="bfloat16")
    assert low.generate(lm.params, padded("right", 0), LENGTHS, max_new_tokens=3).shape == (3, 3)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"temperature": 1.0}, "needs key"),
        ({"temperature": -1.0}, "must not be negative"),
        ({"top_k": 3}, "temperature=0 samples nothing"),
        ({"temperature": 1.0, "top_p": 1.5}, "top_p=1.5 must be above 0 and at most 1"),
        ({"temperature": 1.0, "top_k": 0}, "top_k=0 must be at least 1"),
        ({"padding_side": "top"}, "padding_side='top'"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"lengths": jnp.array([1])}, r"found \(3, 6\) and \(1,\)"),
    ],
)
def test_errors(lm, how, message):
    arguments = {"max_new_tokens": 2, "lengths": LENGTHS} | how
    with pytest.raises(ValueError, match=message):
        lm.generate(lm.params, padded("right", 0), **arguments)
