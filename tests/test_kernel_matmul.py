# SPDX-License-Identifier: Apache-2.0
"""Products with a stored matrix: every row of the table against the library's own decode, Pallas
kernels interpreted.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matmul_cases import (
    B200,
    DEVICES,
    FORMATS,
    H200,
    check_sum,
    decoded,
    normal,
    spec,
    storage_of,
    stored,
)

from jqx_kernels.dispatch import CPU, Device, Unsupported, find_implementation
from jqx_kernels.matmul import MATMUL, MatmulRequest, matmul
from jqx_kernels.matmul import gpu as triton
from jqx_kernels.matmul.reading import inside
from jqx_kernels.matmul.tiles import TILES, Tiles, tiles_for
from jqx_kernels.storage import Storage

ROWS = [row.name for row in MATMUL]
PALLAS = ("triton", "tpu")
N, K = 40, 384  # neither a power of two; three blocks of 128


def product(name, row, weight_dtype="bfloat16"):
    how = {
        "storage": storage_of(name),
        "weight_dtype": weight_dtype,
        "implementation": row,
        "device": DEVICES[row],
        "interpret": row in PALLAS,
    }
    return partial(matmul, **how)


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("name", FORMATS)
def test_a_product_is_the_sum_over_the_decoded_matrix(name, row):
    arrays = stored(name, N, K)
    x = jnp.asarray(normal(17, K)).astype(jnp.bfloat16)
    y = jax.jit(product(name, row))(x, *arrays)
    check_sum(y, x.astype(jnp.float32), decoded(arrays, name, "bfloat16"), jnp.bfloat16)


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("name", FORMATS)
def test_a_product_with_a_unit_vector_is_a_column_of_the_decoded_matrix(name, row):
    arrays = stored(name, N, K)
    columns = [0, 1, 127, 128, 200, K - 2, K - 1]
    x = jnp.zeros((7, K), jnp.float32).at[jnp.arange(7), jnp.asarray(columns)].set(1)
    y = jax.jit(product(name, row))(x, *arrays)
    np.testing.assert_array_equal(y, decoded(arrays, name, "bfloat16")[:, columns].T)


@pytest.mark.parametrize(("m", "n", "k"), [(1, 130, 640), (33, 72, 1152)])
@pytest.mark.parametrize("row", PALLAS)
@pytest.mark.parametrize("name", ["int4", "nvfp4", "mxfp8", "fp8_block", "nf4"])
def test_no_shape_needs_whole_tiles(name, row, m, n, k):
    arrays = stored(name, n, k)
    x = jnp.asarray(normal(m, k)).astype(jnp.bfloat16)
    y = jax.jit(product(name, row))(x, *arrays)
    check_sum(y, x.astype(jnp.float32), decoded(arrays, name, "bfloat16"), jnp.bfloat16)


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("k", [200, 300])
def test_columns_may_end_within_a_block(row, k):
    arrays = stored("fp8_block", 140, k)
    x = jnp.asarray(normal(5, k))
    y = jax.jit(product("fp8_block", row, "float32"))(x, *arrays)
    check_sum(y, x, decoded(arrays, "fp8_block", "float32"), jnp.float32)


def test_many_blocks_of_columns_are_more_than_the_lanes_of_a_tpu():
    k = 16 * 160
    arrays = stored("nvfp4", 8, k)
    x = jnp.asarray(normal(2, k))
    y = jax.jit(product("nvfp4", "tpu", "float32"))(x, *arrays)
    check_sum(y, x, decoded(arrays, "nvfp4", "float32"), jnp.float32)


@pytest.mark.parametrize(
    ("x_dtype", "weight_dtype"),
    [("float32", "float32"), ("float32", "bfloat16"), ("float16", "float16"),
     ("bfloat16", "float16"), ("bfloat16", "float32")],
)  # fmt: skip
@pytest.mark.parametrize("row", ROWS)
def test_dtypes_of_both_operands_are_kept(row, x_dtype, weight_dtype):
    arrays = stored("int4", 6, 256)
    x = jnp.asarray(normal(3, 256)).astype(x_dtype)
    run = jax.jit(product("int4", row, weight_dtype))
    if row == "tpu" and "float16" in (x_dtype, weight_dtype):
        with pytest.raises(Unsupported, match="multiplies bfloat16 and float32, not float16"):
            run(x, *arrays)
        return
    y = run(x, *arrays)
    check_sum(y, x.astype(jnp.float32), decoded(arrays, "int4", weight_dtype), jnp.dtype(x_dtype))


@pytest.mark.parametrize("row", ROWS)
def test_sums_may_stay_in_float32(row):
    """And the gradient of the activations is in their own dtype."""
    arrays = stored("nvfp4", 6, 256)
    x = jnp.asarray(normal(3, 256)).astype(jnp.bfloat16)
    run = partial(product("nvfp4", row), out_dtype="float32")
    y = jax.jit(run)(x, *arrays)
    w = decoded(arrays, "nvfp4", "bfloat16")
    check_sum(y, x.astype(jnp.float32), w, jnp.dtype("float32"))
    dx = jax.grad(lambda x: jnp.sum(run(x, *arrays)))(x)
    assert dx.dtype == jnp.bfloat16
    wanted = np.broadcast_to(w.sum(0), (3, 256))
    np.testing.assert_allclose(dx.astype(jnp.float32), wanted, rtol=2**-7, atol=1e-4)


@pytest.mark.parametrize("name", ["nvfp4", "fp8"])
def test_eight_bit_codes_and_scales_may_come_as_bytes(name):
    codes, scale, outer = stored(name, 6, 128)
    x = jnp.asarray(normal(2, 128))
    scale_bytes = scale.view(jnp.uint8) if scale.dtype.itemsize == 1 else scale
    run = product(name, "xla")
    np.testing.assert_array_equal(
        run(x, codes.view(jnp.uint8), scale_bytes, outer), run(x, codes, scale, outer)
    )


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("name", ["int4", "nvfp4", "fp8"])
def test_the_gradient_goes_through_the_decoded_matrix(name, row):
    arrays = stored(name, 6, 256)
    x, dy = jnp.asarray(normal(3, 256)), jnp.asarray(normal(3, 6))
    run = product(name, row)
    y, back = jax.vjp(jax.jit(lambda x: run(x, *arrays)), x)
    [dx] = back(dy)
    w = decoded(arrays, name, "bfloat16")
    check_sum(y, x, w, jnp.float32)
    check_sum(dx, dy, w.T, jnp.float32)


def test_no_gradient_goes_to_scales():
    codes, scale, outer = stored("nvfp4", 6, 128)
    run = product("nvfp4", "xla")
    x = jnp.asarray(normal(3, 128))
    d = jax.grad(lambda outer: run(x, codes, scale, outer).sum())(outer)
    assert d == 0


@pytest.mark.parametrize("row", ROWS)
def test_a_batch_is_many_products(row):
    arrays = stored("int4", 6, 256)
    x = jnp.asarray(normal(2, 3, 256))
    run = product("int4", row)
    y = jax.jit(jax.vmap(lambda x: run(x, *arrays)))(x)
    for one, its in zip(y, x, strict=True):
        check_sum(one, its, decoded(arrays, "int4", "bfloat16"), jnp.float32)


def test_a_batch_may_have_a_matrix_for_each():
    several = [stored("nvfp4", 6, 128, seed=s) for s in (1, 2)]
    arrays = jax.tree.map(lambda *a: jnp.stack(a), *several)
    x = jnp.asarray(normal(2, 3, 128))
    y = jax.jit(jax.vmap(product("nvfp4", "triton")))(x, *arrays)
    for one, its, own in zip(y, x, several, strict=True):
        check_sum(one, its, decoded(own, "nvfp4", "bfloat16"), jnp.float32)


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("name", ["int4", "nvfp4", "fp8_block"])
def test_other_tiles_are_for_tuning(name, splits):
    arrays = stored(name, 40, 640)
    codes, scale, outer = arrays
    x = jnp.asarray(normal(5, 640))
    tiles, f32 = dict.fromkeys(TILES, Tiles(16, 16, 32, 2, 2, splits)), "float32"
    y = triton.matmul(
        x,
        codes.view(jnp.uint8),
        scale.view(jnp.uint8) if scale.dtype.itemsize == 1 else scale,
        jnp.float32(1) if outer is None else outer,
        MatmulRequest((5, 640), f32, storage_of(name), (40, 640), f32, f32, True),
        tiles,
    )
    check_sum(y, x, decoded(arrays, name, "float32"), jnp.float32)


def test_nothing_is_read_beyond_a_matrix():
    # interpreted kernels have zeros there, GPUs have other arrays
    np.testing.assert_array_equal(inside((2, 0), (2, 2), (3, 1)), [[True, False], [False, False]])
    np.testing.assert_array_equal(inside((0, 2), (1, 2), (None, 3)), [[True, False]])
    assert inside((2, 0), (2, 2), (None, None)) is None


def test_few_columns_of_y_make_more_splits_than_many():
    few = tiles_for("e2m1", 1, (1024, 2048), None)
    many = tiles_for("e2m1", 1, (65536, 2048), None)
    assert (few.splits, many.splits) == (8, 1)
    assert few.rows == 16
    assert tiles_for("e4m3", 1, (4096, 4096), 32).columns == 32


# what is chosen, and what is refused


def chosen(device, m=4, name="int4", x_dtype="bfloat16", weight_dtype="bfloat16"):
    request = MatmulRequest((m, 256), x_dtype, storage_of(name), (8, 256), weight_dtype)
    return find_implementation("matmul", MATMUL, request, device).name


def test_the_first_row_that_can_is_taken():
    assert chosen(H200) == chosen(B200) == "triton"
    assert chosen(H200, m=256) == "xla"
    assert chosen(Device("gpu", "Tesla T4", (7, 5))) == "xla"
    a100 = Device("gpu", "NVIDIA A100", (8, 0))
    assert (chosen(a100), chosen(a100, name="fp8")) == ("triton", "xla")
    assert chosen(Device("gpu", "AMD Instinct MI300X")) == "xla"
    assert chosen(DEVICES["tpu"], m=4096) == "tpu"
    assert chosen(DEVICES["tpu"], weight_dtype="float16") == "xla"
    assert chosen(CPU) == "xla"


def call(name, x, row=None, device=CPU, **replaced):
    arrays = stored(name, 8, 128)._replace(**replaced)
    return jax.jit(
        partial(
            matmul,
            storage=storage_of(name),
            weight_dtype="bfloat16",
            implementation=row,
            device=device,
        )
    )(x, *arrays)


def test_a_row_that_cannot_says_why():
    x = jnp.ones((300, 128), jnp.bfloat16)
    with pytest.raises(Unsupported) as refused:
        call("int4", x, "triton")
    told = str(refused.value)
    assert "bfloat16 (300, 128) with bfloat16 (8, 128) stored as int4 with float32 scales" in told
    assert "triton: needs a CUDA GPU, not cpu" in told
    with pytest.raises(Unsupported, match="from 256 rows on is slower than once; there are 300"):
        call("int4", x, "triton", H200)
    with pytest.raises(Unsupported, match="tpu: needs a TPU, not gpu"):
        call("int4", x, "tpu", H200)
    with pytest.raises(Unsupported, match="no implementation 'cutlass'; there are triton, tpu"):
        call("int4", x, "cutlass")
    with pytest.raises(Unsupported, match="compute capability 8.9, not 8.0"):
        call("fp8", x[:4], "triton", Device("gpu", "NVIDIA A100", (8, 0)))


def test_a_dtype_that_no_row_takes_is_refused_by_each():
    with pytest.raises(Unsupported) as refused:
        call("int4", jnp.ones((3, 128), jnp.int8))
    for row in ("xla", "reference"):
        assert f"{row}: multiplies bfloat16, float16, float32, not int8" in str(refused.value)


@pytest.mark.parametrize(
    ("storage", "reason"),
    [
        (Storage("int4", (1, 96), "float32", "rows", 7.0), "blocks of a power of two, not of 96"),
        (Storage("e2m1", (1, 8), "e8m0", "columns", 6.0), "at least 16 columns, not 8"),
        (Storage("e4m3", (8, 128), "float32", "bytes", 448.0), "at least 16 rows, not 8"),
        (Storage("e4m3", (1, 32), "double", "bytes", 448.0), "no scales in 'double'"),
        (Storage("e5m2", (1, 32), "e8m0", "bytes", 448.0), "no element 'e5m2'"),
    ],
)
@pytest.mark.parametrize("row", PALLAS)
def test_blocks_that_have_no_tiles_are_left_to_other_rows(storage, reason, row):
    request = MatmulRequest((4, 192), "bfloat16", storage, (8, 192))
    with pytest.raises(Unsupported, match=reason):
        find_implementation("matmul", MATMUL, request, DEVICES[row], row)


def test_blocks_that_end_within_a_byte_are_left_to_the_reference():
    storage = Storage("e2m1", (1, 7), "e8m0", "columns", 6.0)
    request = MatmulRequest((4, 14), "bfloat16", storage, (8, 14))
    assert find_implementation("matmul", MATMUL, request, CPU).name == "reference"


@pytest.mark.parametrize("row", ["xla", "reference"])
def test_a_matrix_of_no_rows_is_no_trouble(row):
    arrays = stored("int4", 8, 128)
    y = product("int4", row)(jnp.ones((0, 128), jnp.bfloat16), *arrays)
    assert y.shape == (0, 8)
    with pytest.raises(Unsupported, match="empty"):
        product("int4", "triton")(jnp.ones((0, 128), jnp.bfloat16), *arrays)


def test_arrays_that_do_not_belong_together_are_refused():
    x = jnp.ones((3, 128), jnp.bfloat16)
    with pytest.raises(ValueError, match=r"\(3, 64\) have 64 columns, and the matrix \(8, 128\)"):
        call("int4", x[:, :64])
    with pytest.raises(ValueError, match=r"not activations \(128,\)"):
        call("int4", x[0])
    with pytest.raises(ValueError, match=r"shape \(8, 1\) for a matrix \(8, 128\), not \(4, 1\)"):
        call("int4", x, scale=jnp.ones((4, 1)))
    with pytest.raises(ValueError, match="come as float32, not bfloat16"):
        call("int4", x, scale=jnp.ones((8, 1), jnp.bfloat16))
    with pytest.raises(ValueError, match="below one tensor scale; there is none"):
        call("nvfp4", x, tensor_scale=None)
    with pytest.raises(ValueError, match="Codes are bytes, not int32"):
        call("int8", x, codes=jnp.ones((8, 128), jnp.int32))


def test_shapes_alone_are_enough_to_refuse():
    codes, scale, outer = spec("nvfp4", 8, 128)
    x = jax.ShapeDtypeStruct((3, 64), jnp.bfloat16)
    with pytest.raises(ValueError, match="64 columns"):
        jax.eval_shape(product("nvfp4", "xla"), x, codes, scale, outer)
