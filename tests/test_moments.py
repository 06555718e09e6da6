# SPDX-License-Identifier: Apache-2.0
"""Statistics of inputs against NumPy, and what must not change a bit of them."""

import jax.numpy as jnp
import numpy as np
import pytest
from simulated import rounded

from jqx.algorithms.quadratic import gram, output_error
from jqx.calibration.histograms import block_log2
from jqx.calibration.moments import Wanted, add, add_tokens, batch_ends, results, start

K, TOKENS, BLOCK = 32, 5, 16
SIZES = (2, 3, 1)
DTYPES = ("bfloat16", "float16", "float32")
KINDS = ("amax", "channel_amax", "channel_mean", "square", "gram", "block_gram", "block_log2")


def inputs(dtype="bfloat16", seed=0):
    r = np.random.RandomState(seed)
    x = r.standard_normal((sum(SIZES), TOKENS, K)) * np.exp(r.standard_normal(K))
    x[0, 1] = 0
    return x.astype(np.float32).astype(jnp.dtype(dtype))


def collected(x, kinds=KINDS, *, together=3, sizes=SIZES, dtype=None, tokens=0):
    """The statistics of rows that come so many at a time; where too few are left, the last call
    brings rows that count for nothing.
    """
    ends, block = batch_ends(sizes), BLOCK if "block_gram" in kinds else 0
    state, at = start(Wanted(tuple(kinds), x.shape[-1], block, tokens)), 0
    for first in range(0, len(x), together):
        rows, flags = x[first : first + together], np.zeros(together, bool)
        count = max(0, min(len(rows), len(ends) - at))
        flags[:count] = ends[at : at + count]
        rows = np.concatenate([rows, np.full((together - len(rows), *x.shape[1:]), 99, x.dtype)])
        dtype = dtype or x.dtype.name
        state = add(state, jnp.asarray(rows), jnp.asarray(flags), jnp.int32(count), dtype=dtype)
        at += count
    return {kind: np.asarray(value) for kind, value in results(state).items()}


def by_hand(x, dtype, sizes=SIZES):
    wide = x.astype(np.float32)
    flat, magnitude = wide.reshape(-1, K), np.abs(wide)
    means, first = [], 0
    for size in sizes:
        batch = rounded(magnitude[first : first + size], dtype).reshape(-1, K)
        means.append(rounded(batch.mean(0, dtype=np.float64), dtype))
        first += size
    blocks = flat.reshape(-1, K // BLOCK, BLOCK).astype(np.float64)
    return {
        "amax": rounded(magnitude.max(), dtype),
        "channel_amax": rounded(magnitude.max((0, 1)), dtype),
        "channel_mean": np.sum(means, axis=0, dtype=np.float32) / np.float32(len(sizes)),
        "square": np.square(flat.astype(np.float64)).sum(0),
        "gram": flat.astype(np.float64).T @ flat,
        "block_gram": np.einsum("tki,tkj->kij", blocks, blocks),
        "block_log2": np.asarray(block_log2(jnp.asarray(rounded(wide, dtype)))),
        "tokens": np.int32(len(flat)),
    }


EXACT = ("amax", "channel_amax", "block_log2", "tokens")


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_kind_follows_its_definition(dtype):
    x = inputs(dtype)
    got, wanted = collected(x), by_hand(x, dtype)
    assert got.keys() == wanted.keys()
    for kind, value in wanted.items():
        if kind in EXACT:
            np.testing.assert_array_equal(got[kind], value, err_msg=kind)
        else:
            scale = np.abs(value).max() * 1e-5
            np.testing.assert_allclose(got[kind], value, rtol=1e-5, atol=scale, err_msg=kind)
    if dtype != "float32":
        np.testing.assert_array_equal(got["channel_mean"], wanted["channel_mean"])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_carrier_in_float32_is_looked_at_in_the_dtype_of_the_model(dtype):
    x = inputs("float32")
    got, wanted = collected(x, dtype=dtype), by_hand(x, dtype)
    for kind in ("amax", "channel_amax", "channel_mean", "block_log2"):
        np.testing.assert_array_equal(got[kind], wanted[kind], err_msg=kind)
    assert (got["channel_amax"] != by_hand(x, "float32")["channel_amax"]).any()


def test_means_are_rounded_batch_by_batch():
    x = inputs()
    x[3:] = x[3:] * np.float32(3).astype(x.dtype)
    one, three = (collected(x, ("channel_mean",), sizes=s)["channel_mean"] for s in ((6,), SIZES))
    np.testing.assert_array_equal(one, rounded(one, jnp.bfloat16))
    assert (three != rounded(three, jnp.bfloat16)).any()
    assert (np.abs(three / one - 1) > 0.01).any()  # a batch counts as much as another
    backwards = collected(x, ("channel_mean",), sizes=SIZES[::-1])["channel_mean"]
    assert (backwards != three).any()


@pytest.mark.parametrize("together", [1, 2, 3, 6, 8])
def test_how_many_rows_come_together_changes_no_bit(together):
    x = inputs()
    wanted, got = collected(x, together=6), collected(x, together=together)
    for kind in wanted:
        np.testing.assert_array_equal(got[kind], wanted[kind], err_msg=kind)


@pytest.mark.parametrize("together", [1, 4, 9])
def test_rows_beyond_the_last_batch_are_dropped(together):
    x = inputs()
    more = np.concatenate([x, np.full((3, TOKENS, K), np.nan, x.dtype)])
    wanted, got = collected(x), collected(more, together=together)
    for kind in wanted:
        np.testing.assert_array_equal(got[kind], wanted[kind], err_msg=kind)


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_has_the_same_bits_alone(kind):
    x = inputs()
    np.testing.assert_array_equal(collected(x, (kind,))[kind], collected(x)[kind])


@pytest.mark.parametrize("together", [1, 4])
def test_a_root_is_the_tokens(together):
    x = inputs()
    tokens = sum(SIZES) * TOKENS
    got = collected(x, ("root", "amax"), together=together, tokens=tokens)
    np.testing.assert_array_equal(got["root"], x.astype(np.float32).reshape(-1, K))
    assert got["tokens"] == tokens
    whole = collected(x, ("gram",))
    stats = {"root": jnp.asarray(got["root"])}
    near = np.abs(whole["gram"]).max() * 1e-6
    np.testing.assert_allclose(gram(stats, "test"), whole["gram"], rtol=1e-5, atol=near)
    d = jnp.asarray(np.random.RandomState(1).standard_normal((7, K)), jnp.float32)
    error = np.square(x.astype(np.float64).reshape(-1, K) @ np.asarray(d, np.float64).T).sum()
    for kinds in (stats, {"gram": jnp.asarray(whole["gram"])}):
        assert output_error(d, kinds, "test") == pytest.approx(error, rel=1e-5)


@pytest.mark.parametrize("width", [512, 650])
def test_wide_moments_are_added_up_in_panels(width):
    r = np.random.RandomState(0)
    x = r.standard_normal((4, TOKENS, width)).astype(np.float32)
    got = collected(x, ("gram",), together=1, sizes=(4,))["gram"]
    flat = x.reshape(-1, width).astype(np.float64)
    np.testing.assert_allclose(got, flat.T @ flat, rtol=1e-5, atol=1e-4)
    np.testing.assert_array_equal(got, got.T)
    np.testing.assert_array_equal(collected(x, ("gram",), together=4, sizes=(4,))["gram"], got)


def test_blocks_are_those_on_the_diagonal():
    got = collected(inputs())
    for j in range(K // BLOCK):
        part = got["gram"][j * BLOCK :, j * BLOCK :][:BLOCK, :BLOCK]
        near = np.abs(part).max() * 1e-6
        np.testing.assert_allclose(got["block_gram"][j], part, rtol=1e-5, atol=near)
    np.testing.assert_allclose(got["square"], np.diagonal(got["gram"]), rtol=1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_never_lost(bad):
    x = inputs("float32")
    x[2, 3, 4] = bad
    got = collected(x)
    for kind in ("amax", "channel_amax", "channel_mean", "square", "gram", "block_gram"):
        assert not np.isfinite(got[kind]).all(), kind


def test_nothing_is_nothing():
    found = {k: np.asarray(v) for k, v in results(start(Wanted(KINDS, K, BLOCK, 0))).items()}
    assert set(found) == {*KINDS, "tokens"}
    assert not any(value.any() for value in found.values())


def test_ends_of_batches():
    assert batch_ends(SIZES).tolist() == [False, True, False, False, True, True]
    assert batch_ends((1,)).tolist() == [True]


@pytest.mark.parametrize("room", [0, 3])
def test_tokens_that_fill_an_array_count_for_nothing(room):
    x = inputs("float32")
    counts = (4, 1, 5, 3, 5, 2)
    kinds = (*KINDS, "root")
    state = start(Wanted(kinds, K, BLOCK, sum(counts)))
    for row, count, end in zip(x, counts, batch_ends(SIZES), strict=True):
        filled = np.concatenate([row[:count], np.full((TOKENS - count + room, K), 99, np.float32)])
        state = add_tokens(state, filled, jnp.int32(count), jnp.asarray(end), dtype="bfloat16")
    got = {kind: np.asarray(value) for kind, value in results(state).items()}
    taken, means, first = [row[:count] for row, count in zip(x, counts, strict=True)], [], 0
    for size in SIZES:
        batch = np.abs(np.concatenate(taken[first : first + size]))
        means.append(rounded(rounded(batch, "bfloat16").mean(0, dtype=np.float64), "bfloat16"))
        first += size
    flat = np.concatenate(taken)
    assert got["tokens"] == len(flat)
    np.testing.assert_array_equal(got["root"], flat)
    np.testing.assert_array_equal(got["channel_amax"], rounded(np.abs(flat).max(0), "bfloat16"))
    np.testing.assert_allclose(got["channel_mean"], np.mean(means, axis=0), rtol=1e-2)
    np.testing.assert_allclose(got["gram"], flat.T @ flat, rtol=1e-5, atol=1e-3)
    np.testing.assert_allclose(got["square"], np.square(flat).sum(0), rtol=1e-5)
    log2 = block_log2(jnp.asarray(rounded(flat, "bfloat16")))
    np.testing.assert_array_equal(got["block_log2"], log2)
