# SPDX-License-Identifier: Apache-2.0
"""mse beside a slow search in NumPy written from the formulas, and beside what ModelOpt exports."""

from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import reference
from test_golden_formats import group_amax, read

from jqx.algorithms import Linear, calibrated, stored
from jqx.algorithms.mse import Mse, mse
from jqx.config import Algorithm
from jqx.errors import InputError
from jqx.formats import find_format, grid_shape

BFLOAT16 = ml_dtypes.bfloat16
SWEEP = {"fp8_scale_sweep": True}
FOUR_OR_SIX = {"start_multiplier": 1.0, "stop_multiplier": 1.5, "step_size": 0.5}
RUN = jax.jit(mse, static_argnums=(1, 3))


def weight(shape=(6, 256), dtype=BFLOAT16):
    """Rows of very different size, an outlier, a block and a row of zeros."""
    r = np.random.RandomState(3)
    w = r.standard_t(4, shape) * np.exp(r.standard_normal((shape[0], 1))) * 0.02
    w[1, :130] = 0
    w[2] = 0
    w[3, 7] = 0.6
    return w.astype(np.float32).astype(dtype)


# Simulated rounding, spec sections 2.1: x and amax float32 of one shape.


def integer(bound, x, a, whole):
    none = a <= 2.0**-24
    s = np.where(none, 0, np.float32(bound) / np.where(none, 1, a)).astype(np.float32)
    q = np.clip(np.rint(x * s), -bound - 1, bound)
    return q / np.where(none, np.float32(1), s)


def e4m3(x):
    return np.copysign(reference.E4M3[reference.nearest(reference.E4M3, np.abs(x))], x)


def float8(x, a, whole):
    s = np.float32(1) / np.where(a <= 2.0**-24, np.float32(1), a) * np.float32(448)
    return e4m3(x * s).astype(np.float32) * (np.float32(1) / s)


def float4(top, x, a, whole):
    s = float8(a / np.float32(6), np.float32(whole) * np.float32(448 / top) / np.float32(6), None)
    safe = np.where(s == 0, np.float32(1), s)
    q = reference.E2M1[reference.nearest(reference.E2M1, np.abs(x) / safe)].astype(np.float32)
    return np.copysign(q * s, x).astype(np.float32)


SIMULATED = {
    "int8": partial(integer, 127),
    "int4": partial(integer, 7),
    "fp8": float8,
    "fp8_channel": float8,
    "fp8_block": float8,
    "nvfp4": partial(float4, 448),
    "nvfp4_46": partial(float4, 256),
}


def spread(grid, fmt, shape):
    """Every scale where it counts."""
    rows, cols = (b or n for b, n in zip(fmt.block, shape, strict=True))
    full = np.repeat(np.repeat(grid, rows, 0), cols, 1)
    return full[: shape[0], : shape[1]]


def per_scale(x, fmt, reduce):
    """`reduce` of what shares a scale."""
    rows, cols = (b or n for b, n in zip(fmt.block, x.shape, strict=True))
    return np.array(
        [
            [reduce(x[i : i + rows, j : j + cols]) for j in range(0, x.shape[1], cols)]
            for i in range(0, x.shape[0], rows)
        ]
    )


def tried(w, fmt, params, whole):
    """All the grids of amaxes, in order."""
    largest = per_scale(np.abs(w.astype(np.float32)), fmt, np.max)
    if params.fp8_scale_sweep:
        codes = reference.E4M3[1:].astype(np.float32)
        return [np.full_like(largest, np.float32(whole) * (c / np.float32(448))) for c in codes]
    count = 1 + int(np.ceil((params.stop_multiplier - params.start_multiplier) / params.step_size))
    span = np.linspace(params.start_multiplier, params.stop_multiplier, count, dtype=np.float32)
    exact = fmt.name == "fp8" or fmt.name == "nvfp4_46"
    return [(largest * m).astype(np.float32 if exact else w.dtype).astype(np.float32) for m in span]


def losses_of(w, fmt, grids, whole, cost=np.sum):
    """The loss of every scale in every grid, [grids, ...], in float64."""
    x, found = w.astype(np.float32), []
    for grid in grids:
        y = SIMULATED[fmt.name](x, spread(grid, fmt, x.shape), whole)
        found.append(per_scale((x - y).astype(np.float64) ** 2, fmt, cost))
    return np.array(found)


CASES = [
    ("int8", {}),
    ("int4", {}),
    ("fp8", {}),
    ("fp8_channel", {"start_multiplier": 0.5, "stop_multiplier": 1.0, "step_size": 0.07}),
    ("fp8_block", {}),
    ("nvfp4_46", FOUR_OR_SIX),
    ("nvfp4", SWEEP),
]


@pytest.mark.parametrize("dtype", [BFLOAT16, np.float32], ids=["bf16", "f32"])
@pytest.mark.parametrize(("name", "given"), CASES)
def test_the_search_follows_the_definition(name, given, dtype):
    w, fmt, params = weight(dtype=dtype), find_format(name), Mse(**given)
    whole = np.float32(np.abs(w.astype(np.float32)).max())
    found = RUN(Linear(jnp.asarray(w)), fmt, {}, params)
    assert found.amax.shape == grid_shape(fmt, w.shape)
    grids = tried(w, fmt, params, whole)
    losses = losses_of(w, fmt, grids, whole)
    best = losses.argmin(0)
    wanted = np.take_along_axis(np.array(grids), best[None], 0)[0].reshape(found.amax.shape)
    wanted = wanted if "nvfp4" in name else wanted.astype(dtype).astype(np.float32)
    # scales that cost the same but for the last bits of a float32 are as good
    sure = np.sort(losses, 0)[1] > losses.min(0) * (1 + 1e-5)
    sure |= losses.max(0) == 0
    sure = sure.reshape(found.amax.shape)
    assert sure.mean() > 0.9
    np.testing.assert_array_equal(np.asarray(found.amax)[sure], wanted[sure])


@pytest.mark.parametrize(("name", "given"), CASES)
def test_jit_eager_and_stacks_agree(name, given):
    fmt, params = find_format(name), Mse(**given)
    stack = jnp.stack([jnp.asarray(weight()), jnp.asarray(weight()[::-1] * 2)])
    together = jax.vmap(lambda w: mse(Linear(w), fmt, {}, params).amax)(stack)
    for w, amax in zip(stack, together, strict=True):
        np.testing.assert_array_equal(RUN(Linear(w), fmt, {}, params).amax, amax)
        np.testing.assert_array_equal(mse(Linear(w), fmt, {}, params).amax, amax)


@pytest.mark.parametrize(
    ("name", "given"),
    [("nvfp4", {}), ("mxfp4", {}), ("int4_fp8", {}), ("int8", SWEEP), ("mxfp8", SWEEP)],
)
def test_other_formats_keep_their_largest_magnitudes(name, given):
    linear = Linear(jnp.asarray(weight()), amax=jnp.ones(3), tensor_amax=jnp.float32(4))
    found = RUN(linear, find_format(name), {}, Mse(**given))
    assert found.amax is None
    assert found.tensor_amax == 4


def test_a_tensor_scale_that_is_shared_stays():
    linear = Linear(jnp.asarray(weight()), tensor_amax=jnp.float32(3))
    found = RUN(linear, find_format("nvfp4"), {}, Mse(fp8_scale_sweep=True))
    assert found.tensor_amax == 3
    fractions = np.asarray(found.amax) / np.float32(3) * 448
    codes = np.asarray(stored(found, find_format("nvfp4")).scale).astype(np.float32)
    np.testing.assert_allclose(codes, fractions, rtol=1e-6)


@pytest.mark.parametrize(
    "given",
    [
        {"start_multiplier": 0.0},
        {"start_multiplier": 2.0, "stop_multiplier": 1.0},
        {"step_size": 0.0},
        {"stop_multiplier": float("inf")},
        {"step_size": float("nan")},
    ],
)
def test_nothing_to_try_is_refused(given):
    with pytest.raises(InputError, match="multiplier|step_size"):
        Mse(**given)


GOLDEN = {
    "fp8_mse": ("fp8", {}),
    "int8_mse": ("int8", {}),
    "nvfp4_4o6": ("nvfp4_46", FOUR_OR_SIX),
    "nvfp4_mse_sweep": ("nvfp4", SWEEP),
}


@pytest.mark.parametrize("export", GOLDEN)
def test_stored_bytes_are_those_of_modelopt(shared, export):
    name, given = GOLDEN[export]
    fmt, steps = find_format(name), (Algorithm.of("mse", **given),)
    base = read(shared / "golden" / "base" / "model.safetensors")
    theirs = read(shared / "golden" / export / "model.safetensors")
    paths = [key.removesuffix(".weight") for key in theirs if key.endswith("proj.weight")]
    assert len(paths) == 14
    for path in paths:
        whole = None if fmt.tensor_bound is None else jnp.float32(group_amax(base, path))
        linear = Linear(jnp.asarray(base[f"{path}.weight"]), tensor_amax=whole)
        mine = stored(calibrated(linear, {}, fmt=fmt, steps=steps), fmt)
        assert np.asarray(mine.codes).tobytes() == theirs[f"{path}.weight"].tobytes(), path
        assert np.asarray(mine.scale).tobytes() == theirs[f"{path}.weight_scale"].tobytes(), path
        if whole is not None:
            np.testing.assert_array_equal(mine.tensor_scale, theirs[f"{path}.weight_scale_2"])
