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
from jaxtyping import Array, Bool, Float, Float32, Int, Shaped, UInt8

from jqx.errors import InputError, nearest
from jqx_kernels.bits import divide
from jqx_kernels.codecs import CODECS
from jqx_kernels.packing import PACKINGS
from jqx_kernels.scale_rules import e4m3_scale
from jqx_kernels.storage import Storage

from .compute import Compute
from .layers import settle
from .spec import Attention, BlockKind, ModelSpec

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


class Codes(NamedTuple):
    """Keys or values in a row of CACHE_FORMATS, every token of every head by itself. `outer`: what
    the scales of the blocks of a token lie below, where it has several.
    """

    codes: UInt8[Array, "n slots bytes"]
    scale: Shaped[Array, "n slots blocks"]
    outer: Float32[Array, "n slots 1"] | None = None


@dataclass(frozen=True, slots=True)
class CacheFormat:
    """How keys or values are stored, and the function that does it."""

    storage: Storage
    encode: Callable[[Float32[Array, "n t d"], Storage], Codes]


def _with_one_scale(x: Float32[Array, "n t d"], storage: Storage) -> Codes:
    """A float32 scale for every token of every head."""
    scale = _scale(x, storage.bound)
    return Codes(CODECS[storage.element].encode(divide(x, scale), x), scale)


def _with_scales_of_blocks(x: Float32[Array, "n t d"], storage: Storage) -> Codes:
    """As a matrix in NVFP4, but that every token of every head has a tensor scale."""
    n, t, d = x.shape
    outer = _scale(x, storage.bound * E4M3_MOST)
    blocks = x.reshape(n, t, -1, storage.columns(d))
    amax = jnp.max(jnp.abs(blocks), axis=-1)
    scale, step = e4m3_scale(amax, outer, storage.bound)
    codes = CODECS[storage.element].encode(divide(blocks, step[..., None]), blocks)
    packed = PACKINGS[storage.packing].pack(codes.reshape(n * t, d))
    return Codes(packed.reshape(n, t, -1), scale, outer)


def _scale(x: Float32[Array, "n t d"], bound: float) -> Float32[Array, "n t 1"]:
    amax = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
    return jnp.maximum(divide(amax, bound), jnp.finfo(jnp.float32).tiny)


E4M3_MOST = 448.0
CACHE_FORMATS = {
    "fp8": CacheFormat(Storage("e4m3", (1, None), "float32", "bytes", E4M3_MOST), _with_one_scale),
    "int8": CacheFormat(Storage("int8", (1, None), "float32", "bytes", 127.0), _with_one_scale),
    "nvfp4": CacheFormat(Storage("e2m1", (1, 16), "e4m3", "columns", 6.0), _with_scales_of_blocks),
}
"""How keys and values may be kept, besides as they are."""


def check_cache_format(name: str | None) -> None:
    """Raises InputError, with the nearest names, for a name that is no row of CACHE_FORMATS."""
    if name is not None and name not in CACHE_FORMATS:
        raise nearest(name, CACHE_FORMATS, "cache format")


def check_heads(name: str | None, spec: ModelSpec) -> None:
    """Raises InputError for a row of CACHE_FORMATS whose blocks do not divide the heads."""
    size = None if name is None else CACHE_FORMATS[name].storage.block[1]
    rows = (kind.attention for kind in spec.blocks)
    own = [d for row in rows if isinstance(row, Attention) for d in (row.head_dim, row.values)]
    for d in sorted(set(own)) if size else ():
        if size and d % size:
            others = [other for other, row in CACHE_FORMATS.items() if row.storage.block[1] is None]
            raise InputError(
                f"{name} shares a scale over {size} channels, and heads have {d}: keys and values "
                f"can be kept in {' or '.join(others)}"
            )


class Kept(NamedTuple):
    """The keys, rotated, and values of one block, rounded as the spec's cache says; n = b *
    kv_heads. (With these two axes apart XLA would copy it all to add a token.)
    """

    keys: Float[Array, "n slots d"] | Codes
    values: Float[Array, "n slots m"] | Codes

    @property
    def slots(self) -> int:
        """How many tokens there is room for."""
        return jax.tree.leaves(self.keys)[0].shape[1]

    def with_tokens(
        self,
        k: Float[Array, "n t d"],
        v: Float[Array, "n t m"],
        start: Int[Array, ""],
        compute: Compute,
    ) -> "Kept":
        """The same with the keys and values of `t` tokens from the slot `start` on."""

        def put(old: Array, new: Array) -> Array:
            return lax.dynamic_update_slice(old, new, (0, start, 0))

        return jax.tree.map(put, self, Kept(_encoded(k, compute), _encoded(v, compute)))

    def read(self, compute: Compute) -> tuple[Float[Array, "n slots d"], Float[Array, "n slots m"]]:
        """All keys and values, as operands of products."""
        return _decoded(self.keys, compute), _decoded(self.values, compute)


def _encoded(x: Float[Array, "n t d"], compute: Compute) -> Float[Array, "n t d"] | Codes:
    if compute.cache is None:
        return x
    row = CACHE_FORMATS[compute.cache]
    return row.encode(x.astype(jnp.float32), row.storage)


def _decoded(kept: Array | Codes, compute: Compute) -> Float[Array, "n slots d"]:
    if not isinstance(kept, Codes):
        return kept
    from jqx_kernels.kv_attention import Stored, decoded  # Pallas takes a while

    assert compute.cache is not None
    return settle(decoded(Stored(*kept), CACHE_FORMATS[compute.cache].storage), compute)


class Past(NamedTuple):
    """What a block knows of earlier tokens, nothing where it has no attention, and where those of
    this call go.
    """

    kept: Kept | None
    slots: Slots


def empty(kind: BlockKind, rows: int, slots: int, compute: Compute) -> Kept | None:
    """Nothing kept yet, for `rows` sequences; None where nothing ever is."""
    row = kind.attention
    if not isinstance(row, Attention):
        return None
    lead = (rows * row.kv_heads, slots)
    zeros = [jnp.zeros((*lead, d), compute.carrier) for d in (row.head_dim, row.values)]
    stored = [_encoded(a, compute) for a in zeros]
    return Kept(*jax.tree.map(jnp.copy, stored))  # buffers of their own, to be donated


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
