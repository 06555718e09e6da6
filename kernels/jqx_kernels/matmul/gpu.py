# SPDX-License-Identifier: Apache-2.0
"""Products with a stored matrix on CUDA GPUs, in Triton.

Every program reads tiles of bytes, decodes them in registers and multiplies them, as the left
operand, with the activations: w x^T, of which few rows of x fill a narrow tile of tensor cores.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Float32, Int32, UInt8

from jqx_kernels.dispatch import Device
from jqx_kernels.pallas import cdiv, triton
from jqx_kernels.scale_rules import STEPS
from jqx_kernels.storage import Storage

from .planes import Cut, Part, joined, planes
from .reading import inside, read_tile
from .reference import NT, operand_dtype, precision
from .request import MANY, MatmulRequest, lacks_blocks, lacks_meaning
from .tiles import TILES, Table, Tiles, tiles_for
from .values import INTEGERS, Values, numbers

_OLDEST = {"e4m3": (8, 9)}  # the first with conversions from this element; else of bfloat16


def lacks(device: Device, request: MatmulRequest) -> str | None:
    """Other devices, old ones, many rows, and what has no tiles."""
    least = _OLDEST.get(request.storage.element, (8, 0))
    if device.platform != "gpu" or device.capability is None:
        return f"needs a CUDA GPU, not {device.platform}"
    if device.capability < least:
        return "needs compute capability {}.{}, not {}.{}".format(*least, *device.capability)
    if request.x_shape[0] >= MANY:
        return (
            f"decodes the matrix in every tile, which from {MANY} rows on is slower than once; "
            f"there are {request.x_shape[0]}"
        )
    return lacks_meaning(device, request) or lacks_blocks(request)


def _e2m1(c: Int32[Array, "*s"]) -> Float32[Array, "*s"]:
    """By the bits of a float16, which has the same subnormals 14 powers of two below."""
    halves = (((c & 7) << 9) | ((c & 8) << 12)).astype(jnp.uint16)
    small = lax.bitcast_convert_type(halves, jnp.float16)
    return small.astype(jnp.float32) * jnp.float32(2.0**14)


def _e4m3(c: Int32[Array, "*s"]) -> Float32[Array, "*s"]:
    eight = lax.bitcast_convert_type(c.astype(jnp.uint8), jnp.float8_e4m3fn)
    return eight.astype(jnp.float32)


_VALUES: Values = {**INTEGERS, "e2m1": _e2m1, "e2m1_down": _e2m1, "e4m3": _e4m3}


class _Plan(NamedTuple):
    """What the kernel knows when it is compiled."""

    cut: Cut
    tiles: Tiles
    storage: Storage
    weight_dtype: jnp.dtype

    @property
    def steps(self) -> int:
        """Tiles along a row of bytes in every split."""
        return cdiv(cdiv(self.cut.shape[1], self.tiles.depth), self.tiles.splits)

    @property
    def covered(self) -> int:
        """Bytes of a row in all of these."""
        return self.steps * self.tiles.splits * self.tiles.depth

    @property
    def limits(self) -> tuple[int | None, int | None]:
        """The rows and columns of bytes, None where tiles end with them."""
        (rows, columns), exact = self.cut.shape, self.covered == self.cut.shape[1]
        return None if rows % self.tiles.columns == 0 else rows, None if exact else columns


def _scale(ref: Any, row: Any, at: Any, part: Part, plan: _Plan) -> Array:
    """The stored scales of a tile: [rows or 1, blocks of columns in it]."""
    (rows, columns), first = plan.cut.block, plan.cut.first(part)
    below, right = plan.limits
    own = rows == 1
    across = 1 if columns is None else max(plan.tiles.depth // columns, 1)
    block_row = row if own else 0 if rows is None else row // rows
    block_column = 0 if columns is None else at // columns
    limits = (
        below if own else None,
        None if right is None or columns is None else first + plan.cut.blocks,
    )
    sizes = (plan.tiles.columns if own else 1, across)
    return read_tile(ref, (block_row, first + block_column), sizes, limits)


def _decoded(codes: Array, step: Array, plan: _Plan) -> Array:
    """A tile of the matrix, from the codes in the lowest bits of integers."""
    values = numbers(codes, plan.storage.element, _VALUES)
    if step.shape[1] > 1:
        blocks = values.reshape(values.shape[0], step.shape[1], -1)
        return (blocks * step[:, :, None]).reshape(values.shape).astype(plan.weight_dtype)
    return (values * step).astype(plan.weight_dtype)


def _kernel(outer_ref: Any, codes_ref: Any, scale_ref: Any, *refs: Any, plan: _Plan) -> None:
    parts, tiles, halves = plan.cut.parts, plan.tiles, plan.storage.per_byte[0]
    xs, outs = refs[:-halves], refs[-halves:]
    left, row = pl.program_id(0) * tiles.rows, pl.program_id(1) * tiles.columns
    split = pl.program_id(2)
    both = operand_dtype(xs[0].dtype, plan.weight_dtype)

    def step(i: Any, sums: tuple[Array, ...]) -> tuple[Array, ...]:
        at = (split * plan.steps + i) * tiles.depth
        codes = read_tile(codes_ref, (row, at), (tiles.columns, tiles.depth), plan.limits)
        codes, added = codes.astype(jnp.int32), list(sums)
        for part in parts:
            scale = _scale(scale_ref, row, at, part, plan)
            factor = STEPS[plan.storage.scale](scale, outer_ref[0])
            w = _decoded(codes >> part.shift if part.shift else codes, factor, plan)
            x = xs[part.x][pl.ds(left, tiles.rows), pl.ds(at, tiles.depth)]
            added[part.out] += lax.dot_general(
                w.astype(both),
                x.astype(both),
                NT,
                precision=precision(both),
                preferred_element_type=jnp.float32,
            )
        return tuple(added)

    zeros = jnp.zeros((tiles.columns, tiles.rows), jnp.float32)
    sums = lax.fori_loop(0, plan.steps, step, (zeros,) * len(outs))
    for out, total in zip(outs, sums, strict=True):
        m, sizes = out.shape[1], (tiles.rows, tiles.columns)
        mask = inside((left, row), sizes, (m if m % tiles.rows else None, plan.limits[0]))
        at = out.at[split, pl.ds(left, tiles.rows), pl.ds(row, tiles.columns)]
        plgpu.store(at, total.T.astype(out.dtype), mask=mask)


def matmul(
    x: Float[Array, "m k"],
    codes: UInt8[Array, "..."],
    scale: Array,
    outer: Float32[Array, ""],
    request: MatmulRequest,
    table: Table = TILES,
) -> Float[Array, "m n"]:
    """x w^T in `request.out_dtype`; tiles of another table than TILES are for tuning."""
    storage = request.storage
    m, p = x.shape[0], planes(x, codes, scale, storage)
    rows, columns = p.cut.shape
    tiles = tiles_for(storage.element, m, p.cut.shape, p.cut.block[0], table)
    plan = _Plan(p.cut, tiles, storage, jnp.dtype(request.weight_dtype))
    pad = ((0, -m % tiles.rows), (0, plan.covered - columns))
    xs = [jnp.pad(x, pad) if any(map(sum, pad)) else x for x in p.xs]
    summed_here = tiles.splits == 1
    out = jax.ShapeDtypeStruct(
        (tiles.splits, m, rows), jnp.dtype(request.out_dtype if summed_here else "float32")
    )
    outs = pl.pallas_call(
        partial(_kernel, plan=plan),
        grid=(cdiv(m, tiles.rows), cdiv(rows, tiles.columns), tiles.splits),
        out_shape=[out] * storage.per_byte[0],
        name="stored_matmul",
        **triton(request.interpret, tiles.warps, tiles.stages),
    )(outer.reshape(1), p.codes, p.scale, *xs)
    return joined(tuple(y[0] if summed_here else y.sum(axis=0) for y in outs)).astype(
        request.out_dtype
    )
