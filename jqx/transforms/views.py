# SPDX-License-Identifier: Apache-2.0
"""Where a value comes from, and how its axes lie in the parameter it is a view of.

An axis of a view is a row-major tuple of pieces; a piece is a whole axis of the parameter, or what
a reshape split off one. So transposes, reshapes and broadcasts are bookkeeping on tuples, and a
contraction of the view says which axes of the parameter, in the parameter's own orientation, are
summed over.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from math import prod

NOWHERE = -1  # the axis of a piece that broadcasting made


@dataclass(frozen=True, slots=True)
class Piece:
    """`size` steps of `stride` along one axis of a parameter."""

    axis: int
    size: int
    stride: int = 1


Axes = tuple[tuple[Piece, ...], ...]


@dataclass(frozen=True, slots=True)
class Origin:
    """What a value is made of.

    An activation depends on the inputs (`active`, no paths). A view is one parameter with its axes
    rearranged (`axes`). A value with paths but no axes was computed from those parameters alone;
    one with neither is a constant. `rank` is the number of axes longer than one that parameters
    gave it: 1 for a bias, however it is broadcast.
    """

    paths: frozenset[str] = frozenset()
    axes: Axes | None = None
    rank: int = 0
    active: bool = False

    @property
    def path(self) -> str:
        """The parameter a view shows."""
        (path,) = self.paths
        return path


ACTIVATION = Origin(active=True)
CONSTANT = Origin()


def parameter(path: str, shape: Sequence[int]) -> Origin:
    """A parameter as it lies in the tree."""
    return view(path, tuple((Piece(i, n),) for i, n in enumerate(shape)))


def view(path: str, axes: Axes) -> Origin:
    """The parameter at `path` seen through `axes`."""
    rank = sum(any(p.axis != NOWHERE and p.size > 1 for p in axis) for axis in axes)
    return Origin(frozenset({path}), axes, rank)


def derived(origins: Iterable[Origin], shape: Sequence[int]) -> Origin:
    """The origin of something of this shape computed from values none of which is an activation."""
    origins = list(origins)
    rank = min(max((o.rank for o in origins), default=0), sum(n > 1 for n in shape))
    return Origin(frozenset().union(*(o.paths for o in origins)), rank=rank)


def transposed(axes: Axes, permutation: Sequence[int]) -> Axes:
    """The axes after `lax.transpose`."""
    return tuple(axes[i] for i in permutation)


def squeezed(axes: Axes, dimensions: Sequence[int]) -> Axes:
    """The axes without those at `dimensions`."""
    return tuple(axis for i, axis in enumerate(axes) if i not in dimensions)


def broadcast(axes: Axes, shape: Sequence[int], dimensions: Sequence[int]) -> Axes:
    """The axes after `lax.broadcast_in_dim` to `shape`, old axis i becoming `dimensions[i]`."""
    old = dict(zip(dimensions, axes, strict=True))
    return tuple(
        old[i] if i in old and prod(p.size for p in old[i]) == n else (Piece(NOWHERE, n),)
        for i, n in enumerate(shape)
    )


def reshaped(axes: Axes, shape: Sequence[int]) -> Axes | None:
    """The axes after a row-major reshape to `shape`; None where a new axis would hold parts of old
    ones that are no box.
    """
    pieces = [piece for axis in axes for piece in axis if piece.size > 1][::-1]
    new = []
    for size in shape:
        taken = []
        while size > 1:
            if not pieces:
                return None
            piece = pieces.pop()
            if size % piece.size == 0:
                taken.append(piece)
                size //= piece.size
            elif piece.size % size == 0:
                rest = piece.size // size
                taken.append(Piece(piece.axis, size, piece.stride * rest))
                pieces.append(replace(piece, size=rest))
                size = 1
            else:
                return None
        new.append(tuple(taken))
    return tuple(new)


def contraction(
    axes: Axes, weight_dims: Sequence[int], activation_dims: Sequence[int]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Axes summed over when dimension `weight_dims[i]` of a view meets `activation_dims[i]` of an
    activation.

    Returns the axes of the activation, in the order of the parameter's channels, and the axes of
    the parameter.
    """
    met = [(axes[w], a) for w, a in zip(weight_dims, activation_dims, strict=True)]
    met.sort(key=lambda pair: [(p.axis, -p.stride) for p in pair[0]])
    weight_axes = {p.axis for pieces, _ in met for p in pieces} - {NOWHERE}
    return tuple(a for _, a in met), tuple(sorted(weight_axes))
