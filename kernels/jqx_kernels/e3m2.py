# SPDX-License-Identifier: Apache-2.0
"""E3M2, the element of MXFP6: a sign, three bits of exponent, two of mantissa, no infinity and no
NaN. The values are 0, 1/16, 2/16, 3/16, then four to every power of two from 1/4, up to 28.

One code takes a byte of its own: no checkpoint layout stores them.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float32, UInt8

from .bits import BIAS, MAGNITUDE, bits, from_bits

_FIRST = (127 - 3) << 2  # the exponent bias 127 becomes 3


def e3m2_code(x: Float32[Array, "*s"]) -> UInt8[Array, "*s"]:
    """The code 0..63 nearest to `x` (ties to even, bit 5 is the sign); beyond 28 it saturates."""
    a = jnp.minimum(from_bits(bits(x) & MAGNITUDE), jnp.float32(28))
    b = bits(a)
    normal = ((b + ((1 << 20) - 1) + ((b >> 21) & 1)) >> 21) - _FIRST
    small = bits(a + jnp.float32(2.0**19)) - (BIAS + (19 << 23))  # in steps of 1/16
    code = jnp.where(b < BIAS - (2 << 23), small, normal)
    return (code | ((bits(x) >> 26) & 0x20)).astype(jnp.uint8)


def e3m2_value(code: UInt8[Array, "*s"]) -> Float32[Array, "*s"]:
    """The number that a code 0..63 stands for: exact."""
    c = code.astype(jnp.int32)
    m = c & 31
    small = bits(m.astype(jnp.float32) * jnp.float32(1 / 16))
    return from_bits(jnp.where(m < 4, small, (m + _FIRST) << 21) | ((c & 32) << 26))
