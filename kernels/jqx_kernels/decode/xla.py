# SPDX-License-Identifier: Apache-2.0
"""Decoding that XLA compiles."""

from jaxtyping import Array, Float, Float32, UInt8

from jqx_kernels.blocks import from_blocks, spread, to_blocks
from jqx_kernels.codecs import CODECS
from jqx_kernels.packing import PACKINGS
from jqx_kernels.scale_rules import STEPS
from jqx_kernels.tiles import whole_grid

from .request import DecodeRequest


def decode(
    codes: UInt8[Array, "..."], scale: Array, outer: Float32[Array, ""], request: DecodeRequest
) -> Float[Array, "n k"]:
    """As `reference.decode`."""
    storage = request.storage
    step = STEPS[storage.scale](whole_grid(scale, storage, request.shape), outer)
    unpacked = PACKINGS[storage.packing].unpack(codes)
    values = CODECS[storage.element].decode(to_blocks(unpacked, storage.block))
    return from_blocks(values * spread(step), request.shape).astype(request.dtype)
