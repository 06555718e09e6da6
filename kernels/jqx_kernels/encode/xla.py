# SPDX-License-Identifier: Apache-2.0
"""Encoding that XLA compiles. Exact where XLA divides exactly: on CPUs, but not on NVIDIA GPUs,
where a quotient may be off by two ulp and a code at a tie by one.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, UInt8

from jqx_kernels.bits import divide
from jqx_kernels.blocks import block_amax, from_blocks, spread, to_blocks
from jqx_kernels.packing import PACKINGS
from jqx_kernels.tiles import whole_grid

from .request import EncodeRequest
from .rules import RULES, code


def encode(
    w: Float[Array, "n k"], tensor_scale: Float32[Array, ""] | None, request: EncodeRequest
) -> tuple[UInt8[Array, "..."], Array]:
    """As `reference.encode`."""
    w = lax.optimization_barrier(w)  # XLA divides constants by a constant's reciprocal
    rule = RULES[request.storage.scale]
    amax = block_amax(w, request.storage.block)
    scale, factor = rule.find(amax, tensor_scale, request, divide)
    x = to_blocks(w, request.storage.block).astype(jnp.float32)
    return _packed(rule.quotient(x, spread(factor), divide), x, request), scale


def codes(
    w: Float[Array, "n k"], step: Float32[Array, "..."], request: EncodeRequest
) -> UInt8[Array, "..."]:
    """As `reference.codes`."""
    x = to_blocks(lax.optimization_barrier(w), request.storage.block).astype(jnp.float32)
    grid = whole_grid(step, request.storage, request.shape)
    return _packed(divide(x, spread(grid)), x, request)


def _packed(
    q: Float32[Array, "..."], x: Float32[Array, "..."], request: EncodeRequest
) -> UInt8[Array, "..."]:
    matrix = from_blocks(code(q, x, request), request.shape)
    # packing reads pairs of codes: fused with the division it would be computed one by one
    return PACKINGS[request.storage.packing].pack(lax.optimization_barrier(matrix))
