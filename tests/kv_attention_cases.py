# SPDX-License-Identifier: Apache-2.0
"""Stored keys and values to look back at, and what is to be found there.

What is found is a mean of values, weighted with exponentials of scores. Rounding exponentials to a
dtype moves each by half a step of it, and a score that is off by a little moves its exponential by
as much; so every number may be off by the sum of what its weights may be off by, times the values.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from matmul_cases import DEVICES, HALF_STEP

from jqx_kernels.kv_attention import Stored, kv_attention
from jqx_kernels.storage import Storage

STORAGES = {
    "fp8": Storage("e4m3", (1, None), "float32", "bytes", 448.0),
    "int8": Storage("int8", (1, None), "float32", "bytes", 127.0),
    "nvfp4": Storage("e2m1", (1, 16), "e4m3", "columns", 6.0),
}
DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32}
EPS = 2.0**-24


class Case(NamedTuple):
    """Sizes of one call, and where the new tokens are."""

    n: int = 4
    g: int = 3
    t: int = 1
    d: int = 64
    slots: int = 96
    start: int = 70
    pads: tuple[int, ...] = (0, 5, 69, 17)
    window: int | None = None
    scale: float = 0.125


def e4m3(bits):
    return np.asarray(bits, np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)


def e2m1(codes):
    magnitude = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)[codes & 7]
    return np.where(codes & 8, -magnitude, magnitude)


def drawn(name, case, seed):
    """Codes and scales of every slot: any code but NaN, scales of many sizes."""
    r = np.random.default_rng([seed, case.n, case.slots, case.d])
    shape = (case.n, case.slots)
    wide = np.exp2(r.standard_normal((*shape, 1), np.float32))
    if name == "nvfp4":
        codes = r.integers(0, 256, (*shape, case.d // 2), np.uint8)
        scale = r.integers(1, 0x7F, (*shape, case.d // 16), np.uint8)
        return Stored(codes, scale, (wide / 1000).astype(np.float32))
    codes = r.integers(0, 256, (*shape, case.d), np.uint8)
    if name == "fp8":
        codes = np.where(codes & 0x7F == 0x7F, 0x30, codes).astype(np.uint8)
    return Stored(codes, (wide / {"fp8": 200, "int8": 70}[name]).astype(np.float32))


def numbers(stored, name, dtype):
    """What is stored, rounded to `dtype`, in NumPy from the definition."""
    codes, scale, outer = stored
    if name == "nvfp4":
        both = np.stack([codes & 15, codes >> 4], -1).reshape(*codes.shape[:2], -1)
        values, step = e2m1(both), np.repeat(e4m3(scale) * outer, 16, -1)
    else:
        values = e4m3(codes) if name == "fp8" else codes.view(np.int8).astype(np.float32)
        step = scale
    return (values * step).astype(DTYPES[dtype]).astype(np.float64)


def queries(case, dtype, seed=9):
    r = np.random.default_rng([seed, *case[:4]])
    return r.standard_normal((case.n, case.g, case.t, case.d), np.float32).astype(DTYPES[dtype])


def mask_of(case):
    """[n, t, slots]: which slots each query sees, by counting."""
    found = np.zeros((case.n, case.t, case.slots), bool)
    for n in range(case.n):
        for i in range(case.t):
            for slot in range(case.pads[n], case.start + i + 1):
                near = case.window is None or case.start + i - slot < case.window
                found[n, i, slot] = near
    return found


def wanted(q, k, v, case):
    """(what is found, what it may be off by if no exponential was rounded, sum of |weight value|):
    in float64.
    """
    q, mask = q.astype(np.float64), mask_of(case)[:, None]
    k, v = (np.where(mask_of(case).any(1)[..., None], a, 0) for a in (k, v))
    s = np.einsum("ngtd,ned->ngte", q, k) * case.scale
    off = np.einsum("ngtd,ned->ngte", abs(q), abs(k)) * case.scale * EPS * (case.d + 4) * 2
    top = np.max(np.where(mask, s, -np.inf), -1, keepdims=True)
    w = np.where(mask, np.exp(s - np.where(np.isfinite(top), top, 0)), 0)
    total = np.maximum(w.sum(-1, keepdims=True), 1e-300)
    w, off = w / total, np.where(mask, off, 0).max(-1, keepdims=True) + EPS * (case.slots + 32) * 4
    size = np.einsum("ngte,ned->ngtd", w, abs(v))
    return np.einsum("ngte,ned->ngtd", w, v), 2 * off * size, size


def check(y, q, stored, name, case, dtype):
    """That `y` is what the definition says, for exponentials rounded to `dtype`."""
    k, v = (numbers(a, name, dtype) for a in stored)
    exact, off, size = wanted(np.asarray(q), k, v, case)
    half = 0.0 if dtype == "float32" else 2 * HALF_STEP[dtype]  # of a number just above a power
    tiny = 2.0**-120 * np.max(abs(v))  # exponentials below 2^-126 are zero
    allowed = off + half * size + tiny
    allowed = allowed + HALF_STEP[y.dtype.name] * (abs(exact) + allowed) * 2
    assert y.shape == exact.shape
    worst = np.max(abs(np.asarray(y, np.float64) - exact) - allowed)
    assert worst <= 0, f"off by {worst} more than allowed"


def arguments(case, name, dtype):
    """Arrays for `kv_attention`: q, keys, values, start, pads."""
    keys, values = drawn(name, case, 1), drawn(name, case, 2)
    q = jnp.asarray(queries(case, dtype))
    arrays = jax.tree.map(jnp.asarray, (keys, values))
    return q, *arrays, jnp.int32(case.start), jnp.asarray(case.pads, jnp.int32)


def looking(case, name, row, **how):
    """`kv_attention` of a case by one row, kernels interpreted."""
    more = {"implementation": row, "device": DEVICES[row], "interpret": row in ("triton", "tpu")}
    given = {"storage": STORAGES[name], "scale": case.scale, "window": case.window}
    return partial(kv_attention, **(given | more | how))


def kv_attention_cases(platform):
    """Name -> (function, abstract arguments) of the kernels of a platform."""
    row = {"cuda": "triton", "tpu": "tpu"}[platform]
    found = {}
    for name in STORAGES:
        for g, t, d, dtype in ((3, 1, 64, "bfloat16"), (8, 4, 128, "float32")):
            window = None if t == 1 else 100
            case = Case(6, g, t, d, slots=2048, start=0, pads=(0,) * 6, window=window)
            args = jax.eval_shape(partial(arguments, case, name, dtype))
            f = looking(case, name, row, interpret=False)
            found[f"kv_attention {name} {d} {dtype}"] = f, args
    return found
