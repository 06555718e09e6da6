# SPDX-License-Identifier: Apache-2.0
"""Histograms of magnitudes and the amaxes they lead to, beside slow NumPy written from the
formulas.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_mse import float8, integer

from jqx.algorithms import Linear, calibrated
from jqx.algorithms.histogram import (
    FromBin,
    Percentile,
    entropy_amax,
    histogram_needs,
    mse_amax,
    percentile_amax,
)
from jqx.algorithms.table import ALGORITHMS, check_applicable
from jqx.calibration.histograms import Histogram
from jqx.config import Algorithm
from jqx.errors import InputError
from jqx.formats import FORMATS, find_format

PERCENTILE = jax.jit(percentile_amax, static_argnums=2)
MSE = jax.jit(mse_amax, static_argnums=(2, 3))
ENTROPY = jax.jit(entropy_amax, static_argnums=2)
BINS = 400
"""Fewer than a first batch has, so that slow searches end."""


def batch(seed, size=5000, scale=1.0):
    return (np.random.RandomState(seed).standard_t(4, size) * scale).astype(np.float32)


def histogram(seed, bins=BINS):
    """Counts [bins] up to the largest of many values, and the width of a bin."""
    a = np.abs(batch(seed, 20000))
    width = np.float32(a.max() / bins)
    return np.bincount(np.minimum((a / width).astype(int), bins - 1), minlength=bins), width


# The histogram.


def test_the_first_batch_has_2048_bins_up_to_its_largest_value():
    x = batch(0).reshape(50, 100)
    h = Histogram.start(x)
    a = np.abs(x).reshape(-1)
    assert h.width == a.max() / np.float32(2048)
    assert h.counts.shape == (2048,)
    assert h.counts.sum() == x.size
    for i in (0, 1, 500, 2047):
        inside = (a >= i * h.width) & ((a < (i + 1) * h.width) | (i == 2047))
        assert h.counts[i] == inside.sum()


def test_later_values_that_are_larger_add_bins():
    first, second, third = batch(1), batch(2, scale=3), batch(3, scale=0.1)
    h = Histogram.start(first).fold(second).fold(third)
    everything = np.abs(np.concatenate([first, second, third]))
    assert h.width == Histogram.start(first).width
    assert h.counts.size == int(np.ceil(np.abs(second).max() / h.width))
    assert h.counts.sum() == everything.size
    wanted = np.histogram(everything, h.width * np.arange(h.counts.size + 1, dtype=np.float64))[0]
    assert np.abs(wanted - h.counts).sum() <= 4  # values that are edges in one arithmetic


def test_order_matters_and_is_kept():
    a, b = batch(1), batch(2, scale=3)
    assert Histogram.start(a).fold(b).width != Histogram.start(b).fold(a).width


def test_zeros_before_anything_else():
    zeros = Histogram.start(np.zeros(10, np.float32))
    assert zeros.width == 0
    assert zeros.counts[0] == 10
    h = zeros.fold(np.zeros(5, np.float32)).fold(np.float32([1, 2]))
    assert h.width == np.float32(2 / 2048)
    assert h.counts[0] == 15
    assert h.counts[1024] == h.counts[2047] == 1
    assert Histogram.start(np.zeros((0, 4), np.float32)).counts.sum() == 0


def test_what_has_no_histogram_is_refused():
    for bad in (np.nan, np.inf):
        with pytest.raises(InputError, match="NaN or infinite"):
            Histogram.start(np.float32([1, bad]))
    with pytest.raises(InputError, match="in another order"):
        Histogram.start(np.float32([1])).fold(np.float32([40]))


# The amaxes.


def slow_percentile(counts, width, percentile):
    """The lower edge of the first bin with enough up to it; both neighbours if it is nearly so."""
    share = np.cumsum(counts / counts.sum())
    near = [np.searchsorted(share, percentile / 100 + e) for e in (-1e-6, 1e-6)]
    return {np.float32(i * width) for i in near}


def slow_mse(counts, width, bound, start=128):
    """Errors by bin, from `start` on."""
    centers = ((np.arange(counts.size) + 0.5) * width).astype(np.float32)
    found = {}
    for i in range(start, counts.size):
        a = np.full_like(centers, centers[i])
        y = float8(centers, a, None) if bound == 448 else integer(bound, centers, a, None)
        found[i] = ((y.astype(np.float64) - centers) ** 2 * counts).mean()
    return found


def slow_divergences(counts, start=128):
    """Kullback-Leibler divergences by edge, from `start` on, bin by bin."""
    bins = counts.astype(np.float64)
    bins[0] = bins[1]
    found = {}
    for end in range(start, bins.size + 1):
        step = np.digitize(range(end), np.linspace(0, end, 129)) - 1
        q = np.zeros(end)
        for s in range(128):
            occupied = (step == s) & (bins[:end] > 0)
            if occupied.any():
                q[occupied] = bins[:end][occupied].mean()
        p = bins[:end].copy()
        p[-1] += bins[end:].sum()
        p, q = p / p.sum(), q / q.sum()
        with np.errstate(divide="ignore", invalid="ignore"):
            found[end] = np.where(p > 0, p * np.log(p / q), 0).sum()
    return found


@pytest.mark.parametrize("percentile", [99.99, 99.0, 50.0, 100.0])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_percentiles(seed, percentile):
    counts, width = histogram(seed)
    if percentile == 100:
        wanted = {np.float32((counts.size - 1) * width)}
    else:
        wanted = slow_percentile(counts, width, percentile)
    for run in (percentile_amax, PERCENTILE):
        got = run(jnp.asarray(counts, jnp.float32), jnp.float32(width), percentile)
        assert np.float32(got) in wanted


few = st.lists(st.integers(0, 9), min_size=2, max_size=30).filter(any)


@given(few, st.sampled_from([50.0, 90.0]))
@settings(max_examples=50)
def test_percentiles_of_few_values(some, percentile):
    counts = np.resize(np.array(some), 30) * (np.arange(30) < len(some))
    got = np.float32(PERCENTILE(jnp.asarray(counts, jnp.int32), jnp.float32(0.5), percentile))
    assert got in slow_percentile(counts, np.float32(0.5), percentile)


@pytest.mark.parametrize(("name", "bound"), [("int8_tensor", 127), ("fp8", 448)])
def test_smallest_squared_errors(name, bound):
    counts, width = histogram(4)
    errors = slow_mse(counts, width, bound)
    for run in (mse_amax, MSE):
        amax = np.float32(run(jnp.asarray(counts, jnp.float32), jnp.float32(width), FORMATS[name]))
        i = round(float(amax / width) - 0.5)
        assert amax == np.float32(np.float32(i + 0.5) * width)
        assert errors[i] <= min(errors.values()) * (1 + 1e-5)


@pytest.mark.parametrize("seed", [5, 6])
def test_least_divergence(seed):
    counts, width = histogram(seed)
    divergences = slow_divergences(counts)
    for run in (entropy_amax, ENTROPY):
        amax = np.float32(run(jnp.asarray(counts, jnp.float32), jnp.float32(width)))
        end = round(float(amax / width))
        assert amax == np.float32(end) * width
        assert divergences[end] <= min(divergences.values()) * (1 + 1e-3)


def test_values_are_not_moved_to_where_there_were_none():
    counts = np.zeros(200, np.int64)
    counts[[0, 1, 199]] = 5
    divergences = slow_divergences(counts)
    assert [end for end, d in divergences.items() if np.isfinite(d)] == [200]
    assert ENTROPY(jnp.asarray(counts, jnp.float32), jnp.float32(1)) == 200


def test_bins_that_fill_up_a_stack_change_nothing():
    counts, width = histogram(7)
    longer = np.pad(counts, (0, 57))
    other = np.pad(histogram(8, 300)[0], (0, 157))
    stack = jnp.asarray(np.stack([longer, other]), jnp.float32)
    widths = jnp.asarray([width, 2 * width])
    for f in (
        lambda c, w: percentile_amax(c, w, 99.9),
        lambda c, w: mse_amax(c, w, FORMATS["int8_tensor"]),
        lambda c, w: mse_amax(c, w, FORMATS["fp8"]),
        entropy_amax,
    ):
        together = jax.vmap(f)(stack, widths)
        assert together[0] == f(jnp.asarray(counts, jnp.float32), jnp.float32(width))
        assert together[1] == f(jnp.asarray(other[:300], jnp.float32), jnp.float32(2 * width))


def test_nothing_but_zeros():
    counts, width = jnp.zeros(200).at[0].set(7), jnp.float32(0)
    assert percentile_amax(counts, width, 99.99) == 0
    assert mse_amax(counts, width, FORMATS["fp8"]) == 0
    assert entropy_amax(counts, width) == 0


# The rows.


def stats():
    counts, width = histogram(9)
    return {"histogram": jnp.asarray(counts, jnp.float32), "histogram_width": jnp.float32(width)}


@pytest.mark.parametrize("method", ["percentile", "histogram_mse", "entropy"])
def test_rows_set_the_amax_of_inputs_alone(method):
    linear = Linear(jnp.ones((2, 4)), amax=jnp.ones((2, 1)))
    known = stats()
    found = calibrated(linear, known, fmt=find_format("int8"), steps=(Algorithm.of(method),))
    wanted = {
        "percentile": lambda c, w: PERCENTILE(c, w, 99.99),
        "histogram_mse": lambda c, w: MSE(c, w, FORMATS["int8_tensor"]),
        "entropy": ENTROPY,
    }[method](known["histogram"], known["histogram_width"])
    np.testing.assert_allclose(found.input_amax, wanted, rtol=0.02)
    assert found.input_amax.dtype == jnp.float32
    np.testing.assert_array_equal(found.amax, linear.amax)


def test_what_rows_refuse():
    one = Linear(jnp.ones((2, 16)))
    for method, fmt in (("histogram_mse", "nvfp4"), ("entropy", "fp8"), ("entropy", "int4")):
        row = ALGORITHMS[method]
        with pytest.raises(InputError, match=f"{method} is not for the inputs of {fmt}"):
            row.run(one, find_format(fmt), stats(), row.params())
        with pytest.raises(InputError, match=f"{method} is not for weights in {fmt}"):
            check_applicable((Algorithm.of(method),), [fmt])
    steps = (Algorithm.of("percentile"),)
    with pytest.raises(InputError, match="needs the statistic 'histogram'"):
        calibrated(one, {}, fmt=find_format("int8"), steps=steps)
    smoothed = one._replace(pre_quant_scale=jnp.ones(16))
    with pytest.raises(InputError, match="leave one of the two out"):
        calibrated(smoothed, stats(), fmt=find_format("int8"), steps=steps)
    assert histogram_needs(find_format("int8"), FromBin()) == ("histogram", "histogram_width")
    for bad in (0.0, 101.0):
        with pytest.raises(InputError, match="percentile is"):
            Percentile(percentile=bad)
    with pytest.raises(InputError, match="start_bin is 0"):
        FromBin(start_bin=0)
