# SPDX-License-Identifier: Apache-2.0
"""Stored bytes against the definitions of the formats (reference.py), and the properties every
format has.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import reference
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jqx import QTensor
from jqx.errors import InputError
from jqx.formats import (
    FORMATS,
    block_amax,
    check_divides,
    decode,
    encode,
    fake_quantize,
    find_format,
    grid_shape,
    unpacked_shape,
    weight_amax,
)
from jqx_kernels.packing import PACKINGS

DTYPES = {"bf16": ml_dtypes.bfloat16, "f16": np.float16, "f32": np.float32}
RUN = jax.jit(encode, static_argnums=1)
BACK = jax.jit(decode, static_argnums=(1, 2))


def weight(shape=(6, 256), dtype=np.float32):
    """Rows of very different size, a row, a block and single values of zero, an outlier,
    subnormals, ties.
    """
    r = np.random.RandomState(5)
    w = r.standard_normal(shape) * np.exp(2 * r.standard_normal((shape[0], 1))) * 0.02
    w[1] = 0
    w[2, :130] = 0
    w[3, 7] = 2688 * 2.0**-9
    w[4, ::5] = -1e-40
    w[5, :64] = np.tile([0.25, -0.75, 1.25, -1.75, 2.5, -3.5, 5.0, 6.0], 8) * 2.0**-5
    return w.astype(np.float32).astype(dtype)


def check(got, defined, msg=""):
    """Bits equal: codes and scales as bytes, float32 scales with ==."""
    for mine, ref in zip(got, defined, strict=True):
        assert (mine is None) == (ref is None), msg
        if mine is not None:
            mine = np.asarray(mine)
            mine = mine.view(np.uint8) if mine.dtype.itemsize == 1 else mine
            assert mine.dtype == np.asarray(ref).dtype, msg
            np.testing.assert_array_equal(mine, ref, err_msg=msg)


def test_the_formats_are_the_ones_defined():
    assert list(FORMATS) == [*reference.ROWS, "nf4_double"]  # whose tests are those of nf4


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", reference.ROWS)
def test_stored_bits_follow_the_definition(name, dtype):
    w = weight(dtype=DTYPES[dtype])
    check(RUN(w, FORMATS[name]), reference.encode(w, name))


@pytest.mark.parametrize("name", ["fp8", "fp8_block", "int4", "nvfp4", "mxfp4"])
def test_stored_bits_without_jit(name):
    w = weight(dtype=ml_dtypes.bfloat16)
    check(encode(jnp.asarray(w), FORMATS[name]), reference.encode(w, name))


@pytest.mark.parametrize("name", reference.ROWS)
def test_stored_bits_with_a_given_amax(name):
    w, fmt = weight(dtype=ml_dtypes.bfloat16), FORMATS[name]
    _, rows, cols, kind, _ = reference.ROWS[name]
    grid = reference.block_amax(w, rows, cols) * np.float32(0.7)
    one = kind == "e4m3"  # the tensor scale is that of the amax
    amax = np.float32(1.7) * grid.max() if one else grid.reshape(grid_shape(fmt, w.shape))
    check(RUN(w, fmt, jnp.asarray(amax)), reference.encode(w, name, amax if one else grid))


def test_no_code_depends_on_the_scale_of_a_second_stage():
    w, fmt = weight(dtype=ml_dtypes.bfloat16), FORMATS["int4_fp8"]
    plain = RUN(w, FORMATS["int4"])
    for tensor_amax in (None, jnp.float32(3.5)):
        got = jax.jit(encode, static_argnums=1)(w, fmt, None, tensor_amax)
        check(got[:2], [np.asarray(plain.codes), np.asarray(plain.scale)])
        whole = np.abs(w.astype(np.float32)).max() if tensor_amax is None else np.float32(3.5)
        assert got.tensor_scale == whole / np.float32(448)
        np.testing.assert_array_equal(BACK(got, fmt, np.dtype(np.float32)), _back(plain))


def _back(stored):
    return BACK(stored, FORMATS["int4"], np.dtype(np.float32))


values = st.one_of(
    st.floats(-1, 1, width=32),
    st.floats(-(2.0**-120), 2.0**-120, width=32),
    st.floats(-(2.0**-40), 2.0**-40, width=32),
    st.floats(width=32, allow_nan=False, allow_infinity=False),
    st.just(0.0),
)
weights = hnp.arrays(np.float32, (2, 128), elements=values, fill=st.floats(-1, 1, width=32))


@given(w=weights)
@example(w=np.full((2, 128), 1e-38, np.float32))  # below what XLA's CPU counts as numbers
@settings(max_examples=40, deadline=None)
def test_stored_bits_of_any_float32(w):
    for name in reference.ROWS:
        check(RUN(w, FORMATS[name]), reference.encode(w, name), name)


@pytest.mark.parametrize("name", ["mxfp4", "mxfp8"])
def test_powers_of_two_are_rounded_logarithms(name):
    bound = reference.BOUND[reference.ROWS[name][0]]
    ulps = np.float32(1) + np.arange(40, dtype=np.float32) * np.float32(2.0**-23)
    amax = np.ldexp(ulps[None] * np.float32(bound), np.arange(-110, 110)[:, None]).astype(
        np.float32
    )
    w = np.zeros((amax.size, 32), np.float32)
    w[:, 3] = amax.reshape(-1)
    defined = [reference.exponent(a, bound) + 127 for a in amax.reshape(-1)]
    scale = np.asarray(RUN(w, FORMATS[name]).scale)[:, 0]
    np.testing.assert_array_equal(scale, defined)
    assert (scale.reshape(amax.shape)[:, 1] > scale.reshape(amax.shape)[:, 0]).any()
    assert (scale.reshape(amax.shape)[:, 1] == scale.reshape(amax.shape)[:, 0]).any()


@pytest.mark.parametrize("name", reference.ROWS)
def test_decoded_values_follow_the_definition(name):
    w, fmt = weight(), FORMATS[name]
    got = np.asarray(BACK(RUN(w, fmt), fmt, np.dtype(np.float32)))
    np.testing.assert_array_equal(got, reference.decode(w, name))
    half = np.asarray(BACK(RUN(w, fmt), fmt, np.dtype(ml_dtypes.bfloat16)))
    np.testing.assert_array_equal(half, got.astype(ml_dtypes.bfloat16))
    np.testing.assert_array_equal(np.asarray(fake_quantize(jnp.asarray(w), fmt)), got)


@pytest.mark.parametrize("name", reference.ROWS)
def test_the_error_is_at_most_half_a_step(name):
    w = np.random.RandomState(3).standard_normal((4, 128)).astype(np.float32)
    error = np.abs(np.asarray(BACK(RUN(w, FORMATS[name]), FORMATS[name], np.dtype(np.float32))) - w)
    element, rows, cols, _, _ = reference.ROWS[name]
    coarse = {"int8": 0.5 / 127, "int4": 0.5 / 7, "e4m3": 32 / 448}.get(element, 1.0 / 6)
    amax = reference.block_amax(w, rows, cols)
    for i, j, s in reference.blocks(w.shape, rows, cols):
        # rounded scales may be smaller than the amax asks for (e4m3) or up to twice as large (e8m0)
        loose = {"e8m0": 2.0, "e4m3": 1.1}.get(reference.ROWS[name][3], 1.0 + 1e-6)
        assert error[s].max() <= amax[i, j] * coarse * loose


@pytest.mark.parametrize("name", reference.ROWS)
def test_zeros_stay_zeros_and_finite(name):
    fmt = FORMATS[name]
    stored = RUN(np.zeros((2, 128), ml_dtypes.bfloat16), fmt)
    check(stored, reference.encode(np.zeros((2, 128), ml_dtypes.bfloat16), name))
    np.testing.assert_array_equal(np.asarray(BACK(stored, fmt, np.dtype(np.float32))), 0)
    scale = np.asarray(stored.scale).astype(np.float32)
    assert (scale == (0.0 if fmt.scale.name == "e8m0" else 1.0)).all()


def test_blocks_of_128_by_128_have_ragged_edges():
    w, fmt = weight((130, 200), ml_dtypes.bfloat16), FORMATS["fp8_block"]
    stored = RUN(w, fmt)
    assert stored.scale.shape == (2, 2)
    check(stored, reference.encode(w, "fp8_block"))
    w = w.astype(np.float32)
    back = np.asarray(BACK(RUN(w, fmt), fmt, np.dtype(np.float32)))
    np.testing.assert_array_equal(back, reference.decode(w, "fp8_block"))


def test_another_block_is_another_row():
    fmt = dataclasses.replace(FORMATS["int4"], block=(1, 64))
    w = np.concatenate([weight(), 9 * weight()], axis=1)[:, :448]
    halves = [
        reference.quantize(np.pad(w[:, c : c + 64], ((0, 0), (0, 64))), "int4")
        for c in range(0, 448, 64)
    ]
    stored = RUN(w, fmt)
    np.testing.assert_array_equal(stored.scale, np.concatenate([h[1] for h in halves], axis=1))
    codes = np.concatenate([h[0][:, :64] for h in halves], axis=1)
    np.testing.assert_array_equal(stored.codes, reference.pack(codes, "int4"))
    assert fmt.bits == 4.5


def test_nibbles_lie_where_modelopt_puts_them():
    c = np.arange(8, dtype=np.uint8).reshape(2, 4)
    columns, rows = PACKINGS["columns"], PACKINGS["rows"]
    np.testing.assert_array_equal(columns.pack(jnp.asarray(c)), [[0x10, 0x32], [0x54, 0x76]])
    np.testing.assert_array_equal(rows.pack(jnp.asarray(c)), [[0x40, 0x51, 0x62, 0x73]])
    for packing in (columns, rows):
        np.testing.assert_array_equal(packing.unpack(packing.pack(jnp.asarray(c))), c)
    assert unpacked_shape("columns", (3, 2, 2)) == (3, 2, 4)
    assert unpacked_shape("rows", (1, 4)) == (2, 4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "block", [(None, None), (1, None), (None, 1), (1, 16), (2, 32), (128, 128), (1, 3), (5, 24)]
)
def test_block_amax(block, dtype):
    for shape in ((6, 160), (7, 45)):
        w = weight((7, 160), DTYPES[dtype])[: shape[0], : shape[1]]
        defined = reference.block_amax(w, block[0] or 0, block[1] or 0)
        np.testing.assert_array_equal(np.asarray(_block_amax(w, block)), defined)


_block_amax = jax.jit(block_amax, static_argnums=1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_weight_amax_shows_nan_and_infinity(dtype):
    w = weight(dtype=DTYPES[dtype])
    assert weight_amax(jnp.asarray(w)) == np.abs(w.astype(np.float32)).max()
    w[3, 3] = -np.inf
    assert weight_amax(jnp.asarray(w)) == np.inf
    w[2, 2] = np.nan
    assert np.isnan(weight_amax(jnp.asarray(w)))


@pytest.mark.parametrize("name", ["fp8", "int4", "nvfp4", "mxfp8"])
def test_vmap_equals_a_loop(name):
    stack = np.stack([weight(), 3 * weight(), np.zeros((6, 256), np.float32)])
    many = jax.jit(jax.vmap(partial(encode, fmt=FORMATS[name])))(stack)
    for i, w in enumerate(stack):
        check(jax.tree.map(lambda a, i=i: a[i], many), reference.encode(w, name))


def test_gradients_pass_straight_through():
    x = jnp.asarray(weight())
    for name in ("int8_tensor", "nvfp4"):

        def loss(x, amax, fmt=FORMATS[name]):
            return (fake_quantize(x, fmt, amax) * 3).sum()

        to_x, to_amax = jax.jit(jax.grad(loss, argnums=(0, 1)))(x, jnp.float32(1.0))
        np.testing.assert_array_equal(to_x, np.full(x.shape, 3))
        assert to_amax == 0


def test_fake_quantize_takes_activations_of_any_rank():
    x = weight(dtype=ml_dtypes.bfloat16).reshape(2, 3, 256)
    for name in ("fp8", "nvfp4", "int8"):
        got = fake_quantize(jnp.asarray(x), FORMATS[name])
        assert got.dtype == x.dtype
        defined = reference.decode(x.reshape(6, 256), name).astype(x.dtype).reshape(x.shape)
        np.testing.assert_array_equal(np.asarray(got), defined)
    one = np.asarray(fake_quantize(jnp.asarray(x[0, 0]), FORMATS["fp8_channel"]))
    defined = reference.decode(x[0, :1].reshape(1, 256), "fp8_channel").astype(x.dtype)
    np.testing.assert_array_equal(one, defined[0])


def test_bits_count_scales():
    bits = {n: (round(f.bits, 4), f.nominal_bits) for n, f in FORMATS.items()}
    assert bits == {
        "fp8": (8, 8),
        "fp8_channel": (8, 8),
        "fp8_block": (8.002, 8),
        "int8": (8, 8),
        "int8_tensor": (8, 8),
        "int4": (4.25, 4),
        "int4_fp8": (4.25, 4),
        "nvfp4": (4.5, 4),
        "nvfp4_46": (4.5, 4),
        "nvfp4_b32": (4.25, 4),
        "nvfp4_b32_fp8": (4.25, 4),
        "mxfp4": (4.25, 4),
        "mxfp8": (8.25, 8),
        "mxfp6": (6.25, 6),
        "mxint8": (8.25, 8),
        "nf4": (4.5, 4),
        "nf4_double": (4.125, 4),
    }


def test_shapes_that_do_not_fit_are_refused_with_the_way_out():
    with pytest.raises(
        InputError, match=r"int4 shares one scale over 128 .* has 576. Take blocks of 64"
    ):
        check_divides(FORMATS["int4"], (8, 576))
    with pytest.raises(
        InputError, match=r"nvfp4 shares one scale over 16 .* has 24. Leave this weight out"
    ):
        encode(jnp.zeros((2, 24)), FORMATS["nvfp4"])
    with pytest.raises(InputError, match=r"packs pairs of rows, but \(3, 128\) has 3"):
        encode(jnp.zeros((3, 128)), FORMATS["int4"])
    with pytest.raises(InputError, match="stores matrices"):
        check_divides(FORMATS["fp8"], (8,))
    with pytest.raises(InputError, match="24"):
        fake_quantize(jnp.zeros((2, 24)), FORMATS["mxfp8"])
    check_divides(FORMATS["fp8_block"], (3, 7))


def test_an_amax_of_the_wrong_shape_is_refused():
    w = jnp.zeros((2, 128))
    with pytest.raises(
        ValueError,
        match=r"int8 has scales of shape \(2, 1\) for a matrix \(2, 128\), and amax is \(2,\)",
    ):
        encode(w, FORMATS["int8"], jnp.zeros(2))
    with pytest.raises(
        ValueError,
        match=r"nvfp4 has scales of shape \(2, 8\) for a matrix \(2, 128\), and amax is \(2, 4\)",
    ):
        encode(w, FORMATS["nvfp4"], jnp.zeros((2, 4)))


def test_formats_are_found_by_name():
    assert find_format("nvfp4") is FORMATS["nvfp4"]
    with pytest.raises(InputError, match="no format 'nvpf4'. Did you mean nvfp4"):
        find_format("nvpf4")


CONSTANTS = ["int8", "int4", "fp8", "fp8_block", "nvfp4", "nf4", "mxfp8"]


@pytest.mark.parametrize("name", CONSTANTS)
def test_constants_of_a_program_are_stored_alike(name):
    """XLA divides constants by a constant's reciprocal if it is let to."""
    fmt = FORMATS[name]
    r = np.random.RandomState(2)
    w = jnp.asarray(r.standard_normal((128, 256)), jnp.bfloat16)
    got, defined = jax.jit(lambda: encode(w, fmt))(), reference.encode(np.asarray(w), name)
    check(got, defined)
    faked = jax.jit(lambda: fake_quantize(w, fmt))()
    np.testing.assert_array_equal(np.asarray(faked), np.asarray(fake_quantize(w, fmt)))
    turned = jax.jit(lambda: QTensor.quantize(w.T, fmt, axis=0))()
    check((turned.codes, turned.scale, turned.tensor_scale), defined)
