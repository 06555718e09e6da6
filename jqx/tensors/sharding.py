# SPDX-License-Identifier: Apache-2.0
"""Where codes and scales lie on a mesh if the array they stand for is to lie on it in a given way.

Of several axes that are folded into one, the first may be cut: its pieces are contiguous. An axis
of codes is cut if whole bytes, and that of scales if whole blocks fall into every shard.
"""

import math
from typing import NamedTuple

from jax.sharding import NamedSharding, PartitionSpec

from jqx.errors import InputError

from .layout import Axes, Places

Names = str | tuple[str, ...] | None  # the axes of the mesh that cut one axis of an array


class Cuts(NamedTuple):
    """What cuts the axes of matrices [*lead, n, k]."""

    lead: tuple[Names, ...]
    rows: Names
    columns: Names


def cuts_of(sharding: NamedSharding, places: Places, shape: Axes, codes: Axes) -> Cuts:
    """What cuts the matrices of an array of `shape`, with axes at `places`, that is sharded so and
    whose codes have the shape `codes`.

    Raises InputError if the sharding has more axes than the array.
    """
    spec = sharding.spec
    if len(spec) > len(shape):
        raise InputError(
            f"{spec} tells of {len(spec)} axes and the array {shape} has {len(shape)}: "
            "take the sharding of the array that the codes stand for."
        )
    names = (*spec, *(None for _ in shape[len(spec) :]))

    def cut(axis: int, stored: int) -> Names:
        parts = shards(sharding, names[axis])
        return None if shape[axis] % parts or stored % parts else names[axis]

    *lead, rows, columns = codes
    stack = tuple(cut(axis, size) for axis, size in zip(places.stack, lead, strict=True))
    return Cuts(stack, cut(places.rows[0], rows), cut(places.columns[0], columns))


def shards(sharding: NamedSharding, names: Names) -> int:
    """Into how many pieces these axes of the mesh cut something."""
    axes = (names,) if isinstance(names, str) else names or ()
    return math.prod(sharding.mesh.shape[axis] for axis in axes)


def blocks_cut(
    sharding: NamedSharding, cuts: Cuts, size: Axes, block: tuple[int | None, int | None]
) -> tuple[Names, Names]:
    """What cuts the scales of matrices of `size` [n, k], of which each serves a `block`; None is
    the whole axis.
    """
    rows, columns = (
        names if unit and whole % (unit * shards(sharding, names)) == 0 else None
        for names, whole, unit in zip((cuts.rows, cuts.columns), size, block, strict=True)
    )
    return rows, columns


def placed(sharding: NamedSharding, *names: Names) -> NamedSharding:
    """The sharding on the same mesh and in the same memory of an array whose axes are cut so."""
    return NamedSharding(sharding.mesh, PartitionSpec(*names), memory_kind=sharding.memory_kind)
