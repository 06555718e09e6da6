# SPDX-License-Identifier: Apache-2.0
"""ModelOpt's simulated quantization, which its searches use and which is not what it exports.

    integers   y = clamp(round(x * (B / amax))) / (B / amax)
    E4M3       y = E4M3(x * s) * (1 / s)                       s = (1 / amax) * 448
    E2M1       y = E2M1(|x| / s) * s, with the sign of x       s = E4M3(block amax / (6 g)) * g

where g = amax / (6 * 448), and a scale below 1e-5 counts as 1 (dynamic blocks). Where the amax of
every block was chosen (static blocks), s goes through the E4M3 formula with amax = g * 448, and a
scale of 0 makes zeros. (ModelOpt 0.47: `tensor_quant.py` and its Triton kernels.)
"""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from jqx.formats import Format, block_amax, fake_quantize
from jqx.formats.format import grid_shape
from jqx_kernels.bits import divide, e2m1_code, e2m1_value, e4m3_code, e4m3_value
from jqx_kernels.blocks import from_blocks, spread, to_blocks

SMALLEST = 2.0**-24
"""An amax up to this counts as none."""

Amax = Float[Array, "..."] | None


def simulate(
    x: Float[Array, "n k"], fmt: Format, amax: Amax = None, tensor_amax: Amax = None
) -> Float[Array, "n k"]:
    """`x` rounded to `fmt` the way ModelOpt simulates it, in the dtype of `x`.

    `amax`: what scales reach, in their shape; for formats with a scale of the whole tensor a grid
    means static blocks. `tensor_amax`: what the scale of the whole tensor reaches. Both are taken
    from `x` where None.
    """
    return _RULES.get((fmt.element.name, fmt.scale.name), _as_stored)(x, fmt, amax, tensor_amax)


def simulate_stages(
    x: Float[Array, "n k"], fmt: Format, amax: Amax = None, tensor_amax: Amax = None
) -> Float[Array, "n k"]:
    """`simulate`, and where codes of integers are read as FP8 the rounding to it, with a scale that
    reaches `tensor_amax` (the largest magnitude of `x` where None). Searches leave that out.
    """
    y = simulate(x, fmt, amax, tensor_amax)
    if fmt.element.name != "int4" or fmt.tensor_bound is None:
        return y
    most = jnp.max(jnp.abs(x)) if tensor_amax is None else tensor_amax
    s, back = _e4m3_pair(most.astype(jnp.float32))
    return (_e4m3(y.astype(jnp.float32) * s) * back).astype(x.dtype)


def _grid(x: Array, fmt: Format, amax: Amax) -> Float32[Array, "..."]:
    found = block_amax(x, fmt.block) if amax is None else amax.astype(jnp.float32)
    return found.reshape(grid_shape(fmt, x.shape) or (1, 1))


def _integer(x: Array, fmt: Format, amax: Amax, _: Amax) -> Array:
    bound, a = jnp.float32(fmt.element.max), _grid(x, fmt, amax)
    none = a <= SMALLEST
    s = divide(jnp.full_like(a, bound), jnp.where(none, jnp.float32(1), a))
    s = jnp.where(none, jnp.float32(0), s)
    q = jnp.clip(jnp.round(to_blocks(x.astype(jnp.float32), fmt.block) * spread(s)), -bound - 1)
    q = jnp.minimum(q, bound)
    y = divide(q, spread(jnp.where(none, jnp.float32(1), s)))
    return from_blocks(y, x.shape).astype(x.dtype)


def _e4m3_pair(a: Float32[Array, "..."]) -> tuple[Float32[Array, "..."], Float32[Array, "..."]]:
    """The factor before E4M3 for this amax, and the one after."""
    a = jnp.where(a <= SMALLEST, jnp.float32(1), a)
    s = divide(jnp.ones_like(a), a) * jnp.float32(448)
    return s, divide(jnp.ones_like(s), s)


def _e4m3(x: Float32[Array, "*s"]) -> Float32[Array, "*s"]:
    return e4m3_value(e4m3_code(jnp.clip(x, jnp.float32(-448), jnp.float32(448))))


def _float8(x: Array, fmt: Format, amax: Amax, _: Amax) -> Array:
    s, back = _e4m3_pair(_grid(x, fmt, amax))
    y = _e4m3(to_blocks(x.astype(jnp.float32), fmt.block) * spread(s)) * spread(back)
    return from_blocks(y, x.shape).astype(x.dtype)


def static_step(
    amax: Float32[Array, "..."], tensor_amax: Float32[Array, ""], fmt: Format
) -> Float32[Array, "..."]:
    """What E2M1 codes are multiplied with in static blocks that reach `amax`."""
    assert fmt.tensor_bound is not None
    top = jnp.float32(448.0 / (fmt.tensor_bound / 6.0))  # 1, or 448 / 256 for four over six
    s, back = _e4m3_pair(divide(tensor_amax * top, 6.0))
    return _e4m3(divide(amax, 6.0) * s) * back


def dynamic_step(
    amax: Float32[Array, "..."], tensor_amax: Float32[Array, ""]
) -> Float32[Array, "..."]:
    """What E2M1 codes are multiplied with in blocks whose largest magnitude is `amax`."""
    g = divide(tensor_amax, 6.0 * 448.0)
    g = jnp.where(g > 0, g, jnp.float32(1e-12))
    s = _e4m3(jnp.minimum(divide(amax, 6.0 * g), jnp.float32(448))) * g
    return jnp.where(s >= 1e-5, s, jnp.float32(1))


def _float4(x: Array, fmt: Format, amax: Amax, tensor_amax: Amax) -> Array:
    blocks = block_amax(x, fmt.block)
    whole = jnp.max(blocks) if tensor_amax is None else tensor_amax
    if amax is not None and amax.ndim > 0:
        whole = jnp.max(amax) if tensor_amax is None else tensor_amax
        s = static_step(amax.astype(jnp.float32), whole.astype(jnp.float32), fmt)
    else:
        whole = whole if amax is None else amax
        s = dynamic_step(blocks, whole.astype(jnp.float32))
    wide = to_blocks(x.astype(jnp.float32), fmt.block)
    step = spread(s)
    q = e2m1_value(e2m1_code(jnp.abs(divide(wide, jnp.where(step == 0, jnp.float32(1), step)))))
    y = jnp.where(wide >= 0, q, -q) * step
    return from_blocks(y, x.shape).astype(x.dtype)


def _as_stored(x: Array, fmt: Format, amax: Amax, _: Amax) -> Array:
    """What stored codes stand for."""
    return fake_quantize(x, fmt, amax)


_RULES: dict[tuple[str, str], Callable[..., Array]] = {
    ("int8", "float32"): _integer,
    ("int4", "float32"): _integer,
    ("e4m3", "float32"): _float8,
    ("e2m1", "e4m3"): _float4,
}
