# SPDX-License-Identifier: Apache-2.0
"""SVDQuant: what is taken off and what is left, against float64, and the errors that the reference
tool reached.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from jqx.algorithms import ALGORITHMS, calibrated, finished
from jqx.algorithms.awq import AwqLite, awq_lite
from jqx.algorithms.linear import Linear, stored
from jqx.algorithms.svdquant import SvdQuant, low_rank_off, refitted, svdquant
from jqx.config import Algorithm
from jqx.errors import InputError
from jqx.formats import find_format

OFF = jax.jit(low_rank_off, static_argnames="rank")
RUN = jax.jit(svdquant, static_argnames=("fmt", "params"))
REFIT = jax.jit(refitted, static_argnames=("fmt", "params"))
LITE = jax.jit(awq_lite, static_argnames=("fmt", "params"))
STORED = jax.jit(stored, static_argnames="fmt")
NVFP4 = find_format("nvfp4")


def f32(a):
    return np.asarray(a).astype(np.float32)


def matrix(n, k, seed=0, dtype=jnp.float32):
    """Singular values that fall quickly."""
    r = np.random.RandomState(seed)
    left, right = (np.linalg.qr(r.standard_normal((m, min(n, k))))[0] for m in (n, k))
    return jnp.asarray(left * np.exp(-0.2 * np.arange(min(n, k))) @ right.T, dtype)


def whole(linear):
    """The weight and the product of its factors together."""
    outer, inner = (f32(part).astype(np.float64) for part in linear.low_rank)
    return f32(linear.weight) + outer @ inner


def stats_of(x):
    wide = np.abs(x)
    kinds = {"gram": x.T @ x, "channel_mean": wide.mean(0), "channel_amax": wide.max(0)}
    return {kind: jnp.asarray(value) for kind, value in kinds.items()}


@pytest.mark.parametrize(("n", "k"), [(24, 40), (40, 24)])
def test_the_best_of_its_rank_is_taken_off(n, k):
    w = matrix(n, k)
    got = OFF(Linear(w), 5)
    u, s, v = np.linalg.svd(f32(w).astype(np.float64), full_matrices=False)
    best = u[:, :5] * s[:5] @ v[:5]
    outer, inner = got.low_rank
    assert (outer.shape, inner.shape) == ((n, 5), (5, k))
    np.testing.assert_allclose(f32(outer) @ f32(inner), best, atol=1e-6)
    np.testing.assert_allclose(f32(inner) @ f32(inner).T, np.eye(5), atol=1e-6)  # scales lie in B
    np.testing.assert_allclose(f32(got.weight), f32(w) - best, atol=1e-6)


@pytest.mark.parametrize("rank", [24, 30])
def test_of_full_rank_nothing_is_left(rank):
    w = matrix(24, 40)
    got = OFF(Linear(w), rank)
    assert got.low_rank[0].shape[1] == got.low_rank[1].shape[0] == rank
    np.testing.assert_allclose(f32(got.weight), 0, atol=1e-6)
    np.testing.assert_allclose(whole(got), f32(w), atol=1e-7)
    assert not f32(got.low_rank[0])[:, 24:].any()
    assert not f32(got.low_rank[1])[24:].any()


def test_roundings_of_the_dtype_are_in_the_rest():
    """Factors in bfloat16 are a part in 2^9 off; the rest makes up for that, but for its own
    rounding.
    """
    w = matrix(24, 40, dtype=jnp.bfloat16)
    got = OFF(Linear(w, amax=jnp.ones((24, 1)), tensor_amax=jnp.float32(1)), 8)
    assert {part.dtype for part in (got.weight, *got.low_rank)} == {jnp.dtype(jnp.bfloat16)}
    assert got.amax is None
    assert got.tensor_amax is None
    product = f32(got.low_rank[0]) @ f32(got.low_rank[1])
    rounded = f32(jnp.asarray(product, jnp.bfloat16))
    # bfloat16 of the difference, unless the product lies at a tie
    wanted = f32(jnp.asarray(f32(w) - rounded, jnp.bfloat16))
    assert (f32(got.weight) == wanted).mean() > 0.99
    np.testing.assert_allclose(whole(got), f32(w), atol=2**-8 * np.abs(f32(w)).max())


def test_a_low_rank_part_that_was_there_counts_to_the_weight():
    w = matrix(24, 40)
    again = OFF(OFF(Linear(w), 5), 9)
    np.testing.assert_allclose(f32(again.weight), f32(OFF(Linear(w), 9).weight), atol=1e-6)
    np.testing.assert_allclose(whole(again), f32(w), atol=1e-6)


def test_members_of_a_stack():
    stack = jnp.stack([matrix(24, 40, seed) for seed in range(3)])
    many = jax.jit(jax.vmap(lambda w: low_rank_off(Linear(w), 5)))(stack)
    for i in range(3):
        np.testing.assert_allclose(many.weight[i], OFF(Linear(stack[i]), 5).weight, atol=1e-6)
    eager = low_rank_off(Linear(stack[0]), 5)
    np.testing.assert_allclose(eager.weight, OFF(Linear(stack[0]), 5).weight, atol=1e-6)


def test_the_scales_are_those_of_awq_lite():
    r = np.random.RandomState(1)
    x = (r.standard_normal((200, 64)) * np.exp(r.standard_normal(64))).astype(np.float32)
    w = jnp.asarray(r.standard_normal((16, 64)), jnp.bfloat16)
    params = SvdQuant(lowrank=4, alpha_step=0.25)
    got = RUN(Linear(w), NVFP4, stats_of(x), params)
    smooth = LITE(Linear(w), NVFP4, stats_of(x), AwqLite(alpha_step=0.25))
    assert got.facts["losses"].shape == (5,)
    np.testing.assert_array_equal(f32(got.pre_quant_scale), f32(smooth.pre_quant_scale))
    met = np.abs(x).max(0).astype(jnp.bfloat16).astype(np.float32) * f32(smooth.pre_quant_scale)
    assert float(got.input_amax) == float(met.astype(jnp.bfloat16).max())
    scale = np.abs(f32(smooth.weight)).max()
    np.testing.assert_allclose(whole(got), f32(smooth.weight), atol=2**-8 * scale)
    outer, inner = STORED(got, NVFP4).low_rank
    np.testing.assert_array_equal(f32(outer), f32(got.low_rank[0]))
    np.testing.assert_array_equal(f32(inner), f32(got.low_rank[1]))
    assert ALGORITHMS["svdquant"].needs(NVFP4, params) == ("channel_mean", "channel_amax", "gram")


def drawn(seed=3, tokens=300, n=48, k=64):
    """Inputs some channels of which are large, and a weight in bfloat16."""
    r = np.random.RandomState(seed)
    x = (r.standard_normal((tokens, k)) * np.exp(r.standard_normal(k))).astype(np.float32)
    return x, jnp.asarray(r.standard_normal((n, k)), jnp.bfloat16)


def error_of(linear, w, x):
    """The squared error of the outputs of what is stored, from the inputs themselves."""
    q = STORED(linear, NVFP4)
    outer, inner = (f32(part).astype(np.float64) for part in q.low_rank)
    total = (f32(q.decode(jnp.float32)) + outer @ inner) * f32(q.pre_quant_scale)
    return np.square(x @ (total - f32(w)).T).sum()


@pytest.mark.parametrize("seed", range(4))
def test_the_outer_factor_takes_what_it_can_of_the_error(seed):
    """Of all outer factors beside these codes, to the rounding of bfloat16, the best."""
    x, w = drawn(seed)
    params, known = SvdQuant(lowrank=6), stats_of(x)
    before = RUN(Linear(w), NVFP4, known, params)
    p = f32(before.pre_quant_scale)
    seen = stats_of(x * p)
    got = REFIT(before, NVFP4, seen, params)
    for field in ("weight", "amax", "tensor_amax", "pre_quant_scale", "input_amax"):
        np.testing.assert_array_equal(getattr(got, field), getattr(before, field))
    np.testing.assert_array_equal(f32(got.low_rank[1]), f32(before.low_rank[1]))
    inner = f32(before.low_rank[1]).astype(np.float64)
    rest = whole(before) - f32(STORED(before, NVFP4).decode(jnp.float32))
    inputs = (x * p).astype(np.float64)
    best, *_ = np.linalg.lstsq(inputs @ inner.T, inputs @ rest.T, rcond=None)
    # its own rounding costs in proportion to the factor
    np.testing.assert_allclose(
        f32(got.low_rank[0]), best.T, rtol=2**-7, atol=2**-9 * np.abs(best).max()
    )
    assert error_of(got, w, x) < 0.9 * error_of(before, w, x)


def test_it_stays_where_nothing_is_gained_or_nobody_asks():
    x, w = drawn()
    params = SvdQuant(lowrank=64)
    exact = RUN(Linear(w.astype(jnp.float32)), NVFP4, stats_of(x), params)
    exact = exact._replace(weight=jnp.zeros_like(exact.weight))
    got = REFIT(exact, NVFP4, stats_of(x), params)
    np.testing.assert_array_equal(got.low_rank[0], exact.low_rank[0])
    for other in (SvdQuant(lowrank=6, refit=False), SvdQuant(lowrank=6)):
        linear = RUN(Linear(w), NVFP4, stats_of(x), other)
        steps = (Algorithm.of("svdquant", lowrank=6, refit=other.refit),)
        done = finished(linear, stats_of(x), fmt=NVFP4, steps=steps)
        same = f32(done.low_rank[0]) == f32(linear.low_rank[0])
        assert same.all() == (not other.refit)
    plain = calibrated(Linear(w), {}, fmt=NVFP4, steps=(Algorithm.of("max"),))
    assert finished(plain, {}, fmt=NVFP4, steps=(Algorithm.of("max"),)).low_rank is None


@pytest.mark.parametrize("rank", [40, 70])
def test_factors_with_columns_of_zeros_are_fitted(rank):
    """More columns than the weight has singular values, and fewer tokens than columns."""
    x, w = drawn(tokens=30, n=32)
    params = SvdQuant(lowrank=rank)
    before = RUN(Linear(w), NVFP4, stats_of(x), params)
    got = REFIT(before, NVFP4, stats_of(x * f32(before.pre_quant_scale)), params)
    assert np.isfinite(f32(got.low_rank[0])).all()
    assert error_of(got, w, x) <= error_of(before, w, x)


def test_parameters_out_of_range_are_refused():
    with pytest.raises(InputError, match="lowrank of svdquant is at least 1, not 0"):
        SvdQuant(lowrank=0)
    with pytest.raises(InputError, match="alpha_step"):
        SvdQuant(alpha_step=0.0)


def test_errors_are_near_those_of_the_reference_tool(shared):
    """Of linears that read an input of their own; the others get one factor together."""
    golden = shared / "golden"
    said = json.loads((golden / "nvfp4_svdquant" / "golden.json").read_text())["output_error"]
    base = load_file(golden / "base" / "model.safetensors")
    acts = load_file(golden / "acts.safetensors")
    for module in (m for m in said if m.endswith(("o_proj", "down_proj"))):
        w = base[f"{module}.weight"]
        seen = [f32(v) for name, v in acts.items() if name.split("|")[0] == module]
        batches = [v.reshape(-1, w.shape[1]) for v in seen]
        x = np.concatenate(batches)
        means = [f32(np.abs(b).mean(0).astype(w.dtype)) for b in batches]
        stats = stats_of(x) | {"channel_mean": jnp.asarray(np.mean(means, 0))}
        q = STORED(RUN(Linear(jnp.asarray(w)), NVFP4, stats, SvdQuant()), NVFP4)
        outer, inner = map(f32, q.low_rank)
        total = (f32(q.decode(jnp.float32)) + outer @ inner) * f32(q.pre_quant_scale)
        off = np.square(x @ (total - f32(w)).T).sum() / np.square(x @ f32(w).T).sum()
        assert off <= 1.01 * said[module], module
