# SPDX-License-Identifier: Apache-2.0
"""Rules of the operations in which a parameter meets an activation: products, lookups, names."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .interpret import Met, Use, Value, Walk, evaluate, plain
from .rearrange import ints, member
from .views import ACTIVATION, NOWHERE, Axes, Pieces, View, axes_of, contraction, derived, viewed


def added(walk: Walk, eqn: Any, ins: list[Value]) -> list[Value]:
    """A sum: a parameter of any rank may be a bias."""
    return plain(walk, eqn, ins, rank=max(v.origin.rank for v in ins))


def which(ins: Sequence[Value]) -> int | None:
    """The operand of a product that is a parameter, if exactly one of the first two is made of
    any.
    """
    made = [bool(v.origin.paths) for v in ins[:2]]
    return made.index(True) if sum(made) == 1 else None


def meet(walk: Walk, met: Met) -> list[Value]:
    """A view meets an activation. If that is a constant the result is remembered as made of the
    parameter: a rotated weight is no activation.
    """
    out = walk.meet(met)
    made = ACTIVATION if met.active or met.view is None else derived([viewed(met.view)], out.shape)
    return [Value(out, made)]


def matrix_use(
    view: View, op: str, dims: Sequence[tuple[int, int]], batch: Sequence[int]
) -> Use | None:
    """The use of a view whose dims `dims` (view, activation) are summed over and whose dims
    `batch` meet a member of a stack each; None if it is no product with matrices.
    """
    contracted = [w for w, _ in dims]
    activation_axes, weight_axes = contraction(view, contracted, [a for _, a in dims])
    free = [axis for i, axis in enumerate(view.axes) if i not in (*contracted, *batch)]
    rows = axes_of(free)
    spread = any(p.axis == NOWHERE for i in contracted for p in view.axes[i] if p.size > 1)
    if spread or set(rows) & set(weight_axes):
        return None
    chosen = axes_of([*(view.axes[i] for i in batch), view.fixed])
    stack = tuple(a for a in chosen if a not in rows and a not in weight_axes)
    return Use(view.path, op, activation_axes, weight_axes, stack)


def dot_general(walk: Walk, eqn: Any, ins: list[Value]) -> list[Value]:
    """A matrix product of one view and one activation is a use. A changed parameter in it is
    untracked.
    """
    at = which(ins)
    if at is None:
        return plain(walk, eqn, ins)
    views, along = ins[at].origin.views, ins[at].origin.along
    if not views or along is None:
        return _dot(walk, eqn, ins, at)
    if walk.acts.change is None:
        (out,) = evaluate(eqn, [v.data for v in ins])
        for w, x in _parts(eqn, ins, at):
            met = _met_in_dot(eqn, [w, x] if at == 0 else [x, w], at)
            if met is None:
                walk.escape([w], -1)
            else:
                walk.note(met, jax.eval_shape(met.apply, met.x, met.w))
        return [
            Value(
                out,
                ACTIVATION if ins[1 - at].origin.active else derived([ins[at].origin], out.shape),
            )
        ]
    outs = [_dot(walk, eqn, [w, x] if at == 0 else [x, w], at)[0] for w, x in _parts(eqn, ins, at)]
    return [Value(_joined(eqn, at, along, [v.data for v in outs]), outs[0].origin)]


def _dot(walk: Walk, eqn: Any, ins: list[Value], at: int) -> list[Value]:
    """The product of one view."""
    met = _met_in_dot(eqn, ins, at)
    return plain(walk, eqn, ins, rank=-1) if met is None else meet(walk, met)


def _met_in_dot(eqn: Any, ins: list[Value], at: int) -> Met | None:
    x, w = ins[1 - at], ins[at]
    view = w.origin.view
    contracted, batch = eqn.params["dimension_numbers"]
    if view is None or not _separate(view.axes, batch[at]):
        return None
    dims = list(zip(contracted[at], contracted[1 - at], strict=True))
    use = matrix_use(view, "dot", dims, batch[at])
    if use is None:
        return None

    def apply(x: Any, w: Any) -> Any:
        return evaluate(eqn, [w, x] if at == 0 else [x, w])[0]

    members = [
        (a, view.axes[b])
        for b, a in zip(batch[at], batch[1 - at], strict=True)
        if any(p.axis in use.stack_axes for p in view.axes[b])
    ]
    summed = _summed(view, dims, use)
    met = Met(use, x.data, w.data, apply, x.origin.active, view, tuple(members), summed=summed)
    return met._replace(first=at == 0, stored=w.stored)


def _summed(view: View, dims: Sequence[tuple[int, int]], use: Use) -> tuple[Pieces, ...]:
    """The pieces of the view that are summed over, as `use.activation_axes` are."""
    by_axis = {a: view.axes[w] for w, a in dims}
    return tuple(by_axis[a] for a in use.activation_axes)


def _separate(axes: Axes, batch: Sequence[int]) -> bool:
    """Whether no batch dimension is merged from what broadcasting made and from parts of axes."""
    return all(len({p.axis == NOWHERE for p in axes[b] if p.size > 1}) <= 1 for b in batch)


def _parts(eqn: Any, ins: list[Value], at: int) -> list[tuple[Value, Value]]:
    """Views that lie side by side, each with the part of the activation it meets."""
    w, x = ins[at], ins[1 - at]
    along = w.origin.along or 0
    contracted, batch = eqn.params["dimension_numbers"]
    met = dict(
        zip((*contracted[at], *batch[at]), (*contracted[1 - at], *batch[1 - at]), strict=True)
    )
    parts, start = [], 0
    for view in w.origin.views:
        size = _width(view, along)
        own = lax.slice_in_dim(w.data, start, start + size, axis=along)
        data = x.data
        if along in met:
            data = lax.slice_in_dim(data, start, start + size, axis=met[along])
        parts.append((Value(own, viewed(view)), Value(data, x.origin)))
        start += size
    return parts


def _width(view: View, along: int) -> int:
    size = 1
    for piece in view.axes[along]:
        size *= piece.size
    return size


def _joined(eqn: Any, at: int, along: int, outs: list[Any]) -> Any:
    """The products of parts as the product of the whole."""
    contracted, batch = eqn.params["dimension_numbers"]
    if along in contracted[at]:
        return sum(outs[1:], outs[0])
    if along in batch[at]:
        return jnp.concatenate(outs, axis=tuple(batch[at]).index(along))
    ranks = [len(atom.aval.shape) for atom in eqn.invars]
    free = [i for i in range(ranks[at]) if i not in (*contracted[at], *batch[at])]
    before = len(batch[at])
    if at == 1:
        before += ranks[0] - len(contracted[0]) - len(batch[0])
    return jnp.concatenate(outs, axis=before + free.index(along))


def ragged_dot(walk: Walk, eqn: Any, ins: list[Value]) -> list[Value]:
    """Rows of an activation that lie in groups, each with its own matrix of a stack, is a use.

    Not those in which the summed axis lies in groups, and not those with further batch dimensions
    or an offset of the groups.
    """
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    (cx, cw), (bx, bw) = numbers.dot_dimension_numbers
    view = ins[1].origin.view
    ragged, groups = tuple(numbers.lhs_ragged_dimensions), tuple(numbers.rhs_group_dimensions)
    plainly = len(ins) == 3 and len(groups) == 1 and not bx and ragged[0] not in cx
    if which(ins) != 1 or view is None or not plainly:
        return (
            plain(walk, eqn, ins, rank=-1)
            if any(v.origin.paths for v in ins)
            else plain(walk, eqn, ins)
        )
    dims = list(zip(cw, cx, strict=True))
    use = matrix_use(view, "ragged_dot", dims, groups)
    single = [p for p in view.axes[groups[0]] if p.size > 1]
    if use is None or len(single) > 1 or any(p.axis not in use.stack_axes for p in single):
        return plain(walk, eqn, ins, rank=-1)
    x, w, sizes = ins

    def apply(x: Any, w: Any) -> Any:
        return evaluate(eqn, [x, w, sizes.data])[0]

    batch = ((ragged[0], view.axes[groups[0]]),)
    return meet(
        walk,
        Met(
            use=use,
            x=x.data,
            w=w.data,
            apply=apply,
            active=x.origin.active,
            view=view,
            batch=batch,
            groups=sizes.data,
            ragged=ragged[0],
            summed=_summed(view, dims, use),
            stored=w.stored,
        ),
    )


def convolution(walk: Walk, eqn: Any, ins: list[Value]) -> list[Value]:
    """A convolution of an activation with a kernel is a use: all axes of the kernel but that of the
    output are summed over.
    """
    x, w = ins
    if which(ins) != 1 or w.origin.view is None or eqn.params["batch_group_count"] != 1:
        return (
            plain(walk, eqn, ins, rank=-1)
            if any(v.origin.paths for v in ins)
            else plain(walk, eqn, ins)
        )
    numbers, view = eqn.params["dimension_numbers"], w.origin.view
    out, *summed = numbers.rhs_spec
    features = numbers.lhs_spec[1]
    use = matrix_use(view, "conv", [(i, features) for i in summed], ())
    if use is None:
        return plain(walk, eqn, ins, rank=-1)
    use = Use(use.path, use.op, (features,), use.weight_axes, use.stack_axes)

    def apply(x: Any, w: Any) -> Any:
        return evaluate(eqn, [x, w])[0]

    return meet(walk, Met(use, x.data, w.data, apply, x.origin.active, view))


def gather(walk: Walk, eqn: Any, ins: list[Value]) -> list[Value]:
    """A lookup of whole rows (or columns) of a matrix is a use; that of one member of a stack is a
    view. Any other gather of a parameter is a change.
    """
    table, indices = ins[0], ins[1]
    numbers, view = eqn.params["dimension_numbers"], table.origin.view
    looked_up, sizes = ints(numbers.start_index_map), eqn.params["slice_sizes"]
    if view is None or indices.origin.paths or len(looked_up) != 1:
        return plain(walk, eqn, ins)
    (i,), shape = looked_up, eqn.invars[0].aval.shape
    others = [n for j, n in enumerate(shape) if j != i]
    if sizes[i] != 1 or [n for j, n in enumerate(sizes) if j != i] != others:
        return plain(walk, eqn, ins)
    if view.rank == 2:
        return _lookup(walk, eqn, ins, view, i)
    if eqn.invars[1].aval.shape != (1,) or ints(numbers.collapsed_slice_dims) != (i,):
        return plain(walk, eqn, ins)
    return _chosen(eqn, ins, view, i)


def _lookup(walk: Walk, eqn: Any, ins: list[Value], view: View, i: int) -> list[Value]:
    table, indices = ins
    use = Use(view.path, "gather", (), axes_of([view.axes[i]]), _stack_of(view))

    def apply(x: Any, w: Any) -> Any:
        return evaluate(eqn, [w, x])[0]

    return meet(walk, Met(use, indices.data, table.data, apply, indices.origin.active, view))


def _stack_of(view: View) -> tuple[int, ...]:
    return tuple(a for a in axes_of([view.fixed]) if a not in axes_of(view.axes))


def _chosen(eqn: Any, ins: list[Value], view: View, i: int) -> list[Value]:
    """One member of a stack, whose number the program finds out."""
    (out,) = evaluate(eqn, [v.data for v in ins])
    chosen = member(view, i, ins[1].data[0])
    return [Value(out, viewed(chosen) if chosen else derived([ins[0].origin], out.shape))]


def name(walk: Walk, eqn: Any, ins: list[Value]) -> list[Value]:
    """A value the function gave a name is met under that name, unless it is made of parameters."""
    x, origin = ins[0].data, ins[0].origin
    if origin.paths:
        return [Value(evaluate(eqn, [x])[0], origin)]
    use = Use(eqn.params["name"], "name")
    out = walk.meet(Met(use, x, None, lambda x, _: evaluate(eqn, [x])[0], origin.active))
    return [Value(out, origin)]
