# SPDX-License-Identifier: Apache-2.0
"""Where a value comes from, and how its axes lie in the parameter it is a view of.

An axis of a view is a row-major tuple of pieces, and a piece is a run of evenly spaced places along
one axis of the parameter. So transposes, reshapes, slices and broadcasts are bookkeeping on tuples,
and a contraction of the view says which axes of the parameter, in the parameter's own orientation,
are summed over. What was indexed away (a layer of a stack) is remembered as a fixed piece.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import jax

NOWHERE = -1  # the axis of a piece that broadcasting made


@dataclass(frozen=True, slots=True)
class Piece:
    """`size` places along one axis of a parameter: `offset`, `offset + stride`, and so on.

    `offset` is an int, or an int32 array where only the running program knows it. `loop` is the
    depth of the scan whose iterations the places are, None for others.
    """

    axis: int
    size: int
    stride: int = 1
    offset: Any = 0
    loop: int | None = None


Pieces = tuple[Piece, ...]
Axes = tuple[Pieces, ...]


@dataclass(frozen=True, slots=True)
class View:
    """The parameter at `path`, a leaf of this shape, with its axes rearranged. `fixed` are the
    places that were chosen along axes that the view no longer has.
    """

    path: str
    shape: tuple[int, ...]
    axes: Axes
    fixed: Pieces = ()

    @property
    def rank(self) -> int:
        """The number of axes longer than one that the parameter gave it."""
        return sum(any(p.axis != NOWHERE and p.size > 1 for p in axis) for axis in self.axes)

    def rearranged(self, axes: Axes, gone: Iterable[Piece] = ()) -> "View":
        """The view with other axes; `gone` are pieces of one place each that none of them has."""
        left = tuple(p for p in gone if p.axis != NOWHERE and self.shape[p.axis] > 1)
        return replace(self, axes=axes, fixed=self.fixed + left)


@jax.tree_util.register_pytree_node_class
@dataclass(frozen=True, slots=True)
class Origin:
    """What a value is made of.

    An activation depends on the inputs (`active`, no paths). A view is one parameter, or several
    that lie side by side along the axis `along`. A value with paths but no views was computed from
    those parameters alone; one with neither is a constant. `rank` is the number of axes longer than
    one that parameters gave it: 1 for a bias, however it is broadcast.

    A pytree whose leaves are the offsets that only the running program knows, so an origin can
    leave a nested jit.
    """

    paths: frozenset[str] = frozenset()
    views: tuple[View, ...] = ()
    along: int | None = None
    rank: int = 0
    active: bool = False

    @property
    def view(self) -> View | None:
        """The one parameter it shows; None if it shows none or several."""
        return self.views[0] if len(self.views) == 1 else None

    def tree_flatten(self) -> tuple[list[Any], "Origin"]:
        """The offsets that are arrays, and the rest."""
        moving = [p.offset for p in _pieces(self.views) if not isinstance(p.offset, int)]
        return moving, _with_offsets(self, iter([None] * len(moving)))

    @classmethod
    def tree_unflatten(cls, rest: "Origin", moving: Iterable[Any]) -> "Origin":
        """The inverse of `tree_flatten`."""
        return _with_offsets(rest, iter(moving))


ACTIVATION = Origin(active=True)
CONSTANT = Origin()


def parameter(path: str, shape: Sequence[int]) -> Origin:
    """A parameter as it lies in the tree."""
    return viewed(View(path, tuple(shape), tuple((Piece(i, n),) for i, n in enumerate(shape))))


def viewed(view: View) -> Origin:
    """The origin of a value that is this view."""
    return Origin(frozenset({view.path}), (view,), rank=view.rank)


def side_by_side(views: Sequence[View], along: int) -> Origin:
    """The origin of views concatenated along one axis."""
    paths = frozenset(view.path for view in views)
    return Origin(paths, tuple(views), along, max(view.rank for view in views))


def derived(origins: Iterable[Origin], shape: Sequence[int]) -> Origin:
    """The origin of something of this shape computed from values none of which is an activation."""
    origins = list(origins)
    rank = min(max((o.rank for o in origins), default=0), sum(n > 1 for n in shape))
    return Origin(frozenset().union(*(o.paths for o in origins)), rank=rank)


def transposed(view: View, permutation: Sequence[int]) -> View:
    """The view after `lax.transpose`."""
    return replace(view, axes=tuple(view.axes[i] for i in permutation))


def squeezed(view: View, dimensions: Sequence[int]) -> View:
    """The view without the axes at `dimensions`, which have one place each."""
    gone = [p for i in dimensions for p in view.axes[i]]
    kept = tuple(axis for i, axis in enumerate(view.axes) if i not in dimensions)
    return view.rearranged(kept, gone)


def broadcast(view: View, shape: Sequence[int], dimensions: Sequence[int]) -> View:
    """The view after `lax.broadcast_in_dim` to `shape`, old axis i becoming `dimensions[i]`."""
    old = dict(zip(dimensions, view.axes, strict=True))
    kept = {i: axis for i, axis in old.items() if prod(p.size for p in axis) == shape[i]}
    gone = [p for i, axis in old.items() if i not in kept for p in axis]
    axes = tuple(kept[i] if i in kept else (Piece(NOWHERE, n),) for i, n in enumerate(shape))
    return view.rearranged(axes, gone)


def reshaped(view: View, shape: Sequence[int]) -> View | None:
    """The view after a row-major reshape to `shape`; None where a new axis would hold parts of old
    ones that are no box.
    """
    pieces = [piece for axis in view.axes for piece in axis]
    left = [piece for piece in pieces if piece.size > 1][::-1]
    new = []
    for size in shape:
        taken = []
        while size > 1:
            if not left:
                return None
            piece = left.pop()
            if size % piece.size == 0:
                taken.append(piece)
                size //= piece.size
            elif piece.size % size == 0:
                rest = piece.size // size
                taken.append(replace(piece, size=size, stride=piece.stride * rest))
                left.append(replace(piece, size=rest, offset=0))
                size = 1
            else:
                return None
        new.append(tuple(taken))
    return view.rearranged(tuple(new), [piece for piece in pieces if piece.size == 1])


def sliced(
    view: View, starts: Sequence[Any], sizes: Sequence[int], steps: Sequence[int]
) -> View | None:
    """`sizes[i]` places of every axis, from `starts[i]` (an int or an array) in `steps[i]`; None
    where those of a merged axis are no box.
    """
    cut = [_cut(*each) for each in zip(view.axes, starts, sizes, steps, strict=True)]
    if any(axis is None for axis in cut):
        return None
    gone = [p for pieces, size in zip(cut, sizes, strict=True) if size == 1 for p in pieces or ()]
    axes = tuple(
        () if size == 1 else pieces
        for pieces, size in zip(cut, sizes, strict=True)
        if pieces is not None
    )
    return view.rearranged(axes, gone)


def _cut(pieces: Pieces, start: Any, size: int, step: int) -> Pieces | None:
    """A slice of one axis."""
    if size == prod(p.size for p in pieces):
        return pieces
    first, *rest = (p for p in pieces if p.size > 1)
    inner = prod(p.size for p in rest)
    if not rest:
        offset = first.offset + start * first.stride
        return (replace(first, size=size, stride=first.stride * step, offset=offset),)
    if not isinstance(start, int) or step != 1:
        return None
    if start % inner == 0 and size % inner == 0:
        head = _cut((first,), start // inner, size // inner, 1)
        return None if head is None else (*head, *rest)
    if start // inner == (start + size - 1) // inner:
        tail = _cut(tuple(rest), start % inner, size, 1)
        one = replace(first, size=1, offset=first.offset + start // inner * first.stride)
        return None if tail is None else (one, *tail)
    return None


def taken_apart(view: View, iteration: Any, loop: int) -> View | None:
    """One member of a view that the scan at depth `loop` takes apart along its first axis; None
    where that axis is merged from several.
    """
    first, *rest = view.axes
    if sum(p.size > 1 for p in first) > 1:
        return None
    gone = [
        replace(p, offset=p.offset + iteration * p.stride, loop=loop) if p.size > 1 else p
        for p in first
    ]
    return view.rearranged(tuple(rest), gone)


def contraction(
    view: View, weight_dims: Sequence[int], activation_dims: Sequence[int]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Axes summed over when dimension `weight_dims[i]` of a view meets `activation_dims[i]` of an
    activation.

    Returns the axes of the activation, in the order of the parameter's channels, and the axes of
    the parameter.
    """
    met = [(view.axes[w], a) for w, a in zip(weight_dims, activation_dims, strict=True)]
    met.sort(key=lambda pair: [(p.axis, -p.stride) for p in pair[0]])
    return tuple(a for _, a in met), axes_of(pieces for pieces, _ in met)


def axes_of(dims: Iterable[Pieces]) -> tuple[int, ...]:
    """The axes of the parameter that these axes of a view show."""
    return tuple(sorted({p.axis for pieces in dims for p in pieces} - {NOWHERE}))


def _pieces(views: Iterable[View]) -> Iterator[Piece]:
    for view in views:
        yield from (p for pieces in (*view.axes, view.fixed) for p in pieces)


def _with_offsets(origin: Origin, offsets: Iterator[Any]) -> Origin:
    """The origin with the next of `offsets` where one is no int."""

    def fill(pieces: Pieces) -> Pieces:
        return tuple(
            p if isinstance(p.offset, int) else replace(p, offset=next(offsets)) for p in pieces
        )

    views = tuple(
        replace(v, axes=tuple(fill(axis) for axis in v.axes), fixed=fill(v.fixed))
        for v in origin.views
    )
    return replace(origin, views=views)
