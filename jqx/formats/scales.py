# SPDX-License-Identifier: Apache-2.0
"""From largest magnitudes to stored scales, one rule for every kind of scale.

    float32    scale = amax / element.max
    e4m3       tensor_scale = amax / tensor_bound
               scale = E4M3(block amax / (element.max * tensor_scale))
    e8m0       scale = 2^ceil(log2(block amax / element.max))
    double     scale as in float32, then eight bits for it; codes are found with the first

Where ModelOpt 0.47 exports finite numbers the bytes are the same: an amax of zero counts as
element.max (scale 1), a block of zeros under a tensor scale stores 1, a block scale that underflows
stores 2^-9. Where it exports NaN (a matrix of zeros in the per-tensor and two-level formats) an
amax of zero counts as the bound too (scale 1, codes 0). A float32 scale that would be subnormal,
which XLA and most engines read as zero, is 2^-126 here; such an amax is below 6e-36.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32

from jqx_kernels.bits import bits, divide, e4m3_value, e8m0_value, from_bits, scale_up
from jqx_kernels.blocks import block_amax, spread
from jqx_kernels.scale_rules import (
    SMALLEST,
    TINY,
    e4m3_scale,
    e4m3_stored,
    e8m0_scale,
    float32_scale,
    stand_in,
)

from .double import ScaleFactors, dequantize_scales, quantize_scales
from .format import Format, grid_shape

_Quotient = Callable[[Float32[Array, "..."]], Float32[Array, "..."]]
Outer = Float32[Array, ""] | ScaleFactors | None
"""What block scales are decoded with, in formats of two levels."""


class Scales(NamedTuple):
    """The stored scales of one matrix, and the function that divides its blocks by them."""

    scale: Array
    tensor_scale: Outer
    quotient: _Quotient


_Amax = Float32[Array, "..."] | None


def find_scales(
    w: Float[Array, "n k"],
    fmt: Format,
    amax: Float[Array, "..."] | None,
    tensor_amax: Float[Array, ""] | None = None,
) -> Scales:
    """The scales with which `fmt` stores `w`; `amax` and `tensor_amax` as in `encode`."""
    given = [None if a is None else a.astype(jnp.float32) for a in (amax, tensor_amax)]
    return _RULES[fmt.scale.name](w, fmt, *given)


def given_scales(w: Float[Array, "n k"], fmt: Format, scale: Float32[Array, ""]) -> Scales:
    """The same where the one scale of the whole matrix, the tensor scale of formats of two levels,
    is `scale`. Block scales may underflow to zero, which makes zeros of their blocks.
    """
    if fmt.tensor_bound is not None:
        return _under(scale, block_amax(w, fmt.block), fmt, least=0.0)
    return Scales(scale, None, lambda x: divide(x, scale))


def _amax_of_blocks(
    w: Float[Array, "n k"], fmt: Format, amax: Float32[Array, "..."] | None
) -> Float32[Array, "..."]:
    if amax is None:
        return block_amax(w, fmt.block)
    grid = grid_shape(fmt, w.shape)
    if amax.shape != grid:
        raise ValueError(
            f"{fmt.name} has scales of shape {grid} for a matrix {w.shape}, "
            f"and amax is {amax.shape}."
        )
    return amax.reshape(grid or (1, 1))


def _float32_rule(w: Float[Array, "n k"], fmt: Format, amax: _Amax, tensor_amax: _Amax) -> Scales:
    scale = float_scale(_amax_of_blocks(w, fmt, amax), fmt, w.dtype)
    outer = None
    if fmt.tensor_bound is not None:  # of a second stage, which these codes do not depend on
        whole = _largest(block_amax(w, fmt.block)) if tensor_amax is None else tensor_amax
        outer = tensor_scale(whole, fmt)
    stored = scale.reshape(grid_shape(fmt, w.shape))
    return Scales(stored, outer, lambda x: divide(x, spread(scale)))


def _largest(amax: Float32[Array, "*s"]) -> Float32[Array, ""]:
    """The largest of magnitudes, also of those that XLA's CPU takes for zero."""
    return from_bits(jnp.max(bits(amax)))


def float_scale(amax: Float32[Array, "*s"], fmt: Format, dtype: jnp.dtype) -> Float32[Array, "*s"]:
    """The scales of one level that reach these magnitudes in a matrix of this `dtype`."""
    info = jnp.finfo(_amax_dtype(fmt, dtype))
    return float32_scale(amax, fmt.element.max, (float(info.tiny), float(info.max)))


def tensor_scale(amax: Float32[Array, ""], fmt: Format) -> Float32[Array, ""]:
    """The scale of the whole tensor, in a format of two levels, that reaches this magnitude."""
    assert fmt.tensor_bound is not None
    scale = divide(stand_in(amax, fmt.tensor_bound), fmt.tensor_bound)
    return jnp.maximum(scale, jnp.float32(TINY))


def _amax_dtype(fmt: Format, dtype: jnp.dtype) -> jnp.dtype:
    """The dtype whose smallest normal number ModelOpt keeps an amax above: that of the weight for
    rows and tiles.
    """
    rows, cols = fmt.block
    whole_row_or_tile = rows is not None and (cols is None or rows > 1)
    return dtype if whole_row_or_tile else jnp.dtype(jnp.float32)


def _e4m3_rule(w: Float[Array, "n k"], fmt: Format, amax: _Amax, tensor_amax: _Amax) -> Scales:
    assert fmt.tensor_bound is not None
    if amax is not None and amax.shape:
        return _static_blocks(w, fmt, amax, tensor_amax)
    blocks = block_amax(w, fmt.block)
    given = tensor_amax if amax is None else amax
    whole = _largest(blocks) if given is None else given
    return _under(tensor_scale(whole, fmt), blocks, fmt, SMALLEST)


def _static_blocks(
    w: Float[Array, "n k"], fmt: Format, amax: Float32[Array, "..."], tensor_amax: _Amax
) -> Scales:
    """Scales of blocks whose amax was chosen: (amax / 6) * M / (tensor amax / 6) in E4M3, where M
    is the largest scale that is planned for.
    """
    assert fmt.tensor_bound is not None
    if amax.shape != grid_shape(fmt, w.shape):
        raise ValueError(
            f"{fmt.name} has scales of shape {grid_shape(fmt, w.shape)} for a matrix {w.shape}, "
            f"and amax is {amax.shape}."
        )
    top = jnp.float32(fmt.tensor_bound / fmt.element.max)
    whole = stand_in(jnp.max(amax) if tensor_amax is None else tensor_amax, fmt.tensor_bound)
    outer = jnp.maximum(divide(whole, fmt.tensor_bound), jnp.float32(TINY))
    scale = divide(amax, fmt.element.max)
    scale = jnp.where(bits(scale) == 0, jnp.float32(1), scale)
    scale = divide(scale * top, divide(whole, fmt.element.max))
    return _coded(e4m3_stored(scale, outer), outer)


def _under(
    outer: Float32[Array, ""], blocks: Float32[Array, "..."], fmt: Format, least: float
) -> Scales:
    """The block scales below a tensor scale, of blocks with these largest magnitudes."""
    return _coded(e4m3_scale(blocks, outer, fmt.element.max, least), outer)


def _coded(found: tuple[Array, Array], outer: Float32[Array, ""]) -> Scales:
    code, step = found
    stored = lax.bitcast_convert_type(code, jnp.float8_e4m3fn)
    return Scales(stored, outer, lambda x: divide(x, spread(step)))


def _e8m0_rule(w: Float[Array, "n k"], fmt: Format, amax: _Amax, tensor_amax: _Amax) -> Scales:
    code = e8m0_scale(_amax_of_blocks(w, fmt, amax), fmt.element.max)
    inverse = e8m0_value(jnp.uint8(254) - code)
    return Scales(code, None, lambda x: scale_up(x, spread(inverse)))


def _double_rule(w: Float[Array, "n k"], fmt: Format, amax: _Amax, tensor_amax: _Amax) -> Scales:
    first = _float32_rule(w, fmt, amax, tensor_amax)
    zeros = bits(_amax_of_blocks(w, fmt, amax)) == 0  # whose scale would be far from all others
    codes, factors = quantize_scales(jnp.where(zeros, 0, first.scale).astype(w.dtype))
    return Scales(codes, factors, first.quotient)


_RULES = {
    "float32": _float32_rule,
    "e4m3": _e4m3_rule,
    "e8m0": _e8m0_rule,
    "double": _double_rule,
}


def step_of(scale: Array, tensor_scale: Outer, fmt: Format) -> Float32[Array, "..."]:
    """What a code is multiplied by, as float32 [blocks of rows, blocks of columns]."""
    return _STEPS[fmt.scale.name](scale, tensor_scale)


def _e4m3_step(scale: Array, tensor_scale: Outer) -> Float32[Array, "..."]:
    assert not isinstance(tensor_scale, ScaleFactors | None)
    return e4m3_value(lax.bitcast_convert_type(scale, jnp.uint8)) * tensor_scale


def _double_step(scale: Array, tensor_scale: Outer) -> Float32[Array, "..."]:
    assert isinstance(tensor_scale, ScaleFactors)
    return dequantize_scales(scale, tensor_scale).astype(jnp.float32)


_STEPS = {
    "float32": lambda scale, _: scale.reshape(scale.shape or (1, 1)),
    "e4m3": _e4m3_step,
    "e8m0": lambda scale, _: e8m0_value(scale),
    "double": _double_step,
}
