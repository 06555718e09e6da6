# SPDX-License-Identifier: Apache-2.0
"""Simulated quantization in slow NumPy, written from its equations: what ModelOpt's searches round
with, which is not what it stores.
"""

import numpy as np
import reference

F32 = np.float32
NONE = F32(2.0**-24)  # an amax up to this counts as none


def rounded(x, dtype):
    """`x` in the precision of `dtype`, as float32."""
    return np.asarray(x, np.float32).astype(dtype).astype(np.float32)


def integer(x, amax, bits):
    """clamp(round(x * (B / amax))) / (B / amax)."""
    bound = F32(2 ** (bits - 1) - 1)
    s = F32(0) if amax <= NONE else bound / F32(amax)
    q = np.clip(np.rint(x * s), -bound - 1, bound)
    return q / (F32(1) if amax <= NONE else s)


def e4m3(x):
    """The nearest E4M3 values of float32 ones, none beyond 448."""
    x = np.clip(x, -448, 448)
    values = reference.E4M3[reference.nearest(reference.E4M3, np.abs(x))]
    return np.copysign(values, x).astype(np.float32)


def float8(x, amax):
    """E4M3(x * s) * (1 / s), s = (1 / amax) * 448."""
    a = F32(1) if amax <= NONE else F32(amax)
    s = (F32(1) / a) * F32(448)
    return e4m3(x * s) * (F32(1) / s)


def e2m1(x, step):
    """The nearest E2M1 multiples of `step`."""
    if step == 0:
        return np.zeros_like(x)
    q = reference.E2M1[reference.nearest(reference.E2M1, np.abs(x / step))].astype(np.float32)
    return np.where(x >= 0, q, -q) * step


def dynamic_step(largest, amax):
    """The step of a block whose largest magnitude is `largest`, in a tensor that reaches `amax`."""
    g = F32(amax) / F32(6 * 448)
    g = g if g > 0 else F32(1e-12)
    s = e4m3(np.minimum(F32(largest) / (F32(6) * g), F32(448))) * g
    return s if s >= F32(1e-5) else F32(1)


def static_step(largest, amax, most):
    """The step of a block that reaches `largest` by choice. `most`: the largest block scale that is
    planned for, 448 or 256.
    """
    return float8(F32(largest) / F32(6), F32(amax) * (F32(448) / F32(most)) / F32(6))


INTEGERS = {"int8": (8, 1, 0), "int8_tensor": (8, 0, 0), "int4_b32": (4, 1, 32)}
FLOATS = {"fp8": (0, 0), "fp8_channel": (1, 0), "fp8_block": (128, 128)}
NVFP4 = {"nvfp4": (16, 448), "nvfp4_46": (16, 256), "nvfp4_b32": (32, 448)}
NAMES = (*INTEGERS, *FLOATS, *NVFP4)
"""The formats that are simulated in their own way."""


@np.errstate(over="ignore", invalid="ignore")
def simulated(w, name, amax=None, tensor_amax=None):
    """`w` rounded to the format `name`, in its own dtype. `amax`: a value for every block, which
    for NVFP4 means blocks that were chosen; `tensor_amax`: what the whole tensor reaches.
    """
    x, out = w.astype(np.float32), np.zeros(w.shape, np.float32)
    size = (INTEGERS[name][1:] if name in INTEGERS else FLOATS.get(name)) or (1, NVFP4[name][0])
    grid = reference.block_amax(x, *size)
    whole = grid.max() if tensor_amax is None else tensor_amax
    chosen = grid if amax is None else np.asarray(amax, np.float32).reshape(grid.shape)
    for i, j, s in reference.blocks(w.shape, *size):
        if name in INTEGERS:
            out[s] = integer(x[s], chosen[i, j], INTEGERS[name][0])
        elif name in FLOATS:
            out[s] = float8(x[s], chosen[i, j])
        elif amax is None:
            out[s] = e2m1(x[s], dynamic_step(grid[i, j], whole))
        else:
            top = chosen.max() if tensor_amax is None else tensor_amax
            out[s] = e2m1(x[s], static_step(chosen[i, j], top, NVFP4[name][1]))
    return out.astype(w.dtype)
