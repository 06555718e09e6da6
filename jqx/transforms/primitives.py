# SPDX-License-Identifier: Apache-2.0
"""What each JAX primitive does to a parameter that goes into it: `PRIMITIVES`, primitive name ->
rule.

A rule gets the walk, the equation and its operands, evaluates it, and says where the results come
from. Whatever is not in the table follows `interpret.plain`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax

from jqx.tensors import QTensor

from .decoding import dense
from .interpret import Met, Rule, Use, Value, Walk, evaluate, names_inside, plain
from .views import (
    ACTIVATION,
    CONSTANT,
    Axes,
    Origin,
    broadcast,
    contraction,
    derived,
    reshaped,
    squeezed,
    transposed,
    view,
)


def rearranged(axes_after: Callable[[Axes, Any, Any], Axes | None]) -> Rule:
    """A rule for an operation that only rearranges: `axes_after(axes, eqn, result)` are those of a
    view after it.
    """

    def rule(walk: Walk, eqn: Any, ins: list[Value]) -> list[Value]:
        old = ins[0].origin
        if old.axes is None:
            return plain(walk, eqn, ins)
        (out,) = evaluate(eqn, [v.data for v in ins])
        axes = axes_after(old.axes, eqn, out)
        new = derived([old], out.shape) if axes is None else view(old.path, axes)
        return [Value(out, new)]

    return rule


def unchanged(walk: Walk, eqn: Any, ins: list[Value]) -> list[Value]:
    """Result i is operand i, cast, copied, moved or fenced."""
    outs = evaluate(eqn, [v.data for v in ins])
    return [Value(x, v.origin) for x, v in zip(outs, ins, strict=True)]


def added(walk: Walk, eqn: Any, ins: list[Value]) -> list[Value]:
    """A sum: a parameter of any rank may be a bias."""
    return plain(walk, eqn, ins, rank=max(v.origin.rank for v in ins))


def met(walk: Walk, eqn: Any, ins: list[Value], use: Use, at: int) -> list[Value]:
    """Operand `at` is a view that meets the other operand, an activation.

    If that is a constant the result is remembered as made of the parameter: a rotated weight is no
    activation.
    """
    x, w = ins[1 - at], ins[at]

    def apply(x: Any, w: Any) -> Any:
        return evaluate(eqn, [w, x] if at == 0 else [x, w])[0]

    stored = walk.stored.get(use.path)
    out = walk.meet(Met(use, x.data, w.data, apply, x.origin.active, stored))
    made = ACTIVATION if x.origin.active else derived([w.origin], out.shape)
    return [Value(out, made)]


def dot_general(walk: Walk, eqn: Any, ins: list[Value]) -> list[Value]:
    """A matrix product of one view and one activation is a use. A changed parameter in it is
    untracked.
    """
    if all(v.origin.paths for v in ins) or not any(v.origin.paths for v in ins):
        return plain(walk, eqn, ins)
    at = 0 if ins[0].origin.paths else 1
    origin = ins[at].origin
    if origin.axes is None:
        return plain(walk, eqn, ins, rank=-1)
    contracted, _ = eqn.params["dimension_numbers"]
    axes = contraction(origin.axes, contracted[at], contracted[1 - at])
    return met(walk, eqn, ins, Use(origin.path, "dot", *axes), at)


def gather(walk: Walk, eqn: Any, ins: list[Value]) -> list[Value]:
    """A lookup of whole rows (or columns) of a matrix is a use. Any other gather of a parameter is
    a change.
    """
    table, indices = ins[0], ins[1]
    looked_up = eqn.params["dimension_numbers"].start_index_map
    axes, sizes = table.origin.axes, eqn.params["slice_sizes"]
    if axes is None or indices.origin.paths or len(axes) != 2 or len(looked_up) != 1:
        return plain(walk, eqn, ins)
    (i,) = looked_up
    if sizes[i] != 1 or sizes[1 - i] != table.data.shape[1 - i]:
        return plain(walk, eqn, ins)
    _, weight_axes = contraction(axes, [i], [0])
    return met(walk, eqn, ins, Use(table.origin.path, "gather", (), weight_axes), 0)


def name(walk: Walk, eqn: Any, ins: list[Value]) -> list[Value]:
    """A value the function gave a name is met under that name, unless it is made of parameters."""
    if ins[0].origin.paths:
        return unchanged(walk, eqn, ins)
    use = Use(eqn.params["name"], "name")
    x, origin = ins[0]
    out = walk.meet(Met(use, x, None, lambda x, _: evaluate(eqn, [x])[0], origin.active, None))
    return [Value(out, origin)]


def construct(rule: Rule, takes_stored: bool = False) -> Rule:
    """A rule for an operation with a jaxpr inside: evaluated as it is when there is nothing in it
    to act on. `takes_stored`: QTensors go in as they are and are worth going in for.
    """

    def guarded(walk: Walk, eqn: Any, ins: list[Value]) -> list[Value]:
        stored = takes_stored and any(isinstance(v.data, QTensor) for v in ins)
        if stored or any(v.origin.paths for v in ins) or names_inside(eqn):
            return rule(walk, eqn, ins)
        return plain(walk, eqn, ins)

    return guarded


def inlined(key: str) -> Rule:
    """A construct whose jaxpr, `eqn.params[key]`, is evaluated in place."""

    def rule(walk: Walk, eqn: Any, ins: list[Value]) -> list[Value]:
        jaxpr, consts = opened(eqn.params[key])
        return walk.run(jaxpr, consts, ins)

    return rule


def reissued(wrap: Callable[[Any], Callable[[Callable], Callable]]) -> Rule:
    """A construct that stays one: `wrap(eqn)` is the transform that makes it from a function.

    So a nested jit is compiled as before, and its results are what they were. Its sharding
    annotations are dropped.
    """

    def rule(walk: Walk, eqn: Any, ins: list[Value]) -> list[Value]:
        jaxpr, consts = opened(eqn.params["jaxpr"])
        origins: list[Origin] = []

        def inside(*data: Any) -> Any:
            level = walk.inner()
            args = [Value(x, v.origin) for x, v in zip(data, ins, strict=True)]
            outs = level.run(jaxpr, consts, args)
            origins[:] = [v.origin for v in outs]
            return [v.data for v in outs], level.found

        outs, found = wrap(eqn)(inside)(*(v.data for v in ins))
        for path, what in found.items():
            walk.collect(path, what)
        return [Value(x, o) for x, o in zip(outs, origins, strict=True)]

    return rule


def scan(walk: Walk, eqn: Any, ins: list[Value]) -> list[Value]:
    """A scan: parameters may be constants of the body or be taken apart along their leading axis,
    not be carried.

    What is collected for a parameter that is taken apart is stacked along a new leading axis, one
    entry an iteration, and so are named activations of such a scan; for a constant of the body it
    is merged over the iterations.
    """
    active = any(v.origin.active for v in ins)
    if not active:
        return plain(walk, eqn, ins)
    consts, carry, xs = split_scan(eqn.params, ins)
    walk.escape(carry, -1)
    jaxpr, closed = opened(eqn.params["jaxpr"])
    origins: list[Origin] = []
    sliced = frozenset().union(*(v.origin.paths for v in xs))
    shared = frozenset().union(*(v.origin.paths for v in consts))

    def body(c: Any, x: Any) -> Any:
        level = replace(walk.inner(), stored=_members(walk.stored, xs, x, shared))
        args = [*consts, *(Value(d, ACTIVATION) for d in c)]
        args += [Value(d, _slice(v.origin)) for d, v in zip(x, xs, strict=True)]
        outs = level.run(jaxpr, closed, args)
        origins[:] = [v.origin for v in outs]
        data = [dense(v.data) for v in outs]
        return data[: len(c)], (data[len(c) :], level.found)

    settings = {key: eqn.params[key] for key in ("length", "reverse", "unroll")}
    start = [dense(v.data) for v in carry], [_to_slice(v.data) for v in xs]
    last, (ys, found) = jax.lax.scan(body, *start, **settings)
    for path, what in found.items():
        stacked = sliced and path not in shared - sliced
        walk.collect(path, what if stacked else _folded(walk, what))
    made = [_unstacked(o) for o in origins[len(carry) :]]
    return [*(Value(x, ACTIVATION) for x in last), *map(Value, ys, made)]


def split_scan(
    params: dict[str, Any], ins: list[Value]
) -> tuple[list[Value], list[Value], list[Value]]:
    """Operands of a scan: constants of its body, carry, and what it takes apart."""
    if "num_consts" in params:
        n_consts, n_carry = params["num_consts"], params["num_carry"]
    else:  # JAX 0.11 and newer
        n_consts, n_carry = (len(part) for part in params["ft_in"].elts[:2])
    n = n_consts + n_carry
    return ins[:n_consts], ins[n_consts:n], ins[n:]


def opened(jaxpr: Any) -> tuple[Any, list[Value]]:
    """A jaxpr and its constants, whether it is closed, open, or (JAX 0.11 and newer) both in one
    class.
    """
    consts = [Value(c, CONSTANT) for c in getattr(jaxpr, "consts", ())]
    return getattr(jaxpr, "jaxpr", jaxpr), consts


def _to_slice(data: Any) -> Any:
    """What a scan takes apart: a stack of stored matrices as it is, if its members are such."""
    if isinstance(data, QTensor) and data.ndim > 2 and data.axis >= -2:
        return data
    return dense(data)


def _members(
    stored: Mapping[str, QTensor], xs: list[Value], slices: Sequence[Any], shared: frozenset[str]
) -> dict[str, QTensor]:
    """What is stored as the body of a scan over `xs` sees it. A path of which it sees more than one
    member is left out, and so is one whose slices are no members.
    """
    sliced = frozenset().union(*(v.origin.paths for v in xs))
    members = {
        v.origin.path: x
        for v, x in zip(xs, slices, strict=True)
        if v.origin.axes is not None and isinstance(x, QTensor) and v.origin.path not in shared
    }
    return {path: q for path, q in stored.items() if path not in sliced} | members


def _slice(origin: Origin) -> Origin:
    if origin.axes is not None:
        return view(origin.path, origin.axes[1:])
    return origin


def _unstacked(origin: Origin) -> Origin:
    """The origin of the stacked results of which `origin` is one."""
    return Origin(origin.paths, rank=origin.rank + 1) if origin.paths else ACTIVATION


def _folded(walk: Walk, what: Any) -> Any:
    first = jax.tree.map(lambda x: x[0], what)
    rest = jax.tree.map(lambda x: x[1:], what)
    return jax.lax.scan(lambda a, b: (jax.tree.map(walk.merge, a, b), None), first, rest)[0]


def _jit(eqn: Any) -> Callable[[Callable], Callable]:
    return jax.jit


def _checkpoint(eqn: Any) -> Callable[[Callable], Callable]:
    return partial(
        jax.checkpoint, prevent_cse=eqn.params["prevent_cse"], policy=eqn.params["policy"]
    )


def _table(*rows: tuple[Sequence[str], Rule]) -> dict[str, Rule]:
    return {name: rule for names, rule in rows for name in names}


PRIMITIVES: dict[str, Rule] = _table(
    (("dot_general",), dot_general),
    (("gather",), gather),
    (("name",), name),
    (("add", "sub", "add_any"), added),
    (("transpose",), rearranged(lambda a, e, _: transposed(a, e.params["permutation"]))),
    (("squeeze",), rearranged(lambda a, e, _: squeezed(a, e.params["dimensions"]))),
    (("reshape",), rearranged(lambda a, e, out: reshaped(a, out.shape))),
    (
        ("broadcast_in_dim",),
        rearranged(lambda a, e, out: broadcast(a, out.shape, e.params["broadcast_dimensions"])),
    ),
    (
        (
            "convert_element_type",
            "reduce_precision",
            "copy",
            "copy_p",
            "stop_gradient",
            "optimization_barrier",
            "device_put",
            "sharding_constraint",
            "pvary",
        ),
        unchanged,
    ),
    (("jit", "pjit"), construct(reissued(_jit), takes_stored=True)),
    (("remat", "remat2", "checkpoint"), construct(reissued(_checkpoint), takes_stored=True)),
    (
        ("closed_call", "core_call", "custom_jvp_call", "custom_vjp_call"),
        construct(inlined("call_jaxpr")),
    ),
    (("scan",), construct(scan, takes_stored=True)),
)
