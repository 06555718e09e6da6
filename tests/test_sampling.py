# SPDX-License-Identifier: Apache-2.0
"""Drawing tokens: which ones are kept follows the definition, and how often each comes follows its
probability.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jqx.models.sampling import Draw, filtered, next_tokens, sequence_keys, step_keys

draw_tokens = jax.jit(next_tokens)
probabilities = jax.jit(lambda logits, draw: jax.nn.softmax(filtered(logits, draw), axis=-1))


def by_definition(logits, temperature, top_k, top_p):
    """Probabilities of one row: sorted, cut, and normalised again. Ties with the last kept stay."""
    p = np.exp((logits - logits.max()) / np.float64(temperature))
    p /= p.sum()
    if top_k is not None:
        p = np.where(p >= np.sort(p)[::-1][min(top_k, len(p)) - 1], p, 0)
        p /= p.sum()
    if top_p is not None:
        largest = np.sort(p)[::-1]
        fewest = int(np.searchsorted(np.cumsum(largest), top_p * (1 - 1e-6))) + 1
        p = np.where(p >= largest[min(fewest, len(p)) - 1], p, 0)
        p /= p.sum()
    return p


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 1 << 30),
    temperature=st.sampled_from([0.1, 0.7, 1.0, 3.0]),
    top_k=st.sampled_from([1, 2, 7, 40, 1000]),
    top_p=st.floats(0.05, 0.99),
)
def test_what_is_kept_follows_the_definition(seed, temperature, top_k, top_p):
    logits = np.random.default_rng(seed).normal(0, 2, (3, 40)).astype(np.float32)
    for k, p in ((top_k, None), (None, top_p), (top_k, top_p)):
        got = np.asarray(probabilities(logits, Draw(temperature, k, p)))
        for row, mine in zip(logits, got, strict=True):
            wanted = by_definition(row.astype(np.float64), temperature, k, p)
            np.testing.assert_allclose(mine, wanted, atol=2e-6)
            assert np.all(mine[wanted > 1e-20] > 0)
            assert np.all(mine[wanted == 0] == 0)


def test_the_fewest_tokens_that_reach_the_probability():
    p = np.array([[0.4, 0.3, 0.2, 0.1]], np.float32)
    for top_p, kept in ((0.3, 1), (0.41, 2), (0.69, 2), (0.71, 3), (0.95, 4), (1.0, 4)):
        got = probabilities(np.log(p), Draw(1.0, None, top_p))
        assert np.count_nonzero(np.asarray(got)) == kept, top_p


def test_equally_likely_tokens_are_kept_together():
    logits = np.array([[1.0, 2.0, 2.0, 2.0, 0.0]], np.float32)
    for draw in (Draw(1.0, 2, None), Draw(1.0, None, 0.5)):
        got = np.asarray(probabilities(logits, draw))
        np.testing.assert_allclose(got, [[0, 1 / 3, 1 / 3, 1 / 3, 0]], atol=1e-6)


def test_without_a_temperature_the_first_of_the_likeliest():
    logits = jnp.asarray([[0.0, 3.0, 3.0], [5.0, 1.0, 2.0]])
    got = draw_tokens(logits, None, Draw())
    assert got.dtype == jnp.int32
    assert got.tolist() == [1, 0]


def test_one_candidate_is_greedy():
    logits = jnp.asarray(np.random.default_rng(0).normal(0, 1, (5, 30)), jnp.float32)
    keys = sequence_keys(0, range(5))
    for draw in (Draw(1.0, 1, None), Draw(1.0, None, 1e-6), Draw(1e-3, None, None)):
        got = draw_tokens(logits, keys, draw)
        np.testing.assert_array_equal(np.asarray(got), np.argmax(np.asarray(logits), -1))


@pytest.mark.parametrize(
    "draw", [Draw(1.0), Draw(0.6), Draw(1.5, 4), Draw(1.0, None, 0.8), Draw(1.6, 8, 0.9)]
)
def test_tokens_come_as_often_as_they_are_likely(draw):
    """Chi-squared of 20,000 draws: five standard deviations above its mean at most."""
    n, logits = 20_000, np.random.default_rng(3).normal(0, 1.2, 12).astype(np.float32)
    keys = sequence_keys(1, range(n))
    got = np.asarray(draw_tokens(jnp.broadcast_to(logits, (n, 12)), keys, draw))
    p = by_definition(logits.astype(np.float64), draw.temperature, draw.top_k, draw.top_p)
    counts, kept = np.bincount(got, minlength=12), p > 0
    assert counts[~kept].sum() == 0
    squared = np.sum((counts[kept] - n * p[kept]) ** 2 / (n * p[kept]))
    free = np.count_nonzero(kept) - 1
    assert free > 0
    assert squared < free + 5 * np.sqrt(2 * free)


def test_a_row_is_drawn_by_its_own_key():
    """Other rows, and how many there are, change nothing; another step or seed does."""
    logits = jnp.asarray(np.random.default_rng(0).normal(0, 1, (4, 500)), jnp.float32)
    draw = partial(draw_tokens, draw=Draw(1.0, None, 0.9))
    keys = sequence_keys(7, [11, 12, 13, 14])
    together = draw(logits, step_keys(keys, 3))
    for i in range(4):
        alone = draw(logits[i : i + 1], step_keys(sequence_keys(7, [11 + i]), 3))
        assert alone[0] == together[i]
    same = jnp.broadcast_to(logits[:1], (64, 500))
    first = draw(same, step_keys(sequence_keys(7, range(64)), 0))
    assert len(set(first.tolist())) > 10
    for others in (step_keys(sequence_keys(7, range(64)), 1), sequence_keys(8, range(64))):
        assert np.mean(np.asarray(draw(same, others) == first)) < 0.2


@pytest.mark.parametrize("temperature", [1e-46, 1e-40, 1e-37, 1e-7])
def test_almost_no_temperature_is_none(temperature):
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(3, 50)), jnp.float32)
    keys = sequence_keys(0, range(3))
    drawn = jax.jit(next_tokens)(logits, keys, Draw(temperature=temperature, top_p=0.9))
    np.testing.assert_array_equal(drawn, jnp.argmax(logits, -1))
