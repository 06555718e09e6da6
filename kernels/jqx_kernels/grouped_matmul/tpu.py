# SPDX-License-Identifier: Apache-2.0
"""Grouped products with a stored stack on TPUs, in Mosaic.

Tiles of rows lie side by side; one with rows of several groups is visited by several matrices, one
after another, and stays where it is between. Blocks of bytes and scales are fetched by the number
of the matrix, which is there before the kernel.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int32

from jqx_kernels.dispatch import Device
from jqx_kernels.matmul.planes import apart, cut_of, joined, side_by_side
from jqx_kernels.matmul.tiles import Table, size_of
from jqx_kernels.matmul.tpu_tiles import (
    SUBLANES,
    Operands,
    Plan,
    add_products,
    prepared,
    scale_block,
)
from jqx_kernels.matmul.tuned import tiles_of
from jqx_kernels.pallas import cdiv, tpu

from .groups import visits_of
from .request import GroupedRequest, Stack, lacks_tiles


def lacks(device: Device, request: GroupedRequest) -> str | None:
    """Other devices, float16, and what has no tiles."""
    if device.platform != "tpu":
        return f"needs a TPU, not {device.platform}"
    if "float16" in (request.one.x_dtype, request.one.weight_dtype):
        return "multiplies bfloat16 and float32, not float16"
    return lacks_tiles(device, request)


class _Known(NamedTuple):
    """What there is before the kernel, an integer for every visit. `matrix`: the one that is met,
    or the last that was where none is; `tile`: which of x; `met`: whether one is; `first` and
    `end`: the rows that are written.
    """

    matrix: Any
    tile: Any
    met: Any
    first: Any
    end: Any


def _known(sizes: Int32[Array, "e"], m: int, rows: int) -> _Known:
    visits = visits_of(sizes, m, rows, aligned=True)
    experts = sizes.shape[0]
    last = jnp.max(jnp.where(sizes > 0, jnp.arange(experts, dtype=jnp.int32), 0))
    met = (visits.expert < experts) & (visits.first < visits.end)
    matrix = jnp.minimum(visits.expert, last)
    return _Known(matrix, visits.start // rows, met.astype(jnp.int32), visits.first, visits.end)


def _kernel(*refs: Any, plan: Plan) -> None:
    known, outer, codes, refs = _Known(*refs[:5]), refs[5], refs[6], refs[7:]
    rows_per, columns_per = plan.storage.per_byte
    scales, refs = refs[:rows_per], refs[rows_per:]
    xs, refs = refs[:columns_per], refs[columns_per:]
    outs, sums = refs[:rows_per], refs[rows_per:]
    visit, i = pl.program_id(1), pl.program_id(2)

    @pl.when(i == 0)
    def _() -> None:
        for total in sums:
            total[...] = jnp.zeros_like(total)

    @pl.when(known.met[visit] == 1)
    def _() -> None:
        operands = Operands(xs, codes, scales, outer[0, known.matrix[visit]])
        add_products(sums, operands, i, plan)

    @pl.when(i == pl.num_programs(2) - 1)
    def _() -> None:
        for out, total in zip(outs, sums, strict=True):
            row = lax.broadcasted_iota(jnp.int32, out.shape, 0)
            row = row + known.tile[visit] * out.shape[0]
            mine = (row >= known.first[visit]) & (row < known.end[visit])
            # what other groups wrote to the tile stays
            out[...] = jnp.where(mine, total[...], out[...].astype(jnp.float32)).astype(out.dtype)


class _Sizes(NamedTuple):
    """Of tiles: of x, of y, and along a row of bytes; `steps`: how many there are along it."""

    rows: int
    columns: int
    depth: int
    steps: int

    def along(self, i: Any, visit: Any, known: _Known) -> Any:
        """Which tile along a row; the last one, that is there, in visits without a matrix."""
        return jnp.where(known.met[visit] == 1, i, self.steps - 1)

    def codes(self) -> pl.BlockSpec:
        """Blocks of bytes."""

        def at(j: Any, visit: Any, i: Any, *refs: Any) -> tuple[Any, ...]:
            known = _Known(*refs)
            return known.matrix[visit], j, self.along(i, visit, known)

        return pl.BlockSpec((None, self.columns, self.depth), at)

    def scale(self, scale: Array, width: int | None) -> pl.BlockSpec:
        """Blocks of the scales that go with them."""
        block, place = scale_block(scale.shape[1:], self.columns, self.depth, width)

        def at(j: Any, visit: Any, i: Any, *refs: Any) -> tuple[Any, ...]:
            known = _Known(*refs)
            return known.matrix[visit], *place(j, self.along(i, visit, known))

        return pl.BlockSpec((None, *block), at)

    def x(self) -> pl.BlockSpec:
        """Blocks of x."""

        def at(j: Any, visit: Any, i: Any, *refs: Any) -> tuple[Any, ...]:
            known = _Known(*refs)
            return known.tile[visit], self.along(i, visit, known)

        return pl.BlockSpec((self.rows, self.depth), at)

    def y(self) -> pl.BlockSpec:
        """Blocks of y."""
        return pl.BlockSpec(
            (self.rows, self.columns), lambda j, visit, i, *refs: (_Known(*refs).tile[visit], j)
        )


def grouped_matmul(
    x: Float[Array, "m k"],
    stack: Stack,
    sizes: Int32[Array, "e"],
    request: GroupedRequest,
    table: Table | None = None,
) -> Float[Array, "m n"]:
    """The product in `out_dtype`; another table than that of `matmul` on the device is for
    tuning.
    """
    one, m = request.one, x.shape[0]
    cut = cut_of(stack.codes.shape[1:], stack.scale.shape[1:], one.storage)
    (n, k), (block_rows, width) = cut.shape, cut.block
    table = tiles_of("matmul", one.device, "tpu") if table is None else table
    tiles = table[one.storage.element, size_of(m)]
    rows, depth = min(tiles.rows, m + -m % SUBLANES), min(tiles.depth, k)
    tile = _Sizes(rows, min(tiles.columns, n), depth, cdiv(k, depth))
    xs = apart(x, one.storage.per_byte[1])
    xs = [jnp.pad(x, ((0, -m % rows), (0, -k % depth))) for x in xs]
    scale = side_by_side(stack.scale, cut)
    halves = [cut.scale_of(part, scale) for part in cut.parts if part.out == part.half]
    scales = [prepared(s, block_rows, n) for s in halves[: one.storage.per_byte[0]]]
    out = jax.ShapeDtypeStruct((xs[0].shape[0], n), jnp.dtype(one.out_dtype))
    known = _known(sizes, m, rows)
    outs = pl.pallas_call(
        partial(
            _kernel,
            plan=Plan(cut.parts, one.storage, jnp.dtype(one.weight_dtype), width, k),
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(known),
            grid=(cdiv(n, tile.columns), known.matrix.size, tile.steps),
            in_specs=[
                pl.BlockSpec(memory_space=pltpu.SMEM),
                tile.codes(),
                *(tile.scale(s, width) for s in scales),
                *(tile.x() for _ in xs),
            ],
            out_specs=[tile.y()] * len(scales),
            scratch_shapes=[pltpu.VMEM((rows, tile.columns), jnp.float32)] * len(scales),
        ),
        out_shape=[out] * len(scales),
        name="grouped_stored_matmul",
        **tpu(one.interpret, "parallel", "arbitrary", "arbitrary"),
    )(*known, stack.outer.reshape(1, -1), stack.codes, *scales, *xs)
    return joined(tuple(y[:m] for y in outs))
