# SPDX-License-Identifier: Apache-2.0
"""NF4: a code is one of 16 quantiles of the normal distribution, times the amax of its block; and
scales that are stored in eight bits themselves.

    x ~ NF4[code] * amax                       code: of the nearest value, the smaller one in a tie
    amax ~ code / factor + mean                factor = 127 / max |amax - mean| of 256 scales

The values have the four decimals and the bfloat16 of ModelOpt 0.47 (`nf4_tensor.py`), as have the
roundings of scales. (Dettmers et al. 2023, QLoRA, arXiv 2305.14314.)
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int8, UInt8
from ml_dtypes import bfloat16

from jqx_kernels.bits import divide, round_to

_DECIMALS = (
    *(-1.0, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0.0),
    *(0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.7230, 1.0),
)
NF4_VALUES = tuple(float(v) for v in np.array(_DECIMALS, bfloat16))
_MIDDLES = tuple((a + b) / 2 for a, b in zip(NF4_VALUES[:-1], NF4_VALUES[1:], strict=True))
_MOST = 127.0


def nf4_code(x: Float32[Array, "*s"]) -> UInt8[Array, "*s"]:
    """The code 0..15 of the value nearest to `x`; a tie takes the smaller value."""
    code = jnp.zeros(x.shape, jnp.uint8)
    for middle in _MIDDLES:
        code = code + (x > jnp.float32(middle)).astype(jnp.uint8)
    return code


def nf4_value(code: UInt8[Array, "*s"]) -> Float32[Array, "*s"]:
    """The number that the lowest four bits of a byte stand for."""
    left: list[Array] = [jnp.float32(v) for v in NF4_VALUES]
    for bit in range(4):  # halves the values that are left, by selects: gathers are slow on a CPU
        odd = (code & (1 << bit)) != 0
        left = [jnp.where(odd, b, a) for a, b in zip(left[::2], left[1::2], strict=True)]
    return left[0]


class StoredScales(NamedTuple):
    """Scales in eight bits."""

    codes: Int8[Array, "blocks b"]
    factor: Float[Array, "blocks"]
    """What differences from the mean were multiplied with, in the dtype of the scales."""
    mean: Float[Array, ""]


def quantize_scales(scale: Float[Array, "..."], block: int = 256) -> StoredScales:
    """Eight bits for every scale, in the order of the flat array, `block` of them to a factor.

    Zeros fill the last block up and count in the mean. Every step is rounded to the dtype of
    `scale`, the factor as a rounded reciprocal times 127. Scales that are all their mean get codes
    0 and the factor 1. Scales are finite.
    """
    dtype, flat = scale.dtype, scale.astype(jnp.float32).reshape(-1)
    blocks = jnp.pad(flat, (0, -flat.size % block)).reshape(-1, block)
    mean = round_to(divide(jnp.sum(blocks), float(blocks.size)), dtype)
    off = round_to(blocks - mean, dtype)
    most = jnp.max(jnp.abs(off), axis=1)
    inverse = round_to(divide(jnp.ones_like(most), jnp.where(most == 0, 1, most)), dtype)
    factor = jnp.where(most == 0, jnp.float32(1), round_to(inverse * jnp.float32(_MOST), dtype))
    codes = jnp.clip(jnp.round(round_to(off * factor[:, None], dtype)), -_MOST, _MOST)
    return StoredScales(codes.astype(jnp.int8), factor.astype(dtype), mean.astype(dtype))


def dequantize_scales(stored: StoredScales, shape: tuple[int, ...]) -> Float[Array, "..."]:
    """The scales that `stored` stands for, in this shape and in the dtype of its factors."""
    dtype = stored.factor.dtype
    factor = stored.factor.astype(jnp.float32)[:, None]
    off = round_to(divide(stored.codes.astype(jnp.float32), factor), dtype)
    scale = round_to(off + stored.mean.astype(jnp.float32), dtype).astype(dtype)
    return scale.reshape(-1)[: int(np.prod(shape))].reshape(shape)
