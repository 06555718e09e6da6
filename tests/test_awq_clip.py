# SPDX-License-Identifier: Apache-2.0
"""The clipping of AWQ against slow NumPy, block by block on the tokens themselves."""

import jax.numpy as jnp
import numpy as np
import pytest
import reference
from simulated import rounded, simulated
from test_awq import CLIP, DTYPES, f32, problem, stats_of

from jqx.algorithms import Linear, awq
from jqx.algorithms.awq import AwqClip, awq_clip
from jqx.algorithms.table import ALGORITHMS
from jqx.formats import find_format


def ratios_by_hand(w, x, name, ratios):
    """The share of every block by the error of its own part of the outputs, and then that by the
    error of all of them, block after block, twice.
    """
    size, wide, dtype = 32, f32(w), w.dtype
    flat = f32(x).reshape(-1, x.shape[-1]).astype(np.float64)
    grid = reference.block_amax(wide, 1, size)
    errors = []
    for ratio in ratios:
        q = simulated(w, name, rounded(grid * ratio, dtype))
        errors.append(rounded(f32(q) - wide, dtype).astype(np.float64))
    count = grid.shape[1]
    parts = [slice(j * size, (j + 1) * size) for j in range(count)]
    own = [[np.square(flat[:, s] @ e[:, s].T).sum(0) for s in parts] for e in errors]
    alone = np.argmin(own, 0).T  # [n, blocks]
    best = alone.copy()
    for i in range(len(w)):
        for _ in range(2):
            for j in range(count):
                losses = []
                for r in range(len(ratios)):
                    trial = best[i].copy()
                    trial[j] = r
                    d = np.concatenate([errors[c][i, s] for c, s in zip(trial, parts, strict=True)])
                    losses.append(np.square(flat @ d).sum())
                best[i, j] = int(np.argmin(losses))
    return grid, alone, best, errors


def clipped_error(w, got, name, x):
    """The squared error of the outputs of the simulated weight."""
    q = simulated(w, name, got) if np.ndim(got) else simulated(w, name, None, got)
    flat = f32(x).reshape(-1, x.shape[-1]).astype(np.float64)
    return np.square(flat @ (f32(q) - f32(w)).T).sum()


@pytest.mark.parametrize("dtype", DTYPES)
def test_blocks_are_clipped_as_defined(dtype, monkeypatch):
    w, x = problem(2, dtype=dtype)
    fmt, params = find_format("int4_b32"), AwqClip()
    grid, alone, best, _ = ratios_by_hand(w, x, "int4_b32", params.ratios)
    got = CLIP(Linear(jnp.asarray(w)), fmt, stats_of(x), params)
    wanted = rounded(grid * params.ratios[best], w.dtype)
    assert (np.asarray(got.amax) == wanted).mean() > 0.95
    assert got.facts["ratio"] == pytest.approx(params.ratios[best].mean(), abs=0.02)
    assert (alone != best).any()
    monkeypatch.setattr(awq, "SWEEPS", 0)
    theirs = awq_clip(Linear(jnp.asarray(w)), fmt, stats_of(x), params)
    wanted = rounded(grid * params.ratios[alone], w.dtype)
    assert (np.asarray(theirs.amax) == wanted).mean() > 0.95
    errors = [clipped_error(w, a, "int4_b32", x) for a in (got.amax, theirs.amax, grid)]
    assert errors[0] < 0.99 * errors[1]
    assert errors[0] < 0.9 * errors[2]


@pytest.mark.parametrize("seed", range(3))
def test_clipping_is_never_worse_than_none(seed):
    w, x = problem(seed)
    for name in ("int4_b32", "nvfp4"):
        for kind in ("gram", "root"):
            stats, params = stats_of(x, second=kind), AwqClip(min_clip_ratio=0.5, shrink_step=0.2)
            got = CLIP(Linear(jnp.asarray(w)), find_format(name), stats, params)
            if name == "nvfp4":
                found, most = got.tensor_amax, np.abs(f32(w)).max()
                assert got.amax is None
            else:
                found, most = got.amax, reference.block_amax(f32(w), 1, 32)
            assert clipped_error(w, np.asarray(found), name, x) <= clipped_error(w, most, name, x)


def test_one_share_for_the_scale_of_a_tensor():
    w, x = problem(3)
    w[0, 0] = 30  # far from the others, so that clipping it pays
    top, params = np.float32(30), AwqClip(min_clip_ratio=0.2)
    got = CLIP(Linear(jnp.asarray(w)), find_format("nvfp4"), stats_of(x), params)
    trials = rounded(top * params.ratios, w.dtype)
    losses = [clipped_error(w, a, "nvfp4", x) for a in trials]
    assert got.tensor_amax == trials[int(np.argmin(losses))]
    assert got.facts["ratio"] == params.ratios[int(np.argmin(losses))]
    shared = Linear(jnp.asarray(w), tensor_amax=jnp.float32(40))
    got = CLIP(shared, find_format("nvfp4"), stats_of(x), params)
    trials = rounded(np.float32(40) * params.ratios, w.dtype)
    losses = [clipped_error(w, a, "nvfp4", x) for a in trials]
    assert got.tensor_amax == trials[int(np.argmin(losses))]


@pytest.mark.parametrize("name", ["int8", "fp8", "fp8_block"])
def test_formats_without_blocks_of_columns_stay(name):
    w, x = problem()
    got = CLIP(Linear(jnp.asarray(w)), find_format(name), stats_of(x), AwqClip())
    assert got.amax is got.tensor_amax is None
    assert ALGORITHMS["awq_clip"].needs(find_format(name), AwqClip()) == ()


RATIOS = {
    (0.5, 0.05): [0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1],
    (0.5, 0.2): [0.5, 0.7, 0.9, 1],
    (0.5, 0.4): [0.5, 0.9, 1],
    (0.8, 0.3): [0.8, 1],
    (0.9, 0.05): [0.9, 0.95, 1],
    (0.25, 0.25): [0.25, 0.5, 0.75, 1],
    (1.0, 0.5): [1],
}


@pytest.mark.parametrize(("given", "wanted"), RATIOS.items(), ids=str)
def test_shares_end_with_one(given, wanted):
    found = AwqClip(min_clip_ratio=given[0], shrink_step=given[1]).ratios
    np.testing.assert_allclose(found, wanted, rtol=1e-6)
    assert found[-1] == 1
