# SPDX-License-Identifier: Apache-2.0
"""MXFP6 and MXINT8, which no checkpoint stores: E3M2 and int8 under powers of two."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import reference
from hypothesis import given
from hypothesis import strategies as st

import jqx
from jqx.formats import FORMATS, decode, encode, fake_quantize
from jqx_interop.targets import TARGETS
from jqx_kernels.e3m2 import e3m2_code, e3m2_value

NAMES = ("mxfp6", "mxint8")
CODES = np.arange(64, dtype=np.uint8)
FLOATS = st.floats(width=32, allow_nan=False)


def test_every_code_is_a_value_and_back():
    values = np.asarray(e3m2_value(jnp.asarray(CODES)))
    theirs = CODES.view(ml_dtypes.float6_e3m2fn).astype(np.float32)
    np.testing.assert_array_equal(values, theirs)
    np.testing.assert_array_equal(np.signbit(values), np.signbit(theirs))
    np.testing.assert_array_equal(e3m2_code(jnp.asarray(values)), CODES)
    np.testing.assert_array_equal(values, reference.value("e3m2", CODES))


@given(x=st.lists(FLOATS | st.floats(-40, 40, width=32), min_size=1, max_size=32))
def test_the_nearest_code(x: list[float]):
    given = np.array((x * 32)[:32], np.float32)  # one shape: one compilation
    given = np.where(np.abs(given) < reference.TINY, 0, given).astype(np.float32)
    np.testing.assert_array_equal(e3m2_code(jnp.asarray(given)), reference.e3m2(given))


def test_ties_go_to_the_even_code():
    values = np.asarray(e3m2_value(jnp.asarray(CODES[:32])))
    middles = (values[1:] + values[:-1]) / 2
    codes = np.asarray(e3m2_code(jnp.asarray(middles)))
    np.testing.assert_array_equal(codes, CODES[:31] + CODES[:31] % 2)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_stored_bits_follow_the_definition(name: str, dtype: type):
    r = np.random.RandomState(3)
    w = (r.standard_normal((8, 96)) * np.exp(3 * r.standard_normal((8, 1)))).astype(dtype)
    w[2], w[3, :32], w[4, 5] = 0, 0, 500
    found = jax.jit(encode, static_argnums=1)(jnp.asarray(w), FORMATS[name])
    codes, scale, _ = reference.encode(w, name)
    np.testing.assert_array_equal(np.asarray(found.codes).view(np.uint8), codes)
    np.testing.assert_array_equal(found.scale, scale)
    decoded = reference.decode(w, name)
    np.testing.assert_array_equal(decode(found, FORMATS[name]), decoded)
    rounded = fake_quantize(jnp.asarray(w), FORMATS[name])
    np.testing.assert_array_equal(rounded, decoded.astype(dtype))
    np.testing.assert_array_equal(fake_quantize(rounded, FORMATS[name]), rounded)


@pytest.mark.parametrize("name", NAMES)
def test_functions_run_in_them_and_checkpoints_do_not(name: str):
    r = np.random.RandomState(4)
    params = {"w": jnp.asarray(r.standard_normal((64, 8)), jnp.float32)}
    x = jnp.asarray(r.standard_normal((3, 64)), jnp.float32)

    def apply(params, x):
        return x @ params["w"]

    config = jqx.QuantConfig(rules=(jqx.Rule(weight=name, input=name),), algorithm=None)
    stored = jqx.quantize(params, config, axes=jqx.axes(apply, params, x))
    found = jqx.quantized(apply)(stored, x)
    w = reference.decode(np.asarray(params["w"]).T, name).T
    expected = reference.decode(np.asarray(x), name) @ w
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    choice = jqx.config.Choice(weight=name, input=name)
    assert not any(target.supports(choice) for target in TARGETS.values())
