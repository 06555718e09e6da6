# SPDX-License-Identifier: Apache-2.0
"""Decoding on TPUs: a kernel that Mosaic compiles. Tiles are transposed, as in `encode.tpu`."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Float32, Int32, UInt8

from jqx_kernels.dispatch import Device
from jqx_kernels.kernel_codecs import KERNEL_CODECS
from jqx_kernels.pallas import tpu
from jqx_kernels.scale_rules import STEPS
from jqx_kernels.tiles import (
    SHIFTS,
    Tile,
    filled,
    no_kernel,
    no_tpu,
    padded,
    row_grid,
    shrink,
    stretch,
    tpu_block,
    tpu_tile,
    wide_block,
)

from .request import DecodeRequest


def lacks(device: Device, request: DecodeRequest) -> str | None:
    """Why `decode` cannot do it."""
    return no_kernel(request, no_tpu(device)) or wide_block(_tile(request))


def _tile(request: DecodeRequest) -> Tile:
    k, columns = request.shape[1], request.columns
    # bytes fill a register by 32 sublanes, float32 by 8
    groups = 8 if request.storage.scale == "float32" else 32
    return tpu_tile(tpu_block(columns, k), pl.cdiv(k, columns), groups)


def decode(
    codes: UInt8[Array, "..."], scale: Array, outer: Float32[Array, ""], request: DecodeRequest
) -> Float[Array, "n k"]:
    """As `reference.decode`."""
    (n, k), (down, across) = request.shape, request.storage.per_byte
    tile, block = _tile(request), tpu_block(request.columns, k)
    rows, blocks = padded(n, tile.rows), padded(pl.cdiv(k, request.columns), tile.groups)
    longer = stretch(codes, request.columns // across, block // across)
    # Mosaic writes no float16
    dtype = jnp.float32 if request.dtype == jnp.float16 else request.dtype
    matrix = pl.pallas_call(
        partial(_kernel, request=request, tile=tile),
        grid=(rows // tile.rows, blocks * block // tile.span),
        in_specs=[
            pl.BlockSpec(memory_space=pltpu.SMEM),
            pl.BlockSpec((tile.groups, tile.rows), lambda i, j: (0 if blocks == 1 else j, i)),
            pl.BlockSpec((tile.rows // down, tile.span // across), lambda i, j: (i, j)),
        ],
        out_specs=pl.BlockSpec((tile.rows, tile.span), lambda i, j: (i, j)),
        out_shape=jax.ShapeDtypeStruct((rows, blocks * block), dtype),
        name="decode",
        **tpu(request.interpret, "parallel", "parallel"),
    )(
        outer.reshape(1, 1),
        filled(row_grid(scale, request.storage, request.shape), rows, blocks).T,
        filled(longer, rows // down, blocks * block // across),
    )
    return shrink(matrix, request.columns, block, request.shape).astype(request.dtype)


def _kernel(
    outer_ref: Any,
    scale_ref: Any,
    codes_ref: Any,
    out_ref: Any,
    *,
    request: DecodeRequest,
    tile: Tile,
) -> None:
    storage = request.storage
    c = _unpacked(codes_ref[...].astype(jnp.int32), storage.packing)  # TPUs shift no bytes
    blocks = c.reshape(tile.groups, tile.columns, tile.rows).astype(jnp.uint8)
    step = STEPS[storage.scale](scale_ref[...], outer_ref[0, 0])
    matrix = KERNEL_CODECS[storage.element].decode(blocks) * step[:, None, :]
    out_ref[...] = matrix.reshape(tile.span, tile.rows).T.astype(out_ref.dtype)


def _unpacked(p: Int32[Array, "..."], packing: str) -> Int32[Array, "columns rows"]:
    """The codes of a tile, transposed."""
    if packing == "rows":
        pairs = jnp.stack([p & 15, p >> 4], axis=1)
        return pairs.reshape(2 * p.shape[0], p.shape[1]).T
    if packing not in SHIFTS:
        return p.T
    even, odd = SHIFTS[packing]
    pairs = jnp.stack([(p.T >> even) & 15, (p.T >> odd) & 15], axis=1)
    return pairs.reshape(2 * p.shape[1], p.shape[0])
