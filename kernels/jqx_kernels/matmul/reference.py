# SPDX-License-Identifier: Apache-2.0
"""The meaning of a product with a stored matrix, in plain jnp.

w = cast(code * (scale * tensor_scale)),   y = x w^T   summed in float32
"""

import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, UInt8

from jqx_kernels.blocks import from_blocks, spread, to_blocks
from jqx_kernels.codecs import CODECS
from jqx_kernels.packing import PACKINGS
from jqx_kernels.scale_rules import STEPS
from jqx_kernels.storage import Storage

from .request import MatmulRequest

NT = (((1,), (1,)), ((), ()))
"""Dimension numbers of a product with a transposed matrix."""


def stored_matrix(
    codes: UInt8[Array, "..."], scale: Array, outer: Float32[Array, ""], storage: Storage
) -> Float32[Array, "n k"]:
    """The matrix that codes and scales stand for: code * (scale * tensor_scale) in float32."""
    unpacked = PACKINGS[storage.packing].unpack(codes)
    step = STEPS[storage.scale](scale.reshape(scale.shape or (1, 1)), outer)
    values = CODECS[storage.element].decode(to_blocks(unpacked, storage.block))
    return from_blocks(values * spread(step), unpacked.shape)


def operand_dtype(x_dtype: DTypeLike, weight_dtype: DTypeLike) -> jnp.dtype:
    """In what both operands are multiplied: their dtype, or float32 for two of them."""
    return jnp.dtype(x_dtype if x_dtype == weight_dtype else jnp.float32)


def precision(dtype: DTypeLike) -> lax.Precision | None:
    """That of products of float32 numbers which are not to be cut to fewer bits."""
    return lax.Precision.HIGHEST if jnp.dtype(dtype) == jnp.float32 else None


def dot(x: Float[Array, "m k"], w: Float[Array, "n k"]) -> Float32[Array, "m n"]:
    """x w^T for operands of any two dtypes, summed in float32."""
    both = operand_dtype(x.dtype, w.dtype)
    return lax.dot_general(
        x.astype(both),
        w.astype(both),
        NT,
        precision=precision(both),
        preferred_element_type=jnp.float32,
    )


def matmul(
    x: Float[Array, "m k"],
    codes: UInt8[Array, "..."],
    scale: Array,
    outer: Float32[Array, ""],
    request: MatmulRequest,
) -> Float[Array, "m n"]:
    """x w^T in `request.out_dtype`, for the stored matrix w rounded to `request.weight_dtype`."""
    w = stored_matrix(codes, scale, outer, request.storage).astype(request.weight_dtype)
    return dot(x, w).astype(request.out_dtype)
