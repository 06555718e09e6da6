# SPDX-License-Identifier: Apache-2.0
"""Products with Hadamard matrices as they are defined, in NumPy, and what is compiled for devices.

Sums of whole numbers below 2^24 are exact in float32 in any order: so is all but the last step, and
implementations agree to the bit.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from matmul_cases import DEVICES

from jqx_kernels.hadamard import hadamard

BASES = {12: (1, 11), 20: (1, 19), 28: (2, 13), 36: (2, 17)}  # order -> construction, prime
LARGEST = {"bfloat16": 128, "float16": 512, "float32": 512}  # whole numbers that a dtype has


def base_matrix(order):
    """As in Paley 1933, with squares modulo a prime by Euler's criterion."""
    construction, q = BASES[order]
    squares = [[pow(i - j, (q - 1) // 2, q) if i != j else 0 for j in range(q)] for i in range(q)]
    bordered = np.ones((q + 1, q + 1), int)
    bordered[0, 0] = 0
    bordered[1:, 1:] = np.where(np.array(squares) == q - 1, -1, squares)
    if construction == 1:
        bordered[1:, 0] = -1
        return bordered + np.eye(q + 1, dtype=int)
    pairs = np.kron(bordered, [[1, 1], [1, -1]])
    return pairs + np.kron(np.eye(q + 1, dtype=int), [[1, -1], [-1, -1]])


def split(order):
    """The base of an order, 1 for a power of two, and the doublings."""
    base = next((b for b in BASES if order % b == 0 and (order // b).bit_count() == 1), 1)
    return base, (order // base).bit_length() - 1


def matrix(order):
    """The whole matrix: the base, of whose numbers each is a block of (-1) to the number of bits
    that i and j share.
    """
    base, doublings = split(order)
    at = np.arange(2**doublings)
    shared = np.array([[bin(i & j).count("1") for j in at] for i in at])
    return np.kron(base_matrix(base) if base > 1 else 1, (-1) ** shared)


def sums(x, order, transpose=False):
    """The runs of `x` times the matrix, in float64: the base, then each doubling."""
    base, doublings = split(order)
    y = np.asarray(x, np.float64).reshape(-1, base, 2**doublings)
    if base > 1:
        h = base_matrix(base)
        y = np.einsum("nij,ik->nkj", y, h.T if transpose else h)
    for bit in range(doublings):
        pairs = y.reshape(-1, 2, 2**bit)
        y = np.stack([pairs.sum(1), pairs[:, 0] - pairs[:, 1]], 1)
    return y.reshape(np.shape(x))


def defined(x, order, transpose=False):
    """What is to come out for an array of whole numbers, to the bit."""
    exact = sums(np.asarray(x, np.float32), order, transpose)
    scaled = exact.astype(np.float32) * np.float32(order**-0.5)
    return np.asarray(jnp.asarray(scaled).astype(x.dtype).astype(jnp.float32))


def whole(m, k, dtype, seed=0):
    """A matrix of whole numbers."""
    most = LARGEST[dtype]
    numbers = np.random.default_rng([seed, m, k]).integers(-most, most, (m, k), endpoint=True)
    return jnp.asarray(numbers, jnp.float32).astype(dtype)


def implemented(row, **how):
    """`hadamard` by one row of the table, kernels interpreted."""
    interpret = row in ("triton", "tpu")
    return partial(hadamard, implementation=row, device=DEVICES[row], interpret=interpret, **how)


COMPILED = (
    *((4096, 128, 64), (4096, 4096, 64), (256, 256, 300), (576, 576, 64), (14336, 14336, 64)),
    *((64, 64, 5), (1280, 1280, 64), (1 << 15, 1 << 15, 16)),
)
"""Columns, order and rows of what is compiled."""


def hadamard_cases(platform):
    """Name -> (function, abstract arguments) of products by the kernels of a platform."""
    row = {"cuda": "triton", "tpu": "tpu"}[platform]
    how = {"implementation": row, "device": DEVICES[row]}
    found = {}
    for k, order, m in COMPILED:
        for dtype in ("bfloat16", "float32"):
            f = partial(hadamard, block=order, **how)
            x = jax.ShapeDtypeStruct((m, k), jnp.dtype(dtype))
            found[f"hadamard {order} of {m} x {k} {dtype}"] = f, (x,)
    return found
