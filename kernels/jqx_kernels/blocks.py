# SPDX-License-Identifier: Apache-2.0
"""Blocks of a matrix, and their largest magnitudes.

A magnitude is a bit pattern without its sign, and patterns of positive floats are ordered like the
floats: the amax of bfloat16 or float16 values is an integer maximum over pairs, which a CPU does at
the speed of memory.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32

from .bits import MAGNITUDE, bits, from_bits

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
