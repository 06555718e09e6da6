# SPDX-License-Identifier: Apache-2.0
"""Decoding by every implementation: the same numbers as the library's formats and as the
definition. Kernels are interpreted.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from jax import lax
from lowering import STORAGES, grid_shape

from jqx.formats import FORMATS
from jqx.formats import decode as decode_format
from jqx.formats.encode import Encoded
from jqx_kernels.decode import DECODE, DecodeRequest, decode
from jqx_kernels.dispatch import CPU, Device, Unsupported, find_implementation
from jqx_kernels.storage import Storage

ROWS = [row.name for row in DECODE]
H200, V5E = Device("gpu", "NVIDIA H200", (9, 0)), Device("tpu", "TPU v5 lite")
EXPECTED = jax.jit(decode_format, static_argnames=("fmt", "dtype"))


@partial(jax.jit, static_argnames=("storage", "dtype", "row"))
def decoded(codes, scale, tensor_scale, storage, dtype, row):
    how = {"implementation": row, "interpret": True}
    return decode(codes, scale, tensor_scale, storage=storage, dtype=dtype, **how)


def stored(storage, n, k, seed=0):
    """Bytes of every kind, scales of many sizes, the smallest and zero among them."""
    r = np.random.default_rng([seed, n, k])
    rows, columns = storage.per_byte
    codes = r.integers(0, 256, (n // rows, k // columns), np.uint8)
    if storage.element == "e4m3":
        codes[(codes & 0x7F) == 0x7F] = 0  # NaN has several forms
    grid = grid_shape(storage, n, k)
    if storage.scale == "float32":
        scale = np.exp(5 * r.standard_normal(grid)).astype(np.float32)
    else:
        scale = r.integers(0, 127 if storage.scale == "e4m3" else 255, grid, np.uint8)
    scale.flat[0] = 0
    return jnp.asarray(codes), jnp.asarray(scale), jnp.float32(0.3)


def as_stored(name, codes, scale, tensor_scale):
    """The arrays as the library has them."""
    fmt = FORMATS[name]
    codes = lax.bitcast_convert_type(codes, jnp.dtype(fmt.element.dtype))
    if fmt.scale.name == "e4m3":
        scale = lax.bitcast_convert_type(scale, jnp.float8_e4m3fn)
    return Encoded(codes, scale, tensor_scale)


def shapes(name):
    """Ragged ones, and one of several tiles on either axis in every kernel."""
    columns = STORAGES[name].block[1]
    ragged = (134, 200) if FORMATS[name].ragged else (6, 3 * (columns or 26))
    yield from ((ragged, dtype) for dtype in ("float16", "float32"))
    yield (136, 5 * (columns or 128)), "bfloat16"


def check_bits(got, expected):
    assert got.dtype == expected.dtype
    assert got.shape == expected.shape
    np.testing.assert_array_equal(
        np.asarray(got).view(np.uint8), np.asarray(expected).view(np.uint8)
    )


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("name", STORAGES)
def test_matrices_are_those_of_the_format(name, row):
    for shape, dtype in shapes(name):
        arrays = stored(STORAGES[name], *shape)
        expected = EXPECTED(as_stored(name, *arrays), fmt=FORMATS[name], dtype=dtype)
        check_bits(decoded(*arrays, STORAGES[name], dtype, row), expected)


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("name", STORAGES)
def test_matrices_follow_the_definition(name, row):
    columns = STORAGES[name].block[1]
    w = np.random.default_rng(1).standard_normal((6, 3 * (columns or 26))).astype(np.float32)
    codes, scale, tensor_scale = reference.encode(w, name)
    outer = None if tensor_scale is None else jnp.asarray(tensor_scale)
    found = decoded(jnp.asarray(codes), jnp.asarray(scale), outer, STORAGES[name], "float32", row)
    check_bits(found, reference.decode(w, name))


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("name", STORAGES)
def test_every_code_has_its_value(name, row):
    storage = STORAGES[name]
    whole = Storage(storage.element, (1, None), "float32", "bytes", storage.bound)
    bits = {"e2m1": 4, "e2m1_down": 4, "int4": 4, "nf4": 4, "e3m2": 6}.get(storage.element, 8)
    codes = np.arange(1 << bits, dtype=np.uint8)
    if storage.element == "e4m3":
        codes = codes[(codes & 0x7F) != 0x7F]
    found = decoded(jnp.asarray(codes)[None], jnp.ones((1, 1)), None, whole, "float32", row)
    check_bits(found[0], reference.value(storage.element, codes))


@pytest.mark.parametrize("columns", [24, 96])
@pytest.mark.parametrize("row", ROWS)
def test_blocks_of_any_even_length(row, columns):
    storage = Storage("int4", (1, columns), "float32", "rows", 7.0)
    arrays = stored(storage, 6, 5 * columns + 7)  # the last block is smaller
    expected = decoded(*arrays, storage, "bfloat16", "reference")
    check_bits(decoded(*arrays, storage, "bfloat16", row), expected)


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("shape", [(), (1, 1), (6, 1)])
def test_one_scale_may_serve_all_blocks(shape, row):
    codes, _, _ = stored(STORAGES["int4"], 6, 256)
    grid = jnp.full((6, 2), 0.7)
    expected = decoded(codes, grid, None, STORAGES["int4"], "float32", "reference")
    found = decoded(codes, jnp.full(shape, 0.7), None, STORAGES["int4"], "float32", row)
    check_bits(found, expected)


REQUEST = DecodeRequest((64, 256), jnp.dtype("bfloat16"), STORAGES["nvfp4"])
LONG = REQUEST._replace(shape=(8, 640), storage=Storage("int4", (1, 320), "float32", "rows", 7.0))
CHOICES = [
    (CPU, REQUEST, "xla"),
    (H200, REQUEST, "triton"),
    (V5E, REQUEST, "tpu"),
    (Device("gpu", "Tesla V100", (7, 0)), REQUEST, "xla"),
    (H200, REQUEST._replace(dtype=jnp.dtype("float64")), "xla"),
    (H200, LONG, "triton"),
    (V5E, LONG, "xla"),
    (V5E, REQUEST._replace(storage=STORAGES["nf4"]), "tpu"),
    (CPU, REQUEST._replace(interpret=True), "triton"),
]


@pytest.mark.parametrize(("device", "request_", "row"), CHOICES)
def test_the_first_that_can_is_taken(device, request_, row):
    assert find_implementation("decode", DECODE, request_, device).name == row


ODD = Storage("e2m1", (1, 15), "e4m3", "columns", 6.0)
REFUSALS = [
    ("triton", CPU, REQUEST, "needs an NVIDIA GPU"),
    ("triton", Device("gpu", "Tesla V100", (7, 0)), REQUEST, "needs compute capability 8.0"),
    ("tpu", H200, REQUEST, "needs a TPU"),
    ("tpu", V5E, LONG, "holds 2048 columns, and 8 blocks have 2560"),
    ("tpu", V5E, REQUEST._replace(dtype=jnp.dtype("float64")), "not float64"),
    ("triton", H200, REQUEST._replace(shape=(4, 30), storage=ODD), "a block has 15"),
    ("triton", H200, REQUEST._replace(shape=(0, 64)), "no tiles for an empty"),
    ("tpu", V5E, REQUEST._replace(shape=(0, 64)), "no tiles for an empty"),
    (None, CPU, REQUEST._replace(shape=(2, 3, 64)), "is no matrix"),
]


@pytest.mark.parametrize(("row", "device", "request_", "why"), REFUSALS)
def test_refusals_say_why(row, device, request_, why):
    with pytest.raises(Unsupported, match=why):
        find_implementation("decode", DECODE, request_, device, row)


def test_requests_read_as_words():
    assert str(REQUEST) == "e2m1 with e4m3 scales of 1 x 16 to a bfloat16 matrix [64, 256]"


def test_a_missing_tensor_scale_is_missed():
    codes, scale, _ = stored(STORAGES["nvfp4"], 2, 16)
    with pytest.raises(ValueError, match="give tensor_scale"):
        decode(codes, scale, None, storage=STORAGES["nvfp4"], dtype="float32")


def test_scales_have_to_broadcast():
    codes, _, _ = stored(STORAGES["int8"], 2, 16)
    with pytest.raises(ValueError, match=r"\(3, 1\)"):
        decode(codes, jnp.ones((3, 1)), None, storage=STORAGES["int8"], dtype="float32")
