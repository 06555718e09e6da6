# SPDX-License-Identifier: Apache-2.0
"""The meaning of a product with a Hadamard matrix, in plain jnp.

y = (x H) / sqrt(order)    or x H^T, for every run of x; summed in float32
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from .matrices import hadamard_matrix
from .request import HadamardRequest


def transform(x: Float[Array, "m k"], request: HadamardRequest) -> Float[Array, "m k"]:
    """Every run of x times the whole matrix, in the dtype of `x`."""
    h = jnp.asarray(request.oriented(hadamard_matrix(request.order)))
    runs = x.reshape(request.runs, request.order).astype(jnp.float32)
    sums = jnp.matmul(runs, h, precision=lax.Precision.HIGHEST)
    return (sums * request.scale).reshape(x.shape).astype(x.dtype)
