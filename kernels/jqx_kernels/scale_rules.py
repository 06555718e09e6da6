# SPDX-License-Identifier: Apache-2.0
"""From the largest magnitude of a block to its stored scale, elementwise.

    float32    scale = amax / bound
    e4m3       scale = E4M3(amax / (bound * tensor_scale)),   step = scale * tensor_scale
    e8m0       scale = 2^ceil(log2(amax / bound))

`divide` is the division to use: `bits.divide`, or in a kernel for GPUs one that is exact there.
"""

import math
from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float32, Int32, UInt8

from .bits import INFINITY, bits, divide, e4m3_code, e4m3_value, e8m0_value, from_bits

TINY = 2.0**-126
"""The smallest scale: smaller ones are read as zero by XLA and most engines."""

SMALLEST = 2.0**-9
"""The smallest E4M3 number, which a block scale that underflows becomes."""

Divide = Callable[[Array, Array], Array]


def stand_in(amax: Float32[Array, "*s"], bound: float) -> Float32[Array, "*s"]:
    """`amax`, with `bound` in place of zero and NaN: nothing is known, so the scale becomes 1."""
    return jnp.where((bits(amax) == 0) | jnp.isnan(amax), jnp.float32(bound), amax)


def float32_scale(
    amax: Float32[Array, "*s"],
    bound: float,
    limits: tuple[float, float],
    divide: Divide = divide,
) -> Float32[Array, "*s"]:
    """The scale with which `amax` is `bound`; amaxes are kept within `limits` first."""
    least, most = limits
    known = jnp.clip(stand_in(amax, bound), jnp.float32(least), jnp.float32(most))
    return jnp.maximum(divide(known, jnp.full_like(known, bound)), jnp.float32(TINY))


def e4m3_scale(
    blocks: Float32[Array, "*s"],
    tensor_scale: Float32[Array, "..."],
    bound: float,
    least: float = SMALLEST,
    divide: Divide = divide,
) -> tuple[UInt8[Array, "*s"], Float32[Array, "*s"]]:
    """The code of the block scale below `tensor_scale` of blocks with these largest magnitudes, and
    what their codes are multiplied by. A block of zeros gets the scale 1.
    """
    outer = jnp.broadcast_to(jnp.float32(bound) * tensor_scale, blocks.shape)
    scale = jnp.where(bits(blocks) == 0, jnp.float32(1), divide(blocks, outer))
    return e4m3_stored(scale, tensor_scale, least)


def e4m3_stored(
    scale: Float32[Array, "*s"], tensor_scale: Float32[Array, "..."], least: float = SMALLEST
) -> tuple[UInt8[Array, "*s"], Float32[Array, "*s"]]:
    """The code of a block scale between `least` and 448, and what codes are multiplied by."""
    code = e4m3_code(jnp.clip(scale, jnp.float32(least), jnp.float32(448)))
    return code, jnp.maximum(e4m3_value(code) * tensor_scale, jnp.float32(TINY))


def e8m0_scale(
    amax: Float32[Array, "*s"], bound: float, divide: Divide = divide
) -> UInt8[Array, "*s"]:
    """127 + ceil(log2(amax / bound)) clipped to 0..254, where log2 is rounded to float32 before it
    is ceiled.

    So a quotient a few ulp above a power of two counts as that power, as it does for torch.
    """
    fraction, exponent = math.frexp(bound)
    b = bits(divide(amax, jnp.full_like(amax, 2 * fraction)))
    floor = (b >> 23) - 127 - (exponent - 1)
    above = (b & 0x7F_FFFF).astype(jnp.float32)  # in ulp of the power of two
    up = above > _half_spacing(floor) * jnp.float32(math.log(2))
    return jnp.clip(floor + 127 + up.astype(jnp.int32), 0, 254).astype(jnp.uint8)


def _half_spacing(k: Int32[Array, "*s"]) -> Float32[Array, "*s"]:
    """Half the distance from the integer `k` to the next float32 above it, in units of 2^-23; 0 for
    k = 0.
    """
    b = bits(jnp.abs(k).astype(jnp.float32))
    b = jnp.where(
        k < 0, b - 1, b
    )  # towards zero the spacing below a power of two is the smaller one
    return from_bits(b & INFINITY) * jnp.float32(0.5)


STEPS: dict[str, Callable[[Array, Float32[Array, ""]], Float32[Array, "..."]]] = {
    "float32": lambda scale, outer: scale,
    "e4m3": lambda scale, outer: e4m3_value(scale) * outer,
    "e8m0": lambda scale, outer: e8m0_value(scale),
}
"""Kind of scale -> (stored scales, tensor scale) -> what codes are multiplied by, elementwise."""
