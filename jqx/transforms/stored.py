# SPDX-License-Identifier: Apache-2.0
"""What activations are when a quantized model runs: inputs of linears, keys and values, rounded to
what their formats can hold.

    y = decode(encode(x / scale)) * scale

in float32, with one rounding at the end, to the dtype of `x`: what engines compute, up to their
approximate reciprocals. Larger values than the scale covers saturate; NaN stays NaN. ModelOpt's
fake quantization, which its searches and evaluations use, differs from that and from here:

- FP8, INT8: it multiplies by a rounded 448 / amax or 127 / amax instead of dividing by the stored
  scale. Of normally distributed bfloat16 values 1 in 1,000 (FP8) and 1 in 2,000 (INT8) are ties in
  one arithmetic and not in the other, and land one code apart.
- NVFP4: it rounds to zero every block whose scale is below 1e-5, engines and this those whose scale
  has a zero E4M3 code; it takes blocks of 16 whatever the format says.
- Keys and values: it rounds x - bias, and what comes back of it, to the dtype of `x`; it takes no
  bias off for NVFP4.
"""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from jqx.config import INPUT_FORMATS, KV_FORMATS, InputFormat
from jqx.errors import InputError, nearest
from jqx.formats import FORMATS, Format, fake_quantize, fake_quantize_scaled, weight_amax
from jqx.formats.elements import E2M1, E2M1_DOWN
from jqx_kernels.bits import divide


def fake_input(
    x: Float[Array, "*lead k"], name: str, scale: Float[Array, ""] | None
) -> Float[Array, "*lead k"]:
    """An activation through the input format called `name`, in its own dtype; the gradient is that
    of the identity.

    `scale` is the stored input_scale of formats that have one; where it is None the scale is found
    in `x`, one for all of it, as an engine does that is given none. Formats with a scale per token
    or block find theirs in `x` always. A token of zeros stays zeros.

    Raises InputError if blocks of the format do not divide `k`, or if there is no such format.
    """
    if name not in INPUT_FORMATS:
        raise nearest(name, INPUT_FORMATS, "input format")
    row = INPUT_FORMATS[name]
    fmt = _for_activations(FORMATS[row.format])
    wide = x.astype(jnp.float32)
    if row.bound is None:
        y = fake_quantize(wide, fmt)
    else:
        y = fake_quantize_scaled(wide, fmt, _found(wide, row.bound) if scale is None else scale)
    return _or_nan(x, y).astype(x.dtype)


def _found(x: Float32[Array, "*lead k"], bound: float) -> Float32[Array, ""]:
    """The scale with which the largest magnitude in `x` is the largest number of the format."""
    return jnp.maximum(divide(weight_amax(x), bound), jnp.float32(2.0**-126))


def block_of(row: InputFormat) -> int:
    """How many channels an input in this format needs a multiple of."""
    return FORMATS[row.format].block[1] or 1


def _for_activations(fmt: Format) -> Format:
    """Quotients of activations are not rounded twice, and ties go to even."""
    element = E2M1 if fmt.element == E2M1_DOWN else fmt.element
    return dataclasses.replace(fmt, element=element, double_rounding=False)


def fake_kv(
    x: Float[Array, "b h t d"],
    name: str,
    scale: Float[Array, ""] | None,
    bias: Float[Array, "1 h 1 d"] | None,
) -> Float[Array, "b h t d"]:
    """Keys or values as a cache in the format called `name` keeps them, in the dtype of `x`.

    `scale` is k_scale or v_scale, 1 where None; `bias` is taken off first and added again after.
    Queries and the weights of the softmax stay as they are.

    Raises InputError if blocks of the format do not divide `d`, for a bias that is missing or too
    many, and if there is no such format.
    """
    if name not in KV_FORMATS:
        raise nearest(name, KV_FORMATS, "KV cache format")
    row = KV_FORMATS[name]
    if row.affine != (bias is not None):
        instead = "needs a bias" if row.affine else "takes no bias"
        raise InputError(f"{name} {instead}: keys and values {x.shape} do not fit it")
    fmt = _for_activations(FORMATS[row.format])
    # k_scale is amax / 448 for both formats; NVFP4's tensor scale is amax / (6 * 448)
    fold = 1.0 if fmt.tensor_bound is None else fmt.tensor_bound / row.bound
    one = divide(jnp.float32(1) if scale is None else scale.astype(jnp.float32), fold)
    shift = jnp.float32(0) if bias is None else bias.astype(jnp.float32)
    y = _or_nan(x, fake_quantize_scaled(x.astype(jnp.float32) - shift, fmt, one))
    return (y + shift).astype(x.dtype)


def _or_nan(x: Float[Array, "*s"], y: Float32[Array, "*s"]) -> Float32[Array, "*s"]:
    """`y`, NaN where `x` is: codes of integers and E2M1 have none.

    The selection also keeps compilers from merging the product in `y` with a sum that follows.
    """
    return jnp.where(jnp.isnan(x), jnp.float32(jnp.nan), y)
