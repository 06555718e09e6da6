# SPDX-License-Identifier: Apache-2.0
"""Products with a stored matrix on TPUs, in Mosaic.

The scales of blocks are spread over the columns of a tile by a product with a matrix of zeros and
ones, which is exact and moves no lanes:

    step[n, j] = sum over c of scale[n, c] [c is the block of column j]
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Float32, UInt8

from jqx_kernels.dispatch import Device
from jqx_kernels.pallas import cdiv, tpu
from jqx_kernels.scale_rules import STEPS
from jqx_kernels.storage import Storage

from .planes import Part, joined, planes
from .reference import NT, operand_dtype, precision
from .request import MatmulRequest, lacks_blocks, lacks_meaning
from .values import INTEGERS, numbers

ROWS, COLUMNS, DEPTH = 256, 256, 1024  # of tiles of x, of y, and along a row of bytes
LANES = 128
SUBLANES = 16  # rows of a tile of bfloat16


def lacks(device: Device, request: MatmulRequest) -> str | None:
    """Other devices, float16, and what has no tiles."""
    if device.platform != "tpu":
        return f"needs a TPU, not {device.platform}"
    if "float16" in (request.x_dtype, request.weight_dtype):
        return "multiplies bfloat16 and float32, not float16"
    return lacks_meaning(device, request) or lacks_blocks(request)


class _Plan(NamedTuple):
    """What the kernel knows when it is compiled. `width`: bytes of a row that share a scale, None
    for all; `columns`: bytes of a row.
    """

    parts: tuple[Part, ...]
    storage: Storage
    weight_dtype: jnp.dtype
    width: int | None
    columns: int


def _step(scale: Array, outer: Array, first: Any, depth: int, plan: _Plan) -> Float32[Array, "..."]:
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


def _kernel(outer_ref: Any, codes_ref: Any, *refs: Any, plan: _Plan) -> None:
    rows_per, columns_per = plan.storage.per_byte
    scales, refs = refs[:rows_per], refs[rows_per:]
    xs, refs = refs[:columns_per], refs[columns_per:]
    outs, sums = refs[:rows_per], refs[rows_per:]
    depth, i = codes_ref.shape[1], pl.program_id(2)
    both = operand_dtype(xs[0].dtype, plan.weight_dtype)

    @pl.when(i == 0)
    def _() -> None:
        for total in sums:
            total[...] = jnp.zeros_like(total)

    codes = codes_ref[...].astype(jnp.int32)
    if plan.columns % depth:  # beyond them lies anything, NaN too
        inside = lax.broadcasted_iota(jnp.int32, codes.shape, 1) + i * depth < plan.columns
        codes = jnp.where(inside, codes, 0)
    for part in plan.parts:
        scale = scales[part.half][...]
        held = scale.shape[1] * (plan.width or 1)  # columns of bytes that these scales are for
        first = lax.rem(i * depth, held)
        values = numbers(codes >> part.shift, plan.storage.element, INTEGERS)
        w = values * _step(scale, outer_ref[0, 0], first, depth, plan)
        sums[part.out][...] += lax.dot_general(
            xs[part.x][...].astype(both),
            w.astype(plan.weight_dtype).astype(both),
            NT,
            precision=precision(both),
            preferred_element_type=jnp.float32,
        )

    @pl.when(i == pl.num_programs(2) - 1)
    def _() -> None:
        for out, total in zip(outs, sums, strict=True):
            out[...] = total[...].astype(out.dtype)


def _scale_spec(scale: Array, rows: int, depth: int, width: int | None) -> pl.BlockSpec:
    """Which scales go with a tile: all of a row, or 128 of them."""
    tall, wide = scale.shape
    lanes = wide if wide <= LANES else LANES
    held = lanes * (width or 1)
    several = wide > LANES

    def at(i: Any, j: Any, l: Any) -> tuple[Any, Any]:  # noqa: E741
        return (0 if tall == 1 else j), lax.div(l * depth, held) if several else 0

    return pl.BlockSpec((1 if tall == 1 else rows, lanes), at)


def _prepared(scale: Array, block_rows: int | None, rows: int) -> Array:
    """Scales with a row for every row of bytes, or one for all, and whole blocks of 128."""
    if block_rows is not None and block_rows > 1:
        scale = jnp.repeat(scale, block_rows, axis=0)[:rows]
    wide = scale.shape[1]
    return jnp.pad(scale, ((0, 0), (0, -wide % LANES))) if wide > LANES else scale


def matmul(
    x: Float[Array, "m k"],
    codes: UInt8[Array, "..."],
    scale: Array,
    outer: Float32[Array, ""],
    request: MatmulRequest,
) -> Float[Array, "m n"]:
    """x w^T in `request.out_dtype`."""
    storage = request.storage
    m, p = x.shape[0], planes(x, codes, scale, storage)
    (n, k), (block_rows, width) = p.cut.shape, p.cut.block
    high = min(ROWS, m + -m % SUBLANES)
    wide, depth = min(COLUMNS, n), min(DEPTH, k)
    xs = [jnp.pad(x, ((0, -m % high), (0, -k % depth))) for x in p.xs]
    halves = [p.cut.scale_of(part, p.scale) for part in p.cut.parts if part.out == part.half]
    scales = [_prepared(s, block_rows, n) for s in halves[: storage.per_byte[0]]]
    plan = _Plan(p.cut.parts, storage, jnp.dtype(request.weight_dtype), width, k)
    out = jax.ShapeDtypeStruct((xs[0].shape[0], n), jnp.dtype(request.out_dtype))
    outs = pl.pallas_call(
        partial(_kernel, plan=plan),
        grid=(xs[0].shape[0] // high, cdiv(n, wide), xs[0].shape[1] // depth),
        in_specs=[
            pl.BlockSpec(memory_space=pltpu.SMEM),
            pl.BlockSpec((wide, depth), lambda i, j, l: (j, l)),  # noqa: E741
            *(_scale_spec(s, wide, depth, width) for s in scales),
            *(pl.BlockSpec((high, depth), lambda i, j, l: (i, l)) for _ in xs),  # noqa: E741
        ],
        out_specs=[pl.BlockSpec((high, wide), lambda i, j, l: (i, j))] * len(scales),  # noqa: E741
        out_shape=[out] * len(scales),
        scratch_shapes=[pltpu.VMEM((high, wide), jnp.float32)] * len(scales),
        name="stored_matmul",
        **tpu(request.interpret, "parallel", "parallel", "arbitrary"),
    )(outer.reshape(1, 1), p.codes, *scales, *xs)
    return joined(tuple(y[:m] for y in outs))
