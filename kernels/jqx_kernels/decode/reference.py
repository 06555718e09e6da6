# SPDX-License-Identifier: Apache-2.0
"""What decoding means, in plain jnp.

w = value of the code * (scale * tensor_scale)    in float32, then cast
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, UInt8

from jqx_kernels.codecs import CODECS
from jqx_kernels.packing import PACKINGS
from jqx_kernels.scale_rules import STEPS
from jqx_kernels.tiles import whole_grid

from .request import DecodeRequest


def decode(
    codes: UInt8[Array, "..."], scale: Array, outer: Float32[Array, ""], request: DecodeRequest
) -> Float[Array, "n k"]:
    """The matrix that packed codes and the scales of their blocks stand for."""
    (n, k), storage = request.shape, request.storage
    rows, columns = storage.block
    step = STEPS[storage.scale](whole_grid(scale, storage, request.shape), outer)
    steps = jnp.repeat(jnp.repeat(step, rows or n, axis=0), columns or k, axis=1)[:n, :k]
    values = CODECS[storage.element].decode(PACKINGS[storage.packing].unpack(codes))
    return (values * steps).astype(request.dtype)
