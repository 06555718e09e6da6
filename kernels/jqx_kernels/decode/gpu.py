# SPDX-License-Identifier: Apache-2.0
"""Decoding on NVIDIA GPUs: a kernel that Triton compiles. Two rows that share bytes are planes of a
tile, as in `encode.gpu`.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Float32, UInt8

from jqx_kernels.dispatch import Device
from jqx_kernels.kernel_codecs import KERNEL_CODECS
from jqx_kernels.pallas import triton
from jqx_kernels.scale_rules import STEPS
from jqx_kernels.tiles import (
    SHIFTS,
    Tile,
    gpu_block,
    gpu_tile,
    no_gpu,
    no_kernel,
    row_grid,
    shrink,
    stretch,
)

from .request import DecodeRequest


def lacks(device: Device, request: DecodeRequest) -> str | None:
    """Why `decode` cannot do it."""
    return no_kernel(request, no_gpu(device))


def decode(
    codes: UInt8[Array, "..."], scale: Array, outer: Float32[Array, ""], request: DecodeRequest
) -> Float[Array, "n k"]:
    """As `reference.decode`."""
    (n, k), (planes, per_byte) = request.shape, request.storage.per_byte
    block, blocks = gpu_block(request.columns), pl.cdiv(k, request.columns)
    tile = gpu_tile(n // planes, block, blocks)
    rows, span, whole = tile.rows, tile.span, tile.groups * block
    steps = row_grid(scale, request.storage, request.shape)
    matrix = pl.pallas_call(
        partial(_kernel, request=request, tile=tile),
        grid=(n // planes // rows, blocks * block // span),
        in_specs=[
            pl.BlockSpec((1,), lambda i, j: (0,)),
            pl.BlockSpec((rows, planes, tile.groups), lambda i, j: (i, 0, j * span // whole)),
            pl.BlockSpec((rows, span // per_byte), lambda i, j: (i, j)),
        ],
        out_specs=pl.BlockSpec((rows, planes, span), lambda i, j: (i, 0, j)),
        out_shape=jax.ShapeDtypeStruct((n // planes, planes, blocks * block), request.dtype),
        name="decode",
        **triton(request.interpret),
    )(
        outer.reshape(1),
        steps.reshape(n // planes, planes, blocks),
        stretch(codes, request.columns // per_byte, block // per_byte),
    )
    return shrink(matrix.reshape(n, blocks * block), request.columns, block, request.shape)


def _kernel(
    outer_ref: Any,
    scale_ref: Any,
    codes_ref: Any,
    out_ref: Any,
    *,
    request: DecodeRequest,
    tile: Tile,
) -> None:
    storage, packed = request.storage, codes_ref[...]
    value = KERNEL_CODECS[storage.element].decode
    for plane in range(storage.per_byte[0]):
        step = STEPS[storage.scale](scale_ref[:, plane, :], outer_ref[0])
        unpacked = _unpacked(packed, storage.packing, plane).reshape(tile)
        matrix = (value(unpacked) * step[:, :, None]).astype(request.dtype)
        out_ref[:, plane, :] = matrix.reshape(tile.rows, tile.span)


def _unpacked(
    p: UInt8[Array, "rows bytes"], packing: str, plane: int
) -> UInt8[Array, "rows columns"]:
    if packing == "rows":
        return (p >> (4 * plane)) & 15
    if packing not in SHIFTS:
        return p
    even, odd = SHIFTS[packing]
    return jnp.stack([(p >> even) & 15, (p >> odd) & 15], axis=-1).reshape(p.shape[0], -1)
