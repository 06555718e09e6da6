# SPDX-License-Identifier: Apache-2.0
"""Products of two stored matrices: every row of the table against what both decode to, Pallas
kernels interpreted.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matmul_cases import B200, DEVICES, H200, TPU, check_sum, decoded, spec, stored

from jqx_kernels.dispatch import CPU, Device, Unsupported, find_implementation
from jqx_kernels.scaled_matmul import KINDS, SCALED_MATMUL, ScaledRequest, cudnn, scaled_matmul
from jqx_kernels.scaled_matmul.kinds import Stored

PAIRS = {  # formats of x and of w -> kind
    ("fp8", "fp8"): "fp8",
    ("fp8_channel", "fp8"): "fp8",
    ("fp8_channel", "fp8_channel"): "fp8",
    ("int8", "int8"): "int8",
    ("int8_tensor", "int8"): "int8",
    ("nvfp4", "nvfp4"): "nvfp4",
    ("mxfp8", "mxfp8"): "mxfp8",
}
TILED = ("fp8", "int8")  # kinds that the Pallas kernels are for
CASES = [
    (pair, row)
    for pair, kind in PAIRS.items()
    for row in ("triton", "tpu", "xla", "reference")
    if row in ("xla", "reference") or kind in TILED
]


def operands(pair, m, n, k):
    x, w = stored(pair[0], m, k, seed=3), stored(pair[1], n, k, seed=4)
    outer = x.tensor_scale * w.tensor_scale if PAIRS[pair] == "nvfp4" else None
    return x, w, outer


def product(kind, row, dtype="bfloat16", device=None):
    how = {
        "kind": kind,
        "dtype": jnp.dtype(dtype),
        "implementation": row,
        "device": device or DEVICES[row],
        "interpret": row in ("triton", "tpu"),
    }
    run = partial(scaled_matmul, **how)
    return lambda x, w, outer: run(x.codes, x.scale, w.codes, w.scale, outer)


def check(pair, row, shape, dtype):
    x, w, outer = operands(pair, *shape)
    y = jax.jit(product(PAIRS[pair], row, dtype))(x, w, outer)
    left, right = (decoded(side, name, "float32") for side, name in zip((x, w), pair, strict=True))
    # scales are multiplied one after the other, after the sum: a rounding for each
    check_sum(y, left, right, jnp.dtype(dtype), roundings=4)


@pytest.mark.parametrize(("pair", "row"), CASES)
def test_a_product_is_the_sum_over_both_decoded_matrices(pair, row):
    check(pair, row, (17, 40, 384), "bfloat16")
    check(pair, row, (1, 40, 96), "float32")


@pytest.mark.parametrize("row", ["triton", "tpu"])
@pytest.mark.parametrize("pair", [("fp8_channel", "fp8_channel"), ("int8", "int8")])
def test_no_shape_needs_whole_tiles(pair, row):
    check(pair, row, (5, 131, 1100), "float16" if row == "triton" else "float32")
    check(pair, row, (33, 72, 200), "bfloat16")


@pytest.mark.parametrize("row", ["triton", "tpu", "xla"])
def test_int8_products_are_summed_as_integers(row):
    x, w, _ = operands(("int8", "int8"), 4, 8, 64)
    program = str(jax.make_jaxpr(product("int8", row))(x, w, None))
    assert "preferred_element_type=int32" in program
    assert "preferred_element_type=float32" not in program


def test_the_operands_of_cudnn_are_the_same_numbers():
    for name in ("nvfp4", "mxfp8"):
        arrays = stored(name, 6, 128)
        as_bytes = Stored(arrays.codes.view(jnp.uint8), arrays.scale.view(jnp.uint8))
        codes, scale = cudnn.operand(as_bytes, KINDS[name])
        assert codes.shape == (1, 6, 128)
        assert scale.dtype == jnp.dtype(KINDS[name].scale_dtype)
        step = np.repeat(np.asarray(scale[0]).astype(np.float32), KINDS[name].block, axis=1)
        outer = np.float32(1) if arrays.tensor_scale is None else np.asarray(arrays.tensor_scale)
        w = np.asarray(codes[0]).astype(np.float32) * (step * outer)
        np.testing.assert_array_equal(w, decoded(arrays, name, "float32"))


def chosen(device, kind, m=4, dtype="bfloat16"):
    request = ScaledRequest(kind, (m, 256), (8, 256), dtype)
    return find_implementation("scaled_matmul", SCALED_MATMUL, request, device).name


def test_the_first_row_that_can_is_taken():
    assert [chosen(B200, kind) for kind in KINDS] == ["triton", "triton", "cudnn", "cudnn"]
    assert [chosen(H200, kind) for kind in KINDS] == ["triton", "triton", "xla", "xla"]
    assert [chosen(TPU, kind) for kind in KINDS] == ["tpu", "tpu", "xla", "xla"]
    assert [chosen(CPU, kind) for kind in KINDS] == ["xla"] * 4
    assert chosen(H200, "fp8", m=256) == "xla"
    assert chosen(TPU, "fp8", m=4096) == "tpu"
    assert chosen(TPU, "fp8", dtype="float16") == "xla"
    assert chosen(Device("tpu", "TPU v4"), "int8") == "xla"
    a100 = Device("gpu", "NVIDIA A100", (8, 0))
    assert (chosen(a100, "fp8"), chosen(a100, "int8")) == ("xla", "triton")


@pytest.mark.parametrize(
    ("kind", "row", "device", "reason"),
    [
        ("nvfp4", "cudnn", H200, "cudnn: needs a GPU of compute capability 10.0, not 9.0"),
        ("fp8", "cudnn", B200, "cudnn: multiplies nvfp4 and mxfp8, not fp8"),
        ("mxfp8", "triton", H200, "triton: multiplies fp8 and int8, not mxfp8"),
        ("fp8", "triton", CPU, "triton: needs a CUDA GPU, not cpu"),
        ("fp8", "triton", Device("gpu", "", (8, 0)), "compute capability 8.9, not 8.0"),
        ("fp8", "tpu", H200, "tpu: needs a TPU, not gpu"),
        ("fp8", "tpu", Device("tpu", "TPU v4"), "multiplies bytes, not TPU v4"),
    ],
)
def test_a_row_that_cannot_says_why(kind, row, device, reason):
    name = "fp8_channel" if kind == "fp8" else kind
    x, w = spec(name, 4, 128), spec(name, 8, 128)
    outer = jax.ShapeDtypeStruct((), jnp.float32)
    with pytest.raises(Unsupported) as refused:
        jax.eval_shape(product(kind, row, device=device), x, w, outer)
    assert reason in str(refused.value)
    assert f"{kind} (4, 128) with {kind} (8, 128) in bfloat16" in str(refused.value)


def test_a_dtype_that_no_row_returns_is_refused_by_each():
    x, w = spec("int8", 4, 128), spec("int8", 8, 128)
    with pytest.raises(Unsupported) as refused:
        jax.eval_shape(product("int8", None, "int32", CPU), x, w, None)
    told = str(refused.value)
    for row in ("xla", "reference"):
        assert f"{row}: returns bfloat16, float16 or float32, not int32" in told


def test_arrays_that_do_not_belong_together_are_refused():
    run = product("nvfp4", None, device=CPU)
    x, w = spec("nvfp4", 4, 128), spec("nvfp4", 8, 128)
    outer = jax.ShapeDtypeStruct((), jnp.float32)
    with pytest.raises(ValueError, match=r"\(4, 128\) has 128 columns, w \(8, 64\) 64"):
        jax.eval_shape(run, x, spec("nvfp4", 8, 64), outer)
    with pytest.raises(ValueError, match=r"scales of shape \(8, 8\), not \(4, 8\)"):
        jax.eval_shape(run, x, w._replace(scale=x.scale), outer)
    with pytest.raises(ValueError, match="below one tensor scale; there is none"):
        jax.eval_shape(run, x, w, None)
    with pytest.raises(ValueError, match="come as float8_e4m3fn, not float32"):
        jax.eval_shape(run, x, w._replace(scale=jax.ShapeDtypeStruct((8, 8), jnp.float32)), outer)
    with pytest.raises(ValueError, match="matrix of bytes as x, not float32"):
        jax.eval_shape(run, x._replace(codes=jax.ShapeDtypeStruct((4, 64), jnp.float32)), w, outer)
    with pytest.raises(ValueError, match="no kind 'fp6'.*fp8, int8, nvfp4, mxfp8"):
        jax.eval_shape(product("fp6", None, device=CPU), x, w, outer)
