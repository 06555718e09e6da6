# SPDX-License-Identifier: Apache-2.0
"""The keys and values of earlier tokens: what a decoder keeps instead of reading a text again.

Sequences of a batch are padded on the left, so their next tokens share a slot:

    slot        0    1    2    3    4    5        start = 4: the slot of the next token
    row 0       .    .    the  cat  sat  ?        pads = 2, positions 0, 1, 2
    row 1       a    dog  and  a    cat  ?        pads = 0, positions 0 .. 4

The number of slots doubles when they are full: memory and the cost of looking back follow the text,
and programs are compiled for few shapes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Float32, Int, UInt8

from jqx.errors import nearest
from jqx_kernels.bits import divide, e4m3_code, e4m3_value, int_code, int_value

from .layers import settle
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


@dataclass(frozen=True, slots=True)
class CacheFormat:
    """Keys or values in eight bits: `encode` and `decode` numbers up to `most`."""

    most: float
    encode: Callable[[Float32[Array, "*s"]], UInt8[Array, "*s"]]
    decode: Callable[[UInt8[Array, "*s"]], Float32[Array, "*s"]]


CACHE_FORMATS = {
    "fp8": CacheFormat(448.0, e4m3_code, e4m3_value),
    "int8": CacheFormat(127.0, partial(int_code, width=8), partial(int_value, width=8)),
}
"""How keys and values may be kept, besides as they are."""


def check_cache_format(name: str | None) -> None:
    """Raises InputError, with the nearest names, for a name that is no row of CACHE_FORMATS."""
    if name is not None and name not in CACHE_FORMATS:
        raise nearest(name, CACHE_FORMATS, "cache format")


class Codes(NamedTuple):
    """Keys or values in a row of CACHE_FORMATS, a scale for every token of every head."""

    codes: UInt8[Array, "n slots d"]
    scale: Float32[Array, "n slots 1"]


class Kept(NamedTuple):
    """The keys, rotated, and values of one block, rounded as the spec's cache says; n = b *
    kv_heads. (With these two axes apart XLA would copy it all to add a token.)
    """

    keys: Float[Array, "n slots d"] | Codes
    values: Float[Array, "n slots d"] | Codes

    @property
    def slots(self) -> int:
        """How many tokens there is room for."""
        return jax.tree.leaves(self.keys)[0].shape[1]

    def with_tokens(
        self,
        k: Float[Array, "n t d"],
        v: Float[Array, "n t d"],
        start: Int[Array, ""],
        compute: Compute,
    ) -> "Kept":
        """The same with the keys and values of `t` tokens from the slot `start` on."""

        def put(old: Array, new: Array) -> Array:
            return lax.dynamic_update_slice(old, new, (0, start, 0))

        return jax.tree.map(put, self, Kept(_encoded(k, compute), _encoded(v, compute)))

    def read(self, compute: Compute) -> tuple[Float[Array, "n slots d"], Float[Array, "n slots d"]]:
        """All keys and values, as operands of products."""
        return _decoded(self.keys, compute), _decoded(self.values, compute)


def _encoded(x: Float[Array, "n t d"], compute: Compute) -> Float[Array, "n t d"] | Codes:
    if compute.cache is None:
        return x
    row, wide = CACHE_FORMATS[compute.cache], x.astype(jnp.float32)
    largest = jnp.max(jnp.abs(wide), axis=-1, keepdims=True)
    scale = jnp.maximum(divide(largest, row.most), jnp.finfo(jnp.float32).tiny)
    return Codes(row.encode(divide(wide, scale)), scale)


def _decoded(kept: Array | Codes, compute: Compute) -> Float[Array, "n slots d"]:
    if not isinstance(kept, Codes):
        return kept
    assert compute.cache is not None
    return settle(CACHE_FORMATS[compute.cache].decode(kept.codes) * kept.scale, compute)


class Past(NamedTuple):
    """What a block knows of earlier tokens, and where those of this call go."""

    kept: Kept
    slots: Slots


def empty(kind: BlockKind, rows: int, slots: int, compute: Compute) -> Kept:
    """Nothing kept yet, for `rows` sequences."""
    row = kind.attention
    shape = (rows * row.kv_heads, slots, row.head_dim)
    zeros = _encoded(jnp.zeros(shape, compute.carrier), compute)
    return Kept(*jax.tree.map(jnp.copy, (zeros, zeros)))  # buffers of their own, to be donated


@partial(jax.jit, static_argnames=("slots",))
def grown(kept: Kept, slots: int) -> Kept:
    """The same with `slots` slots, the new ones empty."""
    more = ((0, 0), (0, slots - kept.slots), (0, 0))
    return jax.tree.map(lambda a: jnp.pad(a, more), kept)


def slots_for(tokens: int, last: int) -> int:
    """How many slots to have for `tokens` tokens where there will never be more than `last`: a
    power of two, or just enough for all.
    """
    return min(max(FEWEST, 1 << (tokens - 1).bit_length()), -(-last // STEP) * STEP)
