# SPDX-License-Identifier: Apache-2.0
"""Products with a stored matrix on TPUs, in Mosaic."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Float32, UInt8

from jqx_kernels.dispatch import Device
from jqx_kernels.pallas import cdiv, tpu

from .planes import joined, planes
from .request import MatmulRequest, lacks_blocks, lacks_meaning
from .tiles import Table, size_of
from .tpu_tiles import SUBLANES, Operands, Plan, add_products, prepared, scale_block
from .tuned import tiles_of


def lacks(device: Device, request: MatmulRequest) -> str | None:
    """Other devices, float16, and what has no tiles."""
    if device.platform != "tpu":
        return f"needs a TPU, not {device.platform}"
    if "float16" in (request.x_dtype, request.weight_dtype):
        return "multiplies bfloat16 and float32, not float16"
    return lacks_meaning(device, request) or lacks_blocks(request)


def _kernel(outer_ref: Any, codes_ref: Any, *refs: Any, plan: Plan) -> None:
    rows_per, columns_per = plan.storage.per_byte
    scales, refs = refs[:rows_per], refs[rows_per:]
    xs, refs = refs[:columns_per], refs[columns_per:]
    outs, sums = refs[:rows_per], refs[rows_per:]
    i = pl.program_id(2)

    @pl.when(i == 0)
    def _() -> None:
        for total in sums:
            total[...] = jnp.zeros_like(total)

    add_products(sums, Operands(xs, codes_ref, scales, outer_ref[0, 0]), i, plan)

    @pl.when(i == pl.num_programs(2) - 1)
    def _() -> None:
        for out, total in zip(outs, sums, strict=True):
            out[...] = total[...].astype(out.dtype)


def _scale_spec(scale: Array, rows: int, depth: int, width: int | None) -> pl.BlockSpec:
    block, at = scale_block(scale.shape, rows, depth, width)
    return pl.BlockSpec(block, lambda i, j, l: at(j, l))  # noqa: E741


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
    (n, k), (block_rows, width) = p.cut.shape, p.cut.block
    table = tiles_of("matmul", request.device, "tpu") if table is None else table
    tiles = table[storage.element, size_of(m)]
    high = min(tiles.rows, m + -m % SUBLANES)
    wide, depth = min(tiles.columns, n), min(tiles.depth, k)
    xs = [jnp.pad(x, ((0, -m % high), (0, -k % depth))) for x in p.xs]
    halves = [p.cut.scale_of(part, p.scale) for part in p.cut.parts if part.out == part.half]
    scales = [prepared(s, block_rows, n) for s in halves[: storage.per_byte[0]]]
    plan = Plan(p.cut.parts, storage, jnp.dtype(request.weight_dtype), width, k)
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
