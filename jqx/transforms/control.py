# SPDX-License-Identifier: Apache-2.0
"""Rules of operations with a jaxpr inside that stays one: jit, remat, functions with a gradient of
their own, branches, shard_map. Loops are in `loops`.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
from jax import lax
from jax.sharding import PartitionSpec

from jqx.errors import InputError
from jqx.tensors import QTensor

from .decoding import dense
from .entries import across, everywhere, nothing
from .interpret import Rule, Value, Walk, evaluate, names_inside, plain
from .views import ACTIVATION, CONSTANT, Origin, View, derived, viewed


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


def opened(jaxpr: Any) -> tuple[Any, list[Value]]:
    """A jaxpr and its constants, whether it is closed, open, or (JAX 0.11 and newer) both in one
    class.
    """
    consts = [Value(c, CONSTANT) for c in getattr(jaxpr, "consts", ())]
    return getattr(jaxpr, "jaxpr", jaxpr), consts


def keep_all(walk: Walk, found: dict[str, Any]) -> None:
    """Keep what was collected inside a construct."""
    for path, entry in found.items():
        walk.keep(path, entry)


def inlined(key: str) -> Rule:
    """A construct whose jaxpr, `eqn.params[key]`, is evaluated in place."""

    def rule(walk: Walk, eqn: Any, ins: list[Value]) -> list[Value]:
        jaxpr, consts = opened(eqn.params[key])
        return walk.run(jaxpr, consts, ins)

    return rule


def reissued(wrap: Callable[[Any], Callable[[Callable], Callable]]) -> Rule:
    """A construct that stays one: `wrap(eqn)` is the transform that makes it from a function.

    So a nested jit is compiled as before, and its results are what they were. Its sharding
    annotations and donations are dropped.
    """

    def rule(walk: Walk, eqn: Any, ins: list[Value]) -> list[Value]:
        jaxpr, consts = opened(eqn.params["jaxpr"])

        def inside(args: list[Value]) -> Any:
            level = walk.inner()
            return level.run(jaxpr, consts, args), level.found

        outs, found = wrap(eqn)(inside)(ins)
        keep_all(walk, found)
        return outs

    return rule


def jit(eqn: Any) -> Callable[[Callable], Callable]:
    """The transform of a nested jit."""
    return jax.jit


def checkpoint(eqn: Any) -> Callable[[Callable], Callable]:
    """The transform of a remat, with its policy."""
    return partial(
        jax.checkpoint, prevent_cse=eqn.params["prevent_cse"], policy=eqn.params["policy"]
    )


def with_own_gradient(key: str) -> Rule:
    """`custom_jvp` or `custom_vjp`: evaluated as it is, with its gradient, unless a parameter meets
    an activation inside in a way that is acted on. Then what is inside is evaluated, and has no
    gradient: that of the operations inside would be another one.
    """

    def rule(walk: Walk, eqn: Any, ins: list[Value]) -> list[Value]:
        jaxpr, consts = opened(eqn.params[key])
        dry = walk.dry()
        jax.eval_shape(lambda args: dry.run(jaxpr, consts, args), ins)
        acted = {u.path for u in dry.record.uses if u.op != "elementwise"}
        if not acted:
            walk.record.add(dry.record)
            outs = evaluate(eqn, [v.data for v in ins])
            active = any(v.origin.active for v in ins)
            return [
                Value(x, ACTIVATION if active else derived((v.origin for v in ins), x.shape))
                for x in outs
            ]

        def inside(args: list[Value]) -> Any:
            level = walk.inner()
            return level.run(jaxpr, consts, args), level.found

        # what is closed over may be differentiated, too: scales, probes
        converted, closed = jax.closure_convert(inside, ins)
        outs, found = without_gradient(converted, sorted(acted))(ins, *closed)
        keep_all(walk, found)
        return outs

    return rule


def without_gradient(f: Callable[..., Any], paths: Sequence[str]) -> Callable[..., Any]:
    """`f`; its derivative is an InputError that names `paths`."""
    guarded = jax.custom_jvp(f)

    @guarded.defjvp
    def _(primals: Any, tangents: Any) -> Any:
        raise InputError(
            f"{', '.join(paths)}: used inside a function with a gradient of its own (custom_jvp or "
            "custom_vjp), which would be lost. Leave the parameter out of what is quantized or "
            "probed, or multiply outside of that function."
        )

    return guarded


def cond(walk: Walk, eqn: Any, ins: list[Value]) -> list[Value]:
    """Branches: what is collected in those that are not taken is neutral."""
    index, *operands = ins
    if index.origin.paths:
        return plain(walk, eqn, ins)
    origins: list[list[Origin]] = []

    def branch(jaxpr: Any) -> Callable[[], Any]:
        inner, consts = opened(jaxpr)

        def run() -> Any:
            level = walk.inner()
            outs = level.run(inner, consts, operands)
            origins.append([v.origin for v in outs])
            return [dense(v.data) for v in outs], level.found

        return run

    branches = [branch(jaxpr) for jaxpr in eqn.params["branches"]]
    template: dict[str, Any] = {}
    if walk.acts.collect is not None:
        for run in branches:
            template.update(jax.eval_shape(run)[1])

    def complete(run: Callable[[], Any]) -> Callable[[], Any]:
        def completed() -> Any:
            outs, found = run()
            rest = {p: nothing(e, walk.acts.neutral) for p, e in template.items() if p not in found}
            return outs, {p: (found | rest)[p] for p in template}

        return completed

    outs, found = lax.switch(index.data, [complete(run) for run in branches])
    keep_all(walk, found)
    by_result = zip(*origins[: len(branches)], strict=True)
    return [_either(walk, list(os), x) for os, x in zip(by_result, outs, strict=True)]


def _either(walk: Walk, origins: list[Origin], x: Any) -> Value:
    """The result of one branch or another."""
    if all(o == origins[0] for o in origins) and not jax.tree.leaves(origins):
        return Value(x, origins[0])
    made = [Value(x, o) for o in origins if o.paths]
    if any(o.active for o in origins):
        walk.escape(made, -1)
        return Value(x, ACTIVATION)
    return Value(x, derived(origins, x.shape)) if made else Value(x, CONSTANT)


def shard_map(walk: Walk, eqn: Any, ins: list[Value]) -> list[Value]:
    """A part of every operand on each device; what is collected is merged over the mesh."""
    params = eqn.params
    jaxpr, consts = opened(params["jaxpr"])
    names = tuple(sorted(params["newly_manual_axes"]))
    mesh, checked = params["mesh"], params["check_vma"]
    origins: list[Origin] = []

    def inside(beside: Any, *data: Any) -> Any:
        level = walk.inner(loops=(*walk.loops, None), beside=beside)
        sharded = zip(data, ins, params["in_specs"], strict=True)
        args = [Value(x, _local(v.origin, spec, mesh)) for x, v, spec in sharded]
        outs = level.run(jaxpr, consts, args)
        origins[:] = [v.origin for v in outs]
        found = {p: across(e, names, walk.acts, checked) for p, e in level.found.items()}
        return tuple(dense(v.data) for v in outs), found

    own = jax.shard_map(
        inside,
        mesh=mesh,
        in_specs=(PartitionSpec(), *params["in_specs"]),
        out_specs=(params["out_specs"], PartitionSpec()),
        axis_names=set(names),
        check_vma=checked,
    )
    known = jax.tree.map(everywhere, dict(walk.beside))
    outs, found = own(known, *(dense(v.data) for v in ins))
    keep_all(walk, found)
    return [
        Value(x, derived([o], x.shape) if o.paths else Origin(active=o.active))
        for x, o in zip(outs, origins, strict=True)
    ]


def _local(origin: Origin, spec: Any, mesh: Any) -> Origin:
    """The origin of the part of a value that a device has."""
    view = origin.view
    if view is None:
        # parts of several parameters side by side may be parts of any of them
        return derived([origin], (2,) * origin.rank) if origin.paths else origin
    for dim, names in enumerate(spec):
        if names is None:
            continue
        for name in names if isinstance(names, tuple) else (names,):
            view = _part(view, dim, lax.axis_index(name), mesh.shape[name])
            if view is None:
                return derived([origin], (2,) * origin.rank)
    return viewed(view)


def _part(view: View, dim: int, index: Any, parts: int) -> View | None:
    """Part `index` of `parts` of a view along one dimension."""
    pieces = [p for p in view.axes[dim] if p.size > 1]
    if not pieces or pieces[0].size % parts:
        return view if parts == 1 else None
    first, *rest = pieces
    size = first.size // parts
    own = replace(first, size=size, offset=first.offset + index * (size * first.stride))
    axes = list(view.axes)
    axes[dim] = (own, *rest) if size > 1 else tuple(rest)
    return view.rearranged(tuple(axes), [own] if size == 1 else [])
