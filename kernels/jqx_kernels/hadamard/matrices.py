# SPDX-License-Identifier: Apache-2.0
"""Matrices of +1 and -1 whose rows are orthogonal, and how they come apart.

H = H_base (x) H_2 (x) ... (x) H_2,   base 1, 12, 20, 28 or 36

of order 2^m by Sylvester's doubling, of the others by Paley's two constructions (Paley 1933, On
Orthogonal Matrices), which are not all symmetric.
"""

from collections.abc import Callable
from functools import reduce

import numpy as np

MOST = 128
"""The largest factor that a matrix is cut into."""

LEAST = 16
"""The smallest side of a matrix that tensor cores multiply: a smaller factor costs as much."""


def hadamard_matrix(order: int) -> np.ndarray:
    """The matrix of +1 and -1 in float32, not yet orthogonal: times its transpose it is `order`
    times the identity.

    Raises ValueError for an order that is no power of two times 1, 12, 20, 28 or 36.
    """
    base = base_of(order)
    if base is None:
        raise ValueError(f"No Hadamard matrix of order {order} is known here: {orders()}.")
    doubled = [np.array([[1, 1], [1, -1]], np.float32)] * (order // base - 1).bit_length()
    return reduce(np.kron, doubled, _BASES[base]().astype(np.float32))


def base_of(order: int) -> int | None:
    """The order of the part that doubling does not make; None where there is no such matrix."""
    if order < 1:
        return None
    return next((b for b in _BASES if order % b == 0 and _is_power(order // b)), None)


def largest_order(n: int) -> int:
    """The order of the matrix for runs of n numbers: n where there is one, else the largest power
    of two that divides n.
    """
    return n if base_of(n) else n & -n


def orders() -> str:
    """The orders there are, as errors tell them."""
    *some, last = _BASES
    return f"orders are {', '.join(map(str, some))} or {last} times a power of two"


def factors(order: int) -> tuple[int, ...]:
    """Orders, none above MOST, of matrices whose Kronecker product in this sequence is that of
    `order`: as few as can be, and of two those that cost least. The base is in the first.
    """
    if order <= MOST:
        return (order,)
    base = base_of(order) or order
    doubled = order // base
    pairs = [(order // b, b) for b in _POWERS if doubled % b == 0 and order // b <= MOST]
    if pairs:
        return min(pairs, key=lambda pair: pair[0] + max(pair[1], LEAST))
    first = max(base * b for b in _POWERS if base * b <= MOST)
    return (first, *factors(order // first))


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

_POWERS = tuple(1 << i for i in range(MOST.bit_length()))
