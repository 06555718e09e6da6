# SPDX-License-Identifier: Apache-2.0
"""NF4 against its definition in slow NumPy, and scales in eight bits against theirs."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import DTypeLike

import jqx
from jqx.formats import decode, encode, fake_quantize, find_format
from jqx.formats.double import dequantize_scales, quantize_scales
from jqx_kernels.nf4 import NF4_VALUES, nf4_code, nf4_value

NF4 = find_format("nf4")
RUN = jax.jit(encode, static_argnums=1)
BACK = jax.jit(decode, static_argnums=(1, 2))
FAKE = jax.jit(fake_quantize, static_argnums=1)
PUT, GET = jax.jit(quantize_scales, static_argnums=1), jax.jit(dequantize_scales, static_argnums=2)
BF16 = ml_dtypes.bfloat16
DTYPES = {"bf16": BF16, "f16": np.float16, "f32": np.float32}

PAPER = """-1.0 -0.6961928009986877 -0.5250730514526367 -0.39491748809814453 -0.28444138169288635
-0.18477343022823334 -0.09105003625154495 0.0 0.07958029955625534 0.16093020141124725
0.24611230194568634 0.33791524171829224 0.44070982933044434 0.5626170039176941 0.7229568362236023
1.0"""
"""The values of the QLoRA paper, its appendix E."""


def weight(shape=(6, 256), dtype: DTypeLike = np.float32):
    """Rows of very different size, a row, blocks and single values of zero, and ties."""
    r = np.random.RandomState(5)
    w = r.standard_normal(shape) * np.exp(2 * r.standard_normal((shape[0], 1)))
    w[1], w[2, :130] = 0, 0
    table = np.array(NF4_VALUES)
    w[3, :15], w[3, 15] = (table[1:] + table[:-1]) / 2, 1
    w[3, 16:64] = 0
    return w.astype(dtype)


def by_hand(w):
    """Bytes, scales and values: every block of 64, every number of it."""
    table = np.array([round(float(v), 4) for v in PAPER.split()]).astype(BF16).astype(np.float64)
    n, k = w.shape
    codes, values = np.zeros((n, k), np.uint8), np.zeros((n, k), np.float32)
    scale = np.zeros((n, k // 64), np.float32)
    for i, j in np.ndindex(scale.shape):
        block = w[i, 64 * j : 64 * j + 64]
        scale[i, j] = np.abs(block).max() or 1
        for c, x in enumerate(block, 64 * j):
            quotient = np.float64((np.float32(x) / scale[i, j]).astype(w.dtype))
            codes[i, c] = np.abs(quotient - table).argmin()  # the first of equals
            values[i, c] = np.float32(table[codes[i, c]]) * scale[i, j]
    return codes[:, ::2] * 16 + codes[:, 1::2], scale, values


@pytest.mark.parametrize("run", [RUN, encode], ids=["jit", "eager"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_stored_bits_and_values_follow_the_definition(run, dtype):
    w = weight(dtype=DTYPES[dtype])
    got, (codes, scale, values) = run(jnp.asarray(w), NF4), by_hand(w)
    np.testing.assert_array_equal(got.codes, codes)
    np.testing.assert_array_equal(got.scale, scale)
    assert got.tensor_scale is None
    np.testing.assert_array_equal(BACK(got, NF4, np.dtype(np.float32)), values)
    np.testing.assert_array_equal(np.asarray(FAKE(jnp.asarray(w), NF4)), values.astype(w.dtype))


def test_values_and_codes_are_inverse():
    codes = np.arange(256, dtype=np.uint8)  # the four bits above are another code's
    got = np.asarray(jax.jit(nf4_value)(codes))
    np.testing.assert_array_equal(got, np.tile(np.array(NF4_VALUES, np.float32), 16))
    np.testing.assert_array_equal(nf4_code(jnp.asarray(got)), codes & 15)
    assert list(np.asarray(nf4_code(jnp.float32([-9, 9, np.inf, -np.inf])))) == [0, 15, 15, 0]
    exact = np.array([float(v) for v in PAPER.split()])
    np.testing.assert_allclose(NF4_VALUES, exact, atol=2**-9)


def test_a_block_reaches_what_it_is_told():
    w = weight(dtype=BF16)
    amax = jnp.full((6, 4), 0.5, jnp.float32)
    got = np.asarray(FAKE(jnp.asarray(w), NF4, amax)).astype(np.float32)
    assert np.abs(got).max() == 0.5
    assert (np.abs(got)[np.abs(w.astype(np.float32)) > 0.5] == 0.5).all()


def test_qtensors_and_stacks():
    stack = np.stack([weight(), 3 * weight(), np.zeros((6, 256), np.float32)]).astype(BF16)
    make = jax.jit(lambda w: jqx.QTensor.quantize(w, "nf4", stack=(0,)))
    q = make(stack)
    assert q.bits == NF4.bits == 4.5
    assert q.shape == stack.shape
    for i, w in enumerate(stack):
        codes, scale, values = by_hand(w)
        np.testing.assert_array_equal(q.codes[i], codes)
        np.testing.assert_array_equal(q.scale[i], scale)
        np.testing.assert_array_equal(np.asarray(q.decode()[i]), values.astype(BF16))


# --- scales in eight bits


def rounded(x, dtype):
    return x.astype(dtype).astype(np.float32)


def scales_by_hand(scale, block):
    """Codes, factors and the mean, one block after the other, each step rounded to the dtype."""
    dtype, flat = scale.dtype, scale.astype(np.float32).reshape(-1)
    flat = np.append(flat, np.zeros(-len(flat) % block, np.float32))
    mean = rounded(np.float32(flat.mean(dtype=np.float64)), dtype)
    codes, factors = [], []
    for part in flat.reshape(-1, block):
        off = rounded(part - mean, dtype)
        most = np.abs(off).max()
        factor = rounded(rounded(1 / most, dtype) * np.float32(127), dtype) if most else 1
        factors.append(factor)
        codes.append(np.clip(np.rint(rounded(off * np.float32(factor), dtype)), -127, 127))
    return np.array(codes), np.array(factors, np.float32), mean


@pytest.mark.parametrize("block", [256, 32])
@pytest.mark.parametrize("dtype", DTYPES)
def test_scales_follow_the_definition(dtype, block):
    scale = np.abs(np.random.RandomState(1).standard_normal((40, 17))).astype(DTYPES[dtype])
    (stored, got), (codes, factors, mean) = PUT(scale, block), scales_by_hand(scale, block)
    assert got.factor.dtype == got.mean.dtype == scale.dtype
    stored, kept = np.asarray(stored), codes.reshape(-1)[: scale.size].reshape(scale.shape)
    if dtype == "f32":  # sums of another order
        np.testing.assert_allclose(got.mean, mean, rtol=1e-6)
        np.testing.assert_allclose(got.factor, factors, rtol=1e-5)
        assert (stored == kept).mean() > 0.99
        return
    np.testing.assert_array_equal(np.asarray(got.mean).astype(np.float32), mean)
    np.testing.assert_array_equal(np.asarray(got.factor).astype(np.float32), factors)
    np.testing.assert_array_equal(stored, kept)
    off = rounded(codes / factors[:, None].astype(np.float32), scale.dtype)
    wanted = rounded(off + mean, scale.dtype).reshape(-1)[: scale.size].reshape(scale.shape)
    back = GET(stored, got, block)
    np.testing.assert_array_equal(np.asarray(back).astype(np.float32), wanted)


@given(seed=st.integers(0, 2**31), spread=st.floats(0, 3), count=st.sampled_from([1, 300, 512]))
@settings(max_examples=25)
def test_scales_come_back_within_half_a_step(seed, spread, count):
    r = np.random.RandomState(seed)
    scale = np.exp(spread * r.standard_normal(count)).astype(np.float32)
    codes, factors = PUT(scale, 256)
    back = np.asarray(GET(codes, factors, 256))
    step = np.repeat(1 / np.asarray(factors.factor), 256)[:count]
    # and what float32 loses beside the largest
    assert (np.abs(back - scale) <= 0.5 * step + 1e-6 * scale.max()).all()


def test_scales_that_are_all_one_number_come_back_as_they_are():
    for dtype in (BF16, np.float32):
        scale = np.full((4, 64), 0.75, dtype)
        codes, factors = PUT(scale, 256)
        assert not np.asarray(codes).any()
        np.testing.assert_array_equal(GET(codes, factors, 256), scale)


# --- weights whose scales are in eight bits


def doubled(w):
    """Bytes, codes of scales, factors, mean and values of `w`: zeros have no scale of their own."""
    codes, scale, _ = by_hand(w)
    zeros = ~w.reshape(*scale.shape, 64).any(-1)
    scale = np.where(zeros, 0, scale).astype(w.dtype)
    stored, factors, mean = scales_by_hand(scale, 256)
    off = rounded(stored / factors[:, None].astype(np.float32), w.dtype)
    back = rounded(off + mean, w.dtype).reshape(-1)[: scale.size].reshape(scale.shape)
    table = np.array(NF4_VALUES, np.float32)
    number = np.stack([codes >> 4, codes & 15], -1).reshape(w.shape)
    kept = stored.reshape(-1)[: scale.size].reshape(scale.shape)
    return codes, kept, factors, mean, table[number] * np.repeat(back, 64, axis=1)


DOUBLE = find_format("nf4_double")


@pytest.mark.parametrize("run", [RUN, encode], ids=["jit", "eager"])
@pytest.mark.parametrize("shape", [(6, 256), (40, 512)])
@pytest.mark.parametrize("dtype", ["bf16", "f16"])
def test_double_quantization_follows_the_definition(run, shape, dtype):
    w = (weight(shape) / 8).astype(DTYPES[dtype])
    got, (codes, stored, factors, mean, values) = run(jnp.asarray(w), DOUBLE), doubled(w)
    np.testing.assert_array_equal(got.codes, codes)
    np.testing.assert_array_equal(got.scale, stored)
    np.testing.assert_array_equal(np.asarray(got.tensor_scale.factor).astype(np.float32), factors)
    assert np.asarray(got.tensor_scale.mean).astype(np.float32) == mean
    np.testing.assert_array_equal(BACK(got, DOUBLE, np.dtype(np.float32)), values)
    np.testing.assert_array_equal(np.asarray(FAKE(jnp.asarray(w), DOUBLE)), values.astype(w.dtype))


def test_double_quantization_costs_little_and_zeros_cost_nothing():
    r = np.random.RandomState(0)
    w = (r.standard_normal((64, 1024)) / 32).astype(BF16)
    w[5] = 0
    error = {
        name: np.square(np.asarray(FAKE(jnp.asarray(w), find_format(name)) - w, np.float32)).sum()
        for name in ("nf4", "nf4_double")
    }
    assert error["nf4"] < error["nf4_double"] < 1.01 * error["nf4"]
    assert not np.asarray(FAKE(jnp.asarray(w), DOUBLE), np.float32)[5].any()
    assert not np.asarray(FAKE(jnp.zeros((2, 64), jnp.bfloat16), DOUBLE), np.float32).any()
    loud = np.asarray(FAKE(jnp.full((2, 64), 3e38, jnp.float32), DOUBLE))
    assert (np.isfinite(loud) & (loud > 2e38)).all()


def test_qtensors_of_stacks_in_a_program():
    stack = np.stack([weight((16, 256)) / 8, weight((16, 256))]).astype(BF16)
    make = jax.jit(lambda w: jqx.QTensor.quantize(w, "nf4_double", stack=(0,)))
    q = make(stack)
    assert q.bits == DOUBLE.bits + 8 * 2 * 2 * 2 / stack.size  # a factor and a mean for either
    for i, w in enumerate(stack):
        np.testing.assert_array_equal(
            np.asarray(q.decode()[i]).astype(np.float32), doubled(w)[-1].astype(BF16)
        )
        mine = jax.jit(lambda q, i: q.member(0, i).decode())(q, i)
        np.testing.assert_array_equal(np.asarray(mine), np.asarray(q.decode()[i]))
    x = jnp.asarray(np.random.RandomState(2).standard_normal((3, 256)), jnp.float32)
    run = jqx.quantized(lambda p, x: jnp.einsum("mk,enk->emn", x, p["w"].astype(jnp.float32)))
    wanted = jnp.einsum("mk,enk->emn", x, q.decode(jnp.float32).astype(BF16).astype(jnp.float32))
    np.testing.assert_allclose(jax.jit(run)({"w": q}, x), wanted, rtol=1e-5, atol=1e-5)


def test_one_row_through_a_large_matrix():
    """The product that generation takes cuts matrices into rows."""
    from jqx.models.thin import AT_ONCE, _parts, _stored

    k = 1024
    w = (np.random.RandomState(4).standard_normal((4 * AT_ONCE // k, k)) / 32).astype(BF16)
    q = jqx.QTensor.quantize(jnp.asarray(w), "nf4_double")
    assert _parts(q) > 1
    x = jnp.asarray(np.random.RandomState(2).standard_normal((1, k)), jnp.float32)
    wanted = x @ q.decode().astype(jnp.float32).T
    np.testing.assert_allclose(jax.jit(_stored, static_argnums=2)(x, q, False), wanted, atol=1e-4)


def test_scales_of_another_matrix_are_refused():
    q = jqx.QTensor.quantize(jnp.asarray(weight((40, 512)).astype(BF16)), "nf4_double")
    cut = q.replace(codes=q.codes[:20], scale=q.scale[:20])
    with pytest.raises(jqx.InputError, match="160 scales need 1 factors, one for 256, and there"):
        cut.decode()
