# SPDX-License-Identifier: Apache-2.0
"""NF4: a code is one of 16 quantiles of the normal distribution, within -1..1.

The values have the four decimals and the bfloat16 of ModelOpt 0.47 (`nf4_tensor.py`). (Dettmers et
al. 2023, QLoRA, arXiv 2305.14314.)
"""

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float32, Integer, UInt8
from ml_dtypes import bfloat16

_DECIMALS = (
    *(-1.0, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0.0),
    *(0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.7230, 1.0),
)
NF4_VALUES = tuple(float(v) for v in np.array(_DECIMALS, bfloat16))
_MIDDLES = tuple((a + b) / 2 for a, b in zip(NF4_VALUES[:-1], NF4_VALUES[1:], strict=True))


def nf4_code(x: Float32[Array, "*s"], counted: DTypeLike = jnp.uint8) -> UInt8[Array, "*s"]:
    """The code 0..15 of the value nearest to `x`; a tie takes the smaller value. `counted`: the
    dtype of the arithmetic.
    """
    code = jnp.zeros(x.shape, counted)
    for middle in _MIDDLES:
        code = code + (x > jnp.float32(middle)).astype(counted)
    return code.astype(jnp.uint8)


def nf4_value(code: Integer[Array, "*s"]) -> Float32[Array, "*s"]:
    """The number that the lowest four bits of an integer stand for."""
    left: list[Array] = [jnp.float32(v) for v in NF4_VALUES]
    for bit in range(4):  # halves the values that are left, by selects: gathers are slow
        odd = (code & (1 << bit)) != 0
        left = [jnp.where(odd, b, a) for a, b in zip(left[::2], left[1::2], strict=True)]
    return left[0]
