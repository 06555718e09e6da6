# SPDX-License-Identifier: Apache-2.0
"""Blocks of a matrix: their largest magnitudes, and how small codes share bytes.

A magnitude is a bit pattern without its sign, and patterns of positive floats are ordered like the
floats: the amax of bfloat16 or float16 values is an integer maximum over pairs, which a CPU does at
the speed of memory.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, UInt8

from jqx_kernels.bits import MAGNITUDE, bits, from_bits

Block = tuple[int | None, int | None]
_UNIT = 16  # columns reduced in the first pass


def block_amax(w: Float[Array, "n k"], block: Block) -> Float32[Array, "..."]:
    """The largest magnitude in every (rows, columns) block of `w`, exact; None means the whole
    axis.

    float32 [blocks of rows, blocks of columns]; incomplete blocks at the edges count as filled with
    zeros. A NaN makes its block NaN, an infinity makes it infinite (unless there is also a NaN).
    """
    n, k = w.shape
    rows, cols = block[0] or n, block[1] or k
    if k % _UNIT == 0 and cols % _UNIT == 0:
        # the barrier keeps the passes apart: merged they lose the fast first one
        fine = _row_amax(w, _UNIT)
        fine = lax.optimization_barrier(fine) if cols > _UNIT else fine
        return _grid_amax(fine, rows, cols // _UNIT)
    return _grid_amax(from_bits(bits(w.astype(jnp.float32)) & MAGNITUDE), rows, cols)


def weight_amax(w: Float[Array, "..."]) -> Float32[Array, ""]:
    """The largest magnitude in `w`, exact. NaN if there is a NaN, infinite if there is an
    infinity.
    """
    flat = w.reshape(-1, w.shape[-1]) if w.ndim else w.reshape(1, 1)
    return block_amax(flat, (None, None))[0, 0]


def _row_amax(w: Float[Array, "n k"], cols: int) -> Float32[Array, "n blocks"]:
    """Block maxima along rows whose length is a multiple of the even number `cols`."""
    n, k = w.shape
    if w.dtype.itemsize == 4:
        return _max(from_bits(bits(w) & MAGNITUDE).reshape(n, k // cols, cols), -1)
    pairs = lax.bitcast_convert_type(w.reshape(n, k // cols, cols // 2, 2), jnp.uint32)
    high = jnp.uint32(MAGNITUDE & ~0xFFFF)
    top = jnp.max(jnp.maximum(pairs & high, (pairs << 16) & high), axis=-1)
    if w.dtype == jnp.bfloat16:
        return lax.bitcast_convert_type(top, jnp.float32)
    return lax.bitcast_convert_type((top >> 16).astype(jnp.uint16), w.dtype).astype(jnp.float32)


def _grid_amax(a: Float32[Array, "n m"], rows: int, cols: int) -> Float32[Array, "..."]:
    """Block maxima of magnitudes, with zeros beyond the edges."""
    return _max(_max(_blocks(a, rows, cols), 3), 1)


def _max(a: Float32[Array, "..."], axis: int) -> Float32[Array, "..."]:
    """The maximum of magnitudes, by their bits: NaN is larger than infinity."""
    return from_bits(jnp.max(bits(a), axis=axis))


def _blocks(x: Array, rows: int, cols: int) -> Array:
    n, k = x.shape
    x = jnp.pad(x, ((0, -n % rows), (0, -k % cols))) if n % rows or k % cols else x
    # one axis at a time: JAX knows no sharding of more
    x = x.reshape(x.shape[0] // rows, rows, x.shape[1])
    return x.reshape(*x.shape[:2], x.shape[2] // cols, cols)


def to_blocks(x: Array, block: Block) -> Array:
    """[n, k] as [blocks of rows, rows, blocks of columns, columns], with zeros beyond the edges."""
    return _blocks(x, block[0] or x.shape[0], block[1] or x.shape[1])


def from_blocks(x: Array, shape: tuple[int, ...]) -> Array:
    """The matrix [n, k] that `to_blocks` took apart."""
    rows = x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])
    flat = rows.reshape(rows.shape[0], rows.shape[1] * rows.shape[2])
    return flat if flat.shape == shape else flat[: shape[0], : shape[1]]


def spread(grid: Float32[Array, "..."]) -> Float32[Array, "..."]:
    """A grid of block scales with the axes it needs to broadcast against `to_blocks`."""
    return jnp.expand_dims(grid, (1, 3))


@dataclass(frozen=True, slots=True)
class Packing:
    """How the codes of a matrix, one a byte, become the stored bytes."""

    pack: Callable[[UInt8[Array, "n k"]], UInt8[Array, "..."]]
    unpack: Callable[[UInt8[Array, "..."]], UInt8[Array, "n k"]]
    per_byte: tuple[int, int] = (1, 1)  # (rows, columns) of codes in one byte


def _pack_columns(c: UInt8[Array, "n k"]) -> UInt8[Array, "n half"]:
    """The even column in the low nibble: a little-endian pair of bytes, shifted together."""
    pairs = lax.bitcast_convert_type(c.reshape(c.shape[0], -1, 2), jnp.uint16)
    return (pairs | (pairs >> 4)).astype(jnp.uint8)


def _unpack_columns(p: UInt8[Array, "n half"]) -> UInt8[Array, "n k"]:
    wide = p.astype(jnp.uint16)
    pairs = (wide | (wide << 4)) & jnp.uint16(0x0F0F)
    return lax.bitcast_convert_type(pairs, jnp.uint8).reshape(p.shape[0], -1)


def _pack_columns_high(c: UInt8[Array, "n k"]) -> UInt8[Array, "n half"]:
    """The even column in the high nibble."""
    return _swapped(_pack_columns(c))


def _unpack_columns_high(p: UInt8[Array, "n half"]) -> UInt8[Array, "n k"]:
    return _unpack_columns(_swapped(p))


def _swapped(p: UInt8[Array, "*s"]) -> UInt8[Array, "*s"]:
    return (p << 4) | (p >> 4)


def _pack_rows(c: UInt8[Array, "n k"]) -> UInt8[Array, "half k"]:
    """The even row in the low nibble; only the lowest four bits of a code count."""
    pairs = c.reshape(-1, 2, c.shape[1])
    return (pairs[:, 0] & 15) | (pairs[:, 1] << 4)


def _unpack_rows(p: UInt8[Array, "half k"]) -> UInt8[Array, "n k"]:
    return jnp.stack([p & 15, p >> 4], axis=1).reshape(-1, p.shape[1])


PACKINGS = {
    "bytes": Packing(lambda c: c, lambda p: p),
    "columns": Packing(_pack_columns, _unpack_columns, (1, 2)),
    "columns_high": Packing(_pack_columns_high, _unpack_columns_high, (1, 2)),
    "rows": Packing(_pack_rows, _unpack_rows, (2, 1)),
}


def unpacked_shape(packing: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape [..., n, k] of the matrix whose packed codes have this shape."""
    rows, cols = PACKINGS[packing].per_byte
    return (*shape[:-2], shape[-2] * rows, shape[-1] * cols)
