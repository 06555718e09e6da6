# SPDX-License-Identifier: Apache-2.0
"""AWQ against slow NumPy written from ModelOpt's definition, with the errors of outputs on the
tokens themselves in place of those from second moments; and its properties.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from simulated import rounded, simulated

from jqx.algorithms import Linear, calibrated
from jqx.algorithms.awq import AwqClip, AwqFull, AwqLite, awq_clip, awq_full, awq_lite
from jqx.algorithms.linear import stored
from jqx.algorithms.table import ALGORITHMS
from jqx.config import Algorithm
from jqx.errors import InputError
from jqx.formats import find_format

LITE = jax.jit(awq_lite, static_argnames=("fmt", "params"))
CLIP = jax.jit(awq_clip, static_argnames=("fmt", "params"))
FULL = jax.jit(awq_full, static_argnames=("fmt", "params"))
STORED = jax.jit(stored, static_argnames="fmt")
DTYPES = ("bfloat16", "float16", "float32")
N, K, BATCHES, TOKENS = 12, 64, 2, 40


def problem(seed=0, n=N, k=K, dtype="bfloat16"):
    """A weight, and batches of inputs of which a few channels are far larger than the others."""
    r = np.random.RandomState(seed)
    loud = np.exp(1.2 * r.standard_normal(k))
    mixed = r.standard_normal((BATCHES, TOKENS, k)) @ (np.eye(k) + r.standard_normal((k, k)) / 8)
    w = r.standard_normal((n, k)) * np.exp(r.standard_normal((n, 1)) / 2)
    return w.astype(np.float32).astype(jnp.dtype(dtype)), (mixed * loud).astype(jnp.dtype(dtype))


def f32(a):
    return np.asarray(a).astype(np.float32)


def stats_of(x, *, second="gram"):
    """The statistics of batches of inputs, by their definition."""
    flat, dtype = f32(x).reshape(-1, x.shape[-1]), x.dtype
    means = [rounded(np.abs(f32(batch)).mean(0, dtype=np.float64), dtype) for batch in x]
    found = {
        "channel_mean": np.sum(means, 0) / np.float32(len(means)),
        "channel_amax": np.abs(flat).max(0),
        "gram": flat.T @ flat,
        "root": flat,
    }
    kinds = ("channel_mean", "channel_amax", second)
    return {kind: jnp.asarray(found[kind], jnp.float32) for kind in kinds}


def column_magnitudes(w, name):
    """Every magnitude as a share of the largest of its block, and their mean over rows."""
    size, x, dtype = {"int4_b32": 32, "nvfp4": 16}.get(name, K), np.abs(f32(w)), w.dtype
    tiny = np.float32(jnp.finfo(dtype).tiny)
    share = np.zeros_like(x)
    for _, _, s in reference.blocks(x.shape, 1, size):
        share[s] = rounded(x[s] / rounded(x[s].max() + tiny, dtype), dtype)
    return rounded(share.sum(0) / np.float32(len(x)), dtype)


def scales_at(x, w, alpha):
    a = np.float64(np.float32(alpha))
    top = (x.astype(np.float64) ** a).astype(np.float32)
    below = (w.astype(np.float64) ** (1 - a)).astype(np.float32) + np.float32(2.0**-126)
    s = np.clip(top / below, np.float32(1e-4), np.float32(1e4))
    return s / np.sqrt(s.max() * s.min())


def lite_by_hand(w, x, name, alphas):
    """The losses of all `alphas` on the tokens, and the pre_quant_scale, the weight and the amax of
    inputs that the first of the smallest leaves.
    """
    stats, dtype, wide = stats_of(x), w.dtype, f32(w)
    mean, losses = f32(stats["channel_mean"]), []
    flat = f32(x).reshape(-1, x.shape[-1]).astype(np.float64)
    for alpha in alphas:
        s = scales_at(mean, column_magnitudes(w, name), alpha)
        q = simulated(rounded(wide * rounded(s, dtype), dtype).astype(dtype), name)
        out = (flat * rounded(np.float32(1) / s, dtype)) @ f32(q).astype(np.float64).T
        losses.append(np.square(out - flat @ wide.T).sum())
    best = int(np.argmin(losses))
    p = np.float32(1) / scales_at(mean, column_magnitudes(w, name), alphas[best])
    amax = rounded((f32(stats["channel_amax"]) * p).max(), dtype)
    weight = rounded(wide * (np.float32(1) / p), dtype)
    return losses, best, rounded(p, dtype), weight, amax


def near(got, wanted, dtype):
    """Equal but for what the last bit of a power does to a few."""
    step = float(jnp.finfo(jnp.dtype(dtype)).eps)
    np.testing.assert_allclose(f32(got), wanted, rtol=max(step, 1e-6), atol=0)
    if dtype != "float32":
        assert (f32(got) == wanted).mean() > 0.98


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["int4_b32", "nvfp4", "int8"])
@pytest.mark.parametrize("seed", [0, 1])
def test_lite_follows_the_definition(seed, name, dtype):
    w, x = problem(seed, dtype=dtype)
    got = LITE(Linear(jnp.asarray(w)), find_format(name), stats_of(x), AwqLite())
    alphas = np.arange(11) * 0.1
    losses, best, p, weight, amax = lite_by_hand(w, x, name, alphas)
    assert f32(got.facts["alpha"]) == np.float32(alphas[best])
    np.testing.assert_allclose(f32(got.facts["losses"]), losses, rtol=2e-3)
    assert got.weight.dtype == got.pre_quant_scale.dtype == dtype
    near(got.pre_quant_scale, p, dtype)
    near(got.weight, weight, dtype)
    near(got.input_amax, amax, dtype)
    assert got.amax is got.tensor_amax is None


@pytest.mark.parametrize("name", ["int4_b32", "nvfp4"])
def test_the_tokens_do_as_well_as_their_second_moments(name):
    w, x = problem()
    one, other = (
        LITE(Linear(jnp.asarray(w)), find_format(name), stats_of(x, second=kind), AwqLite())
        for kind in ("gram", "root")
    )
    np.testing.assert_allclose(one.facts["losses"], other.facts["losses"], rtol=1e-4)
    for field in ("weight", "pre_quant_scale", "input_amax"):
        np.testing.assert_array_equal(f32(getattr(one, field)), f32(getattr(other, field)))


@pytest.mark.parametrize(("step", "count"), [(0.1, 11), (0.05, 21), (0.25, 5), (0.3, 5), (1.0, 2)])
def test_every_alpha_of_the_grid_is_tried(step, count):
    w, x = problem()
    fmt = find_format("int4_b32")
    got = LITE(Linear(jnp.asarray(w)), fmt, stats_of(x), AwqLite(alpha_step=step))
    assert got.facts["losses"].shape == (count,)
    assert got.facts["alpha"] == np.float32(step) * int(np.argmin(got.facts["losses"]))


@pytest.mark.parametrize("name", ["int4_b32", "nvfp4", "int8"])
def test_channels_that_are_alike_leave_the_nearest(name):
    """Every row holds the same magnitudes, and all channels are equally loud."""
    row = np.arange(1, 33)
    w = np.stack([np.tile(np.roll(row, i), 2) for i in range(32)]) * np.float32(0.125)
    w = jnp.asarray(w * np.where(np.random.RandomState(0).rand(32, 64) < 0.5, -1, 1), jnp.bfloat16)
    x = np.where(np.random.RandomState(1).rand(BATCHES, TOKENS, 64) < 0.5, -3, 3)
    fmt = find_format(name)
    fmt = fmt if name != "nvfp4" else find_format("nvfp4_b32")
    got = LITE(Linear(w), fmt, stats_of(x.astype(jnp.bfloat16)), AwqLite(alpha_step=1.0))
    np.testing.assert_array_equal(f32(got.pre_quant_scale), 1)
    assert got.facts["losses"][0] == got.facts["losses"][1]
    assert got.facts["alpha"] == 0  # the first of equals
    assert got.input_amax == 3
    mine, plain = (STORED(Linear(weight), fmt) for weight in (got.weight, w))
    for a, b in zip(jax.tree.leaves(mine), jax.tree.leaves(plain), strict=True):
        np.testing.assert_array_equal(f32(a), f32(b))


def test_channels_that_were_never_met_or_used():
    for name in ("int4_b32", "nvfp4"):
        w, x = problem()
        x[..., 5] = 0
        w[:, 9] = 0
        w[3] = 0
        w[4, :32] = 0
        got = FULL(
            Linear(jnp.asarray(w)), find_format(name), stats_of(x), AwqFull(shrink_step=0.25)
        )
        for value in (got.weight, got.pre_quant_scale, got.facts["losses"]):
            assert np.isfinite(f32(value)).all()
        assert (f32(got.pre_quant_scale) > 0).all()
        assert not f32(got.weight)[3].any()
        assert not f32(got.weight)[:, 9].any()
        decoded = STORED(got._replace(facts={}), find_format(name)).decode(jnp.float32)
        assert np.isfinite(decoded).all()


def test_full_is_lite_then_clip():
    moved = 0
    for name, seed in (("int4_b32", 0), ("nvfp4", 1), ("nvfp4", 2), ("nvfp4", 3)):
        w, x = problem(seed)
        fmt = find_format(name)
        lite = LITE(Linear(jnp.asarray(w)), fmt, stats_of(x), AwqLite())
        p = f32(lite.pre_quant_scale)
        seen = {"gram": jnp.asarray(f32(stats_of(x)["gram"]) * p[:, None] * p[None, :])}
        clip = CLIP(lite, fmt, seen, AwqClip())
        full = FULL(Linear(jnp.asarray(w)), fmt, stats_of(x), AwqFull())
        for field in ("weight", "pre_quant_scale", "amax", "tensor_amax"):
            mine, wanted = getattr(full, field), getattr(clip, field)
            assert (mine is None) == (wanted is None)
            if mine is not None:
                np.testing.assert_array_equal(f32(mine), f32(wanted))
        # clipping meets inputs times the factor that is stored
        met = rounded(np.abs(f32(x)).reshape(-1, K).max(0) * p, w.dtype)
        assert full.input_amax == met.max()
        moved += int(full.input_amax != lite.input_amax)
    assert moved
    channels = FULL(Linear(jnp.asarray(w)), find_format("int8"), stats_of(x), AwqFull())
    lite = LITE(Linear(jnp.asarray(w)), find_format("int8"), stats_of(x), AwqLite())
    assert channels.input_amax == lite.input_amax


def test_without_jit_and_in_a_stack():
    problems = [problem(seed, n=4) for seed in range(3)]
    w = jnp.stack([jnp.asarray(w) for w, _ in problems])
    stats = jax.tree.map(lambda *rows: jnp.stack(rows), *(stats_of(x) for _, x in problems))
    for name in ("int4_b32", "nvfp4"):
        fmt = find_format(name)

        def one(w, stats, fmt=fmt):
            return awq_full(Linear(w), fmt, stats, AwqFull(alpha_step=1.0, shrink_step=0.5))

        compiled, together = jax.jit(one), jax.jit(jax.vmap(one))(w, stats)
        for i in range(3):
            row = jax.tree.map(lambda a, i=i: a[i], stats)
            alone = compiled(w[i], row)
            again = jax.tree.map(lambda a, i=i: a[i], together)
            for mine in (again, one(w[i], row)) if i == 0 else (again,):
                for a, b in zip(jax.tree.leaves(mine), jax.tree.leaves(alone), strict=True):
                    np.testing.assert_allclose(f32(a), f32(b), rtol=1e-5)


def test_a_second_step_starts_where_the_first_ended():
    w, x = problem()
    steps = (Algorithm.of("smoothquant", alpha=0.5), Algorithm.of("awq_lite"))
    linear = Linear(jnp.asarray(w, jnp.float32))
    got = calibrated(linear, stats_of(x), fmt=find_format("int8"), steps=steps)
    back = f32(got.weight) * f32(got.pre_quant_scale)
    np.testing.assert_allclose(back, f32(w), rtol=1e-5)
    met = np.abs(f32(x)).reshape(-1, K).max(0) * f32(got.pre_quant_scale)
    assert got.input_amax == pytest.approx(met.max(), rel=1e-5)


NEEDS = {
    ("awq_lite", "int4_b32"): ("channel_mean", "channel_amax", "gram"),
    ("awq_lite", "int8"): ("channel_mean", "channel_amax", "gram"),
    ("awq_clip", "int4_b32"): ("gram",),
    ("awq_clip", "nvfp4"): ("gram",),
    ("awq_full", "nvfp4"): ("channel_mean", "channel_amax", "gram"),
}


@pytest.mark.parametrize(("method", "name"), NEEDS)
def test_missing_statistics_are_named(method, name):
    w, x = problem()
    row, fmt = ALGORITHMS[method], find_format(name)
    assert row.needs(fmt, row.params()) == NEEDS[method, name]
    for kind in row.needs(fmt, row.params()):
        stats = {k: v for k, v in stats_of(x).items() if k != kind}
        with pytest.raises(InputError, match=rf"needs .*'{kind}'.*are: ") as caught:
            row.run(Linear(jnp.asarray(w)), fmt, stats, row.params())
        assert "\n" not in str(caught.value)
        assert "Calibrate for awq" in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "bad"),
    [
        *((kind, {"alpha_step": v}) for kind in (AwqLite, AwqFull) for v in (0.0, -0.1, 1.5)),
        *((kind, {"min_clip_ratio": v}) for kind in (AwqClip, AwqFull) for v in (0.0, 1.1)),
        *((kind, {"shrink_step": v}) for kind in (AwqClip, AwqFull) for v in (0.0, 2.0)),
        (AwqLite, {"alpha_step": float("nan")}),
        (AwqClip, {"min_clip_ratio": float("nan")}),
    ],
    ids=str,
)
def test_parameters_out_of_range_are_refused(kind, bad):
    (name, value), *_ = bad.items()
    with pytest.raises(InputError, match=rf"^{name} is {value}; give a number in \(0, 1\]$"):
        kind(**bad)


def test_a_loss_that_overflows_is_not_chosen():
    """Scaled up, a float16 weight is infinite for some alphas."""
    r = np.random.RandomState(0)
    w = r.standard_normal((16, 32)).astype(np.float16)
    w[:, 1] *= 30
    x = r.standard_normal((64, 32)).astype(np.float32)
    x[:, 1] *= 2e3
    x[:, 5] = 0
    stats = {
        "channel_mean": jnp.asarray(np.abs(x).mean(0)),
        "channel_amax": jnp.asarray(np.abs(x).max(0)),
        "gram": jnp.asarray(x.T @ x),
    }
    step = (Algorithm("awq_lite"),)
    found = calibrated(Linear(jnp.asarray(w)), stats, fmt=find_format("int4_b16"), steps=step)
    assert not np.isfinite(np.asarray(found.facts["losses"])).all()
    assert np.isfinite(found.facts["loss"])
    assert np.isfinite(np.asarray(found.weight)).all()
