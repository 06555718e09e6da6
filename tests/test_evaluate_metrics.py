# SPDX-License-Identifier: Apache-2.0
"""Scores of tokens, and their means and standard errors, against their definitions."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jqx_interop.evaluation.metrics import ALONE, COMPARED, Estimate, Sums, alone, compared
from jqx_interop.evaluation.windows import Windows

RUN_ALONE, RUN_COMPARED = jax.jit(alone), jax.jit(compared)


def by_definition(logits: np.ndarray, reference: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """The columns of `COMPARED`, one token after the other, in float64."""
    rows = []
    for l32, r32, target in zip(logits, reference, targets, strict=True):
        p, r = (np.exp(x.astype(float) - x.max()) for x in (l32, r32))
        p, r = p / p.sum(), r / r.sum()
        kl = sum(r[v] * (math.log(r[v]) - math.log(p[v])) for v in range(len(p)) if r[v] > 0)
        best = sorted(range(len(p)), key=lambda v: -l32[v])
        favourite = int(np.argmax(r32))
        top1, top5 = favourite == best[0], favourite in best[:5]
        rows.append((-math.log(p[target]), -math.log(r[target]), kl, top1, top5))
    return np.array(rows, float)


@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0])
def test_scores_follow_the_definition(scale: float):
    rng = np.random.default_rng(0)
    reference = (scale * rng.standard_normal((200, 37))).astype(np.float32)
    noise = (scale * rng.standard_normal((200, 37))).astype(np.float32)
    logits = (reference + noise * rng.random((200, 1))).astype(np.float32)
    targets = rng.integers(0, 37, 200).astype(np.int32)
    expected = by_definition(logits, reference, targets)
    found = RUN_COMPARED(logits, reference, targets)
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-6)
    assert 0.05 < expected[:, 3].mean() < expected[:, 4].mean() < 1  # both cases occur
    np.testing.assert_allclose(RUN_ALONE(logits, targets), expected[:, :1], rtol=2e-5, atol=2e-6)
    assert (len(ALONE), len(COMPARED)) == (1, expected.shape[1])


def test_a_model_agrees_with_itself():
    logits = jax.random.normal(jax.random.key(0), (50, 40), jnp.float32) * 5
    found = RUN_COMPARED(logits, logits, jnp.arange(40, dtype=jnp.int32)[:50].repeat(2)[:50])
    np.testing.assert_array_equal(found[:, 2:], np.tile([0.0, 1.0, 1.0], (50, 1)))
    np.testing.assert_array_equal(found[:, 0], found[:, 1])


def test_equal_logits_are_equally_likely():
    reference = jnp.zeros((1, 8)).at[0, 5].set(1.0)
    tie = jnp.zeros((1, 8))
    behind_four = jnp.arange(8, dtype=jnp.float32)[None].at[0, 5].set(2.5)
    behind_five = behind_four.at[0, 5].set(1.5)
    targets = jnp.zeros(1, jnp.int32)
    for logits, agreement in ((tie, (1, 1)), (behind_four, (0, 1)), (behind_five, (0, 0))):
        assert tuple(RUN_COMPARED(logits, reference, targets)[0, 3:].tolist()) == agreement


# --- means

clusters = st.lists(
    st.lists(st.floats(-10, 10, width=32), min_size=1, max_size=6), min_size=1, max_size=8
)


def sums_of(values: list[list[float]]) -> Sums:
    """Values of one column, window by window, added in two goes."""
    length = max(map(len, values)) + 1
    first = np.array([length - len(row) for row in values])
    sums = Sums(Windows(np.zeros((len(values), length), np.int32), first), ALONE)
    window = np.repeat(np.arange(len(values)), [len(row) for row in values])
    flat = np.concatenate(values).astype(np.float32)[:, None]
    for part in (slice(None, None, 2), slice(1, None, 2)):
        sums.add(window[part], flat[part])
    return sums


@given(clusters)
def test_means_and_errors_follow_the_definition(values: list[list[float]]):
    sums = sums_of(values)
    found = sums.mean(sums["nll"])
    flat = [x for row in values for x in row]
    mean = sum(flat) / len(flat)
    assert found.value == pytest.approx(mean, rel=1e-9, abs=1e-9)
    if len(values) == 1:
        assert found.se is None
        return
    squares = sum(sum(x - mean for x in row) ** 2 for row in values)
    variance = len(values) / (len(values) - 1) * squares / len(flat) ** 2
    assert found.se == pytest.approx(math.sqrt(variance), rel=1e-6, abs=1e-9)


def test_the_error_is_that_of_a_mean_of_means_where_windows_are_equal():
    rows = np.random.default_rng(1).standard_normal((30, 4)).astype(np.float32)
    sums = sums_of(rows.tolist())
    expected = rows.astype(float).mean(1).std(ddof=1) / math.sqrt(30)
    assert sums.mean(sums["nll"]).se == pytest.approx(expected, rel=1e-6)


def test_the_error_covers_what_it_should():
    """Windows with a common part: the error of 400 draws is their spread, twice that of the tokens
    taken as independent.
    """
    rng = np.random.default_rng(2)
    means, errors = [], []
    for _ in range(400):
        values = rng.standard_normal((40, 1)) + rng.standard_normal((40, 8))
        sums = sums_of(values.tolist())
        found = sums.mean(sums["nll"])
        means.append(found.value)
        errors.append(found.se)
    assert np.mean(errors) == pytest.approx(np.std(means), rel=0.1)
    assert np.mean(errors) > 2 * math.sqrt(2 / 320)


def test_perplexity_by_the_delta_method():
    nll = Estimate(2.0, 1e-4)
    found = nll.exp()
    assert found.value == math.exp(2.0)
    assert found.se == pytest.approx((math.exp(2.0 + 1e-4) - math.exp(2.0 - 1e-4)) / 2, rel=1e-6)
    assert Estimate(1000.0, 1.0).exp().value == math.inf
    assert Estimate(1.0, None).exp().se is None
