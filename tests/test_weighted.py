# SPDX-License-Identifier: Apache-2.0
"""wmse beside a slow search in NumPy over what is really stored; never worse than the largest
magnitudes.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_local_hessian import inputs, within
from test_mse import BFLOAT16, per_scale, weight

from jqx.algorithms import Linear, calibrated, stored
from jqx.algorithms.weighted import Weighted, weighted, weighted_amax, weighted_needs
from jqx.config import Algorithm
from jqx.errors import InputError
from jqx.formats import decode, encode, find_format, grid_shape

RUN = jax.jit(weighted, static_argnums=(1, 3))
ENCODE = jax.jit(encode, static_argnums=1)
NAMES = ["int4", "int4_b64", "int8", "fp8", "fp8_channel", "fp8_block", "nvfp4", "nvfp4_46"]
NAMES += ["mxfp4", "mxfp8", "int4_fp8", "nvfp4_b32_fp8"]
FEW = {"count": 9, "refine": 1}


def errors(w, fmt, amax, whole):
    """What is wrong with the weight once it is stored, float64."""
    encoded = ENCODE(jnp.asarray(w), fmt, amax, whole)
    return np.asarray(decode(encoded, fmt), np.float64) - w.astype(np.float64)


def cost(d, fmt, x, measure):
    """The cost of every scale in float64: with the channels apart, or blocks of the format."""
    x = x.astype(np.float64)
    if measure == "square":
        return per_scale(d**2 * np.square(x).sum(0), fmt, np.sum)
    size = np.gcd(fmt.block[1] or d.shape[1], d.shape[1])
    e = np.einsum(
        "nbi,bij,nbj->nb", *(lambda p: (p, within(x, size), p))(d.reshape(len(d), -1, size))
    )
    return per_scale(np.repeat(e, size, 1) / size, fmt, np.sum)


@pytest.mark.parametrize("measure", ["square", "gram"])
@pytest.mark.parametrize("name", NAMES)
def test_no_scale_costs_more_than_that_of_the_largest_magnitude(name, measure):
    w, x, fmt = weight(), inputs(), find_format(name)
    linear = Linear(jnp.asarray(w))
    found = RUN(linear, fmt, {"gram": jnp.asarray(x.T @ x)}, Weighted(weight=measure, **FEW))
    assert found.amax.shape == grid_shape(fmt, w.shape)
    mine = cost(errors(w, fmt, found.amax, found.tensor_amax), fmt, x, measure)
    largest = cost(errors(w, fmt, None, None), fmt, x, measure)
    assert (mine <= largest * (1 + 1e-5) + 1e-12).all()
    assert name == "mxfp8" or mine.sum() < largest.sum()  # powers of two of floats: all are alike


@pytest.mark.parametrize("measure", ["square", "gram"])
@pytest.mark.parametrize("name", ["int4", "int8", "fp8_block"])
def test_no_multiple_that_is_tried_costs_less(name, measure):
    w, x, fmt = weight(), inputs(), find_format(name)
    params = Weighted(weight=measure, count=9, refine=0)
    linear = Linear(jnp.asarray(w))
    found = RUN(linear, fmt, {"gram": jnp.asarray(x.T @ x)}, params).amax
    largest = per_scale(np.abs(w.astype(np.float32)), fmt, np.max)
    grids = [largest * np.float32(m) for m in (1, *np.linspace(0.4, 1.2, 9))]
    grids = [jnp.asarray(g.reshape(grid_shape(fmt, w.shape))) for g in grids]
    all_costs = np.array([cost(errors(w, fmt, g, None), fmt, x, measure) for g in grids])
    mine = cost(errors(w, fmt, found, None), fmt, x, measure)
    np.testing.assert_allclose(mine, all_costs.min(0), rtol=1e-4, atol=1e-12)
    refined = Weighted(weight=measure, count=9, refine=2)
    better = RUN(linear, fmt, {"gram": jnp.asarray(x.T @ x)}, refined).amax
    after = cost(errors(w, fmt, better, None), fmt, x, measure)
    assert (after <= mine * (1 + 1e-5) + 1e-12).all()
    assert after.sum() < mine.sum()


@pytest.mark.parametrize("name", ["nvfp4", "nvfp4_46", "nvfp4_b32"])
def test_no_code_of_a_scale_near_the_largest_costs_less(name):
    w, x, fmt = weight(), inputs(), find_format(name)
    whole = jnp.float32(1.0)  # shared with a linear that has larger values
    linear = Linear(jnp.asarray(w), tensor_amax=whole)
    found = RUN(linear, fmt, {"gram": jnp.asarray(x.T @ x)}, Weighted())
    assert found.tensor_amax == 1
    base = np.asarray(encode(jnp.asarray(w), fmt, jnp.float32(1)).scale).view(np.uint8).astype(int)
    tensor_scale = np.float32(1) / np.float32(fmt.tensor_bound)
    best = np.full(base.shape, np.inf)
    for offset in range(-8, 5):
        code = np.clip(base + offset, 1, 0x7E).astype(np.uint8)
        grid = np.asarray(code.view(jnp.float8_e4m3fn)).astype(np.float32)
        grid = jnp.asarray(grid * tensor_scale * np.float32(6))
        stands = np.asarray(ENCODE(jnp.asarray(w), fmt, grid, whole).scale).view(np.uint8)
        np.testing.assert_array_equal(stands, code)
        best = np.minimum(best, cost(errors(w, fmt, grid, whole), fmt, x, "square"))
    mine = cost(errors(w, fmt, found.amax, whole), fmt, x, "square")
    assert (mine <= best * (1 + 1e-4) + 1e-12).all()


def test_blocks_end_at_4_where_that_is_better():
    w = np.zeros((2, 32), np.float32)
    w[:, :16] = np.resize([4, 2, 3, 1], 16)  # exact with the largest at 4
    w[:, 16] = 24
    linear = Linear(jnp.asarray(w))
    fmt = find_format("nvfp4")
    found = RUN(linear, fmt, {"square": jnp.ones(32)}, Weighted())
    assert not errors(w, fmt, found.amax, found.tensor_amax)[:, :16].any()
    assert errors(w, fmt, None, None)[:, :16].any()


@given(seed=st.integers(0, 10**6), power=st.integers(-12, 4), dead=st.booleans())
@settings(max_examples=20)
def test_never_worse_than_the_largest_magnitudes(seed, power, dead):
    r = np.random.RandomState(seed)
    w = (r.standard_t(3, (4, 128)) * 2.0**power).astype(BFLOAT16)
    s = np.square(r.standard_normal(128) * (r.uniform(size=128) > 0.5 * dead)).astype(np.float32)
    for name in ("int4", "int8", "fp8", "nvfp4"):
        fmt = find_format(name)
        found = RUN(Linear(jnp.asarray(w)), fmt, {"square": jnp.asarray(s)}, Weighted(**FEW))
        mine, largest = (
            per_scale(errors(w, fmt, a, t) ** 2 * s, fmt, np.sum)
            for a, t in ((found.amax, found.tensor_amax), (None, None))
        )
        assert (mine <= largest * (1 + 1e-5)).all(), name


@pytest.mark.parametrize(
    ("name", "measure"), [("int4_b64", "gram"), ("fp8", "square"), ("nvfp4", "square")]
)
def test_jit_eager_and_stacks_agree(name, measure):
    fmt, params = find_format(name), Weighted(weight=measure, count=9)
    x = inputs()
    grams = jnp.stack([jnp.asarray(x.T @ x), jnp.eye(256, dtype=jnp.float32)])
    stack = jnp.stack([jnp.asarray(weight()), jnp.asarray(weight()[::-1] * 2)])

    def amax(w, g):
        return weighted(Linear(w), fmt, {"gram": g}, params).amax

    for w, g, one in zip(stack, grams, jax.vmap(amax)(stack, grams), strict=True):
        alone = np.asarray(jax.jit(amax)(w, g))
        close = np.abs(alone - np.asarray(one)) <= 1e-5 * alone  # sums in another order
        assert close.mean() > 0.97
        close = np.abs(alone - np.asarray(amax(w, g))) <= 1e-5 * alone
        assert close.mean() > 0.97


def test_a_step_that_names_it_stores_what_was_chosen():
    w, fmt = weight(), find_format("int4_b64")
    stats = {"square": jnp.asarray(np.square(inputs()).sum(0))}
    found = calibrated(
        Linear(jnp.asarray(w)), stats, fmt=fmt, steps=(Algorithm.of("wmse", count=9),)
    )
    back = stored(found, fmt)
    scale = np.where(found.amax == 0, 1, np.asarray(found.amax) / np.float32(7))
    np.testing.assert_array_equal(back.scale, scale)
    amax = weighted_amax(Linear(jnp.asarray(w)), fmt, stats, Weighted(count=9))
    np.testing.assert_allclose(found.amax, amax, rtol=1e-5)
    assert weighted_amax(Linear(jnp.asarray(w)), fmt, stats).shape == (6, 4)


def test_weights_and_channels_of_zeros():
    for name in ("int4", "nvfp4"):
        fmt = find_format(name)
        for w, s in ((np.zeros((2, 128)), np.ones(128)), (np.ones((2, 128)), np.zeros(128))):
            linear = Linear(jnp.asarray(w, jnp.float32))
            found = RUN(linear, fmt, {"square": jnp.asarray(s, jnp.float32)}, Weighted(**FEW))
            d = errors(w, fmt, found.amax, found.tensor_amax)
            assert np.isfinite(np.asarray(found.amax)).all()
            assert np.abs(d).max() < 0.01


def test_statistics_that_it_needs():
    of = {n: weighted_needs(find_format(n), Weighted(weight="gram")) for n in NAMES}
    assert of["int4"] == of["nvfp4"] == ("block_gram",)
    assert of["int8"] == of["fp8"] == of["fp8_block"] == ("gram",)
    assert weighted_needs(find_format("int4"), Weighted()) == ("square",)
    with pytest.raises(InputError, match="wmse needs second moments"):
        weighted(Linear(jnp.asarray(weight())), find_format("int4"), {}, Weighted())


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"weight": "sqare"}, "did you mean square"),
        ({"lowest": 0.0}, "lowest 0.0"),
        ({"highest": 0.1}, "highest 0.1"),
        ({"count": 0}, "count 0"),
        ({"refine": -1}, "refine -1"),
    ],
)
def test_parameters_out_of_range_are_refused(given, says):
    with pytest.raises(InputError, match=says):
        Weighted(**given)
