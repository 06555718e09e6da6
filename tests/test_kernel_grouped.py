# SPDX-License-Identifier: Apache-2.0
"""Products of rows in groups with a stored stack: every row of the table against the definition,
group by group in NumPy, Pallas kernels interpreted.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from grouped_cases import (
    PALLAS,
    all_decoded,
    check_groups,
    grouped,
    integers,
    members,
    rows_of_groups,
    stack_spec,
    stacked,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from lowering import lowered
from matmul_cases import DEVICES, FORMATS, H200, normal, storage_of

from jqx_kernels.dispatch import CPU, Device, Unsupported, find_implementation
from jqx_kernels.grouped_matmul import GROUPED_MATMUL, GroupedRequest, grouped_matmul, groups
from jqx_kernels.grouped_matmul import gpu as triton
from jqx_kernels.grouped_matmul import tpu as mosaic
from jqx_kernels.grouped_matmul.request import Stack
from jqx_kernels.matmul import MatmulRequest
from jqx_kernels.matmul.reference import stored_matrix
from jqx_kernels.matmul.tiles import TILES, Tiles
from jqx_kernels.storage import Storage

ROWS = [row.name for row in GROUPED_MATMUL]
N, K, M = 40, 384, 37  # not one a power of two; three blocks of 128
SIZES = integers(20, 0, 3, 9)  # five rows beyond them


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("name", ["int4", "nvfp4", "mxfp8", "fp8", "fp8_block"])
def test_the_rows_of_a_group_meet_its_decoded_matrix(name, row):
    matrices = members(name, 4, N, K)
    x = jnp.asarray(normal(M, K)).astype(jnp.bfloat16)
    y = jax.jit(grouped(name, row))(x, *stacked(matrices), SIZES)
    check_groups(y, x, all_decoded(matrices, name), SIZES, jnp.bfloat16)


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("name", ["int4_b64", "nf4"])
def test_a_unit_vector_gets_a_column_of_the_matrix_of_its_group(name, row):
    matrices = members(name, 3, N, K)
    columns = np.asarray([0, 1, 127, 128, 200, K - 1])
    x = jnp.zeros((6, K), jnp.float32).at[jnp.arange(6), columns].set(1)
    y = jax.jit(grouped(name, row))(x, *stacked(matrices), integers(1, 3, 2))
    w = all_decoded(matrices, name)
    wanted = [w[e][:, column] for e, column in zip([0, 1, 1, 1, 2, 2], columns, strict=True)]
    np.testing.assert_array_equal(y, wanted)


MANY_SIZES = (
    *((0, 0, 0, 0), (M, 0, 0, 0), (0, 0, 0, M), (16, 16, 0, 5), (1, 1, 1, 1), (17, 0, 0, 0)),
    *((0, 15, 2, 0), (10, 10, 10, 7), (0, 33, 0, 1), (30, 30, 30, 30), (0, 0, 99, 1)),
)
"""Some end with tiles of 16 rows, some leave rows, some reach beyond them."""


@pytest.mark.parametrize("row", ROWS)
def test_groups_of_any_size(row):
    matrices = members("nvfp4", 4, 24, 128)
    x, arrays = jnp.asarray(normal(M, 128)), stacked(matrices)
    run, w = jax.jit(grouped("nvfp4", row)), all_decoded(matrices, "nvfp4")
    for sizes in MANY_SIZES:
        check_groups(run(x, *arrays, integers(*sizes)), x, w, sizes, jnp.float32)


@pytest.mark.parametrize(("row", "splits"), [("triton", 1), ("triton", 3), ("tpu", 1)])
def test_several_tiles_of_rows_and_columns(row, splits):
    """Of tiles that are for tuning."""
    name, (n, k) = "int4", (72, 384)
    matrices = members(name, 4, n, k)
    codes, scale, _ = stacked(matrices)
    x = jnp.asarray(normal(M, k))
    one = MatmulRequest((M, k), "float32", storage_of(name), (n, k), "float32", "float32", True)
    wide = {"triton": (16, 32), "tpu": (24, 128)}[row]
    tiles = dict.fromkeys(TILES, Tiles(16, *wide, 2, 2, splits))
    module = {"triton": triton, "tpu": mosaic}[row]
    run = partial(module.grouped_matmul, request=GroupedRequest(one, 4), table=tiles)
    run, w = jax.jit(run), all_decoded(matrices, name, "float32")
    for sizes in MANY_SIZES:
        y = run(x, Stack(codes, scale, jnp.ones(4, jnp.float32)), integers(*sizes))
        check_groups(y, x, w, sizes, jnp.float32)


@pytest.mark.parametrize("row", ROWS)
def test_matrices_without_rows_are_not_multiplied(row):
    matrices = members("int8", 3, 16, 128)
    broken = matrices[1]._replace(scale=jnp.full_like(matrices[1].scale, jnp.nan))
    x = jnp.asarray(normal(20, 128)).at[18:].set(jnp.nan)  # beyond the groups
    y = jax.jit(grouped("int8", row))(
        x, *stacked([matrices[0], broken, matrices[2]]), integers(9, 0, 9)
    )
    assert np.all(np.isfinite(y))
    check_groups(y[:18], x[:18], all_decoded(matrices, "int8"), [9, 0, 9], jnp.float32)


@pytest.mark.parametrize(("x_dtype", "weight_dtype"), [("float32", "float32"),
                         ("float16", "float16"), ("bfloat16", "float32")])  # fmt: skip
@pytest.mark.parametrize("row", ROWS)
def test_dtypes_of_both_operands_are_kept(row, x_dtype, weight_dtype):
    matrices = members("int4", 2, 6, 256)
    x = jnp.asarray(normal(5, 256)).astype(x_dtype)
    run, sizes = jax.jit(grouped("int4", row, weight_dtype)), integers(3, 1)
    if row == "tpu" and "float16" in (x_dtype, weight_dtype):
        with pytest.raises(Unsupported, match="multiplies bfloat16 and float32, not float16"):
            run(x, *stacked(matrices), sizes)
        return
    y = run(x, *stacked(matrices), sizes)
    check_groups(y, x, all_decoded(matrices, "int4", weight_dtype), sizes, x_dtype)


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("name", ["int4", "nvfp4"])
def test_the_gradient_goes_through_the_decoded_matrix_of_each_row(name, row):
    matrices, sizes = members(name, 3, 6, 256), integers(2, 0, 5)
    arrays, w = stacked(matrices), all_decoded(matrices, name)
    x, dy = jnp.asarray(normal(9, 256)), jnp.asarray(normal(9, 6))
    run = grouped(name, row)
    y, back = jax.vjp(jax.jit(lambda x: run(x, *arrays, sizes)), x)
    check_groups(y, x, w, sizes, jnp.float32)
    [dx] = back(dy)
    check_groups(dx, dy, w, sizes, jnp.float32, back=True)


def test_sums_may_stay_in_float32():
    """And the gradient of the activations is in their own dtype."""
    matrices, sizes = members("mxfp4", 2, 6, 128), integers(2, 1)
    x = jnp.asarray(normal(3, 128)).astype(jnp.bfloat16)
    run, arrays = grouped("mxfp4", "xla", out_dtype="float32"), stacked(matrices)
    y, back = jax.vjp(jax.jit(lambda x: run(x, *arrays, sizes)), x)
    check_groups(y, x, all_decoded(matrices, "mxfp4"), sizes, jnp.float32)
    assert back(y)[0].dtype == jnp.bfloat16


def odd_stack():
    """Blocks of seven columns, which end within bytes."""
    storage = Storage("e2m1", (1, 7), "e8m0", "columns", 6.0)
    rng = np.random.default_rng(0)
    codes = jnp.asarray(rng.integers(0, 256, (2, 5, 7)), jnp.uint8)
    scale = jnp.asarray(rng.integers(120, 130, (2, 5, 2)), jnp.uint8)
    return storage, codes, scale


def test_blocks_that_end_within_a_byte_are_left_to_the_reference():
    storage, codes, scale = odd_stack()
    x, sizes = jnp.asarray(normal(4, 14)), integers(1, 2)
    run = partial(grouped_matmul, storage=storage, weight_dtype="float32", device=CPU)
    w = [np.asarray(stored_matrix(codes[e], scale[e], jnp.float32(1), storage)) for e in (0, 1)]
    y, back = jax.vjp(jax.jit(lambda x: run(x, codes, scale, None, sizes)), x)
    check_groups(y, x, w, sizes, jnp.float32)
    check_groups(back(y)[0], y, w, sizes, jnp.float32, back=True)
    with pytest.raises(Unsupported, match="xla: needs blocks that hold whole bytes, not 7 of 2"):
        run(x, codes, scale, None, sizes, implementation="xla")


@pytest.mark.parametrize("row", ROWS)
def test_one_tensor_scale_may_be_for_all(row):
    matrices = [m._replace(tensor_scale=jnp.float32(0.5)) for m in members("nvfp4", 2, 6, 128)]
    codes, scale, _ = stacked(matrices)
    x, sizes = jnp.asarray(normal(3, 128)), integers(1, 2)
    scale = scale.view(jnp.uint8)  # and scales may come as bytes
    y = jax.jit(grouped("nvfp4", row))(x, codes, scale, jnp.float32(0.5), sizes)
    check_groups(y, x, all_decoded(matrices, "nvfp4"), sizes, jnp.float32)


@pytest.mark.parametrize("row", ROWS)
def test_a_batch_has_groups_of_its_own(row):
    matrices = members("int4", 3, 6, 128)
    x = jnp.asarray(normal(2, 8, 128))
    sizes = jnp.stack([integers(3, 0, 5), integers(0, 2, 4)])
    run, arrays = grouped("int4", row), stacked(matrices)
    y = jax.jit(jax.vmap(lambda x, sizes: run(x, *arrays, sizes)))(x, sizes)
    for one, its, own in zip(y, x, sizes, strict=True):
        check_groups(one, its, all_decoded(matrices, "int4"), own, jnp.float32)


@pytest.mark.parametrize("name", ["nvfp4", "fp8"])
@pytest.mark.parametrize("back", [False, True])
def test_xla_never_holds_more_than_one_decoded_matrix(name, back):
    m, n = 32, 256
    run = grouped(name, "xla")
    args = jax.ShapeDtypeStruct((m, n), jnp.bfloat16), *stack_spec(name, 16, n, n)
    sizes = jax.ShapeDtypeStruct((16,), jnp.int32)
    f = (lambda x, *a: jax.grad(lambda x: run(x, *a).sum())(x)) if back else run
    held = jax.jit(f).lower(*args, sizes).compile().memory_analysis().temp_size_in_bytes
    assert held < 2 * 2 * n * n  # of 16, in bfloat16


# which rows meet which matrix


def slow_visits(sizes, m, rows, aligned):
    """(matrix, first row of the tile, first row, end) of every visit, one after another."""
    found = []
    spans, beyond = rows_of_groups(sizes, m)
    for e, span in [*spans, (len(sizes), beyond)]:
        at = span.start - span.start % rows if aligned else span.start
        while at < span.stop and span.start < span.stop:
            found.append((e, at, max(at, span.start), min(at + rows, span.stop)))
            at += rows
    return found


VISITS = jax.jit(groups.visits_of, static_argnames=("m", "rows", "aligned"))


@given(
    st.lists(st.integers(0, 40), min_size=5, max_size=5),
    st.sampled_from([(1, 16), (37, 16), (64, 16), (64, 32)]),
    st.booleans(),
)
@settings(deadline=None, max_examples=60)
def test_every_row_is_visited_once(sizes, shape, aligned):
    got = np.stack(VISITS(integers(*sizes), *shape, aligned), axis=1)
    wanted = slow_visits(sizes, *shape, aligned)
    assert len(wanted) <= len(got)
    np.testing.assert_array_equal(got[: len(wanted)], wanted)
    for expert, start, first, end in got[len(wanted) :]:  # too many, and no rows in them
        assert (expert, start) == wanted[-1][:2]
        assert first == end


# what is chosen, and what is refused


def chosen(device, m=4, name="int4", shape=(8, 256), x_dtype="bfloat16"):
    one = MatmulRequest((m, shape[1]), x_dtype, storage_of(name), shape)
    return find_implementation("grouped_matmul", GROUPED_MATMUL, GroupedRequest(one, 8), device)


def test_the_first_row_that_can_is_taken():
    assert chosen(H200).name == "triton"
    assert chosen(H200, m=256).name == "triton"
    assert chosen(H200, m=8 * 256).name == "xla"  # 256 rows for each of eight
    assert chosen(Device("gpu", "Tesla T4", (7, 5))).name == "xla"
    assert chosen(Device("gpu", "NVIDIA A100", (8, 0)), name="fp8").name == "xla"
    assert chosen(DEVICES["tpu"], m=4096).name == "tpu"
    assert chosen(DEVICES["tpu"], x_dtype="float16").name == "xla"
    assert chosen(CPU).name == "xla"


def test_places_between_two_and_four_gib_are_not_counted_by_pallas():
    side = 2**14
    assert chosen(H200, name="int8", shape=(side, side)).name == "triton"
    assert chosen(H200, name="int8", shape=(side + 1024, side)).name == "xla"
    assert chosen(H200, name="int8", shape=(2 * side + 1024, side)).name == "triton"


def call(x, row=None, device=CPU, sizes=(1, 2), **replaced):
    arrays = stacked(members("nvfp4", 2, 8, 128))._replace(**replaced)
    run = grouped("nvfp4", row, device=device, interpret=False) if row else None
    how = {"storage": storage_of("nvfp4"), "weight_dtype": "bfloat16", "device": device}
    return jax.jit(run or partial(grouped_matmul, **how))(x, *arrays, jnp.asarray(sizes))


def test_a_row_that_cannot_says_why():
    x = jnp.ones((600, 128), jnp.bfloat16)
    with pytest.raises(Unsupported) as refused:
        call(x, "triton")
    told = str(refused.value)
    assert "(600, 128) with bfloat16 (8, 128) stored as e2m1 with e4m3 scales" in told
    assert "one of 2 for every group of rows" in told
    assert "triton: needs a CUDA GPU, not cpu" in told
    with pytest.raises(Unsupported, match="from 256 rows for each of 2 on.*there are 600"):
        call(x, "triton", H200)
    with pytest.raises(Unsupported, match="tpu: needs a TPU, not gpu"):
        call(x, "tpu", H200)
    with pytest.raises(Unsupported, match="reference: multiplies bfloat16, float16, float32, not"):
        call(x.astype(jnp.int8))


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"codes": jnp.zeros((8, 64), jnp.uint8)}, r"takes a stack of matrices, not codes \(8, 64"),
        ({"codes": jnp.zeros((3, 8, 64), jnp.uint8)}, "not of one number of matrices"),
        ({"sizes": [1, 2, 3]}, r"group sizes \(3,\) are not of one number"),
        ({"sizes": [[1, 2]]}, "not of one number of matrices"),
        ({"sizes": [1.0, 2.0]}, "Group sizes are integers, not float32"),
        ({"codes": jnp.zeros((2, 8, 32), jnp.uint8)}, "have 128 columns, and the matrix"),
        ({"codes": jnp.zeros((2, 8, 64), jnp.int32)}, "Codes are bytes, not int32"),
        ({"scale": jnp.zeros((2, 8, 3), jnp.uint8)}, r"scales of shape \(8, 8\)"),
        ({"tensor_scale": None}, "below a tensor scale.*there is none"),
        ({"tensor_scale": jnp.ones(3)}, r"or \(2,\); there is an array \(3,\)"),
    ],
)
def test_arrays_that_do_not_belong_together_are_refused(bad, words):
    with pytest.raises(ValueError, match=words):
        call(jnp.ones((3, 128), jnp.bfloat16), **bad)


@pytest.mark.parametrize("row", ["xla", "reference"])
def test_no_rows_are_no_trouble(row):
    arrays = stacked(members("int4", 2, 8, 128))
    none = jnp.ones((0, 128), jnp.bfloat16)
    assert grouped("int4", row)(none, *arrays, integers(0, 0)).shape == (0, 8)
    with pytest.raises(Unsupported, match="empty"):
        grouped("int4", "triton")(none, *arrays, integers(0, 0))


# programs for devices that are not here

CALLS = {"triton": ("cuda", "xla.gpu.triton"), "tpu": ("tpu", "tpu_custom_call")}


def program(name, row, m, f=None, dtype="bfloat16"):
    run = grouped(name, row, dtype, interpret=False)
    x = jax.ShapeDtypeStruct((m, 1920), jnp.dtype(dtype))  # 15 blocks of 128
    sizes = jax.ShapeDtypeStruct((8,), jnp.int32)
    platform, called = CALLS[row]
    text = lowered(f(run) if f else run, (x, *stack_spec(name, 8, 1000, 1920), sizes), platform)
    return called in text and "grouped_stored_matmul" in text


@pytest.mark.parametrize("row", PALLAS)
@pytest.mark.parametrize("name", FORMATS)
def test_every_storage_lowers(name, row):
    assert program(name, row, 200)


@pytest.mark.parametrize("row", PALLAS)
def test_few_rows_float32_and_gradients_lower(row):
    def gradient(run):
        return jax.value_and_grad(lambda x, *a: run(x, *a).astype(jnp.float32).sum())

    assert program("nvfp4", row, 5, gradient)
    assert program("nvfp4", row, 5, dtype="float32")
