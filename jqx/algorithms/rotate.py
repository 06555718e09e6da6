# SPDX-License-Identifier: Apache-2.0
"""Rotations that a model cannot tell apart, but rounding can: outliers are spread over channels.

    R1   the residual stream x becomes x R1:  W' = W R1 where it is read, W' = R1^T W where written
    R2   the values of a head v become v R2:  W_v' = R2^T W_v,  W_o' = W_o R2, head by head

A norm that divides by the root mean square does not see R1 once its gain is in the weights after
it. R is a Hadamard matrix with random signs. Nothing is left to do while the model runs.
(QuaRot, Ashkboos et al. 2024, arXiv 2404.00456; SpinQuant, Liu et al. 2024, arXiv 2405.16406.)
"""

from collections.abc import Callable, Mapping
from functools import reduce
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

from jqx.errors import InputError, nearest

from .quadratic import HIGHEST

Leaves = Mapping[str, Array]
_Turn = Callable[[Array, Array, Array], Array]


class Role(NamedTuple):
    """What one array of a model has to do with its residual stream."""

    kind: str
    """A row of KINDS."""
    norm: str | None = None
    """The name of the gain that what it reads was multiplied with, whose kind is "norm"."""
    head_dim: int = 0
    """Channels of a head, of the kinds with values in their names."""


def rotate_in(w: Float[Array, "*lead k"], r: Float32[Array, "d d"]) -> Float[Array, "*lead k"]:
    """The weight for inputs that are multiplied with the orthogonal `r`, every d of them; rows of
    numbers in that space, as of an embedding or a bias, are multiplied themselves.

    In the dtype of `w`. Raises InputError if d does not divide the last axis.
    """
    parts = _parts(w, r.shape[0], w.ndim - 1)
    return jnp.matmul(parts, r, precision=HIGHEST).reshape(w.shape).astype(w.dtype)


def rotate_out(w: Float[Array, "*lead n k"], r: Float32[Array, "d d"]) -> Float[Array, "*lead n k"]:
    """The weight whose outputs are multiplied with the orthogonal `r`, every d of them.

    In the dtype of `w`. Raises InputError if d does not divide the axis before the last.
    """
    parts = _parts(w, r.shape[0], w.ndim - 2)
    turned = jnp.einsum("...ij,il->...lj", parts, r, precision=HIGHEST)
    return turned.reshape(w.shape).astype(w.dtype)


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


def rotate_params(
    leaves: Leaves, roles: Mapping[str, Role], seed: int, plus_one: bool = False
) -> dict[str, Array]:
    """The arrays of the same model, rotated; names without a role stay as they are.

    Weights are [*lead, n, k], and k is what they contract. `plus_one`: norms multiply by gain + 1.
    A head that shares its weight with the embedding must have an array of its own, since the last
    gain goes into it alone.

    Raises InputError for a role of an unknown kind or array, for arrays that do not agree on the
    width of the stream, and for a gain that no array reads.
    """
    _check(leaves, roles)
    folded = {name: _folded(leaves, name, roles, plus_one) for name in leaves}
    if not any(_KINDS[role.kind].stream is not None for role in roles.values()):
        return folded
    r1 = rotation(_width(leaves, roles), seed)
    for name, role in roles.items():
        r2 = rotation(role.head_dim, seed + 1) if role.head_dim else r1
        folded[name] = _KINDS[role.kind].turn(folded[name], r1, r2)
    return folded


class _Kind(NamedTuple):
    stream: int | None  # the axis that is the residual stream
    heads: bool  # whether an axis is the values of heads
    turn: _Turn


_KINDS = {
    "embedding": _Kind(-1, False, lambda w, r1, r2: rotate_in(w, r1)),
    "reads": _Kind(-1, False, lambda w, r1, r2: rotate_in(w, r1)),
    "writes": _Kind(-2, False, lambda w, r1, r2: rotate_out(w, r1)),
    "writes_bias": _Kind(-1, False, lambda w, r1, r2: rotate_in(w, r1)),
    "values": _Kind(-1, True, lambda w, r1, r2: rotate_out(rotate_in(w, r1), r2)),
    "values_bias": _Kind(None, True, lambda w, r1, r2: rotate_in(w, r2)),
    "writes_values": _Kind(-2, True, lambda w, r1, r2: rotate_in(rotate_out(w, r1), r2)),
    "norm": _Kind(None, False, lambda w, r1, r2: w),
}

KINDS = tuple(_KINDS)
"""What an array can be: the embedding, a weight that reads the stream or writes it or its bias, the
weight that makes the values of heads or its bias, the one that reads those values and writes the
stream, and the gain of a norm.
"""


def _check(leaves: Leaves, roles: Mapping[str, Role]) -> None:
    for name, role in roles.items():
        if role.kind not in _KINDS:
            raise nearest(role.kind, KINDS, "kind of role")
        for wanted in (name, role.norm):
            if wanted is not None and wanted not in leaves:
                raise nearest(wanted, leaves, "array")
        if role.norm is not None and (role.norm not in roles or roles[role.norm].kind != "norm"):
            raise InputError(f"{name} reads what {role.norm} scales, which has not the role norm")
        if _KINDS[role.kind].heads and role.head_dim < 1:
            raise InputError(f"{name} has values of heads: say how many channels (head_dim)")
    read = {role.norm for role in roles.values()}
    for name, role in roles.items():
        if role.kind == "norm" and name not in read:
            raise InputError(
                f"No array reads what {name} scales. Name it in the roles of those that do; a head "
                "that is the embedding needs an array of its own"
            )


def _width(leaves: Leaves, roles: Mapping[str, Role]) -> int:
    """Channels of the residual stream."""
    axes = {name: _KINDS[role.kind].stream for name, role in roles.items()}
    widths = {name: leaves[name].shape[axis] for name, axis in axes.items() if axis is not None}
    first, *_ = widths
    for name, width in widths.items():
        if width != widths[first]:
            raise InputError(
                f"The stream has {widths[first]} channels in {first}, {width} in {name}"
            )
    return widths[first]


def _folded(leaves: Leaves, name: str, roles: Mapping[str, Role], plus_one: bool) -> Array:
    """An array with the gain before it taken in; of a gain what is left."""
    w, role = leaves[name], roles.get(name)
    if role is None:
        return w
    if role.kind == "norm":
        return jnp.zeros_like(w) if plus_one else jnp.ones_like(w)
    if role.norm is None:
        return w
    gain = leaves[role.norm].astype(jnp.float32) + jnp.float32(plus_one)
    return (w.astype(jnp.float32) * jnp.expand_dims(gain, range(w.ndim - 1))).astype(w.dtype)


def _parts(w: Array, d: int, axis: int) -> Float32[Array, "..."]:
    """`w` with an axis in parts of `d`."""
    if w.shape[axis] % d:
        raise InputError(f"a rotation of {d} channels does not fit {w.shape[axis]} of {w.shape}")
    shape = (*w.shape[:axis], w.shape[axis] // d, d, *w.shape[axis + 1 :])
    return w.astype(jnp.float32).reshape(shape)


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
