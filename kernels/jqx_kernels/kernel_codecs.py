# SPDX-License-Identifier: Apache-2.0
"""`CODECS` in operations that the compilers of kernels have: Triton does not round, Mosaic adds and
compares no bytes.
"""

from itertools import pairwise

import jax.numpy as jnp
from jaxtyping import Array, Float32, UInt8

from .bits import BIAS, MAGNITUDE, bits, from_bits
from .codecs import CODECS, Codec
from .e3m2 import e3m2_value
from .nf4 import NF4_VALUES


def _e3m2_code(x: Float32[Array, "*s"]) -> UInt8[Array, "*s"]:
    a = jnp.minimum(from_bits(bits(x) & MAGNITUDE), jnp.float32(28))
    b = bits(a)
    normal = ((b + ((1 << 20) - 1) + ((b >> 21) & 1)) >> 21) - ((127 - 3) << 2)
    small = bits(a + jnp.float32(2.0**19)) - (BIAS + (19 << 23))  # in steps of 1/16
    code = jnp.where(b < BIAS - (2 << 23), small, normal)
    return (code | ((bits(x) >> 26) & 0x20)).astype(jnp.uint8)


def _nf4_code(x: Float32[Array, "*s"]) -> UInt8[Array, "*s"]:
    code = jnp.zeros(x.shape, jnp.int32)
    for low, high in pairwise(NF4_VALUES):
        code = code + (x > jnp.float32((low + high) / 2)).astype(jnp.int32)
    return code.astype(jnp.uint8)


def _nf4_value(code: UInt8[Array, "*s"]) -> Float32[Array, "*s"]:
    c = code.astype(jnp.int32) & 15
    value = jnp.zeros(code.shape, jnp.float32)
    for i, v in enumerate(NF4_VALUES):
        value = jnp.where(c == i, jnp.float32(v), value)
    return value


KERNEL_CODECS = {
    **CODECS,
    "e3m2": Codec(lambda q, x: _e3m2_code(q), e3m2_value),
    "nf4": Codec(lambda q, x: _nf4_code(q), _nf4_value),
}
"""Name of an element -> the functions of a kernel."""
