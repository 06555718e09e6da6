# SPDX-License-Identifier: Apache-2.0
"""Operations that only rearrange: what they do to views, and to parameters that are stored.

`VIEWS`: primitive name -> (view, equation, further operands) -> the view after it, or None where it
is none any more. `STORED`: the same for QTensors, None where the result has to be decoded.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jqx.tensors import QTensor

from .views import (
    Origin,
    View,
    broadcast,
    derived,
    reshaped,
    side_by_side,
    sliced,
    squeezed,
    transposed,
    viewed,
)

Operands = Sequence[Any]


def ints(axes: Iterable[Any]) -> tuple[int, ...]:
    """Axes as `int`: rules of `vmap` leave NumPy integers among them."""
    return tuple(int(axis) for axis in axes)


def _slice(view: View, eqn: Any, _: Operands) -> View | None:
    starts, stops = eqn.params["start_indices"], eqn.params["limit_indices"]
    steps = eqn.params["strides"] or (1,) * len(starts)
    return sliced(view, starts, eqn.outvars[0].aval.shape, steps) if stops else view


def _dynamic_slice(view: View, eqn: Any, starts: Operands) -> View | None:
    sizes, steps = eqn.params["slice_sizes"], (1,) * len(starts)
    clamped = [_clamped(s, eqn, i) for i, s in enumerate(starts)]
    return sliced(view, clamped, sizes, steps)


def _clamped(start: Any, eqn: Any, axis: int) -> Any:
    """Where a dynamic slice begins: it never leaves the array."""
    room = eqn.invars[0].aval.shape[axis] - eqn.params["slice_sizes"][axis]
    if not isinstance(start, jax.Array):  # written down in the function
        return min(max(int(start), 0), room)
    return jnp.clip(jnp.asarray(start).astype(jnp.int32), 0, room) if room else 0


VIEWS: Mapping[str, Callable[[View, Any, Operands], View | None]] = {
    "transpose": lambda view, eqn, _: transposed(view, ints(eqn.params["permutation"])),
    "squeeze": lambda view, eqn, _: squeezed(view, ints(eqn.params["dimensions"])),
    "expand_dims": lambda view, eqn, _: reshaped(view, eqn.outvars[0].aval.shape),
    "reshape": lambda view, eqn, _: reshaped(view, eqn.outvars[0].aval.shape),
    "broadcast_in_dim": lambda view, eqn, _: broadcast(
        view, eqn.outvars[0].aval.shape, ints(eqn.params["broadcast_dimensions"])
    ),
    "slice": _slice,
    "dynamic_slice": _dynamic_slice,
}


def arranged(origin: Origin, eqn: Any, others: Operands) -> Origin:
    """The origin of a rearranged parameter, or of several that lie side by side."""
    name, along = eqn.primitive.name, origin.along
    if along is None or not origin.views:
        view = VIEWS[name](origin.view, eqn, others) if origin.view else None
        return viewed(view) if view else derived([origin], eqn.outvars[0].aval.shape)
    if name == "transpose":
        permutation = ints(eqn.params["permutation"])
        views = [transposed(view, permutation) for view in origin.views]
        return side_by_side(views, permutation.index(along))
    return derived([origin], eqn.outvars[0].aval.shape)


def member(view: View, axis: int, index: Any) -> View | None:
    """The view of one member along `axis`, whose number (an array) never leaves the view."""
    sizes = [_size(view, i) for i in range(len(view.axes))]
    clamped = jnp.clip(jnp.asarray(index).astype(jnp.int32), 0, sizes[axis] - 1)
    starts = [clamped if i == axis else 0 for i in range(len(sizes))]
    wanted = [1 if i == axis else n for i, n in enumerate(sizes)]
    one = sliced(view, starts, wanted, [1] * len(sizes))
    return squeezed(one, [axis]) if one else None


def concatenated(origins: Sequence[Origin], along: int) -> Origin | None:
    """The origin of views put side by side; None if one of them is no view."""
    views = [origin.view for origin in origins]
    return side_by_side([v for v in views if v], along) if all(views) else None


def stacked(origins: Sequence[Origin], along: int) -> Origin | None:
    """The origin of views that `lax.stack` puts side by side along a new axis; None if one of them
    is no view.
    """

    def widened(view: View) -> View | None:
        sizes = [_size(view, i) for i in range(len(view.axes))]
        return reshaped(view, (*sizes[:along], 1, *sizes[along:]))

    views = [widened(origin.view) if origin.view else None for origin in origins]
    return side_by_side([v for v in views if v], along) if all(views) else None


def unstacked(view: View, along: int) -> list[View | None]:
    """The views that `lax.unstack` makes of one."""
    parts = split(view, [1] * _size(view, along), along)
    return [squeezed(part, [along]) if part else None for part in parts]


def split(view: View, sizes: Sequence[int], along: int) -> list[View | None]:
    """The views that `lax.split` makes of one."""
    parts, start = [], 0
    whole = [_size(view, i) for i in range(len(view.axes))]
    for size in sizes:
        starts = [start if i == along else 0 for i in range(len(whole))]
        wanted = [size if i == along else n for i, n in enumerate(whole)]
        parts.append(sliced(view, starts, wanted, [1] * len(whole)))
        start += size
    return parts


def _size(view: View, dim: int) -> int:
    size = 1
    for piece in view.axes[dim]:
        size *= piece.size
    return size


def _stored_slice(q: QTensor, eqn: Any, _: Operands) -> QTensor | None:
    if eqn.params["strides"] is not None and any(s != 1 for s in eqn.params["strides"]):
        return None
    return _part(q, eqn.params["start_indices"], eqn.outvars[0].aval.shape)


def _part(q: QTensor, starts: Operands, sizes: Sequence[int]) -> QTensor | None:
    cut = [i for i, size in enumerate(sizes) if size != q.shape[i]]
    for i in cut:
        part = q.part(i, starts[i], sizes[i])
        if part is None:
            return None
        q = part
    return q


def _stored_squeeze(q: QTensor, eqn: Any, _: Operands) -> QTensor | None:
    for axis in sorted(eqn.params["dimensions"], reverse=True):
        member = q.member(axis, 0)
        if member is None:
            return None
        q = member
    return q


STORED: Mapping[str, Callable[[QTensor, Any, Operands], QTensor | None]] = {
    "transpose": lambda q, eqn, _: q.transpose(eqn.params["permutation"]),
    "squeeze": _stored_squeeze,
    "slice": _stored_slice,
    "dynamic_slice": lambda q, eqn, starts: _part(q, starts, eqn.params["slice_sizes"]),
}
