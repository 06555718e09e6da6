# SPDX-License-Identifier: Apache-2.0
"""Stored matrices to multiply with, the devices that kernels are for, and what a product is to be.

A sum of k products in float32, in any order, is off by at most k 2^-24 of the sum of their
magnitudes; a product of float32 numbers, and the rounding to the dtype of y, come on top.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jqx.formats import decode, encode, find_format
from jqx.formats import storage_of as storage_of_format
from jqx_kernels.dispatch import Device
from jqx_kernels.matmul import matmul

H200 = Device("gpu", "NVIDIA H200", (9, 0))
B200 = Device("gpu", "NVIDIA B200", (10, 0))
TPU = Device("tpu", "TPU v5 lite")
DEVICES = {"triton": H200, "tpu": TPU, "cudnn": B200, "xla": None, "reference": None}
HALF_STEP = {"bfloat16": 2.0**-9, "float16": 2.0**-12, "float32": 2.0**-25}
FORMATS = (
    *("int4", "int4_b64", "nvfp4", "nvfp4_b32", "mxfp4", "mxfp8", "mxint8", "fp8", "fp8_channel"),
    *("fp8_block", "int8", "int8_tensor", "nf4"),
)
ENCODE = jax.jit(encode, static_argnames="fmt")
DECODE = jax.jit(decode, static_argnames=("fmt", "dtype"))


def storage_of(name):
    return storage_of_format(find_format(name))


def normal(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape, np.float32)


def stored(name, n, k, seed=1):
    """(codes, scale, tensor scale) of a matrix whose rows and columns are of many sizes."""
    w = normal(n, k, seed=seed) * np.exp2(normal(n, 1)) * np.exp2(normal(1, k))
    return ENCODE(jnp.asarray(w), find_format(name))


def decoded(arrays, name, dtype):
    """The stored matrix as the library decodes it."""
    return np.asarray(DECODE(arrays, find_format(name), dtype=jnp.dtype(dtype)).astype(jnp.float32))


def check_sum(y, x, w, dtype, roundings=1):
    """`y` is x w^T for `x` and `w`, summed in float32 and rounded to `dtype`; `roundings`: of every
    product and its sum, to float32.
    """
    x, w = np.asarray(x, np.float64), np.asarray(w, np.float64)
    exact = x @ w.T
    off = (x.shape[1] + roundings) * 2.0**-24 * (np.abs(x) @ np.abs(w).T)
    allowed = off + HALF_STEP[jnp.dtype(dtype).name] * (np.abs(exact) + off) * 2
    assert y.dtype == dtype
    got = np.asarray(y, np.float64)
    worst = np.max(np.abs(got - exact) - allowed)
    assert worst <= 0, f"off by {worst} more than allowed"


def abstract(arrays):
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), arrays)


def spec(name, n, k):
    """The shapes of what `stored` makes."""
    w = jax.ShapeDtypeStruct((n, k), jnp.float32)
    return jax.eval_shape(partial(encode, fmt=find_format(name)), w)


def product_cases(platform):
    """Name -> (function, abstract arguments) of products with every stored matrix by the kernels of
    a platform, of few rows and of more.
    """
    row = {"cuda": "triton", "tpu": "tpu"}[platform]
    how = {"implementation": row, "device": DEVICES[row], "weight_dtype": "bfloat16"}
    found = {}
    for name in FORMATS:
        f = partial(matmul, storage=storage_of(name), **how)
        for m in (1, 64):
            x = jax.ShapeDtypeStruct((m, 1024), jnp.bfloat16)
            found[f"matmul {name} of {m}"] = f, (x, *spec(name, 512, 1024))
    return found
