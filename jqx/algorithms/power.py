# SPDX-License-Identifier: Apache-2.0
"""x^a for magnitudes, and 0^0 = 1."""

import jax.numpy as jnp
from jaxtyping import Array, Float32


def power(x: Float32[Array, "*s"], a: Float32[Array, ""]) -> Float32[Array, "*s"]:
    """`x` to the power `a`, both at least 0."""
    return jnp.power(x, a)
