# SPDX-License-Identifier: Apache-2.0
"""Products of a few rows are those of the decoded weight, whole or in parts, for every format."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jqx
from jqx.formats import FORMATS
from jqx.models import BF16, FLOAT32, thin
from jqx.transforms import quantized

CONTRACT = (((1,), (1,)), ((), ()))


def product(params, x):
    return jax.lax.dot_general(
        x, params["w"].astype(x.dtype), CONTRACT, preferred_element_type=jnp.float32
    )


def run(w, x, compute=FLOAT32):
    params = {"w": w}
    return jax.jit(quantized(product, product=thin.few_rows(params, compute)))(params, x)


def drawn(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@cache
def stored(name):
    w = jnp.asarray(drawn((384, 256)), jnp.bfloat16)
    return jax.jit(partial(jqx.QTensor.quantize, fmt=name))(w)


@pytest.mark.parametrize("at_once", [1 << 20, 1 << 10], ids=["whole", "parts"])
@pytest.mark.parametrize("name", [*FORMATS, "int4_b32"])
def test_stored_weights(name, at_once, monkeypatch):
    """12 parts at the most, fewer where blocks span rows; one row and several."""
    monkeypatch.setattr(thin, "AT_ONCE", at_once)
    monkeypatch.setattr(thin, "MOST", 4 * at_once)
    q, x = stored(name), drawn((5, 256), 1)
    assert (thin._parts(q) > 1) == (at_once < q.size)
    wanted = x.astype(np.float64) @ np.asarray(q.decode(), np.float64).T

    def both(params, x):
        by = quantized(product, product=thin.few_rows(params, FLOAT32))
        return by(params, x[:1]), by(params, x)

    one, several = jax.jit(both)({"w": q}, jnp.asarray(x))
    np.testing.assert_allclose(one, wanted[:1], atol=3e-5)
    np.testing.assert_allclose(several, wanted, atol=3e-5)


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("k", [64, 66, 65, 67])
def test_plain_weights_of_any_width(k, rows):
    """Columns in 8, 6 and 5 slices, and a prime number of them."""
    w, x = jnp.asarray(drawn((10, k)), jnp.bfloat16), drawn((rows, k), 1)
    wanted = x.astype(np.float64) @ np.asarray(w, np.float64).T
    np.testing.assert_allclose(run(w, jnp.asarray(x)), wanted, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_weights_of_other_dtypes(dtype):
    w, x = jnp.asarray(drawn((10, 64)), dtype), drawn((2, 64), 1)
    q = jax.jit(partial(jqx.QTensor.quantize, fmt="int8"))(w)
    for stored, dense in ((w, w), (q, q.decode())):
        wanted = x.astype(np.float64) @ np.asarray(dense, np.float64).T
        for rows in (1, 2):
            got = run(stored, jnp.asarray(x[:rows]))
            np.testing.assert_allclose(got, wanted[:rows], atol=1e-5)


def test_rows_of_any_size_are_exact():
    """A row is taken apart into numbers whose sum it is, so only sums are rounded."""
    x = drawn((2, 64), 1) * 10.0 ** drawn((2, 64), 2) * 1e6
    w = np.zeros((64, 64), np.float32)
    w[np.arange(64), np.arange(64)] = 1.5
    got = run(jnp.asarray(w, jnp.bfloat16), jnp.asarray(x))
    np.testing.assert_array_equal(got, x * np.float32(1.5))


def test_bfloat16_rows():
    """Rows that are bfloat16 numbers already, in arrays of either dtype."""
    w, x = jnp.asarray(drawn((10, 64)), jnp.bfloat16), jnp.asarray(drawn((3, 64), 1), jnp.bfloat16)
    wanted = np.asarray(x, np.float64) @ np.asarray(w, np.float64).T
    for rows in (1, 3):
        for carried in (x, x.astype(jnp.float32)):
            np.testing.assert_allclose(run(w, carried[:rows], BF16), wanted[:rows], atol=1e-5)


def test_rows_that_no_part_divides():
    """A prime number of rows is one part; blocks of rows that are not whole are, too."""
    for name, n in (("int8", 131), ("fp8_block", 200)):
        q = jqx.QTensor.quantize(jnp.asarray(drawn((n, 128))), name)
        x = drawn((1, 128), 1)
        wanted = x.astype(np.float64) @ np.asarray(q.decode(), np.float64).T
        np.testing.assert_allclose(run(q, jnp.asarray(x)), wanted, atol=3e-5)


def test_a_scale_of_the_input_comes_first():
    q = jqx.QTensor.quantize(jnp.asarray(drawn((8, 64)), jnp.bfloat16), "fp8")
    q = q.replace(input_format="fp8", input_scale=jnp.float32(0.5))
    x = jnp.asarray(drawn((1, 64), 1))
    wanted = jax.jit(quantized(product))({"w": q}, x)
    np.testing.assert_allclose(run(q, x), wanted, atol=1e-5)
    assert not np.allclose(run(q.replace(input_format=None), x), wanted, atol=1e-2)


def test_other_products_are_left_alone():
    """More rows, other axes, weights stored [in, out]."""
    w = jnp.asarray(drawn((64, 32)), jnp.bfloat16)
    x = jnp.asarray(drawn((thin.FEW + 1, 32), 1))
    np.testing.assert_array_equal(run(w, x), jax.jit(product)({"w": w}, x))
    params = {"w": w}
    by = quantized(product, product=lambda met: asked.append(few(met)) or asked[-1])
    few, asked = thin.few_rows(params, FLOAT32), []
    jax.eval_shape(by, params, x)
    jax.eval_shape(by, params, x[:-1])
    assert [found is None for found in asked] == [True, False]
    flax = {"w": jqx.QTensor.quantize(w, "int8", axis=0)}
    by = quantized(lambda p, x: x @ p["w"], product=thin.few_rows(flax, FLOAT32))
    x = w[:, 0][None]
    np.testing.assert_allclose(jax.jit(by)(flax, x), x @ flax["w"].decode(), atol=1e-4)


@pytest.mark.parametrize("name", ["int4", "nvfp4", "fp8", "int8", None])
def test_members_of_stacks(name):
    """One that the program finds out, of stored and of plain stacks."""
    w = jnp.asarray(drawn((3, 64, 256)), jnp.bfloat16)
    stack = w if name is None else jqx.QTensor.quantize(w, name, stack=(0,))
    x, e = jnp.asarray(drawn((1, 256), 1)), jnp.int32(2)

    def chosen(params, x, e):
        member = jax.lax.dynamic_index_in_dim(params["w"], e, keepdims=False)
        return product({"w": member}, x)

    params = {"w": stack}
    run = jax.jit(quantized(chosen, product=thin.few_rows(params, FLOAT32)))
    dense = w if name is None else stack.decode()
    wanted = np.asarray(x, np.float64) @ np.asarray(dense[2], np.float64).T
    np.testing.assert_allclose(run(params, x, e), wanted, atol=3e-5)
    how = str(jax.make_jaxpr(run)(params, x, e))
    assert ("optimization_barrier" in how) == (name in ("int4", "nvfp4"))
