# SPDX-License-Identifier: Apache-2.0
"""Rotations that spread an outlier evenly: R = S H, signs drawn at random times a Hadamard matrix.

A rotation of n channels is its n signs. H is that of order n where `jqx_kernels.hadamard` has one,
else that of the largest power of two in n, along the diagonal.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32


def rotation(n: int, seed: int) -> Float32[Array, "n"]:
    """The signs of a rotation of `n` channels, +1 or -1."""
    return jax.random.rademacher(jax.random.key(seed), (n,), jnp.float32)


def turned(x: Float[Array, "*lead n"], signs: Float32[Array, "n"]) -> Float[Array, "*lead n"]:
    """The rows of `x` times the rotation with these signs, in the dtype of `x`."""
    from jqx_kernels.hadamard import hadamard, largest_order  # Pallas takes a while to import

    return hadamard(x, block=largest_order(x.shape[-1]), signs=signs)
