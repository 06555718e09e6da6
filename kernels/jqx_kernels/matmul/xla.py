# SPDX-License-Identifier: Apache-2.0
"""Products with a stored matrix that XLA compiles: the parts of `planes`, decoded and
multiplied.
"""

from jaxtyping import Array, Float, Float32, UInt8

from jqx_kernels.blocks import from_blocks, spread, to_blocks
from jqx_kernels.codecs import CODECS
from jqx_kernels.dispatch import Device
from jqx_kernels.scale_rules import STEPS
from jqx_kernels.storage import Storage

from .planes import Part, Planes, joined, planes
from .reference import dot
from .request import MatmulRequest, lacks_meaning


def lacks(device: Device, request: MatmulRequest) -> str | None:
    """Blocks that end within a byte, and what nothing can do."""
    storage = request.storage
    for size, per_byte in zip(storage.block, storage.per_byte, strict=True):
        if size is not None and size > 1 and size % per_byte:
            return f"needs blocks that hold whole bytes, not {size} of {per_byte} codes a byte"
    return lacks_meaning(device, request)


def decoded_part(p: Planes, part: Part, outer: Float32[Array, ""], storage: Storage) -> Array:
    """What the codes of one part of a matrix stand for, float32 in the shape of the bytes."""
    codes = to_blocks(p.codes >> part.shift if part.shift else p.codes, p.cut.block)
    step = STEPS[storage.scale](p.cut.scale_of(part, p.scale), outer)
    return from_blocks(CODECS[storage.element].decode(codes) * spread(step), p.codes.shape)


def matmul(
    x: Float[Array, "m k"],
    codes: UInt8[Array, "..."],
    scale: Array,
    outer: Float32[Array, ""],
    request: MatmulRequest,
) -> Float[Array, "m n"]:
    """x w^T in `request.out_dtype`; every part is decoded once, whole."""
    storage = request.storage
    p = planes(x, codes, scale, storage)
    outs: dict[int, Array] = {}
    for part in p.cut.parts:
        w = decoded_part(p, part, outer, storage).astype(request.weight_dtype)
        y = dot(p.xs[part.x], w)
        outs[part.out] = outs[part.out] + y if part.out in outs else y
    return joined(tuple(outs.values())).astype(request.out_dtype)
