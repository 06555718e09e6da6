# SPDX-License-Identifier: Apache-2.0
"""Sums and maxima of the inputs of one linear, added up a row of tokens at a time and in order, so
that how many rows are run together changes no bit.

    channel_amax   max |x|              channel_mean   mean over batches of mean over tokens of |x|
    square         sum x^2              gram           sum x x^T
    block_gram     the same in blocks of channels      root   the tokens themselves, where they are
    block_log2     histogram of block maxima                  fewer than channels

A mean is rounded to the dtype of the model for every statistics batch, as ModelOpt does.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int32

from jqx_kernels.bits import divide, round_to

from .histograms import BINS, block_log2

HIGHEST = lax.Precision.HIGHEST
PANELS, NARROWEST = 4, 128


class Wanted(NamedTuple):
    """What is collected of inputs with `width` channels; hashable. `block`: channels that are
    looked at together, for "block_gram"; `tokens`: of all batches, for "root".
    """

    kinds: tuple[str, ...]
    width: int
    block: int = 0
    tokens: int = 0


Moments = Mapping[str, Array]
"""What was added up so far. Make one with `start`, read it with `results`."""


def start(wanted: Wanted) -> dict[str, Array]:
    """Nothing yet."""
    k, b = wanted.width, wanted.block
    shapes: dict[str, tuple[int, ...]] = {
        "amax": (),
        "channel_amax": (k,),
        "channel_mean": (k,),
        "square": (k,),
        "gram": (k, k),
        "block_gram": (k // b, b, b) if b else (),
        "root": (wanted.tokens, k),
    }
    found = {kind: jnp.zeros(shapes[kind], jnp.float32) for kind in wanted.kinds if kind in shapes}
    if "block_log2" in wanted.kinds:
        found["block_log2"] = jnp.zeros((BINS,), jnp.int32)
    if "channel_mean" in found:
        found["_sum"] = jnp.zeros((k,), jnp.float32)
    counts = {"_tokens": 0, "_met": 0, "_batches": 0}
    return found | {name: jnp.int32(n) for name, n in counts.items()}


@partial(jax.jit, static_argnames=("dtype",), donate_argnums=(0,))
def add(
    moments: dict[str, Array],
    x: Float[Array, "rows tokens k"],
    ends: Bool[Array, "rows"],
    count: Int32[Array, ""],
    *,
    dtype: str,
) -> dict[str, Array]:
    """`moments` with the first `count` rows of `x` added in their order; after a row with `ends` a
    statistics batch is complete. `dtype`: the model's.
    """

    def one(i: Array, so_far: dict[str, Array]) -> dict[str, Array]:
        row = lax.dynamic_index_in_dim(x, i, keepdims=False)
        return _add_row(so_far, row, jnp.int32(row.shape[0]), ends[i], dtype)

    return lax.fori_loop(0, count, one, moments)


@partial(jax.jit, static_argnames=("dtype",), donate_argnums=(0,))
def add_tokens(
    moments: dict[str, Array],
    x: Float[Array, "tokens k"],
    count: Int32[Array, ""],
    end: Bool[Array, ""],
    *,
    dtype: str,
) -> dict[str, Array]:
    """`moments` with the first `count` tokens of `x` added as one row; with `end` a statistics
    batch is complete after it. For inputs that are not as many for every row, as those of experts.
    """
    inside = jnp.arange(x.shape[0]) < count
    return _add_row(moments, jnp.where(inside[:, None], x, 0), count, end, dtype)


def _add_row(
    moments: dict[str, Array],
    x: Float[Array, "tokens k"],
    tokens: Int32[Array, ""],
    end: Bool[Array, ""],
    dtype: str,
) -> dict[str, Array]:
    """`moments` with so many `tokens` added, the first ones of `x`; zeros come after them."""
    out, wide = dict(moments), x.astype(jnp.float32)
    magnitude = jnp.abs(wide)
    if "amax" in out:
        out["amax"] = jnp.maximum(out["amax"], round_to(jnp.max(magnitude), dtype))
    if "channel_amax" in out:
        most = round_to(jnp.max(magnitude, axis=0), dtype)
        out["channel_amax"] = jnp.maximum(out["channel_amax"], most)
    if "square" in out:
        out["square"] = out["square"] + jnp.sum(wide * wide, axis=0)
    if "gram" in out:
        out["gram"] = _add_upper(out["gram"], wide)
    if "block_gram" in out:
        parts = wide.reshape(x.shape[0], *out["block_gram"].shape[:2])
        product = jnp.einsum("tki,tkj->kij", parts, parts, precision=HIGHEST)
        out["block_gram"] = out["block_gram"] + product
    if "block_log2" in out:
        out["block_log2"] = out["block_log2"] + block_log2(round_to(magnitude, dtype))
    if "root" in out:
        places = jnp.arange(x.shape[0])
        at = jnp.where(places < tokens, out["_tokens"] + places, out["root"].shape[0])
        out["root"] = out["root"].at[at].set(wide, mode="drop")
    out["_tokens"] = out["_tokens"] + tokens
    out["_met"] = out["_met"] + tokens
    out["_batches"] = out["_batches"] + end.astype(jnp.int32)
    return out if "channel_mean" not in out else _add_mean(out, magnitude, end, dtype)


def _panels(k: int) -> list[tuple[int, int]]:
    """Where the columns of second moments are cut: above the diagonal half of them is enough."""
    size = -(-k // PANELS) if k >= PANELS * NARROWEST else k
    return [(start, min(start + size, k)) for start in range(0, k, size)]


def _add_upper(g: Float[Array, "k k"], x: Float[Array, "tokens k"]) -> Float[Array, "k k"]:
    """`g` with the panels of x^T x on and above the diagonal added."""
    for start, end in _panels(x.shape[1]):
        part = jnp.matmul(x[:, :end].T, x[:, start:end], precision=HIGHEST)
        g = g.at[:end, start:end].add(part)
    return g


@jax.jit
def _whole(g: Float[Array, "k k"]) -> Float[Array, "k k"]:
    """The symmetric matrix of which `g` has what is on and above the diagonal."""
    upper = jnp.triu(g)
    return upper + jnp.triu(g, 1).T


def _add_mean(
    out: dict[str, Array], magnitude: Float[Array, "tokens k"], end: Bool[Array, ""], dtype: str
) -> dict[str, Array]:
    """The sums of a row of magnitudes, and the mean of the batch if it ends."""
    total = out["_sum"] + jnp.sum(round_to(magnitude, dtype), axis=0)
    mean = round_to(divide(total, out["_met"].astype(jnp.float32)), dtype)
    out["channel_mean"] = jnp.where(end, out["channel_mean"] + mean, out["channel_mean"])
    out["_sum"] = jnp.where(end, jnp.zeros_like(total), total)
    out["_met"] = jnp.where(end, 0, out["_met"])
    return out


def results(moments: Moments) -> dict[str, Any]:
    """The statistics by kind, with "tokens"."""
    found = {kind: value for kind, value in moments.items() if not kind.startswith("_")}
    if "gram" in found:
        found["gram"] = _whole(found["gram"])
    if "channel_mean" in found:
        batches = jnp.maximum(moments["_batches"], 1).astype(jnp.float32)
        found["channel_mean"] = divide(found["channel_mean"], batches)
    return found | {"tokens": moments["_tokens"]}


def batch_ends(sizes: Sequence[int]) -> np.ndarray:
    """Whether a statistics batch ends with a row, for batches of these numbers of rows."""
    ends = np.zeros(sum(sizes), bool)
    ends[np.cumsum(sizes) - 1] = True
    return ends
