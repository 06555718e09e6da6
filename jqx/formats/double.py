# SPDX-License-Identifier: Apache-2.0
"""Scales that are stored in eight bits themselves, as those of NF4 with double quantization.

    scale ~ code / factor + mean               factor = 127 / max |scale - mean| of 256 scales

Roundings are those of ModelOpt 0.47 (`nf4_tensor.py`). (Dettmers et al. 2023, QLoRA, arXiv
2305.14314.)
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int8

from jqx.errors import InputError
from jqx_kernels.bits import divide, round_to

_MOST = 127.0
SCALE_BLOCK = 256
"""Scales that share a factor."""


class ScaleFactors(NamedTuple):
    """What scales in eight bits are decoded with, in their dtype."""

    factor: Float[Array, "*lead blocks"]
    """What differences from the mean were multiplied with, one for 256 scales."""
    mean: Float[Array, "*lead"]


def quantize_scales(
    scale: Float[Array, "..."], block: int = SCALE_BLOCK
) -> tuple[Int8[Array, "..."], ScaleFactors]:
    """Eight bits for every scale, in the order of the flat array, `block` of them to a factor.

    Zeros fill the last block up and count in the mean. Every step is rounded to the dtype of
    `scale`, the factor as a rounded reciprocal times 127. Scales that are all their mean get codes
    0 and the factor 1. Scales are finite.
    """
    dtype, flat = scale.dtype, scale.astype(jnp.float32).reshape(-1)
    blocks = jnp.pad(flat, (0, -flat.size % block)).reshape(-1, block)
    mean = round_to(jnp.sum(divide(blocks, float(blocks.size))), dtype)  # a sum may be too large
    off = round_to(blocks - mean, dtype)
    most = jnp.max(jnp.abs(off), axis=1)
    inverse = round_to(divide(jnp.ones_like(most), jnp.where(most == 0, 1, most)), dtype)
    factor = jnp.maximum(
        round_to(inverse * jnp.float32(_MOST), dtype), jnp.float32(jnp.finfo(dtype).tiny)
    )
    factor = jnp.where(most == 0, jnp.float32(1), factor)
    codes = jnp.clip(jnp.round(round_to(off * factor[:, None], dtype)), -_MOST, _MOST)
    codes = codes.reshape(-1)[: flat.size].reshape(scale.shape).astype(jnp.int8)
    return codes, ScaleFactors(factor.astype(dtype), mean.astype(dtype))


def dequantize_scales(
    codes: Int8[Array, "..."], factors: ScaleFactors, block: int = SCALE_BLOCK
) -> Float[Array, "..."]:
    """The scales that `codes` stand for, in the dtype of the factors. Raises InputError where the
    factors are not as many as the codes need.
    """
    dtype, needed = factors.factor.dtype, -(-codes.size // block)
    if factors.factor.shape != (needed,):
        raise InputError(
            f"{codes.size} scales need {needed} factors, one for {block}, and there are "
            f"{factors.factor.shape}: they are not of one matrix"
        )
    factor = jnp.repeat(factors.factor.astype(jnp.float32), block)[: codes.size]
    off = round_to(divide(codes.astype(jnp.float32), factor.reshape(codes.shape)), dtype)
    return round_to(off + factors.mean.astype(jnp.float32), dtype).astype(dtype)
