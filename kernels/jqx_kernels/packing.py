# SPDX-License-Identifier: Apache-2.0
"""How small codes share bytes."""

from collections.abc import Callable
from dataclasses import dataclass

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, UInt8


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
