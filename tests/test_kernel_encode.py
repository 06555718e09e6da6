# SPDX-License-Identifier: Apache-2.0
"""Encoding by every implementation: the same bytes as the library's formats and as the definition.
Kernels are interpreted.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st
from lowering import DTYPES, STORAGES

from jqx.formats import FORMATS, step_of
from jqx.formats import encode as encode_format
from jqx_kernels.dispatch import CPU, Device, Unsupported, find_implementation
from jqx_kernels.encode import CODES, ENCODE, EncodeRequest, codes, encode
from jqx_kernels.storage import Storage

ROWS = [row.name for row in ENCODE]
OF_ROWS = [name for name, storage in STORAGES.items() if storage.block[0] == 1]
DIVIDED = [name for name, storage in STORAGES.items() if storage.scale != "e8m0"]
EXPECTED = jax.jit(encode_format, static_argnames="fmt")
TINY = np.float32(2.0**-126)
H200, V5E = Device("gpu", "NVIDIA H200", (9, 0)), Device("tpu", "TPU v5 lite")


@partial(jax.jit, static_argnames=("name", "row"))
def encoded(w, tensor_scale, name, row):
    how = {"implementation": row, "interpret": True}
    twice = FORMATS[name].double_rounding
    return encode(w, tensor_scale, storage=STORAGES[name], double_rounding=twice, **how)


@partial(jax.jit, static_argnames=("name", "row"))
def coded(w, step, name, row):
    how = {"implementation": row, "interpret": True}
    return codes(
        w, step, storage=STORAGES[name], double_rounding=FORMATS[name].double_rounding, **how
    )


def matrix(n, k, dtype, seed=0):
    """Rows of many sizes; one of zeros, one of the smallest numbers, one with the largest."""
    r = np.random.default_rng([seed, n, k])
    w = r.standard_normal((n, k)) * np.exp(3 * r.standard_normal((n, 1)))
    info = jnp.finfo(dtype)
    w[1] = 0
    w[2] = r.integers(-3, 4, k) * float(info.smallest_subnormal)
    w[3, ::7] = float(info.max)
    w[-1, : k // 2] = 0
    return jnp.asarray(w.astype(np.float32)).astype(dtype)


def matrices(name):
    """Ragged ones, and one of several tiles on either axis in every kernel."""
    columns = STORAGES[name].block[1]
    ragged = (134, 200) if FORMATS[name].ragged else (6, 3 * (columns or 25))
    yield from (matrix(*ragged, dtype) for dtype in ("float16", "float32"))
    yield matrix(136, 5 * (columns or 128), "bfloat16")


def check_bytes(got, expected):
    for mine, theirs in zip(got, expected, strict=True):
        assert mine.shape == theirs.shape
        np.testing.assert_array_equal(
            np.asarray(mine).view(np.uint8), np.asarray(theirs).view(np.uint8)
        )


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("name", OF_ROWS)
def test_codes_and_scales_are_those_of_the_format(name, row):
    for w in matrices(name):
        expected = EXPECTED(w, fmt=FORMATS[name])
        check_bytes(encoded(w, expected.tensor_scale, name, row), expected[:2])


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("name", DIVIDED)
def test_codes_over_given_steps_are_those_of_the_format(name, row):
    fmt = FORMATS[name]
    for w in matrices(name):
        expected = EXPECTED(w, fmt=fmt)
        step = jnp.maximum(step_of(expected.scale, expected.tensor_scale, fmt), TINY)
        check_bytes([coded(w, step, name, row)], expected[:1])


@pytest.mark.parametrize("row", ROWS)
def test_codes_over_the_steps_of_static_blocks(row):
    w, fmt = matrix(6, 96, "bfloat16"), FORMATS["nvfp4"]
    amax = jnp.asarray(np.random.default_rng(1).random((6, 6)), jnp.float32)
    expected = EXPECTED(w, fmt=fmt, amax=amax)
    step = jnp.maximum(step_of(expected.scale, expected.tensor_scale, fmt), TINY)
    check_bytes([coded(w, step, "nvfp4", row)], expected[:1])


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize(("name", "shape"), [("fp8_block", ()), ("fp8_channel", (1, 1))])
def test_one_step_may_serve_all_blocks(name, shape, row):
    w = matrix(134, 200, "float16")
    q = np.asarray(w).astype(np.float32) / np.float32(0.3)
    found = coded(w, jnp.full(shape, 0.3, jnp.float32), name, row)
    np.testing.assert_array_equal(found, reference.e4m3(q))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", STORAGES)
def test_the_reference_follows_the_definition(name, dtype):
    columns = STORAGES[name].block[1]
    w = matrix(6, 3 * (columns or 25), dtype)
    if FORMATS[name].block == (None, None):
        w = w.at[3].set(1)  # else almost all codes are zero
    stored, scale, tensor_scale = reference.encode(np.asarray(w), name)
    outer = None if tensor_scale is None else jnp.asarray(tensor_scale)
    found, scales = encoded(w, outer, name, "reference")
    check_bytes([found], [stored])
    np.testing.assert_array_equal(np.asarray(scales).reshape(scale.shape), scale)


TIES = np.float32([6, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5])


@pytest.mark.parametrize("row", ROWS)
def test_ties(row):
    block = np.concatenate([TIES, -TIES])
    w = jnp.asarray(np.tile(block, (2, 2)))
    even, scale = encoded(w, jnp.float32(2**-3), "nvfp4", row)  # steps of 1
    np.testing.assert_array_equal(np.asarray(scale), np.full((2, 2), 0x50))
    np.testing.assert_array_equal(even[0, :4], [0x07, 0x22, 0x44, 0x66])
    np.testing.assert_array_equal(even[0, 4:8], [0x8F, 0xAA, 0xCC, 0xEE])
    down, scale = encoded(w, None, "mxfp4", row)
    np.testing.assert_array_equal(np.asarray(scale), [[127], [127]])
    np.testing.assert_array_equal(down[0, :4], [0x07, 0x21, 0x43, 0x65])


def test_another_bound_makes_other_scales():
    w = matrix(6, 64, "bfloat16")
    storage = Storage("e2m1", (1, 16), "e4m3", "columns", 4.0)
    outer = jnp.float32(0.5)
    found = {
        row: jax.jit(partial(encode, storage=storage, implementation=row, interpret=True))(w, outer)
        for row in ROWS
    }
    amax = np.abs(np.asarray(w, np.float32)).reshape(6, 4, 16).max(-1)
    q = np.where(amax == 0, 1, amax / 2)
    scales = reference.nearest(reference.E4M3, np.clip(q, 2**-9, 448))
    for row in ROWS:
        np.testing.assert_array_equal(found[row][1], scales)
        check_bytes(found[row], found["reference"])


@pytest.mark.parametrize("columns", [24, 96])
@pytest.mark.parametrize("row", ROWS)
def test_blocks_of_any_even_length(row, columns):
    storage = Storage("int4", (1, columns), "float32", "rows", 7.0)
    how = {"storage": storage, "interpret": True}
    w = matrix(6, 5 * columns + 7, "bfloat16")  # the last block is smaller
    step = jnp.asarray(np.random.default_rng(2).random((6, 6)), jnp.float32)
    for f, scale in ((encode, None), (codes, step)):
        expected = jax.tree.leaves(jax.jit(partial(f, implementation="reference", **how))(w, scale))
        found = jax.tree.leaves(jax.jit(partial(f, implementation=row, **how))(w, scale))
        check_bytes(found, expected)


PATTERNS = st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=128)


@given(patterns=PATTERNS, exponent=st.integers(-20, 20))
@settings(max_examples=60)
def test_any_floats(patterns, exponent):
    x = np.resize(np.array(patterns, np.uint32).view(np.float32), (2, 64))
    w = jnp.asarray(np.where(np.isfinite(x), x, 1).astype(np.float32))
    outer = jnp.float32(2.0**exponent * 0.7)
    for name in ("nvfp4", "mxfp4", "mxfp8", "int8"):
        expected = encoded(w, outer, name, "reference")
        for row in ROWS[:-1]:
            check_bytes(encoded(w, outer, name, row), expected)


REQUEST = EncodeRequest((64, 256), jnp.dtype("bfloat16"), STORAGES["nvfp4"])
CHOICES = [
    (ENCODE, CPU, REQUEST, "xla"),
    (ENCODE, H200, REQUEST, "triton"),
    (ENCODE, V5E, REQUEST, "tpu"),
    (CODES, H200, REQUEST._replace(storage=STORAGES["fp8_block"]), "triton"),
    (ENCODE, V5E, REQUEST._replace(storage=STORAGES["fp8"]), "xla"),
    (CODES, V5E, REQUEST._replace(storage=STORAGES["fp8"]), "tpu"),
    (
        CODES,
        V5E,
        REQUEST._replace(shape=(8, 640), storage=Storage("int4", (1, 320), "float32", "rows", 7.0)),
        "xla",
    ),
    (ENCODE, V5E, REQUEST._replace(interpret=True), "triton"),
]


@pytest.mark.parametrize(("table", "device", "request_", "row"), CHOICES)
def test_the_first_that_can_is_taken(table, device, request_, row):
    assert find_implementation("it", table, request_, device).name == row


ODD = Storage("e2m1", (1, 15), "e4m3", "columns", 6.0)
REFUSALS = [
    (None, Device("gpu", "an AMD GPU"), REQUEST, "divisions on GPUs are off"),
    (None, H200, REQUEST._replace(dtype=jnp.dtype("float64")), "divisions on GPUs are off"),
    (None, H200, REQUEST._replace(storage=STORAGES["fp8_block"]), "single rows only"),
    ("triton", CPU, REQUEST, "needs an NVIDIA GPU"),
    ("triton", Device("gpu", "Tesla V100", (7, 0)), REQUEST, "needs compute capability 8.0"),
    ("tpu", H200, REQUEST, "needs a TPU"),
    ("tpu", V5E, REQUEST._replace(dtype=jnp.dtype("float64")), "knows bfloat16, float16, float32"),
    ("triton", H200, REQUEST._replace(storage=STORAGES["fp8"]), "single rows only"),
    ("triton", H200, REQUEST._replace(shape=(4, 30), storage=ODD), "a block has 15"),
    (None, CPU, REQUEST._replace(shape=(3, 64), storage=STORAGES["int4"]), "do not divide"),
    ("triton", H200, REQUEST._replace(shape=(0, 64)), "no tiles for an empty"),
    ("tpu", V5E, REQUEST._replace(shape=(0, 64)), "no tiles for an empty"),
    (None, CPU, REQUEST._replace(shape=(2, 3, 64)), "is no matrix"),
]


@pytest.mark.parametrize(("row", "device", "request_", "why"), REFUSALS)
def test_refusals_say_why(row, device, request_, why):
    with pytest.raises(Unsupported, match=why):
        find_implementation("encode", ENCODE, request_, device, row)


def test_requests_read_as_words():
    assert str(REQUEST) == "a bfloat16 matrix [64, 256] as e2m1 with e4m3 scales of 1 x 16"
    assert str(REQUEST._replace(double_rounding=True)).endswith("after double rounding")


def test_a_missing_tensor_scale_is_missed():
    with pytest.raises(ValueError, match="give tensor_scale"):
        encode(jnp.ones((2, 16)), None, storage=STORAGES["nvfp4"])


def test_steps_have_to_broadcast():
    with pytest.raises(ValueError, match=r"\(3, 1\)"):
        codes(jnp.ones((2, 16)), jnp.ones((3, 1)), storage=STORAGES["int8"])
