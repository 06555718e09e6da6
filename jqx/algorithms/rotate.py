# SPDX-License-Identifier: Apache-2.0
"""Rotations that a model cannot tell apart, but rounding can: outliers are spread over channels.

    R1   the residual stream x becomes x R1:  W' = W R1 where it is read, W' = R1^T W where written
    R2   the values of a head v become v R2:  W_v' = R2^T W_v,  W_o' = W_o R2, head by head

A norm that divides by the root mean square does not see R1 once its gain is in the weights after
it. R is a Hadamard matrix with random signs. Nothing is left to do while the model runs.
(QuaRot, Ashkboos et al. 2024, arXiv 2404.00456; SpinQuant, Liu et al. 2024, arXiv 2405.16406.)
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from jqx.errors import InputError, nearest

from .hadamard import rotation, turned

Leaves = Mapping[str, Array]
_Turn = Callable[[Array, Any, Any], Array]


class Role(NamedTuple):
    """What one array of a model has to do with its residual stream."""

    kind: str
    """A row of KINDS."""
    norm: str | None = None
    """The name of the gain that what it reads was multiplied with, whose kind is "norm"."""
    head_dim: int = 0
    """Channels of a head, of the kinds with values in their names."""


def rotate_in(w: Float[Array, "*lead k"], r: Float32[Array, "d"]) -> Float[Array, "*lead k"]:
    """The weight for inputs that are turned by the rotation `r`, every d of them; rows of numbers
    in that space, as of an embedding or a bias, are turned themselves.

    In the dtype of `w`. Raises InputError if d does not divide the last axis.
    """
    parts = _parts(w, r.shape[0], w.ndim - 1)
    return turned(parts, r).reshape(w.shape).astype(w.dtype)


def rotate_out(w: Float[Array, "*lead n k"], r: Float32[Array, "d"]) -> Float[Array, "*lead n k"]:
    """The weight whose outputs are turned by the rotation `r`, every d of them.

    In the dtype of `w`. Raises InputError if d does not divide the axis before the last.
    """
    parts = _parts(w, r.shape[0], w.ndim - 2).swapaxes(-1, -2)
    return turned(parts, r).swapaxes(-1, -2).reshape(w.shape).astype(w.dtype)


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
    width = stream_width({name: leaf.shape for name, leaf in leaves.items()}, roles)
    sizes = {role.head_dim for role in roles.values() if role.head_dim}
    turns = {size: rotation(size, seed + 1) for size in sizes}
    stream = rotation(width, seed) if width is not None else None
    rotated = dict(leaves)
    for name, role in roles.items():
        gain = None if role.norm is None else effective_gain(leaves[role.norm], plus_one)
        rotated[name] = rotate_leaf(
            leaves[name], role.kind, gain, (stream, turns.get(role.head_dim))
        )
        if role.kind == "norm" and plus_one:
            rotated[name] = jnp.zeros_like(leaves[name])
    return rotated


def effective_gain(gain: Float[Array, "d"], plus_one: bool) -> Float32[Array, "d"]:
    """What a norm multiplies by. `plus_one`: by its gain + 1."""
    return gain.astype(jnp.float32) + jnp.float32(plus_one)


def rotate_leaf(
    w: Float[Array, "..."],
    kind: str,
    gain: Float32[Array, "d"] | None,
    turns: tuple[Float32[Array, "d"] | None, Float32[Array, "h"] | None],
) -> Float[Array, "..."]:
    """One array of a kind, with the `gain` before it taken in; `turns`: the rotations of the stream
    and of the values of heads, those that the kind needs. A gain becomes ones.

    Computed in float32 and rounded once to the dtype of `w`.
    """
    wide = w.astype(jnp.float32)
    if gain is not None:
        wide = wide * jnp.expand_dims(gain, range(w.ndim - 1))
    return _KINDS[kind].turn(wide, *turns).astype(w.dtype)


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
    "norm": _Kind(None, False, lambda w, r1, r2: jnp.ones_like(w)),
}

KINDS = tuple(_KINDS)
"""What an array can be: the embedding, a weight that reads the stream or writes it or its bias, the
weight that makes the values of heads or its bias, the one that reads those values and writes the
stream, and the gain of a norm.
"""


def axes_of(kind: str) -> tuple[int | None, bool]:
    """The axis of a kind that is the residual stream, if any, and whether another one, or the only
    one, is the values of heads.
    """
    return _KINDS[kind].stream, _KINDS[kind].heads


def stream_width(shapes: Mapping[str, tuple[int, ...]], roles: Mapping[str, Role]) -> int | None:
    """Channels of the residual stream; None where no array has to do with it.

    Raises InputError for roles that cannot be those of arrays of these `shapes`.
    """
    _check(shapes, roles)
    axes = {name: _KINDS[role.kind].stream for name, role in roles.items()}
    widths = {name: shapes[name][axis] for name, axis in axes.items() if axis is not None}
    first = next(iter(widths), None)
    for name, width in widths.items():
        if first is not None and width != widths[first]:
            raise InputError(
                f"The stream has {widths[first]} channels in {first}, {width} in {name}"
            )
    return None if first is None else widths[first]


def _check(known: Mapping[str, object], roles: Mapping[str, Role]) -> None:
    for name, role in roles.items():
        if role.kind not in _KINDS:
            raise nearest(role.kind, KINDS, "kind of role")
        for wanted in (name, role.norm):
            if wanted is not None and wanted not in known:
                raise nearest(wanted, known, "array")
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


def _parts(w: Array, d: int, axis: int) -> Float32[Array, "..."]:
    """`w` with an axis in parts of `d`."""
    if w.shape[axis] % d:
        raise InputError(f"a rotation of {d} channels does not fit {w.shape[axis]} of {w.shape}")
    shape = (*w.shape[:axis], w.shape[axis] // d, d, *w.shape[axis + 1 :])
    return w.astype(jnp.float32).reshape(shape)
