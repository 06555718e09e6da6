# SPDX-License-Identifier: Apache-2.0
"""Matrices to stored codes and scales, back, and both at once: `encode`, `decode`, `fake_quantize`.

    code = round(x / scale),   x ~ code * scale        in float32 whatever the dtype of x

The codes and scales are those of ModelOpt 0.47's export, byte for byte, for bfloat16, float16 and
float32 matrices.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, UInt8

from jqx_kernels.bits import round_to
from jqx_kernels.blocks import from_blocks, spread, to_blocks
from jqx_kernels.codecs import CODECS
from jqx_kernels.packing import PACKINGS

from .format import Format, check_columns, check_divides
from .scales import Outer, Scales, find_scales, given_scales, step_of


class Encoded(NamedTuple):
    """One matrix as it is stored."""

    codes: Array
    scale: Array
    tensor_scale: Outer


def encode(
    w: Float[Array, "n k"],
    fmt: Format,
    amax: Float[Array, "..."] | None = None,
    tensor_amax: Float[Array, ""] | None = None,
) -> Encoded:
    """Find the codes and scales that store `w` in `fmt`.

    `amax` is the magnitude the scales must reach, taken from `w` where None: in the shape of the
    scales ([] per tensor, [n, 1] per row, [n, k/16]...). For formats of two levels one number is
    that of the tensor scale; a grid is what blocks must reach (ModelOpt's static blocks), and
    `tensor_amax` what the tensor scale must, the largest in the grid where None. Larger values
    saturate. A NaN in `w` becomes any code: refuse it before. Codes are packed; `fmt` is static
    under jit.

    Raises InputError if the shape does not fit the format (`check_divides`), ValueError if the
    shape of `amax` does not.
    """
    check_divides(fmt, w.shape)
    w = lax.optimization_barrier(w)  # XLA divides constants by a constant's reciprocal
    scales = find_scales(w, fmt, amax, tensor_amax)
    codes, scale, tensor_scale = _divided(w, fmt, scales), scales.scale, scales.tensor_scale
    # packing reads pairs of codes: fused with the division it would be computed one by one
    packed = PACKINGS[fmt.packing].pack(lax.optimization_barrier(codes))
    return Encoded(
        lax.bitcast_convert_type(packed, jnp.dtype(fmt.element.dtype)), scale, tensor_scale
    )


def _codes(
    w: Float[Array, "n k"], fmt: Format, amax: Float[Array, "..."] | None
) -> tuple[UInt8[Array, "n k"], Array, Outer]:
    """The codes of `w`, one a byte, and the stored scales."""
    w = lax.optimization_barrier(w)  # as in `encode`
    scales = find_scales(w, fmt, amax, None)
    return _divided(w, fmt, scales), scales.scale, scales.tensor_scale


def _divided(w: Float[Array, "n k"], fmt: Format, scales: Scales) -> UInt8[Array, "n k"]:
    x = to_blocks(w, fmt.block).astype(jnp.float32)
    q = scales.quotient(x)
    if fmt.double_rounding:
        q = round_to(q, w.dtype)
    return from_blocks(CODECS[fmt.element.name].encode(q, x), w.shape)


def decode(encoded: Encoded, fmt: Format, dtype: DTypeLike = jnp.float32) -> Float[Array, "n k"]:
    """The matrix that `encoded` stands for: code * scale in float32, then cast to `dtype`.

    With two levels scale * tensor_scale comes first. Values below 2^-126, and blocks whose E8M0
    scale is 2^-127, decode as zeros on backends that read subnormals as zero, as XLA's CPU does.
    """
    codes = lax.bitcast_convert_type(encoded.codes, jnp.uint8)
    return _values(
        PACKINGS[fmt.packing].unpack(codes), encoded.scale, encoded.tensor_scale, fmt
    ).astype(dtype)


def _values(
    codes: UInt8[Array, "n k"], scale: Array, tensor_scale: Outer, fmt: Format
) -> Float32[Array, "n k"]:
    values = CODECS[fmt.element.name].decode(to_blocks(codes, fmt.block))
    return from_blocks(values * spread(step_of(scale, tensor_scale, fmt)), codes.shape)


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def fake_quantize(
    x: Float[Array, "*lead k"], fmt: Format, amax: Float[Array, "..."] | None = None
) -> Float[Array, "*lead k"]:
    """`decode(encode(x))` in the dtype of `x`, with the gradient of the identity
    (straight-through); none for `amax`.

    Axes before the last count as rows, so a format with a scale per row has one per token of an
    activation. `amax` as in `encode`. Raises InputError if blocks do not divide the last axis.
    """
    check_columns(fmt, x.shape)
    flat = x.reshape(-1, x.shape[-1])
    return _values(*_codes(flat, fmt, amax), fmt).astype(x.dtype).reshape(x.shape)


@fake_quantize.defjvp
def _straight_through(fmt: Format, primals: Any, tangents: Any) -> tuple[Array, Array]:
    x, amax = primals
    return fake_quantize(x, fmt, amax), tangents[0]


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def fake_quantize_scaled(
    x: Float[Array, "*lead k"], fmt: Format, scale: Float[Array, "..."]
) -> Float[Array, "*lead k"]:
    """`fake_quantize` with the stored scale of the whole tensor given: the only one of `fp8` and
    `int8_tensor`, the tensor scale of formats of two levels. Larger values saturate.

    A block whose scale is so small that its E4M3 code is zero becomes zeros, as it does in engines;
    `encode` gives it the smallest scale there is. Raises InputError if blocks do not divide the
    last axis, ValueError if `fmt` has no such scale or `scale` is not one number.
    """
    if fmt.block != (None, None) and fmt.tensor_bound is None:
        raise ValueError(f"{fmt.name} has no scale of the whole tensor.")
    if scale.shape:
        raise ValueError(f"{fmt.name} takes one scale, not an array of shape {scale.shape}.")
    check_columns(fmt, x.shape)
    flat = x.reshape(-1, x.shape[-1])
    scales = given_scales(flat, fmt, scale.astype(jnp.float32))
    codes = _divided(flat, fmt, scales)
    return _values(codes, scales.scale, scales.tensor_scale, fmt).astype(x.dtype).reshape(x.shape)


@fake_quantize_scaled.defjvp
def _straight_through_scaled(fmt: Format, primals: Any, tangents: Any) -> tuple[Array, Array]:
    x, scale = primals
    return fake_quantize_scaled(x, fmt, scale), tangents[0]
