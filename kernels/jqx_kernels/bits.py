# SPDX-License-Identifier: Apache-2.0
"""Exact arithmetic on the bits of float32: division, rounding, and the codes of E4M3, E2M1, E8M0
and integers.

Compilers rewrite float arithmetic: `x / d` becomes a multiplication by a rounded reciprocal, `(a +
c) - c` becomes `a`, a cast to a narrow type and back disappears. Nothing here can be rewritten so:
roundings are integer operations on the bit pattern, and the one division hides its divisor. All
functions are elementwise and use only operations that Pallas kernels also have. XLA on a CPU reads
float32 subnormals (below 2^-126) as zero; a sign is taken from the bits and stays.
"""

import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float32, Int32, UInt8

MAGNITUDE = 0x7FFF_FFFF  # a float32 without its sign
INFINITY = 0x7F80_0000
SIGN = -0x8000_0000
BIAS = 127 << 23  # the bits of 1.0


def bits(x: Float32[Array, "*s"]) -> Int32[Array, "*s"]:
    """The bit pattern of `x` as a signed integer: larger for larger positive floats, negative for
    negative ones.
    """
    return lax.bitcast_convert_type(x, jnp.int32)


def from_bits(b: Int32[Array, "*s"]) -> Float32[Array, "*s"]:
    """The float32 whose bit pattern is `b`."""
    return lax.bitcast_convert_type(b, jnp.float32)


def is_negative(x: Float32[Array, "*s"]) -> Bool[Array, "*s"]:
    """Whether x < 0, subnormals included: -0.0 is not negative."""
    b = bits(x)
    return (b < 0) & (b != SIGN)


def divide(x: Float32[Array, "*s"], d: Float32[Array, "..."] | float) -> Float32[Array, "*s"]:
    """The IEEE quotient x / d for a number `d` or an array that broadcasts against `x`; 0 where x
    is 0, whatever d is.

    A divisor that depends on `x` cannot be replaced by its reciprocal, which would put a quarter of
    the quotients one ulp off. Exact on CPUs and in interpreted kernels; GPUs divide approximately
    unless a kernel says otherwise.
    """
    return x / jnp.where(x == 0, jnp.float32(1), jnp.asarray(d, jnp.float32))


def scale_up(x: Float32[Array, "..."], power: Float32[Array, "..."]) -> Float32[Array, "..."]:
    """x * power for a power of two, exact for subnormal `x` too, which XLA on a CPU would read as
    zero.
    """
    b = bits(x)
    m = b & MAGNITUDE
    # 2^-149 is 2^-23 times 2^-126, the latter off the exponent bits: compilers would merge the two
    # factors into one subnormal constant, that is zero
    lowered = from_bits(jnp.maximum(bits(power) - (126 << 23), 0))
    tiny = m.astype(jnp.float32) * jnp.float32(2.0**-23) * lowered
    return jnp.where(m < (1 << 23), from_bits(bits(tiny) | (b & SIGN)), x * power)


def round_to(x: Float32[Array, "*s"], dtype: DTypeLike) -> Float32[Array, "*s"]:
    """`x` rounded to the nearest bfloat16 or float16 (ties to even), still stored as float32.

    float32 returns `x` itself; NaN stays NaN. Raises ValueError for another dtype.
    """
    name = jnp.dtype(dtype).name
    if name not in _ROUNDINGS:
        raise ValueError(f"round_to knows {', '.join(_ROUNDINGS)}, not {name}.")
    b = bits(x)
    rounded = _ROUNDINGS[name](b)
    return from_bits(jnp.where((b & MAGNITUDE) > INFINITY, b, rounded))


def _to_bfloat16(b: Int32[Array, "*s"]) -> Int32[Array, "*s"]:
    return _rounded_top(b, 16) << 16


def _to_float16(b: Int32[Array, "*s"]) -> Int32[Array, "*s"]:
    m = b & MAGNITUDE
    normal = _rounded_top(m, 13) << 13
    normal = jnp.where(normal >= BIAS + (16 << 23), INFINITY, normal)
    tiny = _steps(from_bits(m), -1).astype(jnp.float32) * jnp.float32(2.0**-24)
    return jnp.where(m < BIAS - (14 << 23), bits(tiny), normal) | (b & SIGN)


_ROUNDINGS = {"float32": lambda b: b, "bfloat16": _to_bfloat16, "float16": _to_float16}


def _steps(a: Float32[Array, "*s"], exponent: int) -> Int32[Array, "*s"]:
    """`a` counted in steps of 2^(exponent - 23), ties to even; 0 <= a < 2^exponent."""
    return bits(a + jnp.float32(2.0**exponent)) - (BIAS + (exponent << 23))


def _rounded_top(b: Int32[Array, "*s"], drop: int) -> Int32[Array, "*s"]:
    """The bits `b` of a magnitude without its lowest `drop` bits, rounded to nearest, ties to
    even.
    """
    return (b + ((1 << (drop - 1)) - 1) + ((b >> drop) & 1)) >> drop


def e4m3_code(x: Float32[Array, "*s"]) -> UInt8[Array, "*s"]:
    """The E4M3 byte nearest to `x` (ties to even); beyond 448 it saturates, NaN becomes 0x7F."""
    b = bits(x)
    magnitude = b & MAGNITUDE
    a = jnp.minimum(from_bits(magnitude), jnp.float32(448))
    m = bits(a)
    normal = _rounded_top(m, 20) - (120 << 3)  # exponent bias 127 becomes 7
    code = jnp.where(m < BIAS - (6 << 23), _steps(a, 14), normal)
    code = jnp.where(magnitude > INFINITY, 0x7F, code)
    return (code | ((b >> 24) & 0x80)).astype(jnp.uint8)


def e4m3_value(code: UInt8[Array, "*s"]) -> Float32[Array, "*s"]:
    """The number an E4M3 byte stands for: exact, 0x7F and 0xFF are NaN."""
    c = code.astype(jnp.int32)
    m = c & 0x7F
    tiny = m.astype(jnp.float32) * jnp.float32(2.0**-9)
    normal = jnp.where(m == 0x7F, 0x7FC0_0000, (m + (120 << 3)) << 20)
    return from_bits(jnp.where(m < 8, bits(tiny), normal) | ((c & 0x80) << 24))


def e2m1_magnitude(x: Float32[Array, "*s"]) -> Int32[Array, "*s"]:
    """The index 0..7 of the value of {0, .5, 1, 1.5, 2, 3, 4, 6} nearest to |x|; ties to the even
    index, above 5 is 7.
    """
    a = jnp.minimum(from_bits(bits(x) & MAGNITUDE), jnp.float32(6))
    b = bits(a)
    return jnp.where(b < BIAS, _steps(a, 22), _rounded_top(b, 22) - (126 << 1))


def e2m1_magnitude_down(x: Float32[Array, "*s"]) -> Int32[Array, "*s"]:
    """As `e2m1_magnitude`, but a tie takes the smaller value."""
    a = jnp.minimum(from_bits(bits(x) & MAGNITUDE), jnp.float32(6))
    b = bits(a)
    small = (a > 0.25).astype(jnp.int32) + (a > 0.75).astype(jnp.int32)
    return jnp.where(b < BIAS, small, ((b + 0x1F_FFFF) >> 22) - (126 << 1))


def e2m1_code(
    x: Float32[Array, "*s"], sign_of: Float32[Array, "*s"] | None = None
) -> UInt8[Array, "*s"]:
    """The E2M1 code 0..15 nearest to `x` as NVFP4 stores it: ties to even, and bit 3 says x < 0.

    Zero of either sign is 0, a negative number that rounds to zero is 8. The sign is read from
    `sign_of` if given: the dividend of a quotient that may have underflowed to zero.
    """
    negative = is_negative(x if sign_of is None else sign_of)
    return (e2m1_magnitude(x) | jnp.where(negative, 8, 0)).astype(jnp.uint8)


def e2m1_code_down(
    x: Float32[Array, "*s"], sign_of: Float32[Array, "*s"] | None = None
) -> UInt8[Array, "*s"]:
    """The E2M1 code 0..15 nearest to `x` as ModelOpt exports MXFP4: ties go down, and bit 3 says x
    <= 0.

    So zero of either sign is 8. `sign_of` as in `e2m1_code`.
    """
    negative = bits(x if sign_of is None else sign_of) <= 0
    return (e2m1_magnitude_down(x) | jnp.where(negative, 8, 0)).astype(jnp.uint8)


def e2m1_value(code: UInt8[Array, "*s"]) -> Float32[Array, "*s"]:
    """The number an E2M1 code 0..15 stands for; 8 is -0.0."""
    c = code.astype(jnp.int32)
    m = c & 7
    tiny = bits(m.astype(jnp.float32) * jnp.float32(0.5))
    return from_bits(jnp.where(m < 2, tiny, (m + (126 << 1)) << 22) | ((c & 8) << 28))


def e8m0_value(code: UInt8[Array, "*s"]) -> Float32[Array, "*s"]:
    """2^(code - 127) for a code 0..254; 2^-127 is subnormal. 255, which means NaN, gives
    infinity.
    """
    c = code.astype(jnp.int32)
    return from_bits(jnp.where(c == 0, 0x0040_0000, c << 23))


def int_code(x: Float32[Array, "*s"], width: int) -> UInt8[Array, "*s"]:
    """`x` rounded to the nearest integer of `width` bits (ties to even, saturating), as a two's
    complement byte.
    """
    bound = float(1 << (width - 1))
    clipped = jnp.clip(x, jnp.float32(-bound), jnp.float32(bound - 1))
    return bits(clipped + jnp.float32(1.5 * 2**23)).astype(
        jnp.uint8
    )  # the low mantissa bits are the integer


def int_value(code: UInt8[Array, "*s"], width: int) -> Float32[Array, "*s"]:
    """The integer that the lowest `width` bits of a byte hold in two's complement."""
    half = 1 << (width - 1)
    c = code.astype(jnp.int32) & (2 * half - 1)
    return ((c ^ half) - half).astype(jnp.float32)
