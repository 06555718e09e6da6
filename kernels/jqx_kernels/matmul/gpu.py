# SPDX-License-Identifier: Apache-2.0
"""Products with a stored matrix on CUDA GPUs, in Triton.

Every program reads tiles of bytes, decodes them in registers and multiplies them, as the left
operand, with the activations: w x^T, of which few rows of x fill a narrow tile of tensor cores.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Float32, UInt8

from jqx_kernels.dispatch import Device
from jqx_kernels.pallas import cdiv, triton

from .gpu_tiles import Operands, Place, Plan, lacks_gpu, summed
from .planes import joined, planes
from .reading import inside
from .request import MANY, MatmulRequest, lacks_blocks, lacks_meaning
from .tiles import Table, tiles_for
from .tuned import tiles_of


def lacks(device: Device, request: MatmulRequest) -> str | None:
    """Other devices, old ones, many rows, and what has no tiles."""
    reason = lacks_gpu(device, request.storage.element)
    if reason is not None:
        return reason
    if request.x_shape[0] >= MANY:
        return (
            f"decodes the matrix in every tile, which from {MANY} rows on is slower than once; "
            f"there are {request.x_shape[0]}"
        )
    return lacks_meaning(device, request) or lacks_blocks(request)


def _kernel(outer_ref: Any, codes_ref: Any, scale_ref: Any, *refs: Any, plan: Plan) -> None:
    tiles, halves = plan.tiles, plan.storage.per_byte[0]
    xs, outs = refs[:-halves], refs[-halves:]
    left, row = pl.program_id(0) * tiles.rows, pl.program_id(1) * tiles.columns
    split = pl.program_id(2)
    operands = Operands(xs, codes_ref, scale_ref, outer_ref[0])
    sums = summed(operands, Place(left, row, split, plan.steps), plan)
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
    table: Table | None = None,
) -> Float[Array, "m n"]:
    """x w^T in `request.out_dtype`; another table than that of the device is for tuning."""
    storage = request.storage
    m, p = x.shape[0], planes(x, codes, scale, storage)
    rows, columns = p.cut.shape
    table = tiles_of("matmul", request.device) if table is None else table
    tiles = tiles_for(storage.element, m, p.cut.shape, p.cut.block[0], table)
    plan = Plan(p.cut, tiles, storage, jnp.dtype(request.weight_dtype))
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
