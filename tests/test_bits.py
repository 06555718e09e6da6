# SPDX-License-Identifier: Apache-2.0
"""The element codecs against tables: every tie and its neighbours, every bfloat16, random bit
patterns.
"""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st

from jqx_kernels import bits

ENCODERS = {
    "e4m3": (bits.e4m3_code, reference.e4m3),
    "e2m1": (bits.e2m1_code, reference.e2m1),
    "e2m1_down": (bits.e2m1_code_down, reference.e2m1_down),
    "int8": (lambda x: bits.int_code(x, 8), lambda x: reference.integer(x, 8)),
    "int4": (lambda x: bits.int_code(x, 4) & 15, lambda x: reference.integer(x, 4) & 15),
}
JITTED = {name: jax.jit(f) for name, (f, _) in ENCODERS.items()}
GRIDS = {
    "e4m3": reference.E4M3,
    "e2m1": reference.E2M1,
    "e2m1_down": reference.E2M1,
    "int8": np.arange(129),
    "int4": np.arange(9),
}
PATTERNS = st.lists(st.integers(0, 2**32 - 1), min_size=64, max_size=64)


def around(x):
    """x and the floats next to it, with both signs."""
    x = np.asarray(x, np.float32)
    x = np.concatenate(
        [x, np.nextafter(x, np.float32(np.inf)), np.nextafter(x, np.float32(-np.inf))]
    )
    return np.concatenate([x, -x])


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("mode", ["eager", "jit"])
def test_codes_at_values_and_ties_and_one_ulp_beside_them(name, mode):
    grid = GRIDS[name]
    x = around(np.concatenate([grid, (grid[1:] + grid[:-1]) / 2, [1e30, 2.0**-126, 2.0**-100]]))
    code, defined = ENCODERS[name]
    got = np.asarray((JITTED[name] if mode == "jit" else code)(jnp.asarray(x)))
    np.testing.assert_array_equal(got, defined(x))


@pytest.mark.parametrize("name", ENCODERS)
def test_codes_of_every_finite_bfloat16(name):
    every = (np.arange(65536, dtype=np.uint32) << 16).view(np.float32)
    x = every[np.isfinite(every)]
    np.testing.assert_array_equal(np.asarray(JITTED[name](x)), ENCODERS[name][1](x))


@given(patterns=PATTERNS)
@settings(max_examples=60, deadline=None)
def test_codes_of_any_float(patterns):
    x = np.array(patterns, np.uint32).view(np.float32)
    x = np.where(np.isfinite(x), x, 1).astype(np.float32)
    for name, run in JITTED.items():
        np.testing.assert_array_equal(np.asarray(run(x)), ENCODERS[name][1](x), err_msg=name)


def test_infinities_saturate_and_nan_has_its_code():
    x = np.array([np.inf, -np.inf, np.nan], np.float32)
    np.testing.assert_array_equal(np.asarray(JITTED["e4m3"](x)), [0x7E, 0xFE, 0x7F])
    np.testing.assert_array_equal(np.asarray(JITTED["e2m1"](x))[:2], [7, 15])
    np.testing.assert_array_equal(np.asarray(JITTED["int8"](x))[:2], [127, 128])


def test_signs_of_zero_and_of_what_rounds_to_zero():
    x = np.array([0.0, -0.0, 1e-3, -1e-3, 1e-40, -1e-40], np.float32)
    np.testing.assert_array_equal(np.asarray(JITTED["e2m1"](x)), [0, 0, 0, 8, 0, 8])
    np.testing.assert_array_equal(np.asarray(JITTED["e2m1_down"](x)), [8, 8, 0, 8, 0, 8])
    from_dividend = jax.jit(bits.e2m1_code)(np.float32([-0.0, -0.0]), np.float32([-1e-40, -0.0]))
    np.testing.assert_array_equal(np.asarray(from_dividend), [8, 0])


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_values_of_all_codes(wrap):
    codes = np.arange(256, dtype=np.uint8)
    e4m3 = np.asarray(wrap(bits.e4m3_value)(jnp.asarray(codes)))
    np.testing.assert_array_equal(e4m3, codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32))
    e2m1 = np.asarray(wrap(bits.e2m1_value)(jnp.asarray(codes[:16])))
    np.testing.assert_array_equal(e2m1, reference.value("e2m1", codes[:16]))
    assert np.signbit(e2m1[8])
    e8m0 = np.asarray(wrap(bits.e8m0_value)(jnp.asarray(codes[:255]))).view(np.uint32)
    np.testing.assert_array_equal(
        e8m0, np.ldexp(1.0, codes[:255].astype(int) - 127).astype(np.float32).view(np.uint32)
    )
    for width in (8, 4):
        x = np.arange(-(2 ** (width - 1)), 2 ** (width - 1), dtype=np.float32)
        back = wrap(lambda x, w=width: bits.int_value(bits.int_code(x, w), w))(jnp.asarray(x))
        np.testing.assert_array_equal(np.asarray(back), x)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("d", [6.0, 7.0, 127.0, 448.0, 2688.0])
def test_quotients_are_ieee_for_constants(wrap, d):
    x = np.random.RandomState(0).standard_normal(4096).astype(np.float32)
    np.testing.assert_array_equal(
        np.asarray(wrap(lambda x: bits.divide(x, d))(jnp.asarray(x))), x / np.float32(d)
    )


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_quotients_are_ieee_for_broadcast_divisors(wrap):
    r = np.random.RandomState(1)
    x, d = (
        r.standard_normal((64, 128)).astype(np.float32),
        r.random((64, 1)).astype(np.float32) + 0.1,
    )
    np.testing.assert_array_equal(
        np.asarray(wrap(bits.divide)(jnp.asarray(x), jnp.asarray(d))), x / d
    )
    plain = np.asarray(jax.jit(lambda x, d: x / d)(x, d))
    assert (plain != x / d).any(), "the compiler divides exactly: this test shows nothing any more"


def test_zero_divided_by_zero_is_zero():
    np.testing.assert_array_equal(
        np.asarray(bits.divide(jnp.float32([0.0, -0.0]), jnp.zeros(2))), [0, 0]
    )


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
def test_rounding_equals_the_cast(dtype):
    r = np.random.RandomState(2)
    sizes = np.exp2(r.randint(-30, 20, 20000))
    edges = [0.0, 65504.0, 65520.0, 65519.99, 2.0**-14, 2.0**-24, 2.0**-25, 3 * 2.0**-25, np.inf]
    halves = (1 + (2 * r.randint(0, 128, 500) + 1) / 256) * 2.0**3  # ties of bfloat16
    x = around(np.concatenate([r.standard_normal(20000) * sizes, edges, halves]))
    x = np.where(np.abs(x) < 2.0**-126, 0, x).astype(np.float32)
    run = jax.jit(lambda x: bits.round_to(x, dtype))
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(np.asarray(run(x)), x.astype(dtype).astype(np.float32))
    assert np.isnan(run(np.full_like(x, np.nan))).all()


def test_rounding_refuses_other_dtypes():
    with pytest.raises(ValueError, match="float32, bfloat16, float16, not float64"):
        bits.round_to(jnp.zeros(1), np.float64)


@given(patterns=PATTERNS, exponents=st.lists(st.integers(-127, 127), min_size=64, max_size=64))
@settings(max_examples=60, deadline=None)
def test_scaling_by_powers_of_two_is_exact_for_subnormals(patterns, exponents):
    x = np.array(patterns, np.uint32).view(np.float32)
    x = np.where(np.isfinite(x), x, 1).astype(np.float32)
    power = np.ldexp(1.0, np.maximum(np.array(exponents), -126)).astype(np.float32)
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(np.asarray(_scale_up(x, power)), reference.flush(x * power))


_scale_up = jax.jit(bits.scale_up)
