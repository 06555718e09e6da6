# SPDX-License-Identifier: Apache-2.0
"""The meaning of a grouped product with a stored stack, in plain jnp.

w_e = cast(code * (scale * tensor_scale)),   y_i = x_i w_e^T   summed in float32

for the rows i of group e; every matrix is multiplied with all rows, and its own are kept.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, Int32

from jqx_kernels.matmul.reference import dot, stored_matrix
from jqx_kernels.matmul.request import as_bytes

from .groups import spans
from .request import GroupedRequest, Stack


def grouped_matmul(
    x: Float[Array, "m k"], stack: Stack, sizes: Int32[Array, "e"], request: GroupedRequest
) -> Float[Array, "m n"]:
    """The product in `out_dtype`."""
    return _product(x, stack, sizes, request, 0).astype(request.one.out_dtype)


def gradient(
    dy: Float[Array, "m n"], stack: Stack, sizes: Int32[Array, "e"], request: GroupedRequest
) -> Float[Array, "m k"]:
    """That of x, in its dtype: dy_i w_e."""
    return _product(dy, stack, sizes, request, 1).astype(request.one.x_dtype)


def _product(
    x: Array, stack: Stack, sizes: Array, request: GroupedRequest, made: int
) -> Float32[Array, "..."]:
    """The sums over one axis of the matrices; the other, `made`, are the columns of the result."""
    one = request.one

    def keep(y: Array, given: tuple[Stack, Array, Array]) -> tuple[Array, None]:
        own, start, end = given
        codes, scale = as_bytes(own.codes), as_bytes(own.scale)
        w = stored_matrix(codes, scale, own.outer, one.storage).astype(one.weight_dtype)
        row = lax.broadcasted_iota(jnp.int32, y.shape, 0)
        return jnp.where((row >= start) & (row < end), dot(x, w.T if made else w), y), None

    y = jnp.zeros((x.shape[0], one.weight_shape[made]), jnp.float32)
    return lax.scan(keep, y, (stack, *spans(sizes, x.shape[0])))[0]
