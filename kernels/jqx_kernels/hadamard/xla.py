# SPDX-License-Identifier: Apache-2.0
"""Products with a Hadamard matrix that XLA compiles, by its factors.

A run of a b values is a matrix [a, b], which H_a multiplies from the left and H_b from the right:
a + b products for every value in place of a b.
"""

from functools import partial

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32

from jqx_kernels.pallas import cdiv

from .matrices import factors, hadamard_matrix
from .request import HadamardRequest

CHUNK, MANY = 1 << 18, 1 << 21
"""Values that a CPU multiplies at once, so that what lies between two factors stays in its caches,
and how many there have to be for that to be worth a loop.
"""


def transform(x: Float[Array, "m k"], request: HadamardRequest) -> Float[Array, "m k"]:
    """Every run of x times the factors of the matrix, in the dtype of `x`."""
    runs = x.reshape(request.runs, request.order)
    whole, parts = partial(_multiplied, request=request), partial(_in_chunks, request=request)
    return lax.platform_dependent(runs, cpu=parts, default=whole).reshape(x.shape)


def _in_chunks(runs: Float[Array, "n o"], request: HadamardRequest) -> Float[Array, "n o"]:
    n, chunk = runs.shape[0], max(CHUNK // request.order, 1)
    if runs.size < MANY or n <= chunk:
        return _multiplied(runs, request)

    def step(i: Array, y: Float[Array, "n o"]) -> Float[Array, "n o"]:
        at = jnp.minimum(i * chunk, n - chunk)  # the last one begins within the one before
        part = _multiplied(lax.dynamic_slice_in_dim(runs, at, chunk), request)
        return lax.dynamic_update_slice_in_dim(y, part, at, 0)

    return lax.fori_loop(0, cdiv(n, chunk), step, jnp.zeros_like(runs))


def _multiplied(runs: Float[Array, "n o"], request: HadamardRequest) -> Float[Array, "n o"]:
    y, before, after = runs.astype(jnp.float32), runs.shape[0], request.order
    for order in factors(request.order):
        after //= order
        y = _factor(y.reshape(before, order, after), order, request)
        before *= order
    return (y * request.scale).reshape(runs.shape).astype(runs.dtype)


def _factor(y: Float32[Array, "n a b"], order: int, request: HadamardRequest) -> Array:
    """One factor of the matrix from the left."""
    h = jnp.asarray(request.oriented(hadamard_matrix(order)))
    if y.shape[2] == 1:
        return jnp.matmul(y[:, :, 0], h, precision=lax.Precision.HIGHEST)
    # a batch of products in the order that arrays have: others make XLA turn them on CPUs
    left = jnp.broadcast_to(h.T, (y.shape[0], order, order))
    return jnp.matmul(left, y, precision=lax.Precision.HIGHEST)
