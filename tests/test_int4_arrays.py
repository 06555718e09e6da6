# SPDX-License-Identifier: Apache-2.0
"""The arrays of AutoAWQ and GPTQ against their definitions, bit by bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jqx
from jqx.algorithms.linear import Linear
from jqx.algorithms.shared import half_scaled
from jqx.config import Choice
from jqx.formats import find_format
from jqx.tensors import QTensor
from jqx_interop.targets import TARGETS

NAMES = ("awq", "gptq", "gptq-v1")
ORDER = {"awq": (0, 2, 4, 6, 1, 3, 5, 7), "gptq": range(8), "gptq-v1": range(8)}
STORED_ZERO = {"awq": 0, "gptq": 0, "gptq-v1": -1}
F32 = np.dtype("f4")


def word(codes, order):
    """Eight codes in one int32."""
    found = sum(int(codes[place]) << (4 * i) for i, place in enumerate(order))
    return np.uint32(found).view(np.int32)


def defined(name, codes, zeros, scales):
    """The arrays of unsigned codes [n, k] with zero points and scales [n, blocks]."""
    (n, k), blocks, order = codes.shape, zeros.shape[1], ORDER[name]
    if name == "awq":
        qweight = [[word(codes[j : j + 8, i], order) for j in range(0, n, 8)] for i in range(k)]
    else:
        qweight = [[word(codes[j, i : i + 8], order) for j in range(n)] for i in range(0, k, 8)]
    kept = zeros + STORED_ZERO[name]
    qzeros = [[word(kept[j : j + 8, b], order) for j in range(0, n, 8)] for b in range(blocks)]
    found = {"qweight": np.int32(qweight), "qzeros": np.int32(qzeros)}
    found["scales"] = scales.T.astype(np.float16)
    if name != "awq":
        found["g_idx"] = np.int32([i // (k // blocks) for i in range(k)])
    return found


def drawn(seed, n, k, block):
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 16, (n, k))
    scales = rng.uniform(1e-3, 1, (n, k // block)).astype(np.float16).astype(np.float32)
    return codes, rng.integers(1, 16, scales.shape), scales


def choice_of(block):
    return Choice(weight="int4" if block == 128 else f"int4_b{block}")


SHAPES = st.sampled_from([(8, 128, 128), (16, 64, 32), (24, 256, 128), (8, 32, 8), (64, 96, 32)])


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), shape=SHAPES)
def test_arrays_follow_the_definition(name, seed, shape):
    n, k, block = shape
    codes, _, scales = drawn(seed, n, k, block)
    wanted = defined(name, codes, np.full(scales.shape, 8), scales)
    values = (codes - 8) * np.repeat(scales, block, axis=1)
    q = TARGETS[name].gathered(wanted, choice_of(block), (n, k), F32)
    assert q.low_rank is None
    np.testing.assert_array_equal(jax.jit(lambda q: q.decode(jnp.float32))(q), values)
    named = {leaf.removeprefix("a."): a for leaf, a in TARGETS[name].named("a", q).items()}
    assert {leaf: a.tobytes() for leaf, a in named.items()} == {
        leaf: a.tobytes() for leaf, a in wanted.items()
    }
    promised = TARGETS[name].outputs("a", choice_of(block), (n, k), F32, False)
    assert [(t.name, t.shape) for t in promised] == [(f"a.{k}", a.shape) for k, a in named.items()]


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), shape=SHAPES)
def test_other_zero_points_mean_the_same_matrix(name, seed, shape):
    n, k, block = shape
    codes, zeros, scales = drawn(seed, n, k, block)
    given_arrays = defined(name, codes, zeros, scales)
    values = (codes - np.repeat(zeros, block, axis=1)) * np.repeat(scales, block, axis=1)
    q = TARGETS[name].gathered(given_arrays, choice_of(block), (n, k), F32)
    q = jax.tree.map(jnp.asarray, q)
    assert TARGETS[name].shifted(given_arrays) == bool(np.any(zeros != 8))
    x = np.random.default_rng(seed).standard_normal((2, k)).astype(np.float32)
    out = jax.jit(jqx.quantized(lambda p, x: x @ p["w"].T))({"w": q}, x)
    np.testing.assert_allclose(out, x @ values.T, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("run", [half_scaled, jax.jit(half_scaled, static_argnames="fmt")])
@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), size=st.floats(2.0**-30, 2.0**16))
def test_scales_are_numbers_of_float16_that_are_nearest(run, seed, size):
    fmt = find_format("int4_b32")
    w = (np.random.default_rng(seed).standard_normal((16, 64)) * size).astype(np.float32)
    w[0] = 0
    linear = run(Linear(jnp.asarray(w)), fmt=fmt)
    q = QTensor.quantize(jnp.asarray(w), fmt, linear.amax)
    found = np.asarray(q.scale)
    np.testing.assert_array_equal(found.astype(np.float16).astype(np.float32), found)
    wanted = np.abs(w.reshape(16, 2, 32)).max(-1) / np.float32(7)
    clipped = np.clip(wanted.astype(np.float16), np.float16(2.0**-24), np.float16(65504))
    np.testing.assert_array_equal(found[1:], clipped.astype(np.float32)[1:])
    assert np.all(found > 0)
    assert not np.asarray(q.decode())[0].any()


def test_codes_that_do_not_fill_words(tmp_path):
    problem = TARGETS["awq"].lacks(Choice(weight="int4_b4"), (12, 16))
    assert problem.startswith("awq packs 8 codes together, and 8 does not divide both axes of 12 x")
