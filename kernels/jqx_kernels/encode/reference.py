# SPDX-License-Identifier: Apache-2.0
"""What encoding means, in plain jnp.

amax = largest |x| of a block,   scale by `RULES`,   code = round(x / scale)
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, UInt8

from jqx_kernels.bits import MAGNITUDE, bits, divide, from_bits
from jqx_kernels.blocks import to_blocks
from jqx_kernels.packing import PACKINGS
from jqx_kernels.tiles import whole_grid

from .request import EncodeRequest
from .rules import RULES, code


def encode(
    w: Float[Array, "n k"], tensor_scale: Float32[Array, ""] | None, request: EncodeRequest
) -> tuple[UInt8[Array, "..."], Array]:
    """The packed codes of `w`, and the scale of every block."""
    x = w.astype(jnp.float32)
    rule = RULES[request.storage.scale]
    # by the bits, since a CPU reads the smallest numbers as zero
    magnitudes = bits(to_blocks(x, request.storage.block)) & MAGNITUDE
    amax = from_bits(jnp.max(magnitudes, axis=(1, 3)))
    scale, factor = rule.find(amax, tensor_scale, request, divide)
    q = rule.quotient(x, _everywhere(factor, request), divide)
    return PACKINGS[request.storage.packing].pack(code(q, x, request)), scale


def codes(
    w: Float[Array, "n k"], step: Float32[Array, "..."], request: EncodeRequest
) -> UInt8[Array, "..."]:
    """The packed codes of `w` over given steps."""
    x = w.astype(jnp.float32)
    q = divide(x, _everywhere(step, request))
    return PACKINGS[request.storage.packing].pack(code(q, x, request))


def _everywhere(step: Float32[Array, "..."], request: EncodeRequest) -> Float32[Array, "n k"]:
    """The step of a block at each of its values."""
    (n, k), (rows, columns) = request.shape, request.storage.block
    grid = whole_grid(step, request.storage, request.shape)
    return jnp.repeat(jnp.repeat(grid, rows or n, axis=0), columns or k, axis=1)[:n, :k]
