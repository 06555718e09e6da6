# SPDX-License-Identifier: Apache-2.0
"""The meaning of a product of two stored matrices, in plain jnp.

y = cast((code_x * scale_x) (code_w * scale_w)^T * tensor_scale)        all in float32
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32

from jqx_kernels.blocks import from_blocks, spread, to_blocks
from jqx_kernels.codecs import CODECS
from jqx_kernels.matmul.reference import NT
from jqx_kernels.packing import PACKINGS
from jqx_kernels.scale_rules import STEPS

from .kinds import KINDS, Kind, ScaledRequest, Stored


def values(stored: Stored, kind: Kind) -> Float32[Array, "rows k"]:
    """The matrix that an operand stores, but for the tensor scale."""
    codes = PACKINGS[kind.packing].unpack(stored.codes)
    rows = stored.scale.shape[0]
    block = (1 if rows == codes.shape[0] else None, kind.block)
    step = STEPS[kind.scale](stored.scale, jnp.float32(1))
    numbers = CODECS[kind.element].decode(to_blocks(codes, block))
    return from_blocks(numbers * spread(step), codes.shape)


def multiply(
    x: Stored, w: Stored, outer: Float32[Array, ""], request: ScaledRequest
) -> Float[Array, "m n"]:
    """The product in `request.dtype`."""
    y = lax.dot_general(
        values(x, KINDS[request.kind]),
        values(w, KINDS[request.kind]),
        NT,
        precision=lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
    return (y * outer).astype(request.dtype)
