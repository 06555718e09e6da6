# SPDX-License-Identifier: Apache-2.0
"""What was collected at the uses of one path, and how it is put together over a function.

An entry begins with one axis for every axis of the parameter along which members are used one at a
time (a stack of layers or experts). A member that is known by its number (indexed, in a loop) is
put in its place, beside neutral numbers. Those that a scan takes apart are stacked when it ends.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jqx.errors import InputError

NAMED = -1  # stands for the axis of a parameter where there is none: activations that have a name

Merge = Callable[[Any, Any], Any]


@partial(jax.tree_util.register_dataclass, data_fields=["what"], meta_fields=["axes", "open"])
@dataclass(frozen=True)
class Entry:
    """`what` is a pytree of arrays whose leading axes are the parameter's `axes`. `open` are axes
    still to come: the depth of the scan that will stack them, and which they are.
    """

    what: Any
    axes: tuple[int, ...] = ()
    open: tuple[tuple[int, int], ...] = ()


def merged(merge: Merge, path: str, a: Entry, b: Entry) -> Entry:
    """Two entries of one path as one. Raises InputError if they are not alike."""
    shapes = [(e.axes, e.open, jax.tree.map(np.shape, e.what)) for e in (a, b)]
    if shapes[0] != shapes[1]:
        raise InputError(
            f"{path} is used in ways whose statistics differ: {shapes[0][2]} and {shapes[1][2]}, "
            f"a number for every member of the axes {_stack(a)} and {_stack(b)}. Collect for one "
            "`use.op` only and return None for the others."
        )
    return Entry(merge(a.what, b.what), a.axes, a.open)


def _stack(entry: Entry) -> tuple[int, ...]:
    return tuple(sorted(axis for axis in (*entry.axes, *(a for _, a in entry.open)) if axis >= 0))


def scanned(entry: Entry, depth: int, merge: Merge) -> Entry:
    """What the scan at `depth` has collected, `entry` with a leading axis for its iterations."""
    axis = dict(entry.open).get(depth)
    if axis is not None:
        return Entry(entry.what, (axis, *entry.axes), tuple(o for o in entry.open if o[0] != depth))
    first = jax.tree.map(lambda x: x[0], entry.what)
    rest = jax.tree.map(lambda x: x[1:], entry.what)
    step = lambda a, b: (merge(a, b), None)  # noqa: E731
    return Entry(lax.scan(step, first, rest)[0], entry.axes, entry.open)


def nothing(entry: Entry, neutral: float | int) -> Entry:
    """An entry like this one (arrays or their shapes) of neutral numbers."""
    fill = lambda x: vary(jnp.full(x.shape, neutral, x.dtype), varying(x))  # noqa: E731
    return jax.tree.map(fill, entry)


def ordered(entry: Entry) -> Any:
    """`what`, its leading axes in the order in which the parameter has them."""
    axes, count = entry.axes, len(entry.axes)
    order = sorted(range(count), key=lambda i: axes[i])
    if order == list(range(count)):
        return entry.what
    turn = lambda x: jnp.transpose(x, (*order, *range(count, x.ndim)))  # noqa: E731
    return jax.tree.map(turn, entry.what)


def across(entry: Entry, names: Sequence[str], acts: Any, checked: bool) -> Entry:
    """`entry` merged over the devices along the mesh axes `names`, the same on all of them.

    `acts` has `merge` and `neutral`. `checked`: whether types say along which of them a value
    differs; where it does not, it counts once.
    """
    what = entry.what
    for name in names:
        size = lax.axis_size(name)
        spread = partial(_everywhere, name=name, neutral=acts.neutral, checked=checked)
        every = jax.tree.map(spread, what)
        what = jax.tree.map(lambda x: x[0], every)
        for i in range(1, size):
            what = acts.merge(what, jax.tree.map(lambda x, i=i: x[i], every))
    return Entry(what, entry.axes, entry.open)


def _everywhere(x: Any, name: str, neutral: float | int, checked: bool) -> Any:
    """[devices, ...]: `x` of every device along a mesh axis, the same on all of them."""
    size = lax.axis_size(name)
    if checked and name not in varying(x):
        return jnp.concatenate([x[None], jnp.full((size - 1, *x.shape), neutral, x.dtype)])
    here = jnp.arange(size) == lax.axis_index(name)
    own = here.reshape(-1, *([1] * x.ndim))
    # a sum with zeros is exact, and known to be the same everywhere
    return lax.psum(jnp.where(own, x[None], jnp.zeros_like(x)[None]), name)


def varying(x: Any) -> frozenset[str]:
    """The mesh axes along which `x`, inside a shard_map, is known to differ."""
    aval = x if isinstance(x, jax.ShapeDtypeStruct) else jax.typeof(x)
    kind = getattr(aval, "manual_axis_type", None)
    return frozenset(getattr(kind if kind is not None else aval, "varying", ()) or ())


def vary(x: Any, names: frozenset[str]) -> Any:
    """`x`, typed as differing along these mesh axes."""
    more = tuple(names - varying(x))
    return lax.pcast(x, more, to="varying") if more else x


def everywhere(x: Any) -> Any:
    """`x`, the same on every device of a mesh with explicit axes."""
    return _resharded(x, jax.typeof(x).sharding.mesh)


def beside(x: Any, what: Any) -> Any:
    """`what`, its first axis on a mesh with explicit axes as that of `x` is."""
    sharding = jax.typeof(x).sharding
    return _resharded(what, sharding.mesh, *sharding.spec[:1])


def explicit(x: Any) -> bool:
    """Whether `x` lies on a mesh with explicit axes."""
    return AxisType.Explicit in (jax.typeof(x).sharding.mesh.axis_types or ())


def _resharded(x: Any, mesh: Any, *spec: Any) -> Any:
    if AxisType.Explicit not in (mesh.axis_types or ()):
        return x
    return jax.sharding.reshard(x, NamedSharding(mesh, PartitionSpec(*spec)))
