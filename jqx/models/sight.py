# SPDX-License-Identifier: Apache-2.0
"""Which keys a query sees, and what is added to their scores: windows, chunks, blocks, alibi and
sinks.

A key has a slot, where it lies among the keys, and a position, how far it is from the beginning of
its text: slot - pads.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jqx_kernels.bits import round_to

from .spec import Alibi, Attention, Sparse

_BF16 = jnp.dtype("bfloat16")


class Sight(NamedTuple):
    """What queries may look at: the keys marked `real` that are not after them, where the first
    query is beside key `first`. Position 0 is that of key `pads`, None where it is key 0. `sinks`:
    the score of nothing for every query head, None where it counts for nothing.
    """

    real: Bool[Array, "n e"]
    first: Int[Array, ""] | int = 0
    pads: Int[Array, "n"] | None = None
    sinks: Float[Array, "n g"] | None = None


class Heads(NamedTuple):
    """What scores of heads depend on besides queries and keys; None where they do not. `slopes`:
    of alibi; `number`: those of the query heads; `pads` and `sinks` as in Sight.
    """

    slopes: Float[Array, "*n g"] | None = None
    number: Int[Array, "*n g"] | None = None
    pads: Int[Array, "*n"] | None = None
    sinks: Float[Array, "*n g"] | None = None


class View(NamedTuple):
    """Which scores count, what is added to them, and a score beside them."""

    allowed: Bool[Array, "*some c e"]
    bias: Float[Array, "*n g 1 e"] | None = None
    sinks: Float[Array, "*n g 1 1"] | None = None


def heads_of(row: Attention, sight: Sight) -> Heads:
    """For every key/value head of every sequence, what its scores depend on."""
    if row.alibi is None and row.sparse is None and row.chunk is None:
        return Heads(sinks=sight.sinks)
    n, group = sight.real.shape[0], row.heads // row.kv_heads
    number = jnp.arange(row.heads, dtype=jnp.int32).reshape(row.kv_heads, group)
    number = jnp.tile(number, (n // row.kv_heads, 1))
    slopes = None
    if row.alibi is not None:
        known = jnp.asarray(slopes_of(row.alibi, row.heads))
        slopes = jnp.tile(known.reshape(row.kv_heads, -1), (n // row.kv_heads, 1))
    pads = jnp.zeros(n, jnp.int32) if sight.pads is None else sight.pads
    return Heads(slopes, number, pads, sight.sinks)


def view_of(
    row: Attention, sight: Sight, queries: tuple[int, int], keys: tuple[int, int], heads: Heads
) -> View:
    """The view of queries in a range on keys in a range of slots; `heads`: of one key/value head,
    or of all. Allowed are keys that are not after the query, near enough, and in blocks it sees.
    """
    at = sight.first + jnp.arange(*queries, dtype=jnp.int32)
    slots = jnp.arange(*keys, dtype=jnp.int32)
    distance = at[:, None] - slots[None, :]
    near = distance >= 0 if row.window is None else (distance >= 0) & (distance < row.window)
    sinks = None if heads.sinks is None else heads.sinks[..., None, None]
    if heads.pads is None:
        return View(near[None], sinks=sinks)
    lead = (1,) * heads.pads.ndim
    view = View(near.reshape(*lead, 1, *near.shape), sinks=sinks)
    seen, mine = (a.reshape(*lead, -1) - heads.pads[..., None] for a in (slots, at))
    if row.chunk is not None:
        together = mine[..., :, None] // row.chunk == seen[..., None, :] // row.chunk
        view = view._replace(allowed=view.allowed & together[..., None, :, :])
    if row.sparse is not None:
        allowed = view.allowed & _in_blocks(row.sparse, heads, mine, seen)
        view = view._replace(allowed=allowed)
    if row.alibi is not None:
        bias = _faded(row.alibi, heads, seen, mine[..., -1:])
        view = view._replace(bias=bias * row.scale if row.alibi.scaled else bias)
    return view


def _in_blocks(sparse: Sparse, heads: Heads, queries: Array, keys: Array) -> Array:
    mine, theirs = queries[..., :, None] // sparse.block, keys[..., None, :] // sparse.block
    assert heads.number is not None
    strided = (theirs[..., None, :, :] + heads.number[..., None, None] + 1) % sparse.stride == 0
    return (mine - theirs < sparse.near)[..., None, :, :] | strided


def _faded(alibi: Alibi, heads: Heads, keys: Array, last: Array) -> Array:
    """Slope times position, less that of the last query: sums of large numbers lose precision."""
    assert heads.slopes is not None
    slopes = heads.slopes[..., None, None]

    def at(position: Array) -> Array:
        p = position.astype(jnp.float32)[..., None, None, :]
        if not alibi.rounded:
            return slopes * p
        # on the bits: the compiler may leave out casts to bfloat16 and back
        return round_to(round_to(slopes, _BF16) * round_to(p, _BF16), _BF16)

    return at(keys) - at(last)


def slopes_of(alibi: Alibi, heads: int) -> Float[np.ndarray, "h"]:
    """The slope of every head: 2^(-most i / p), i = 1 .. p, for the largest power of two p that is
    not above `heads`; further heads have those halfway between.
    """
    p = 1 << (heads.bit_length() - 1)
    exponents = [*range(2, 2 * p + 1, 2), *range(1, 2 * (heads - p), 2)]
    return (2.0 ** (-alibi.most * np.array(exponents) / (2 * p))).astype(np.float32)
