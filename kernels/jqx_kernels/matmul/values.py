# SPDX-License-Identifier: Apache-2.0
"""Codes to numbers in kernels, where there are integers of 32 bits and no arithmetic on bytes."""

from collections.abc import Callable, Mapping
from functools import partial

import jax.numpy as jnp
from jaxtyping import Array, Float32, Int32

from jqx_kernels.bits import from_bits
from jqx_kernels.codecs import CODECS
from jqx_kernels.nf4 import nf4_value

Values = Mapping[str, Callable[[Int32[Array, "*s"]], Float32[Array, "*s"]]]


def _integer(c: Int32[Array, "*s"], width: int) -> Float32[Array, "*s"]:
    """The integer in the lowest bits, as the last bits of a float32 that is 2^23 larger."""
    half = 1 << (width - 1)
    shifted = ((c ^ half) & (2 * half - 1)) | 0x4B00_0000
    return from_bits(shifted) - jnp.float32(2**23 + half)


INTEGERS: Values = {
    "int4": partial(_integer, width=4),
    "int8": partial(_integer, width=8),
    "nf4": nf4_value,
}
"""Element -> the number that the lowest bits of an integer are a code of, on any device."""


def numbers(c: Int32[Array, "*s"], element: str, values: Values) -> Float32[Array, "*s"]:
    """What the lowest bits of integers stand for: by `values`, else by way of bytes."""
    if element in values:
        return values[element](c)
    return CODECS[element].decode(c.astype(jnp.uint8))
