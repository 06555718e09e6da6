# SPDX-License-Identifier: Apache-2.0
"""Simulated quantization against slow NumPy written from its equations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.numpy import load_file
from simulated import FLOATS, INTEGERS, NAMES, NVFP4, simulated

from jqx.algorithms.simulate import simulate
from jqx.formats import block_amax, fake_quantize, find_format
from jqx.formats.format import grid_shape

RUN = jax.jit(simulate, static_argnames="fmt")
DTYPES = ("bfloat16", "float16", "float32")
SHAPE = (3, 64)

sizes = st.sampled_from([1e-30, 1e-8, 6e-8, 1e-5, 0.3, 1.0, 7.0, 448.0, 3e4])
values = hnp.arrays(
    np.float32, SHAPE, elements=st.floats(-1, 1, width=32, allow_subnormal=False) | st.just(0.0)
)


def weight(values, size, dtype):
    """A matrix that float32 arithmetic reads as it is."""
    x = (values * np.float32(size)).astype(jnp.dtype(dtype))
    return np.where(np.abs(x.astype(np.float32)) < 1e-36, np.zeros_like(x), x)


def same(got, wanted):
    got = np.asarray(got)
    assert got.dtype == wanted.dtype
    np.testing.assert_array_equal(got.astype(np.float32), wanted.astype(np.float32))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=10)
@given(values=values, size=sizes)
def test_values_follow_the_definition(name, dtype, values, size):
    w = weight(values, size, dtype)
    same(RUN(jnp.asarray(w), find_format(name)), simulated(w, name))


@pytest.mark.parametrize("name", [*INTEGERS, *FLOATS, *NVFP4])
@settings(max_examples=10)
@given(values=values, size=sizes, share=st.floats(0, 1.5, width=32), seed=st.integers(0, 9))
def test_so_they_do_with_scales_that_were_chosen(name, values, size, share, seed):
    w, fmt = weight(values, size, "bfloat16"), find_format(name)
    grid = np.asarray(block_amax(jnp.asarray(w), fmt.block)).reshape(grid_shape(fmt, SHAPE) or ())
    grid = grid * np.random.RandomState(seed).uniform(0.4, 1.6, grid.shape).astype(np.float32)
    grid = np.where(grid < 1e-36, np.float32(0), grid)
    whole = np.float32(max(share, 0.1) * max(grid.max(), 1e-30))
    got = RUN(jnp.asarray(w), fmt, jnp.asarray(grid), jnp.asarray(whole))
    same(got, simulated(w, name, grid, whole))


@pytest.mark.parametrize("name", NVFP4)
@pytest.mark.parametrize("share", [0.3, 1.0, 2.0])
def test_blocks_follow_the_tensor_they_are_in(name, share):
    w = np.random.RandomState(0).standard_normal(SHAPE).astype(jnp.bfloat16)
    whole, fmt = np.float32(share * np.abs(w.astype(np.float32)).max()), find_format(name)
    wanted = simulated(w, name, None, whole)
    same(RUN(jnp.asarray(w), fmt, None, jnp.asarray(whole)), wanted)
    same(RUN(jnp.asarray(w), fmt, jnp.asarray(whole)), wanted)  # the same, said as an amax


def test_it_is_not_what_is_stored():
    w = np.random.RandomState(0).standard_normal((64, 512)).astype(np.float32)
    small = w.copy()
    small[:, :16] *= np.float32(1e-6)
    for name, x in (("fp8_channel", w), ("int8", w), ("nvfp4", small)):
        x = jnp.asarray(x)
        fmt = find_format(name)
        there = np.asarray(fake_quantize(x, fmt))
        assert (np.asarray(RUN(x, fmt)) != there).any(), name
    flushed = np.asarray(RUN(jnp.asarray(small), find_format("nvfp4")))[:, :16]
    assert not flushed.any()


@pytest.mark.parametrize("name", ["mxfp4", "mxfp8", "nf4"])
def test_other_formats_are_rounded_as_they_are_stored(name):
    w = np.random.RandomState(0).standard_normal(SHAPE).astype(np.float32)
    got = RUN(jnp.asarray(w), find_format(name))
    same(got, np.asarray(fake_quantize(jnp.asarray(w), find_format(name))))
    if name in reference.ROWS:
        same(got, reference.decode(w, name))


@pytest.mark.parametrize("name", NAMES)
def test_without_jit_and_in_a_stack(name):
    stack = np.random.RandomState(1).standard_normal((3, *SHAPE)).astype(jnp.bfloat16)
    stack[1, :, :32] = 0
    fmt = find_format(name)
    grids = [block_amax(jnp.asarray(w), fmt.block).reshape(grid_shape(fmt, SHAPE)) for w in stack]
    grids = jnp.stack(grids) * jnp.float32(0.8)
    together = jax.vmap(lambda w, a: simulate(w, fmt, a))(jnp.asarray(stack), grids)
    plain = jax.vmap(lambda w: simulate(w, fmt))(jnp.asarray(stack))
    for i, w in enumerate(stack):
        w = jnp.asarray(w)
        same(simulate(w, fmt, grids[i]), np.asarray(RUN(w, fmt, grids[i])))
        same(together[i], np.asarray(RUN(w, fmt, grids[i])))
        same(simulate(w, fmt), np.asarray(RUN(w, fmt)))
        same(plain[i], np.asarray(RUN(w, fmt)))


def test_blocks_of_two_axes_may_be_smaller_at_the_edges():
    w = np.random.RandomState(0).standard_normal((130, 150)).astype(jnp.bfloat16)
    w[128:] *= 100
    same(RUN(jnp.asarray(w), find_format("fp8_block")), simulated(w, "fp8_block"))


def test_the_reference_tool_kept_scales_that_this_arithmetic_chose(shared):
    """The best of nine clipped scales of a matrix, by the error of simulated values."""
    golden = shared / "golden"
    base, theirs = (load_file(golden / d / "model.safetensors") for d in ("base", "int8_mse"))
    path = "model.layers.0.mlp.down_proj"
    w = base[f"{path}.weight"][:16]
    grid = np.abs(w.astype(np.float32)).max(1, keepdims=True)
    shares = np.linspace(0.25, 4.0, 39).astype(np.float32)
    losses, amaxes = [], []
    for share in shares:
        amax = (grid * share).astype(jnp.bfloat16).astype(np.float32)
        got = np.asarray(RUN(jnp.asarray(w), find_format("int8"), jnp.asarray(amax)))
        losses.append(np.square(w.astype(np.float32) - got.astype(np.float32)).sum(1))
        amaxes.append(amax[:, 0])
    best = np.argmin(losses, 0)
    chosen = np.stack(amaxes)[best, np.arange(16)] / np.float32(127)
    np.testing.assert_array_equal(chosen, theirs[f"{path}.weight_scale"][:16])
