# SPDX-License-Identifier: Apache-2.0
"""Inputs of linears, keys and values as their formats hold them, against the definitions in
reference.py, and the properties they have.
"""

from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jqx import InputError
from jqx.config import INPUT_FORMATS, KV_FORMATS
from jqx.formats import FORMATS, fake_quantize_scaled
from jqx.transforms import fake_input, fake_kv

DTYPES = {"bf16": ml_dtypes.bfloat16, "f16": np.float16, "f32": np.float32}
INPUT = jax.jit(fake_input, static_argnums=1)
CACHED = jax.jit(fake_kv, static_argnums=1)
STATIC = [name for name, row in INPUT_FORMATS.items() if row.bound is not None]
E4M3_TINY = 2.0**-9  # the smallest E4M3 number
LOST = 448 * 2.0**-126  # nothing is promised of values whose own scale, value / 448, is subnormal


def tokens(dtype=np.float32, shape=(2, 4, 64)):
    """Tokens of very different size, one of zeros, a block of zeros, blocks far below the others,
    ties, subnormals.
    """
    r = np.random.RandomState(3)
    x = r.standard_normal(shape) * np.exp(2 * r.standard_normal((*shape[:-1], 1)))
    x[0, 1] = 0
    x[0, 2, :32] = 0
    x[0, 3, :16] *= 1e-4
    x[1, 0, 16:32] *= 1e-7
    x[1, 1, ::5] = -1e-40
    x[1, 2, :16] = np.tile([0.25, -0.75, 1.25, -1.75, 2.5, -3.5, 5.0, 6.0], 2)
    return x.astype(np.float32).astype(dtype)


def stored_scale(x, name, times=1.0):
    bound = INPUT_FORMATS[name].bound
    return None if bound is None else reference.scale_of(x.astype(np.float32), bound) * times


def same(got, defined):
    got = np.asarray(got)
    assert got.dtype == defined.dtype
    np.testing.assert_array_equal(got.astype(np.float32), defined.astype(np.float32))


def test_every_format_is_defined():
    assert list(INPUT_FORMATS) == list(reference.INPUTS)
    assert {name.split("_")[0] for name in KV_FORMATS} == set(reference.CACHES)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", INPUT_FORMATS)
def test_inputs_follow_the_definition(name, dtype):
    x = tokens(DTYPES[dtype])
    scale = stored_scale(x, name)
    defined = reference.activation(x, name, scale)
    scale = None if scale is None else jnp.float32(scale)
    same(INPUT(jnp.asarray(x), name, scale), defined)
    if dtype == "bf16":
        same(fake_input(jnp.asarray(x), name, scale), defined)
    if dtype == "f32":  # and the values of a token are on few levels
        assert len(np.unique(np.abs(defined[1, 3]))) <= {"nvfp4": 32, "mxfp4": 16}.get(name, 127)


@pytest.mark.parametrize("times", [0.3, 3.0])
@pytest.mark.parametrize("name", STATIC)
def test_the_stored_scale_is_the_one_that_counts(name, times):
    """Not the one that the values at hand would have: smaller ones saturate, larger ones waste."""
    x = tokens(ml_dtypes.bfloat16)
    scale = stored_scale(x, name, np.float32(times))
    got = INPUT(jnp.asarray(x), name, jnp.float32(scale))
    same(got, reference.activation(x, name, scale))
    part = INPUT(jnp.asarray(x[1:, :3]), name, jnp.float32(scale))
    same(part, np.asarray(got)[1:, :3])
    assert (np.asarray(got) != reference.activation(x, name)).any()


@pytest.mark.parametrize("name", STATIC)
def test_without_a_stored_scale_it_is_that_of_all_values(name):
    for x in (tokens(), np.zeros((2, 64), np.float32), np.full((1, 32), 1e-42, np.float32)):
        same(INPUT(jnp.asarray(x), name, None), reference.activation(x, name))


def test_a_token_of_its_own_scale_does_not_see_the_others():
    x = tokens()
    for name in ("fp8_token", "mxfp4", "mxfp8"):
        whole = np.asarray(INPUT(jnp.asarray(x), name, None))
        for at in np.ndindex(2, 4):
            np.testing.assert_array_equal(INPUT(jnp.asarray(x[at][None]), name, None)[0], whole[at])


def test_a_block_of_nvfp4_that_is_far_below_becomes_zeros():
    """Engines store its scale as E4M3 zero; weights keep the smallest scale instead."""
    scale = jnp.float32(1.0)
    for largest, lives in ((6 * E4M3_TINY / 2, False), (6.01 * E4M3_TINY / 2, True)):
        x = np.linspace(-largest, largest, 16, dtype=np.float32)[None]
        got = np.asarray(INPUT(jnp.asarray(x), "nvfp4", scale))
        assert got.any() == lives
        same(got, reference.activation(x, "nvfp4", np.float32(1)))
    assert np.asarray(fake_quantize_scaled(jnp.asarray(x), FORMATS["nvfp4"], scale)).any()


@pytest.mark.parametrize("name", INPUT_FORMATS)
def test_nan_stays_nan_and_infinity_saturates(name):
    x = tokens()
    x[0, 0, 3] = np.nan
    scale = None if name not in STATIC else jnp.float32(0.01)
    got = np.asarray(INPUT(jnp.asarray(x), name, scale))
    assert np.isnan(got[0, 0, 3])
    np.testing.assert_array_equal(got[1], INPUT(jnp.asarray(x[1:]), name, scale)[0])
    if name in STATIC:
        x[0, 0, 3], bound = -np.inf, INPUT_FORMATS[name].bound
        low = 128 if name == "int8" else bound
        got = INPUT(jnp.asarray(x), name, scale)[0, 0, 3]
        np.testing.assert_allclose(got, -0.01 * low, rtol=1e-6)
    assert np.isnan(np.asarray(INPUT(jnp.full((1, 32), np.nan), name, None))).all()


@pytest.mark.parametrize("name", INPUT_FORMATS)
def test_the_gradient_goes_straight_through(name):
    x, scale = jnp.asarray(tokens()), jnp.float32(0.01)

    def loss(x, scale):
        return (3 * INPUT(x, name, scale)).sum()

    to_x, to_scale = jax.jit(jax.grad(loss, argnums=(0, 1)))(x, scale)
    np.testing.assert_array_equal(to_x, np.full(x.shape, 3))
    assert to_scale == 0
    np.testing.assert_array_equal(
        jax.jit(jax.grad(lambda x: INPUT(x, name, None).sum()))(x), np.ones(x.shape)
    )


@pytest.mark.parametrize("name", INPUT_FORMATS)
def test_vmap_equals_a_loop(name):
    x = jnp.asarray(tokens(ml_dtypes.bfloat16))
    scales = None if name not in STATIC else jnp.float32([0.01, 0.1])
    many = jax.jit(jax.vmap(partial(_one, name), in_axes=(0, None if scales is None else 0)))
    got = many(x, scales)
    for i in range(2):
        one = INPUT(x[i], name, None if scales is None else scales[i])
        same(got[i], np.asarray(one))


def _one(name, x, scale):
    return fake_input(x, name, scale)


values = st.one_of(
    st.floats(-8, 8, width=32),
    st.floats(-(2.0**-20), 2.0**-20, width=32),
    st.floats(width=32, allow_nan=False, allow_infinity=False),
    st.just(0.0),
)
activations = hnp.arrays(np.float32, (2, 32), elements=values, fill=st.floats(-1, 1, width=32))
scales = st.floats(2.0**-30, 2.0**30, width=32)


@given(x=activations, scale=scales)
@settings(max_examples=60, deadline=None)
def test_any_float32(x, scale):
    """The definition; twice is once; no more than half a step off; nothing beyond the bound."""
    for name, (element, size, bound) in reference.INPUTS.items():
        given_scale = None if bound is None else jnp.float32(scale)
        y = np.asarray(INPUT(jnp.asarray(x), name, given_scale))
        same(y, reference.activation(x, name, np.float32(scale)))
        top = np.float64(scale) * (128 if name == "int8" else bound or np.inf)
        assert (np.abs(y) <= top * (1 + 1e-6)).all()
        again = np.asarray(INPUT(jnp.asarray(y), name, given_scale))
        if name != "nvfp4":  # whose blocks may find another scale where theirs was subnormal
            np.testing.assert_allclose(again, y, rtol=3e-7, atol=LOST)
        for *_, s in reference.blocks(x.shape, 1, size if size > 1 else 0):
            step = np.float64(reference.step_of(x[s], element, size, np.float32(scale)))
            half = {"int8": 0.5 * step, "e2m1": 1.0 * step}.get(element)
            if half is None:
                share, least = {"e4m3": (1 / 16, 2.0**-10), "e3m2": (1 / 8, 2.0**-5)}[element]
                half = np.maximum(np.abs(x[s]) * share, step * least)
            inside = np.abs(x[s]) <= step * reference.BOUND[element]
            inside &= np.isfinite(y[s])  # the code above the largest float32 is infinity
            off = np.abs(np.float64(y[s]) - x[s])
            assert (off <= half * (1 + 1e-5) + LOST)[inside].all(), name


# --- keys and values


def heads(dtype=np.float32):
    r = np.random.RandomState(4)
    x = r.standard_normal((2, 3, 5, 32)) * np.exp(r.standard_normal((1, 3, 1, 32))) * 20
    x[0, 0, 0] = 0
    x[1, 1, 1, :16] *= 1e-6
    bias = (r.standard_normal((1, 3, 1, 32)) * 4).astype(dtype)
    return x.astype(np.float32).astype(dtype), bias


@pytest.mark.parametrize("dtype", ["bf16", "f32"])
@pytest.mark.parametrize("name", KV_FORMATS)
def test_keys_and_values_follow_the_definition(name, dtype):
    x, bias = heads(DTYPES[dtype])
    row = KV_FORMATS[name]
    bias = bias if row.affine else None
    for scale in [None] if row.cast else [None, np.float32(0.013), np.float32(0.2)]:
        defined = reference.cached(x, name, scale, bias)
        mine = [None if a is None else jnp.asarray(a) for a in (scale, bias)]
        same(CACHED(jnp.asarray(x), name, *mine), defined)
        if dtype == "bf16" and scale is not None:
            same(fake_kv(jnp.asarray(x), name, *mine), defined)


def test_a_bias_is_what_is_lost_least():
    """A channel that is far from zero and hardly varies keeps its small differences."""
    x, _ = heads()
    x = x * np.float32(1e-2) + np.float32(7)
    bias = x.mean((0, 2), keepdims=True)
    for name in ("fp8", "nvfp4"):
        plain = CACHED(jnp.asarray(x), name, jnp.float32(np.abs(x).max() / 448), None)
        left = jnp.float32(np.abs(x - bias).max() / 448)
        affine = CACHED(jnp.asarray(x), f"{name}_affine", left, jnp.asarray(bias))
        assert np.square(affine - x).sum() < 0.1 * np.square(plain - x).sum()


@pytest.mark.parametrize("name", ["fp8", "nvfp4_affine"])
def test_the_gradient_of_keys_and_values_goes_straight_through(name):
    x, bias = heads(ml_dtypes.bfloat16)
    bias = jnp.asarray(bias) if "affine" in name else None

    def loss(x):
        return CACHED(x, name, jnp.float32(0.1), bias).astype(jnp.float32).sum()

    np.testing.assert_array_equal(
        np.asarray(jax.jit(jax.grad(loss))(jnp.asarray(x)), np.float32), 1
    )
    spoilt = jnp.asarray(x).at[0, 0, 0, 0].set(np.nan)
    got = np.asarray(CACHED(spoilt, name, jnp.float32(0.1), bias), np.float32)
    assert np.isnan(got[0, 0, 0, 0])
    assert not np.isnan(got[1]).any()


# --- what is refused


def test_what_does_not_fit_is_refused():
    x = jnp.zeros((2, 24))
    with pytest.raises(InputError, match="nvfp4 shares one scale over 16 .* has 24"):
        fake_input(x, "nvfp4", jnp.float32(1))
    with pytest.raises(InputError, match="unknown input format 'fp9'; did you mean fp8"):
        fake_input(x, "fp9", None)
    with pytest.raises(ValueError, match="fp8_channel has no scale of the whole tensor"):
        fake_quantize_scaled(x, FORMATS["fp8_channel"], jnp.float32(1))
    with pytest.raises(ValueError, match=r"fp8 takes one scale, not an array of shape \(2,\)"):
        fake_quantize_scaled(x, FORMATS["fp8"], jnp.ones(2))
    k, bias = (jnp.asarray(a) for a in heads())
    with pytest.raises(InputError, match="fp8_affine needs a bias"):
        fake_kv(k, "fp8_affine", None, None)
    with pytest.raises(InputError, match="nvfp4 takes no bias"):
        fake_kv(k, "nvfp4", None, bias)
    with pytest.raises(InputError, match="unknown KV cache format 'fp7'"):
        fake_kv(k, "fp7", None, None)
