# SPDX-License-Identifier: Apache-2.0
"""What one program of a product with stored bytes does on a TPU, in Mosaic.

The scales of blocks are spread over the columns of a tile by a product with a matrix of zeros and
ones, which is exact and moves no lanes:

    step[n, j] = sum over c of scale[n, c] [c is the block of column j]
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float32

from jqx_kernels.scale_rules import STEPS
from jqx_kernels.storage import Storage

from .planes import Part
from .reference import NT, operand_dtype, precision
from .request import as_bytes
from .values import INTEGERS, numbers

LANES = 128
SUBLANES = 16  # rows of a tile of bfloat16


class Plan(NamedTuple):
    """What the kernel knows when it is compiled. `width`: bytes of a row that share a scale, None
    for all; `columns`: bytes of a row.
    """

    parts: tuple[Part, ...]
    storage: Storage
    weight_dtype: jnp.dtype
    width: int | None
    columns: int


class Operands(NamedTuple):
    """References to tiles: the columns of x for every part, the bytes, and the scales of each half
    of their rows; `outer`: the tensor scale, a number.
    """

    xs: Sequence[Any]
    codes: Any
    scales: Sequence[Any]
    outer: Any


def _step(scale: Array, outer: Array, first: Any, depth: int, plan: Plan) -> Float32[Array, "..."]:
    """What the codes of a tile are multiplied by; `first`: the column of its first byte, counted
    from that of the first of these scales.
    """
    kind, wide = plan.storage.scale, plan.width
    if wide is None:
        return STEPS[kind](scale, outer)
    # a scale of eight bits is a bfloat16; the tensor scale, which is not, comes after
    values = STEPS[kind](scale, jnp.float32(1))
    dtype = jnp.float32 if kind == "float32" else jnp.bfloat16
    shape = (scale.shape[1], depth)
    column = lax.broadcasted_iota(jnp.int32, shape, 1) + first
    block = lax.shift_right_logical(column, wide.bit_length() - 1)
    hit = block == lax.broadcasted_iota(jnp.int32, shape, 0)
    spread = lax.dot_general(
        values.astype(dtype),
        jnp.where(hit, 1.0, 0.0).astype(dtype),
        (((1,), (0,)), ((), ())),
        precision=precision(dtype),
        preferred_element_type=jnp.float32,
    )
    return spread * outer if kind == "e4m3" else spread


def add_products(sums: Sequence[Any], refs: Operands, i: Any, plan: Plan) -> None:
    """Add x w^T of the tile `i` along the rows of bytes to the sums for every half of y."""
    depth = refs.codes.shape[1]
    both = operand_dtype(refs.xs[0].dtype, plan.weight_dtype)
    codes = as_bytes(refs.codes[...]).astype(jnp.int32)
    if plan.columns % depth:  # beyond them lies anything, NaN too
        inside = lax.broadcasted_iota(jnp.int32, codes.shape, 1) + i * depth < plan.columns
        codes = jnp.where(inside, codes, 0)
    for part in plan.parts:
        scale = as_bytes(refs.scales[part.half][...])
        held = scale.shape[1] * (plan.width or 1)  # columns of bytes that these scales are for
        first = lax.rem(i * depth, held)
        values = numbers(codes >> part.shift, plan.storage.element, INTEGERS)
        w = values * _step(scale, refs.outer, first, depth, plan)
        sums[part.out][...] += lax.dot_general(
            refs.xs[part.x][...].astype(both),
            w.astype(plan.weight_dtype).astype(both),
            NT,
            precision=precision(both),
            preferred_element_type=jnp.float32,
        )


At = Callable[[Any, Any], tuple[Any, Any]]
"""(tile of rows of bytes, tile along them) -> the block of scales that goes with it."""


def scale_block(
    shape: tuple[int, ...], rows: int, depth: int, width: int | None
) -> tuple[tuple[int, int], At]:
    """Which of the scales of this shape go with a tile: all of a row, or 128 of them."""
    tall, wide = shape
    lanes = wide if wide <= LANES else LANES
    held = lanes * (width or 1)
    several = wide > LANES

    def at(j: Any, l: Any) -> tuple[Any, Any]:  # noqa: E741
        return (0 if tall == 1 else j), lax.div(l * depth, held) if several else 0

    return (1 if tall == 1 else rows, lanes), at


def prepared(scale: Array, block_rows: int | None, rows: int) -> Array:
    """Scales [..., blocks of rows, blocks of columns] with a row for every row of bytes, or one for
    all, and whole blocks of 128.
    """
    if block_rows is not None and block_rows > 1:
        scale = jnp.repeat(scale, block_rows, axis=-2)[..., :rows, :]
    more = -scale.shape[-1] % LANES if scale.shape[-1] > LANES else 0
    return jnp.pad(scale, (*((0, 0),) * (scale.ndim - 1), (0, more))) if more else scale
