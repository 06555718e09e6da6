# SPDX-License-Identifier: Apache-2.0
"""Which members of a stack a use is about, and how what is known of them is put in their places."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .entries import NAMED, Entry
from .interpret import Met
from .views import NOWHERE, Pieces, View


@dataclass(frozen=True, slots=True)
class Members:
    """The members along one axis of a parameter that a use meets.

    `fixed` are pieces of one place, `dims` which dimension of `pieces_of` each further piece is.
    """

    axis: int
    size: int
    fixed: Pieces
    moving: tuple[tuple[int, Any], ...] = ()

    @property
    def loop(self) -> int | None:
        """The depth of the scan whose iterations are the members, all of them and nothing else."""
        one = len(self.fixed) == 1 and not self.moving and self.fixed[0].loop is not None
        whole = one and self.fixed[0].size == self.size and self.fixed[0].stride == 1
        return self.fixed[0].loop if whole else None


def members(met: Met) -> list[Members]:
    """The members a use meets, for every axis of its stack in order."""
    assert met.view is not None
    pieces = pieces_of(met)
    found = []
    for axis in met.use.stack_axes:
        fixed = tuple(p for p in met.view.fixed if p.axis == axis)
        moving = tuple((i, p) for i, p in enumerate(pieces) if p.axis == axis)
        found.append(Members(axis, met.view.shape[axis], fixed, moving))
    return found


def pieces_of(met: Met) -> list[Any]:
    """The pieces that the batch dimensions of a use run over, one dimension each."""
    return [p for _, dim in met.batch for p in dim if p.size > 1]


def places(one: Members, dims: int) -> Any:
    """The numbers of the members, an int32 array with `dims` dimensions."""
    at: Any = 0
    for piece in one.fixed:
        at = at + piece.offset
    for dim, piece in one.moving:
        steps = piece.offset + piece.stride * jnp.arange(piece.size, dtype=jnp.int32)
        at = at + steps.reshape([-1 if i == dim else 1 for i in range(dims)])
    return jnp.broadcast_to(
        jnp.asarray(at, jnp.int32), jnp.broadcast_shapes(jnp.shape(at), (1,) * dims)
    )


def entry(
    met: Met, what: Any, neutral: float | int, loops: Sequence[int] = (), each: bool = False
) -> Entry:
    """`what` was collected at a use, as an entry: in its place along the axes of the stack.

    With `each` the leading dimensions of its arrays are the members, as `pieces_of` says; without,
    they are what was collected of all of them together. `loops`: the depths of the scans that
    stack what is collected of a named activation.
    """
    if met.view is None:
        return Entry(what, (), tuple((depth, NAMED) for depth in loops))
    stack = [m for m in members(met) if each or m.fixed]
    still = tuple((m.loop, m.axis) for m in stack if m.loop is not None)
    placed = [m for m in stack if m.loop is None]
    put = lambda x: _put(placed, len(pieces_of(met)) if each else 0, x, neutral)  # noqa: E731
    return Entry(jax.tree.map(put, what), tuple(m.axis for m in placed), still)


def _put(placed: list[Members], dims: int, x: Any, neutral: float | int) -> Any:
    """`x` [*dims, ...] in an array with an axis for each of `placed`."""
    if not placed or (dims == len(placed) and all(map(_whole, placed, range(dims)))):
        return x
    sizes = [m.size for m in placed]
    everywhere = jnp.full((*sizes, *x.shape[dims:]), neutral, x.dtype)
    return everywhere.at[tuple(places(m, dims) for m in placed)].set(x)


def _whole(one: Members, dim: int) -> bool:
    """Whether the members are all there are, in their order, along this dimension."""
    if one.fixed or len(one.moving) != 1 or one.moving[0][0] != dim:
        return False
    piece = one.moving[0][1]
    at_start = isinstance(piece.offset, int) and piece.offset == 0
    return at_start and piece.size == one.size and piece.stride == 1


def by_member(met: Met, x: Any) -> Any:
    """The activation as [*members, tokens, channels]: `pieces_of` the members, then all other axes,
    then those summed over, in the order of the parameter's channels. Not for ragged products.
    """
    dims = [axis for axis, _ in met.batch]
    channels = list(met.use.activation_axes)
    others = [i for i in range(x.ndim) if i not in (*dims, *channels)]
    moved = jnp.transpose(x, (*dims, *others, *channels))
    sizes = [p.size for p in pieces_of(met)]
    tokens, k = prod(x.shape[i] for i in others), prod(x.shape[i] for i in channels)
    return moved.reshape(*sizes, tokens, k)


def back(met: Met, y: Any, x: Any) -> Any:
    """The inverse of `by_member`: `y` in the place of the activation `x`."""
    dims = [axis for axis, _ in met.batch]
    channels = list(met.use.activation_axes)
    others = [i for i in range(x.ndim) if i not in (*dims, *channels)]
    order = (*dims, *others, *channels)
    moved = y.reshape([x.shape[i] for i in order])
    return jnp.transpose(moved, [order.index(i) for i in range(x.ndim)])


def channels(met: Met) -> Any:
    """Which of the parameter's channels a product sums over, their numbers as int32 [k]; None if
    it is all of them.
    """
    view = met.view
    assert view is not None
    pieces = [p for dim in met.summed for p in dim if p.size > 1]
    axes = met.use.weight_axes
    sizes = [view.shape[a] for a in axes]
    if prod(p.size for p in pieces) == prod(sizes):
        return None
    flat: Any = 0
    for axis, size in zip(axes, sizes, strict=True):
        fixed = tuple(p for p in view.fixed if p.axis == axis)
        moving = tuple((i, p) for i, p in enumerate(pieces) if p.axis == axis)
        flat = flat * size + places(Members(axis, size, fixed, moving), len(pieces))
    return flat.reshape(-1)


def seen(view: View, w: Any) -> Any:
    """The array `w`, of the shape of the view's parameter, as the view shows it."""
    pieces = list(enumerate(p for dim in view.axes for p in dim if p.size > 1))
    order: list[int] = []
    for axis in reversed(range(w.ndim)):
        mine = sorted(((i, p) for i, p in pieces if p.axis == axis), key=lambda ip: -ip[1].stride)
        fixed = tuple(p for p in view.fixed if p.axis == axis)
        moving = tuple(enumerate(p for _, p in mine))
        w = _taken(w, Members(axis, w.shape[axis], fixed, moving))
        order = [*(i for i, _ in mine), *order]
    w = jnp.transpose(w, [order.index(i) for i in sorted(order)])
    w = w.reshape([1 if p.axis == NOWHERE else p.size for _, p in pieces])
    w = jnp.broadcast_to(w, [p.size for _, p in pieces])
    return w.reshape([prod(p.size for p in dim) for dim in view.axes])


def _taken(w: Any, one: Members) -> Any:
    """The places `one` along an axis of `w`, a dimension for each piece."""
    if not one.moving:
        return lax.dynamic_index_in_dim(w, places(one, 0), one.axis, keepdims=False)
    sizes = [p.size for _, p in one.moving]
    if not _in_order(one):
        at = places(one, len(sizes)).reshape(-1)
        w = jnp.take(w, at, axis=one.axis, mode="clip")
    return w.reshape(*w.shape[: one.axis], *sizes, *w.shape[one.axis + 1 :])


def _in_order(one: Members) -> bool:
    """Whether the places are all there are, the last piece the fastest."""
    step = 1
    for _, piece in reversed(one.moving):
        if not isinstance(piece.offset, int) or piece.offset or piece.stride != step:
            return False
        step *= piece.size
    return not one.fixed and step == one.size
