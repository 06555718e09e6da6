# SPDX-License-Identifier: Apache-2.0
"""What one program of a product with stored bytes does on a GPU, in Triton: it reads tiles of
bytes, decodes them in registers and multiplies them.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float32, Int32

from jqx_kernels.dispatch import Device
from jqx_kernels.pallas import cdiv
from jqx_kernels.scale_rules import STEPS
from jqx_kernels.storage import Storage
from jqx_kernels.tiles import no_capability

from .planes import Cut, Part
from .reading import read_tile
from .reference import NT, operand_dtype, precision
from .tiles import Tiles
from .values import INTEGERS, Values, numbers

_OLDEST = {"e4m3": (8, 9)}  # the first with conversions from this element; else of bfloat16


def lacks_gpu(device: Device, element: str) -> str | None:
    """Other devices, and old ones."""
    return no_capability(device, _OLDEST.get(element, (8, 0)))


def _e2m1(c: Int32[Array, "*s"]) -> Float32[Array, "*s"]:
    """By the bits of a float16, which has the same subnormals 14 powers of two below."""
    halves = (((c & 7) << 9) | ((c & 8) << 12)).astype(jnp.uint16)
    small = lax.bitcast_convert_type(halves, jnp.float16)
    return small.astype(jnp.float32) * jnp.float32(2.0**14)


def _e4m3(c: Int32[Array, "*s"]) -> Float32[Array, "*s"]:
    eight = lax.bitcast_convert_type(c.astype(jnp.uint8), jnp.float8_e4m3fn)
    return eight.astype(jnp.float32)


VALUES: Values = {**INTEGERS, "e2m1": _e2m1, "e2m1_down": _e2m1, "e4m3": _e4m3}
"""Element -> the number that the lowest bits of an integer are a code of, on a GPU."""


class Plan(NamedTuple):
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


class Operands(NamedTuple):
    """References to what is multiplied: the columns of x for every part, the bytes and their
    scales; `outer`: the tensor scale, a number.
    """

    xs: tuple[Any, ...]
    codes: Any
    scale: Any
    outer: Any


class Place(NamedTuple):
    """What one program multiplies: `steps` tiles from the row of bytes `row` on, in one split, with
    the rows of x from `left` on, up to `end` (None: x is padded). `lead`: the number of the matrix
    where there is a stack of them.
    """

    left: Any
    row: Any
    split: Any
    steps: Any
    end: Any = None
    lead: tuple[Any, ...] = ()


def _scale(ref: Any, at: Any, part: Part, place: Place, plan: Plan) -> Array:
    """The stored scales of a tile: [rows or 1, blocks of columns in it]."""
    (rows, columns), first = plan.cut.block, plan.cut.first(part)
    below, right = plan.limits
    own = rows == 1
    across = 1 if columns is None else max(plan.tiles.depth // columns, 1)
    block_row = place.row if own else 0 if rows is None else place.row // rows
    block_column = 0 if columns is None else at // columns
    limits = (
        below if own else None,
        None if right is None or columns is None else first + plan.cut.blocks,
    )
    sizes = (plan.tiles.columns if own else 1, across)
    return read_tile(ref, (block_row, first + block_column), sizes, limits, place.lead)


def _decoded(codes: Array, step: Array, plan: Plan) -> Array:
    """A tile of the matrix, from the codes in the lowest bits of integers."""
    values = numbers(codes, plan.storage.element, VALUES)
    if step.shape[1] > 1:
        blocks = values.reshape(values.shape[0], step.shape[1], -1)
        return (blocks * step[:, :, None]).reshape(values.shape).astype(plan.weight_dtype)
    return (values * step).astype(plan.weight_dtype)


def summed(refs: Operands, place: Place, plan: Plan) -> tuple[Array, ...]:
    """w x^T of one program, [rows of bytes, rows of x] for every half of y."""
    tiles = plan.tiles
    both = operand_dtype(refs.xs[0].dtype, plan.weight_dtype)

    def step(i: Any, sums: tuple[Array, ...]) -> tuple[Array, ...]:
        at = (place.split * plan.steps + i) * tiles.depth
        sizes = (tiles.columns, tiles.depth)
        codes = read_tile(refs.codes, (place.row, at), sizes, plan.limits, place.lead)
        codes, added = codes.astype(jnp.int32), list(sums)
        for part in plan.cut.parts:
            scale = _scale(refs.scale, at, part, place, plan)
            factor = STEPS[plan.storage.scale](scale, refs.outer)
            w = _decoded(codes >> part.shift if part.shift else codes, factor, plan)
            sizes = (tiles.rows, tiles.depth)
            x = read_tile(refs.xs[part.x], (place.left, at), sizes, (place.end, None))
            added[part.out] += lax.dot_general(
                w.astype(both),
                x.astype(both),
                NT,
                precision=precision(both),
                preferred_element_type=jnp.float32,
            )
        return tuple(added)

    zeros = jnp.zeros((tiles.columns, tiles.rows), jnp.float32)
    return lax.fori_loop(0, place.steps, step, (zeros,) * plan.storage.per_byte[0])
