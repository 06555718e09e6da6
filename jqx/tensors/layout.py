# SPDX-License-Identifier: Apache-2.0
"""Layout: how an array with any number of axes is a stack of matrices [*lead, n, k].

    lead   the stack axes: every member is a matrix of its own
    n      the row axes, folded into one with the last of them fastest
    k      the contraction axes, folded likewise

| array | contracted over | stack | lead, n, k |
|---|---|---|---|
| `[out, in]` | 1 | - | , out, in |
| attention kernel `[d, h, k]` | 0 | - | , h * k, d |
| output kernel `[h, k, d]` | 0, 1 | - | , d, h * k |
| stacked `[d, layers, h, k]` | 0 | 1 | layers, h * k, d |

Transformations of pytrees add leading axes to matrices and take them away without a word to the
layout, so a layout counts axes from the end and leaves out what the matrices tell.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Shaped

from jqx.errors import InputError

Axes = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the axes of matrices lie in the array they stand for. Hashable, so it can be static
    under jit; make one with `layout_of`.

    A leading axis that is new lies in front of the array, whatever `stack` says of those that were
    there; if there are fewer than `stack` names, its first ones are gone.
    """

    columns: Axes = (-1,)  # the contraction axes, counted from the end of one member, ascending
    stack: Axes = ()  # of the last leading axes, counted from the end of the whole array, ascending
    row_sizes: Axes = ()  # of the row axes but the first: that one may be cut by sharding
    column_sizes: Axes = ()  # of the contraction axes but the first


class Places(NamedTuple):
    """The axes of an array by what they are, each in ascending order, counted from its front."""

    stack: Axes
    rows: Axes
    columns: Axes


def layout_of(shape: Sequence[int], axis: int | Axes, stack: Axes | None = None) -> Layout:
    """The layout of an array of `shape` that is contracted over `axis`, one or several.

    `stack` are its stack axes, the others are rows; None: all others but the last are a stack.
    Axes may be negative and come in any order. Raises InputError if one of them is not there or is
    named twice, or if no row axis is left.
    """
    ndim, told = len(shape), tuple(shape)
    columns = _counted(ndim, told, (axis,) if isinstance(axis, int) else axis)
    rest = tuple(a for a in range(ndim) if a not in columns)
    stacked = rest[:-1] if stack is None else _counted(ndim, told, stack)
    if twice := sorted(set(columns) & set(stacked)):
        raise InputError(
            f"Axis {twice[0]} of {told} is named as a contraction axis and as a stack axis: "
            "name it once."
        )
    rows = tuple(a for a in rest if a not in stacked)
    if not rows or not columns:
        missing = "row" if columns else "contraction"
        raise InputError(
            f"An array of shape {told} with the contraction axes {columns} and the stack axes "
            f"{stacked} has no {missing} axis: name fewer of the others."
        )
    return layout_at(told, Places(stacked, rows, columns))


def _counted(ndim: int, shape: Axes, axes: Axes) -> Axes:
    """The same axes counted from the front, in ascending order."""
    for axis in axes:
        if not -ndim <= axis < ndim:
            raise InputError(f"An array of shape {shape} has no axis {axis}.")
    counted = tuple(sorted(axis % ndim for axis in axes))
    if len(set(counted)) < len(counted):
        raise InputError(f"The axes {axes} of an array of shape {shape} name one of them twice.")
    return counted


def layout_at(shape: Sequence[int], places: Places) -> Layout:
    """The layout of an array of `shape` whose axes lie at `places`; the same for all layouts that
    mean the same.
    """
    ndim = len(shape)
    members = [a for a in range(ndim) if a not in places.stack]
    return Layout(
        columns=tuple(members.index(a) - len(members) for a in places.columns),
        # leading axes lie in front without being named
        stack=tuple(a - ndim for i, a in enumerate(places.stack) if a != i),
        row_sizes=tuple(shape[a] for a in places.rows[1:]),
        column_sizes=tuple(shape[a] for a in places.columns[1:]),
    )


def places_of(layout: Layout, leading: int) -> Places:
    """Where the axes are if the matrices have `leading` axes before their last two."""
    kept = layout.stack[max(len(layout.stack) - leading, 0) :]  # those gone lay before them
    ndim = leading + len(layout.row_sizes) + 1 + len(layout.columns)
    stack = (*range(leading - len(kept)), *(ndim + a for a in kept))
    members = [a for a in range(ndim) if a not in stack]
    columns = tuple(members[a] for a in layout.columns)
    return Places(stack, tuple(a for a in members if a not in columns), columns)


def array_shape(layout: Layout, shape: Sequence[int]) -> Axes:
    """The shape of the array that matrices of `shape` [*lead, n, k] stand for."""
    *lead, n, k = shape
    places = places_of(layout, len(lead))
    sizes = (*lead, *_unfolded(n, layout.row_sizes), *_unfolded(k, layout.column_sizes))
    at = dict(zip((*places.stack, *places.rows, *places.columns), sizes, strict=True))
    return tuple(at[a] for a in range(len(at)))


def to_matrices(w: Shaped[Array, "..."], layout: Layout) -> Shaped[Array, "*lead n k"]:
    """The matrices of the array `w`, in its dtype."""
    places = places_of(layout, w.ndim - len(layout.row_sizes) - 1 - len(layout.columns))
    moved = jnp.transpose(w, (*places.stack, *places.rows, *places.columns))
    lead, folded = moved.shape[: len(places.stack)], moved.shape[len(places.stack) :]
    rows = len(places.rows)
    return moved.reshape(*lead, math.prod(folded[:rows]), math.prod(folded[rows:]))


def from_matrices(m: Shaped[Array, "*lead n k"], layout: Layout) -> Shaped[Array, "..."]:
    """The array that the matrices `m` stand for: the inverse of `to_matrices`."""
    places = places_of(layout, m.ndim - 2)
    order = (*places.stack, *places.rows, *places.columns)
    shape = array_shape(layout, m.shape)
    back = tuple(order.index(a) for a in range(len(order)))
    return jnp.transpose(m.reshape(tuple(shape[a] for a in order)), back)


def _unfolded(size: int, minor: Axes) -> Axes:
    """The sizes of axes that were folded to one of `size`, of which all but the first are known."""
    return (size // math.prod(minor), *minor)
