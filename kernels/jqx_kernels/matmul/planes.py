# SPDX-License-Identifier: Apache-2.0
"""A product taken apart so that packed codes are never interleaved.

Two columns in a byte: the low codes are a matrix of their own that meets the even columns of x, the
high codes one that meets the odd columns. Two rows in a byte: the low codes are the even columns of
y, the high codes the odd ones. So all arithmetic is on matrices of the shape of the bytes.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from jqx_kernels.storage import Storage


class Part(NamedTuple):
    """One product of those whose sum is y: `x`, which of the columns of x; `shift`, where its code
    is in a byte; `half`, which rows of two; `out`, to which part of y it is added.
    """

    x: int
    shift: int
    half: int
    out: int


PARTS = {
    "bytes": (Part(0, 0, 0, 0),),
    "columns": (Part(0, 0, 0, 0), Part(1, 4, 0, 0)),
    "columns_high": (Part(1, 0, 0, 0), Part(0, 4, 0, 0)),
    "rows": (Part(0, 0, 0, 0), Part(0, 4, 1, 1)),
}


class Cut(NamedTuple):
    """The parts of one product, static. `shape`: (rows, columns) of bytes; `block`: how many of
    them share a scale, None for a whole axis; `blocks`: how many blocks of columns there are;
    `halves`: 2 where packed rows have scales of their own, which lie side by side.
    """

    parts: tuple[Part, ...]
    shape: tuple[int, int]
    block: tuple[int | None, int | None]
    blocks: int
    halves: int

    def first(self, part: Part) -> int:
        """The column where the scales of a part begin."""
        return self.blocks * min(part.half, self.halves - 1)

    def scale_of(self, part: Part, scale: Array) -> Array:
        """The scales of a part, [..., blocks of rows, blocks of columns]."""
        return scale[..., self.first(part) : self.first(part) + self.blocks]


class Planes(NamedTuple):
    """The operands of the parts: `xs`, columns of x; `codes`, the bytes as they are stored;
    `scale`, [blocks of rows, halves * blocks of columns].
    """

    cut: Cut
    xs: tuple[Float[Array, "m columns"], ...]
    codes: UInt8[Array, "rows columns"]
    scale: Array


def cut_of(codes: tuple[int, ...], scale: tuple[int, ...], s: Storage) -> Cut:
    """How a product is taken apart, from the shapes of bytes and of scales [blocks of rows, blocks
    of columns]. Blocks of packed rows or columns hold whole bytes.
    """
    per_rows, per_columns = s.per_byte
    rows, columns = s.block
    block = (1 if rows == 1 else rows and rows // per_rows, columns and columns // per_columns)
    halves = per_rows if rows == 1 else 1
    return Cut(PARTS[s.packing], (codes[0], codes[1]), block, scale[1], halves)


def side_by_side(scale: Array, cut: Cut) -> Array:
    """Scales [..., blocks of rows, blocks of columns] with those of packed rows side by side."""
    *lead, tall, _ = scale.shape
    return scale.reshape(*lead, tall // cut.halves, -1)


def apart(x: Float[Array, "m k"], parts: int) -> tuple[Float[Array, "m columns"], ...]:
    """The columns of `x` that meet each part of a byte; the inverse of `joined`."""
    return tuple(x[:, i::parts] for i in range(parts))


def planes(x: Float[Array, "m k"], codes: UInt8[Array, "..."], scale: Array, s: Storage) -> Planes:
    """The operands of a product."""
    scale = scale.reshape(scale.shape or (1, 1))
    cut = cut_of(codes.shape, scale.shape, s)
    return Planes(cut, apart(x, s.per_byte[1]), codes, side_by_side(scale, cut))


def joined(outs: tuple[Float[Array, "m rows"], ...]) -> Float[Array, "m n"]:
    """y from its parts."""
    if len(outs) == 1:
        return outs[0]
    m, rows = outs[0].shape
    return jnp.stack(outs, axis=-1).reshape(m, len(outs) * rows)
