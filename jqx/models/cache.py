# SPDX-License-Identifier: Apache-2.0
"""The keys and values of earlier tokens: what a decoder keeps instead of reading a text again.

Sequences of a batch are padded on the left, so their next tokens share a slot:

    slot        0    1    2    3    4    5        start = 4: the slot of the next token
    row 0       .    .    the  cat  sat  ?        pads = 2, positions 0, 1, 2
    row 1       a    dog  and  a    cat  ?        pads = 0, positions 0 .. 4

The number of slots doubles when they are full: memory and the cost of looking back follow the text,
and programs are compiled for few shapes.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from .spec import BlockKind, Compute

FEWEST, STEP = 256, 128
"""Slots at least, and what their number is a multiple of when the last one is known."""


class Slots(NamedTuple):
    """Where the tokens of a call go: from the slot `start` on, the same in every row of a batch.
    The first `pads` slots of a row are padding.
    """

    start: Int[Array, ""]
    pads: Int[Array, "b"]

    def positions(self, t: int) -> Int[Array, "b t"]:
        """The positions of the `t` tokens of a call; negative ones are padding."""
        return self.start + jnp.arange(t, dtype=jnp.int32)[None, :] - self.pads[:, None]

    def real(self, slots: int) -> Bool[Array, "b slots"]:
        """Which of the first `slots` slots are no padding; the last ones may still be empty."""
        return jnp.arange(slots, dtype=jnp.int32)[None, :] >= self.pads[:, None]


class Kept(NamedTuple):
    """The keys, rotated, and values of one block, rounded as the spec's cache says; n = b *
    kv_heads. (With these two axes apart XLA would copy it all to add a token.)
    """

    keys: Float[Array, "n slots d"]
    values: Float[Array, "n slots d"]

    def with_tokens(
        self, k: Float[Array, "n t d"], v: Float[Array, "n t d"], start: Int[Array, ""]
    ) -> "Kept":
        """The same with the keys and values of `t` tokens from the slot `start` on."""
        put = lax.dynamic_update_slice
        return Kept(put(self.keys, k, (0, start, 0)), put(self.values, v, (0, start, 0)))


class Past(NamedTuple):
    """What a block knows of earlier tokens, and where those of this call go."""

    kept: Kept
    slots: Slots


def empty(kind: BlockKind, rows: int, slots: int, compute: Compute) -> Kept:
    """Nothing kept yet, for `rows` sequences."""
    row = kind.attention
    shape = (rows * row.kv_heads, slots, row.head_dim)
    return Kept(jnp.zeros(shape, compute.carrier), jnp.zeros(shape, compute.carrier))


@partial(jax.jit, static_argnames=("slots",))
def grown(kept: Kept, slots: int) -> Kept:
    """The same with `slots` slots, the new ones empty."""
    more = ((0, 0), (0, slots - kept.keys.shape[1]), (0, 0))
    return Kept(jnp.pad(kept.keys, more), jnp.pad(kept.values, more))


def slots_for(tokens: int, last: int) -> int:
    """How many slots to have for `tokens` tokens where there will never be more than `last`: a
    power of two, or just enough for all.
    """
    return min(max(FEWEST, 1 << (tokens - 1).bit_length()), -(-last // STEP) * STEP)
