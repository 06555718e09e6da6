# SPDX-License-Identifier: Apache-2.0
"""Orthogonal matrices whose numbers have one magnitude: they spread an outlier evenly.

Of order 2^m by Sylvester's doubling, of 12, 20, 28 and 36 times that by Paley's two constructions
(Paley 1933, On Orthogonal Matrices).
"""

from collections.abc import Callable
from functools import reduce

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32


def hadamard(n: int) -> Float32[Array, "n n"]:
    """An orthogonal matrix of numbers of one magnitude, for n = 2^m times 1, 12, 20, 28 or 36; for
    another n one such matrix of the largest power of two in it, along the diagonal.
    """
    base = next((b for b in _BASES if n % b == 0 and _is_power(n // b)), 0)
    size = n if base else n & -n
    doubled = [np.array([[1, 1], [1, -1]])] * int(np.log2(size // (base or 1)))
    block = reduce(np.kron, doubled, _BASES[base or 1]()) / np.sqrt(size)
    return jnp.asarray(np.kron(np.eye(n // size), block), jnp.float32)


def rotation(n: int, seed: int) -> Float32[Array, "n n"]:
    """`hadamard(n)` with the signs of its rows drawn at random."""
    signs = jax.random.rademacher(jax.random.key(seed), (n, 1), jnp.float32)
    return hadamard(n) * signs


def _is_power(n: int) -> bool:
    return n & (n - 1) == 0


def _residues(q: int) -> np.ndarray:
    """1 where i - j is a square modulo the prime `q`, -1 where it is none, 0 on the diagonal."""
    squares = {i * i % q for i in range(1, q)}
    kinds = np.array([0] + [1 if i in squares else -1 for i in range(1, q)])
    at = np.arange(q)
    return kinds[(at[:, None] - at[None, :]) % q]


def _bordered(q: int, corner: int) -> np.ndarray:
    """The residues with a row of ones before them, and a column of `corner`."""
    top = np.concatenate([[0], np.ones(q, int)])[None]
    rest = np.concatenate([np.full((q, 1), corner), _residues(q)], axis=1)
    return np.concatenate([top, rest])


def _paley_one(q: int) -> np.ndarray:
    """Of order q + 1, for a prime that is 3 modulo 4 (Paley 1933)."""
    return np.eye(q + 1) + _bordered(q, -1)


def _paley_two(q: int) -> np.ndarray:
    """Of order 2 (q + 1), for a prime that is 1 modulo 4."""
    off, on = np.array([[1, 1], [1, -1]]), np.array([[1, -1], [-1, -1]])
    return np.kron(_bordered(q, 1), off) + np.kron(np.eye(q + 1), on)


_BASES: dict[int, Callable[[], np.ndarray]] = {
    1: lambda: np.ones((1, 1)),
    12: lambda: _paley_one(11),
    20: lambda: _paley_one(19),
    28: lambda: _paley_two(13),
    36: lambda: _paley_two(17),
}
