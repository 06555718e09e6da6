# SPDX-License-Identifier: Apache-2.0
"""Products of float32 numbers with +1 and -1 on units that multiply 16 bits, without a rounding.

x = high + middle + low, of eight bits each; all three times a sign are exact, and so are the sums
in float32 of what has no more bits.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from jqx_kernels.bits import bits, from_bits

_TOP = -0x1_0000  # the bits of a float32 that a bfloat16 has


def terms(x: Float[Array, "*s"]) -> tuple[Float[Array, "*s"], ...]:
    """Numbers of 16 bits whose sum is `x`, the smallest first: three bfloat16 for float32, `x`
    itself for others. Infinity is the last of its terms, zeros before it.
    """
    if x.dtype != jnp.float32:
        return (x,)
    found, rest = [], x
    for _ in range(3):
        top = from_bits(bits(rest) & _TOP)  # by bits, since compilers drop casts there and back
        found.append(top.astype(jnp.bfloat16))
        rest = jnp.where(rest == top, jnp.float32(0), rest - top)
    return tuple(reversed(found))


def summed(x: Float[Array, "*s"], multiply: Callable[[Array], Array]) -> Float32[Array, "..."]:
    """The sum of the products that `multiply` makes of the terms of `x`, in float32."""
    first, *others = map(multiply, terms(x))
    return sum(others, first)
