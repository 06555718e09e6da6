# SPDX-License-Identifier: Apache-2.0
"""SmoothQuant against slow NumPy written from ModelOpt's definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from simulated import rounded

from jqx.algorithms import Linear
from jqx.algorithms.smoothquant import SmoothQuant, smoothquant, smoothquant_needs
from jqx.errors import InputError
from jqx.formats import find_format

RUN = jax.jit(smoothquant, static_argnames=("fmt", "params"))
INT8 = find_format("int8")
DTYPES = ("bfloat16", "float16", "float32")
N, K = 10, 64


def problem(seed=0, dtype="bfloat16"):
    """A weight, and the largest magnitude of every channel of its inputs."""
    r = np.random.RandomState(seed)
    w = r.standard_normal((N, K)) * np.exp(r.standard_normal(K))
    x = np.exp(2 * r.standard_normal(K))
    return w.astype(np.float32).astype(jnp.dtype(dtype)), rounded(x, jnp.dtype(dtype))


def f32(a):
    return np.asarray(a).astype(np.float32)


@np.errstate(divide="ignore", invalid="ignore")
def by_hand(w, x, alpha):
    """pre_quant_scale, weight and the amax of inputs."""
    dtype, columns = w.dtype, np.abs(f32(w)).max(0)
    top = rounded(columns.astype(np.float64) ** np.float64(1 - alpha), dtype)
    s = top / (x.astype(np.float64) ** np.float64(alpha)).astype(np.float32)
    s = np.where(np.isnan(s), np.float32(0), s)  # 0 / 0, with which ModelOpt stops
    if s.min() <= 2.0**-31:
        s = np.where(x <= 2.0**-31, np.float32(1), s)
    s = np.clip(s, np.float32(1e-4), np.float32(1e4))
    weight = rounded(f32(w) * (np.float32(1) / s), dtype)
    return rounded(s, dtype), weight, rounded((rounded(x, dtype) * s).max(), dtype)


def check(w, x, alpha):
    got = RUN(
        Linear(jnp.asarray(w)), INT8, {"channel_amax": jnp.asarray(x)}, SmoothQuant(alpha=alpha)
    )
    assert got.weight.dtype == got.pre_quant_scale.dtype == w.dtype
    assert got.amax is got.tensor_amax is None
    assert got.facts["alpha"] == np.float32(alpha)
    step = float(jnp.finfo(w.dtype).eps)
    for mine, wanted in zip(
        (got.pre_quant_scale, got.weight, got.input_amax), by_hand(w, x, alpha), strict=True
    ):
        # the last bit of a power moves a few by one step
        np.testing.assert_allclose(f32(mine), wanted, rtol=max(step, 1e-6))
        if w.dtype != np.float32:
            assert (f32(mine) == wanted).mean() > 0.98
    return got


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("alpha", [0.0, 0.25, 0.5, 0.8, 1.0])
def test_scales_follow_the_definition(alpha, dtype):
    for seed in range(3):
        check(*problem(seed, dtype), alpha)


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_of_it_moves_into_the_weight_by_default(dtype):
    w, x = problem(0, dtype)
    got = check(w, x, SmoothQuant().alpha)
    assert f32(got.input_amax) == pytest.approx(1, rel=1e-2)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("case", ["never met", "never used", "both", "one of each"])
def test_channels_that_were_never_met_or_used(case, alpha):
    w, x = problem()
    if case != "never used":
        x[5] = 0
    if case != "never met":
        w[:, 9 if case != "both" else 5] = 0
    got = check(w, x, alpha)
    assert (f32(got.pre_quant_scale) > 0).all()
    for value in (got.weight, got.pre_quant_scale, got.input_amax):
        assert np.isfinite(f32(value)).all()


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_what_a_linear_computes_stays(alpha):
    w, x = problem(dtype="float32")
    got = RUN(
        Linear(jnp.asarray(w)), INT8, {"channel_amax": jnp.asarray(x)}, SmoothQuant(alpha=alpha)
    )
    np.testing.assert_allclose(f32(got.weight) * f32(got.pre_quant_scale), w, rtol=1e-6)


def test_scales_are_limited():
    w, x = problem(dtype="float32")
    x[0], x[1] = 1e6, 1e-6
    got = check(w, x, 1.0)
    assert f32(got.pre_quant_scale)[:2].tolist() == pytest.approx([1e-4, 1e4])


def test_without_jit_and_in_a_stack():
    problems = [problem(seed) for seed in range(3)]
    w = jnp.stack([jnp.asarray(w) for w, _ in problems])
    x = jnp.stack([jnp.asarray(x) for _, x in problems])

    def one(w, x):
        return smoothquant(Linear(w), INT8, {"channel_amax": x}, SmoothQuant(alpha=0.5))

    together = jax.vmap(one)(w, x)
    for i in range(3):
        alone = RUN(Linear(w[i]), INT8, {"channel_amax": x[i]}, SmoothQuant(alpha=0.5))
        for mine in (one(w[i], x[i]), jax.tree.map(lambda a, i=i: a[i], together)):
            for a, b in zip(jax.tree.leaves(mine), jax.tree.leaves(alone), strict=True):
                np.testing.assert_array_equal(f32(a), f32(b))


def test_what_it_cannot_do_is_refused():
    w, x = problem()
    stats = {"channel_amax": jnp.asarray(x)}
    assert smoothquant_needs(INT8, SmoothQuant()) == ("channel_amax",)
    for name, bits in (("int4_b32", 4), ("nvfp4", 4), ("mxfp6", 6)):
        with pytest.raises(InputError, match=rf"{name} has {bits}: take awq_lite"):
            smoothquant(Linear(jnp.asarray(w)), find_format(name), stats, SmoothQuant())
    with pytest.raises(InputError, match="smoothquant needs the statistic 'channel_amax'.*amax"):
        smoothquant(Linear(jnp.asarray(w)), INT8, {"amax": jnp.float32(1)}, SmoothQuant())
    for alpha in (-0.1, 1.1, float("nan")):
        with pytest.raises(InputError, match=f"alpha is {alpha}; give a number from 0 to 1"):
            SmoothQuant(alpha=alpha)
