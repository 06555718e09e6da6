# SPDX-License-Identifier: Apache-2.0
"""Scales of stored keys and values, and the bias that the affine formats take off first.

    stored  ~  (x - bias) / scale
    bias = mean of x over batch and time, one number a head and channel

The mean is a running average over statistics batches, rounded to the model dtype after each; the
amax of a batch is that of x - bias with the average so far, this batch included. Both depend on the
order of the batches, and on what is one batch: fold them in order, each whole.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int32

from jqx_kernels.bits import divide, round_to

from .reductions import Number, amax, input_scale

BOUND = 448.0  # FP8 keys and values; NVFP4 ones have the same scale


class AffineKV(NamedTuple):
    """The running mean after `batches` batches, in the model dtype, and the amax so far of what it
    leaves.
    """

    bias: Float[Array, "1 h 1 d"]
    amax: Float32[Array, ""]
    batches: Int32[Array, ""]


def kv_scale(value: Number, path: str) -> np.float32:
    """The scale of keys or values whose amax is `value`: amax / 448 in float32; 1 for an amax of
    zero.

    Raises InputError naming `path` if it is NaN or infinite.
    """
    return input_scale(value, BOUND, path)


def affine_start(heads: int, dim: int, dtype: DTypeLike) -> AffineKV:
    """The state before the first batch, for keys or values [b, heads, t, dim] of a model in
    `dtype`.
    """
    return AffineKV(jnp.zeros((1, heads, 1, dim), dtype), jnp.float32(0), jnp.int32(0))


def affine_fold(state: AffineKV, x: Float[Array, "b h t d"]) -> AffineKV:
    """The state after one more statistics batch `x`, which is first rounded to the dtype of the
    state.

    Mean: a float32 sum, divided exactly, rounded. Average: (bias * n + mean) / (n + 1) in float32,
    rounded. x - bias: rounded. A NaN or infinity in `x` stays in bias and amax.
    """
    dtype = state.bias.dtype
    x = round_to(x.astype(jnp.float32), dtype)
    total = jnp.sum(jnp.sum(x, 2, keepdims=True), 0, keepdims=True)
    mean = round_to(divide(total, float(x.shape[0] * x.shape[2])), dtype)
    n = state.batches.astype(jnp.float32)
    bias = round_to(divide(state.bias.astype(jnp.float32) * n + mean, n + 1), dtype)
    left = amax(round_to(x - bias, dtype), dtype)
    return AffineKV(bias.astype(dtype), jnp.maximum(state.amax, left), state.batches + 1)
