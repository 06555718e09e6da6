# SPDX-License-Identifier: Apache-2.0
"""Products with Hadamard matrices: every row of the table against the definition, Pallas kernels
interpreted.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hadamard_cases import base_matrix, defined, hadamard_cases, implemented, matrix, sums, whole
from hypothesis import given, settings
from hypothesis import strategies as st
from lowering import TARGETS, lowered
from matmul_cases import B200, DEVICES, H200, normal

from jqx_kernels.dispatch import CPU, Device, Unsupported, find_implementation
from jqx_kernels.hadamard import (
    HADAMARD,
    HadamardRequest,
    gpu,
    hadamard,
    hadamard_matrix,
    largest_order,
    xla,
)
from jqx_kernels.hadamard.exact import terms
from jqx_kernels.hadamard.matrices import factors

ROWS = [row.name for row in HADAMARD]
PALLAS = ("triton", "tpu")
ORDERS = [1, 2, 8, 64, 512, 12, 20, 28, 36, 24, 72, 144]


@pytest.mark.parametrize("order", ORDERS)
def test_matrices_are_those_of_sylvester_and_paley(order):
    h = hadamard_matrix(order)
    np.testing.assert_array_equal(h, matrix(order))
    np.testing.assert_array_equal(h @ h.T, order * np.eye(order))
    x = np.random.default_rng(order).integers(-9, 9, (3, order))
    np.testing.assert_array_equal(sums(x, order), x @ h)
    np.testing.assert_array_equal(sums(x, order, transpose=True), x @ h.T)


def test_some_bases_are_not_symmetric():
    assert [(base_matrix(n) != base_matrix(n).T).any() for n in (12, 20, 28, 36)] == [
        *(True, True, False, False)
    ]


@pytest.mark.parametrize("order", [4, 192, 256, 576, 1024, 1536])
def test_a_matrix_is_the_product_of_its_factors(order):
    product = np.ones((1, 1), np.float32)
    for factor in factors(order):
        product = np.kron(product, hadamard_matrix(factor))
    np.testing.assert_array_equal(product, hadamard_matrix(order))


def test_factors_are_few_and_small():
    assert factors(4096) == (64, 64)
    assert factors(14336) == (112, 128)
    assert factors(1 << 15) == (128, 16, 16)
    every = [base << i for base in (1, 12, 20, 28, 36) for i in range(17)]
    assert all(max(factors(order)) <= 128 for order in every)
    assert all(np.prod(factors(order)) == order for order in every)
    assert max(map(len, map(factors, every))) == 4


# every row against the definition

SHAPES = [
    *((3, 16, 16), (5, 48, 12), (1, 8, 8), (7, 384, 128), (3, 64, 64), (2, 192, 192)),
    *((9, 512, 256), (2, 576, 576), (1, 768, 768)),
]


def fits(row, order, k, dtype):
    return row != "tpu" or (dtype != "float16" and (order == k or order % 128 == 0))


def check(row, x, order, transpose=False):
    y = jax.jit(implemented(row, block=order, transpose=transpose))(x)
    assert (y.shape, y.dtype) == (x.shape, x.dtype)
    np.testing.assert_array_equal(y.astype(jnp.float32), defined(x, order, transpose))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize(("m", "k", "order"), SHAPES)
def test_whole_numbers_come_out_to_the_bit(m, k, order, row, dtype):
    if not fits(row, order, k, dtype):
        with pytest.raises(Unsupported):
            implemented(row, block=order)(whole(m, k, dtype))
        return
    check(row, whole(m, k, dtype), order)


@pytest.mark.parametrize("order", [12, 192])
@pytest.mark.parametrize("row", ROWS)
def test_the_transpose_is_another_matrix(order, row):
    x = whole(3, order, "float32")
    check(row, x, order, transpose=True)
    assert (defined(x, order) != defined(x, order, transpose=True)).any()


@pytest.mark.parametrize("row", ["triton", "xla"])
@pytest.mark.parametrize("order", [1 << 12, 14336, 1 << 15, 28 << 10])
def test_long_runs_take_two_factors_or_three(order, row):
    check(row, whole(2, order, "bfloat16"), order)


@pytest.mark.parametrize("transpose", [False, True])
def test_pieces_of_a_tpu_are_summed_with_the_base(transpose):
    check("tpu", whole(2, 3072, "bfloat16"), 3072, transpose)


@pytest.mark.parametrize("order", [64, 256])
@pytest.mark.parametrize("row", ROWS)
def test_every_bit_of_a_float32_counts(order, row):
    x = np.zeros((order, order), np.float32)
    x[np.diag_indices(order)] = normal(order)
    y = jax.jit(implemented(row))(jnp.asarray(x))
    np.testing.assert_array_equal(y, matrix(order) * x.diagonal()[:, None] / order**0.5)


@pytest.mark.parametrize("order", [192, 256, 576])
@pytest.mark.parametrize("row", ROWS)
def test_sums_are_those_of_float32(order, row):
    x = normal(4, order)
    y = jax.jit(implemented(row))(jnp.asarray(x))
    np.testing.assert_allclose(y, sums(x, order) * order**-0.5, rtol=0, atol=2.0**-18)


@pytest.mark.parametrize("order", [12, 128, 256])
@pytest.mark.parametrize("row", ROWS)
def test_what_is_not_finite_stays_in_its_run(order, row):
    runs = 1 if order == 12 else 2
    x = np.array(whole(5, runs * order, "float32"))
    x[1, 3], x[3, -2], x[4, 5] = np.nan, np.inf, -np.inf
    y = np.asarray(jax.jit(implemented(row, block=order))(jnp.asarray(x)))
    told = x.reshape(5, runs, order)
    wanted = told @ matrix(order) * np.float32(order**-0.5)
    np.testing.assert_array_equal(y.reshape(wanted.shape), wanted.astype(np.float32))


def test_terms_add_up_to_what_they_are_of():
    x = np.concatenate([normal(2000), [0, 3.4e38, -1e-20, np.inf, -np.inf]]).astype(np.float32)
    low, middle, high = (np.asarray(t.astype(jnp.float32)) for t in jax.jit(terms)(x))
    np.testing.assert_array_equal(high + (middle + low), x)
    assert np.isnan(sum(np.asarray(t) for t in terms(jnp.full(3, jnp.nan)))).all()
    assert np.mean(low != 0) > 0.9
    half = jnp.ones(3, jnp.bfloat16)
    assert terms(half) == (half,)


# programs of kernels, chunks of the CPU


def test_programs_of_a_gpu_take_several_tiles(monkeypatch):
    monkeypatch.setattr(gpu, "PROGRAMS", 2)
    monkeypatch.setattr(gpu, "VALUES", 512)
    for m, order in ((11, 256), (45, 16), (7, 192)):
        check("triton", whole(m, 2 * order, "float32"), order)


def test_nothing_is_read_beyond_what_there_is(monkeypatch):
    # interpreted kernels read the last tile again, GPUs other arrays
    monkeypatch.setattr(gpu, "PROGRAMS", 2)
    monkeypatch.setattr(gpu, "VALUES", 256)

    def first(runs, order):
        (one,) = gpu._passes(HadamardRequest((runs, order), "float32", order))
        return one, one.inside((one.grid[0] * (one.steps - 1) + 1, 0, 0))

    even, mask = first(4, 256)
    assert (even.grid[0] * even.steps, mask) == (4, None)
    odd, mask = first(5, 256)
    assert odd.grid[0] * odd.steps == 6
    assert not mask.any()
    _, mask = first(4, 192)
    np.testing.assert_array_equal(mask[0].sum(0), [12] * 16)
    _, mask = first(1, 12)
    np.testing.assert_array_equal(mask, np.arange(16)[None, None] < 12)


@pytest.mark.parametrize("m", [1, 8, 9, 23])
def test_a_cpu_multiplies_in_chunks(m, monkeypatch):
    monkeypatch.setattr(xla, "CHUNK", 4 * 64)
    monkeypatch.setattr(xla, "MANY", 1)
    check("xla", whole(m, 64, "float32"), 64)
    check("xla", whole(m, 3, "float32"), 1)


# what it is for


@pytest.mark.parametrize("row", ROWS)
def test_gradients_are_products_with_the_transpose(row):
    x, dy = whole(3, 192, "float32"), whole(3, 192, "float32", seed=1)
    y, back = jax.vjp(jax.jit(implemented(row)), x)
    np.testing.assert_array_equal(y, defined(x, 192))
    np.testing.assert_array_equal(back(dy)[0], defined(dy, 192, transpose=True))
    _, back = jax.vjp(implemented(row, transpose=True), x)
    np.testing.assert_array_equal(back(dy)[0], defined(dy, 192))


def test_gradients_of_gradients_are_there():
    x = whole(2, 12, "float32")
    grad = jax.grad(lambda x: (hadamard(x) ** 3).sum())
    tangent = jax.grad(lambda x: grad(x).sum())(x)
    x, h = np.asarray(x), matrix(12) / 12**0.5
    np.testing.assert_allclose(tangent, (6 * (x @ h) * np.sum(h, 0)) @ h.T, rtol=1e-4, atol=1e-3)


@settings(max_examples=25)
@given(st.sampled_from([8, 12, 40, 128, 192]), st.integers(1, 3), st.integers(0, 99))
def test_lengths_stay_and_the_transpose_undoes_it(order, runs, seed):
    x = jnp.asarray(normal(3, runs * order, seed=seed))
    signs = jnp.sign(jnp.asarray(normal(runs * order, seed=seed)))
    y = hadamard(x, block=order, signs=signs)
    lengths = [np.linalg.norm(np.reshape(a, (3, runs, order)), axis=-1) for a in (x, y)]
    np.testing.assert_allclose(*lengths, rtol=1e-5)
    back = hadamard(y, block=order, signs=signs, transpose=True)
    np.testing.assert_allclose(back, x, rtol=0, atol=1e-5)


@pytest.mark.parametrize("row", ["triton", "xla"])
def test_signs_are_those_of_columns(row):
    x, signs = whole(3, 48, "bfloat16"), np.where(normal(48) > 0, 1, -1).astype(np.float32)
    run = jax.jit(implemented(row, block=12, signs=jnp.asarray(signs)))
    np.testing.assert_array_equal(
        run(x).astype(jnp.float32), defined(x * jnp.asarray(signs, x.dtype)[None], 12)
    )
    back = jax.jit(implemented(row, block=12, signs=jnp.asarray(signs), transpose=True))
    np.testing.assert_array_equal(
        back(x).astype(jnp.float32), defined(x, 12, transpose=True) * signs
    )


@pytest.mark.parametrize("row", ROWS)
def test_axes_before_the_last_are_a_batch(row):
    x = whole(6, 64, "float32").reshape(2, 3, 64)
    wanted = defined(x, 64)
    run = implemented(row)
    np.testing.assert_array_equal(run(x), wanted)
    np.testing.assert_array_equal(jax.jit(jax.vmap(run))(x), wanted)
    np.testing.assert_array_equal(run(x[0, 0]), wanted[0, 0])


def test_the_matrices_of_modelopt_are_those_of_powers_of_two():
    """Its order for 576 is 64, in blocks; ours for the whole axis is 36 times 16."""
    x = whole(2, 576, "float32")
    np.testing.assert_array_equal(hadamard(x, block=576 & -576), sums(x, 64) / np.float32(8))
    assert [largest_order(n) for n in (576, 4096, 336, 7)] == [576, 4096, 16, 1]


# what is chosen, and what is refused


def chosen(device, order=4096, dtype="bfloat16", k=None):
    request = HadamardRequest((4, k or order), dtype, order)
    return find_implementation("hadamard", HADAMARD, request, device).name


def test_the_first_row_that_can_is_taken():
    assert chosen(H200) == chosen(B200) == chosen(H200, 28672) == "triton"
    assert chosen(Device("gpu", "Tesla T4", (7, 5))) == chosen(CPU) == "xla"
    assert chosen(DEVICES["tpu"], 576) == chosen(DEVICES["tpu"], 128, k=512) == "tpu"
    assert chosen(DEVICES["tpu"], dtype="float16") == "xla"
    assert chosen(DEVICES["tpu"], 16, k=512) == chosen(DEVICES["tpu"], 1 << 16) == "xla"


def test_a_row_that_cannot_says_why():
    x = jnp.ones((3, 256), jnp.bfloat16)
    with pytest.raises(Unsupported, match=r"bfloat16 \(3, 256\) in runs of 16 .* needs a CUDA GPU"):
        hadamard(x, block=16, implementation="triton", device=CPU)
    with pytest.raises(Unsupported, match="capability 8.0, not 7.5"):
        hadamard(x, implementation="triton", device=Device("gpu", "Tesla T4", (7, 5)))
    with pytest.raises(Unsupported, match="needs a TPU, not gpu"):
        hadamard(x, implementation="tpu", device=H200)
    tpu = {"implementation": "tpu", "device": DEVICES["tpu"]}
    with pytest.raises(Unsupported, match="whole rows or of a multiple of 128 values, not of 16"):
        hadamard(x, block=16, **tpu)
    with pytest.raises(Unsupported, match="bfloat16 and float32, not float16"):
        hadamard(x.astype(jnp.float16), **tpu)
    with pytest.raises(Unsupported, match="holds runs of 32768 values, not of 65536"):
        hadamard(jnp.ones((1, 1 << 16)), **tpu)


@pytest.mark.parametrize("row", ["xla", "reference"])
def test_no_rows_are_no_trouble(row):
    assert implemented(row)(jnp.ones((0, 64))).shape == (0, 64)
    with pytest.raises(Unsupported, match="no tiles for an empty matrix"):
        implemented("triton")(jnp.ones((0, 64)))
    with pytest.raises(Unsupported, match="not int32"):
        implemented(row)(jnp.ones((3, 64), jnp.int32))


@pytest.mark.parametrize(
    ("shape", "how", "said"),
    [
        ((3, 336), {}, "of order 336 .* or 36 times a power of two; take block=16"),
        ((3, 64), {"block": 48 * 7}, "of order 336 .* take block=16"),
        ((3, 64), {"block": 0}, "of order 0 is known here: orders are 1, 12, 20, 28 or 36 times"),
        ((3, 64), {"block": 12}, r"Runs of 12 values do not fit rows of 64, .* of \(3, 64\)"),
        ((3, 64), {"signs": jnp.ones(16)}, r"signs of shape \(64,\), not \(16,\)"),
        ((), {}, "not one number"),
    ],
)
def test_arrays_that_do_not_belong_together_are_refused(shape, how, said):
    with pytest.raises(ValueError, match=said):
        jax.eval_shape(lambda x: hadamard(x, **how), jnp.ones(shape))
    with pytest.raises(ValueError, match="of order 44 is known here"):
        hadamard_matrix(44)


# programs for devices that are not here


@pytest.mark.parametrize("case", hadamard_cases("cuda"))
@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_kernels_lower(case, platform):
    f, args = hadamard_cases(platform)[case]
    text = lowered(f, args, platform)
    assert TARGETS[platform].call in text
    assert "hadamard" in text


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_batches_and_gradients_lower(platform):
    x = jax.ShapeDtypeStruct((2, 5, 1024), jnp.bfloat16)
    row = TARGETS[platform].row
    run = jax.vmap(lambda x: hadamard(x, implementation=row, device=TARGETS[platform].device))
    loss = jax.value_and_grad(lambda x: run(x).astype(jnp.float32).sum())
    assert TARGETS[platform].call in lowered(loss, (x,), platform)
