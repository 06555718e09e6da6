# SPDX-License-Identifier: Apache-2.0
"""The histogram of block maxima and the amax it leads to, beside slow NumPy and ModelOpt's
exports.
"""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_golden_formats import read

from jqx.algorithms import Linear, calibrated
from jqx.algorithms.headroom import Headroom, headroom_amax, headroom_needs
from jqx.algorithms.table import ALGORITHMS
from jqx.calibration.histograms import block_log2
from jqx.config import Algorithm
from jqx.errors import InputError
from jqx.formats import find_format

COUNT = jax.jit(block_log2)
AMAX = jax.jit(headroom_amax, static_argnums=1)
NVFP4 = find_format("nvfp4")


def bins_of(a):
    """The bins of positive float32 numbers, in float64."""
    at = np.floor((np.log2(a.astype(np.float64)) + 40) / 80 * 512)
    return np.clip(at, 0, 511).astype(int)


def counted(x):
    """Counts of the largest magnitudes of 16 values."""
    rows = x.astype(np.float32).reshape(-1, x.shape[-1])
    rows = np.pad(rows, ((0, 0), (0, -rows.shape[1] % 16)))
    a = np.abs(rows).reshape(-1, 16).max(1)
    return np.bincount(bins_of(a[a > 0]), minlength=512)


def value_at(counts, percentile):
    """The center of the bin where that share of the counts is reached, and the bin."""
    total, so_far = counts.sum(), 0
    for i, n in enumerate(counts):
        so_far += n
        if so_far >= np.float32(percentile / 100) * np.float32(total):
            return 2.0 ** (-40 + (i + 0.5) / 512 * 80)
    raise AssertionError


def defined(counts, params):
    """max(rho * anchor, upper)."""
    upper = value_at(counts, params.upper_percentile)
    kept = counts.copy()
    kept[: bins_of(np.float32(upper / 1e6))] = 0
    return np.float32(max(params.rho * value_at(kept, params.anchor_percentile), upper))


def activations(seed=0, shape=(3, 50, 64), spread=1.0):
    r = np.random.RandomState(seed)
    x = r.standard_normal(shape) * np.exp(spread * r.standard_normal(shape[:-1]))[..., None]
    return x.astype(np.float32)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("k", [64, 40])
def test_the_histogram_follows_the_definition(dtype, k):
    x = activations(shape=(2, 40, k)).astype(dtype)
    x[0, :3] = 0
    for run in (block_log2, COUNT):
        got = run(jnp.asarray(x))
        assert got.dtype == jnp.int32
        np.testing.assert_array_equal(got, counted(x))


def test_powers_of_two_begin_their_bins():
    """Those that are edges, every 2^5, and what is just below; and beyond all bins."""
    powers = np.exp2(np.arange(-40, 45, 5)).astype(np.float32)
    a = np.concatenate([powers, np.nextafter(powers, 0), np.float32([1e-30, 1e30, np.inf])])
    got = np.asarray(COUNT(jnp.asarray(np.repeat(a[:, None], 16, 1))))
    wanted = [min(32 * i, 511) for i in range(17)]
    wanted += [max(32 * i - 1, 0) for i in range(17)] + [0, 511, 511]
    np.testing.assert_array_equal(got, np.bincount(wanted, minlength=512))


def test_batches_add_up_and_stacks_stay_apart():
    x = activations(3)
    np.testing.assert_array_equal(COUNT(x), COUNT(x[:1]) + COUNT(x[1:]))
    together = jax.vmap(block_log2)(jnp.asarray(x))
    np.testing.assert_array_equal(together, [COUNT(row) for row in x])


PARAMS = [
    Headroom(),
    Headroom(rho=100.0, anchor_percentile=0.0),
    Headroom(rho=0.001, upper_percentile=50.0),
    Headroom(anchor_percentile=100.0, rho=28671.0),
]


@pytest.mark.parametrize("params", PARAMS)
@pytest.mark.parametrize("spread", [0.1, 2.0, 6.0])
def test_the_amax_follows_the_definition(params, spread):
    counts = counted(activations(5, (400, 64), spread))
    for run in (headroom_amax, AMAX):
        got = np.asarray(run(jnp.asarray(counts, jnp.int32), params))
        assert got == defined(counts, params)


def test_blocks_a_million_times_smaller_are_no_anchor():
    x = np.full((100, 16), 1e-9, np.float32)
    x[:40] = 1
    assert headroom_amax(COUNT(x), Headroom()) == defined(counted(x), Headroom())
    assert headroom_amax(COUNT(x), Headroom()) > 16000


@given(st.lists(st.integers(0, 50), min_size=1, max_size=40), st.integers(0, 470))
@settings(max_examples=50)
def test_any_histogram(some, at):
    counts = np.zeros(512, np.int64)
    counts[at : at + len(some)] = some
    got = np.asarray(AMAX(jnp.asarray(counts, jnp.int32), Headroom()))
    assert got == (defined(counts, Headroom()) if counts.any() else 0)


def test_the_row_sets_the_amax_of_inputs_and_the_scales_of_weights():
    w = jnp.asarray(activations(1, (4, 64)))
    counts = COUNT(activations())
    stats = {"block_log2": counts, "square": jnp.ones(64)}
    for weights in ("max", "mse", "wmse"):
        step = Algorithm.of("nvfp4_act_headroom", weight_scale_algorithm=weights)
        found = calibrated(Linear(w), stats, fmt=NVFP4, steps=(step,))
        assert found.input_amax == defined(np.asarray(counts), Headroom())
        assert (found.amax is None) == (weights == "max")
    step = Algorithm.of("nvfp4_act_headroom", upper_percentile=100.0, rho=1e-9)
    stats = {"block_log2": counts, "amax": jnp.float32(77)}
    assert calibrated(Linear(w), stats, fmt=NVFP4, steps=(step,)).input_amax == 77


def test_statistics_that_it_needs():
    assert headroom_needs(NVFP4, Headroom()) == ("block_log2",)
    assert headroom_needs(NVFP4, Headroom(upper_percentile=100.0)) == ("block_log2", "amax")
    hessian = Headroom(weight_scale_algorithm="local_hessian")
    assert headroom_needs(NVFP4, hessian) == ("block_log2", "block_gram")
    run = ALGORITHMS["nvfp4_act_headroom"].run
    with pytest.raises(InputError, match="needs the statistic 'block_log2'"):
        run(Linear(jnp.ones((2, 16))), NVFP4, {}, Headroom())
    smoothed = Linear(jnp.ones((2, 16)), pre_quant_scale=jnp.ones(16))
    with pytest.raises(InputError, match="leave one of the two out"):
        run(smoothed, NVFP4, {}, Headroom())


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"rho": 28672.0}, "rho is 28672.0"),
        ({"rho": 0.0}, "rho is 0.0"),
        ({"anchor_percentile": 101.0}, "anchor_percentile is 101.0"),
        ({"upper_percentile": -1.0}, "upper_percentile is -1.0"),
        ({"weight_scale_algorithm": "maks"}, "did you mean mse, max"),
    ],
)
def test_parameters_out_of_range_are_refused(given, says):
    with pytest.raises(InputError, match=says):
        Headroom(**given)


def test_input_scales_are_those_of_modelopt(shared):
    acts = read(shared / "golden" / "acts.safetensors")
    theirs = read(shared / "golden" / "nvfp4_headroom" / "model.safetensors")
    paths = {key.partition("|")[0] for key in acts}
    assert len(paths) == 14
    for path in paths:
        counts = sum(COUNT(jnp.asarray(a)) for k, a in acts.items() if k.startswith(f"{path}|"))
        scale = np.asarray(AMAX(counts, Headroom())) / np.float32(6 * 448)
        assert scale == theirs[f"{path}.input_scale"], path
