# SPDX-License-Identifier: Apache-2.0
"""The largest magnitude of an activation, and the scale it leads to.

ModelOpt reduces in the dtype of the tensor. Rounding is monotone, so the maximum of rounded values
is the rounded maximum: computing in float32 and rounding once gives the same number for the same
activations.
"""

import ml_dtypes
import numpy as np
from jax import lax
from jax import numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32

from jqx.errors import InputError
from jqx_kernels.bits import round_to

# One number: from a jitted reduction, a NumPy file, or Python.
Number = Float[Array, ""] | Float[np.ndarray, ""] | np.generic | float | int

CHUNK = 1 << 20  # values looked at together: they stay in a core's cache


def amax(x: Float[Array, "..."], dtype: DTypeLike) -> Float32[Array, ""]:
    """The largest magnitude in `x`, rounded to `dtype` (bfloat16, float16, float32: the model's).

    Zero for an array without elements. NaN if there is a NaN in `x`, infinite (or NaN) if there is
    an infinity.
    """
    largest = _amax_of_bits(x) if x.dtype.itemsize == 2 else _amax_of_floats(x)
    return round_to(largest, dtype)


def _amax_of_bits(x: Float[Array, "..."]) -> Float32[Array, ""]:
    """Of two-byte floats: without sign, bit patterns are ordered like magnitudes, NaN last."""
    patterns = lax.bitcast_convert_type(x, jnp.uint16) & jnp.uint16(0x7FFF)
    return lax.bitcast_convert_type(jnp.max(patterns, initial=0), x.dtype).astype(jnp.float32)


def _amax_of_floats(x: Float[Array, "..."]) -> Float32[Array, ""]:
    """XLA's own maximum over float32 forgets NaN on a CPU, so a sum that any of them spoils stands
    guard: two such reductions take half the time of one over bit patterns.
    """
    largest = jnp.max(jnp.abs(x), initial=0)
    spoilt = jnp.isnan(jnp.sum(x * 0)) & (largest < jnp.inf)
    return jnp.where(spoilt, jnp.nan, largest)


def stored_amax(x: Float[np.ndarray, "..."]) -> np.float32:
    """The largest magnitude in an array in memory or in a memory-mapped file, in the array's own
    dtype.

    Compares bit patterns, a piece at a time, so the file is read once and never copied. NaN counts
    as larger than infinity, which counts as larger than anything: whatever spoils the array comes
    out.

    Raises InputError for dtypes other than bfloat16, float16 and float32.
    """
    if x.dtype not in (np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16), np.dtype(np.float32)):
        raise InputError(f"Activations are bfloat16, float16 or float32, not {x.dtype}: cast them.")
    unsigned = np.dtype(f"u{x.dtype.itemsize}")
    magnitude = unsigned.type(np.iinfo(unsigned).max >> 1)
    flat = np.asarray(x).reshape(-1).view(unsigned)
    work = np.empty(min(CHUNK, flat.size), unsigned)
    largest = unsigned.type(0)
    for start in range(0, flat.size, CHUNK):
        piece = flat[start : start + CHUNK]
        largest = max(largest, np.bitwise_and(piece, magnitude, out=work[: piece.size]).max())
    return np.float32(np.array(largest, unsigned).view(x.dtype))


def finite_amax(amax: Number, path: str) -> np.float32:
    """The amax of `path` as a NumPy float32. Raises InputError naming the path if it is NaN or
    infinite.
    """
    value = np.float32(amax)
    if not np.isfinite(value):
        raise InputError(
            f"{path} met NaN or infinite values while calibrating (amax {value}): no scale "
            "covers them. Look at the calibration data, or compute in a wider dtype."
        )
    return value


def input_scale(
    amax: Number,
    bound: float | int,
    path: str,
    code_max: float | int | None = None,
) -> np.float32:
    """What codes of an activation are multiplied by: amax / bound in float32, exactly.

    `bound` is the largest number the format reaches with scale 1: 448 for FP8, 127 for INT8, 6 *
    448 for NVFP4. `code_max` is the largest code where blocks have scales of their own (6 for
    NVFP4); `bound` if None. An amax of zero, which says that calibration never reached the linear,
    counts as `code_max`. Without block scales amax is at least the smallest normal float32. `path`
    names the linear in errors.

    Raises InputError if amax is NaN or infinite.
    """
    value = finite_amax(amax, path)
    if value == 0:
        value = np.float32(bound if code_max is None else code_max)
    if code_max is None:
        value = np.maximum(value, np.finfo(np.float32).tiny)
    return np.float32(value / np.float32(bound))
