# SPDX-License-Identifier: Apache-2.0
"""What each JAX primitive does to a parameter that goes into it: `PRIMITIVES`, primitive name ->
rule.

A rule gets the walk, the equation and its operands, evaluates it, and says where the results come
from. Whatever is not in the table follows `interpret.plain`.
"""

from collections.abc import Callable, Sequence
from typing import Any

from .control import (
    checkpoint,
    cond,
    construct,
    inlined,
    jit,
    reissued,
    shard_map,
    with_own_gradient,
)
from .interpret import Rule, Value, Walk, evaluate, plain
from .loops import scan, while_loop
from .meetings import added, convolution, dot_general, gather, name, ragged_dot
from .rearrange import VIEWS, arranged, concatenated, split, stacked, unstacked
from .views import Origin, View, derived, viewed


def rearranged(walk: Walk, eqn: Any, ins: list[Value]) -> list[Value]:
    """An operation that only rearranges a parameter."""
    first, *others = ins
    if not first.origin.views or any(v.origin.paths for v in others):
        return plain(walk, eqn, ins)
    (out,) = evaluate(eqn, [v.data for v in ins])
    return [Value(out, arranged(first.origin, eqn, [v.data for v in others]))]


def unchanged(walk: Walk, eqn: Any, ins: list[Value]) -> list[Value]:
    """Result i is operand i, cast, copied, moved or fenced."""
    outs = evaluate(eqn, [v.data for v in ins])
    return [Value(x, v.origin) for x, v in zip(outs, ins, strict=True)]


def joined(origin_of: Callable[[list[Origin], Any], Origin | None]) -> Rule:
    """Several parameters side by side: `origin_of(origins, eqn)`."""

    def rule(walk: Walk, eqn: Any, ins: list[Value]) -> list[Value]:
        origin = origin_of([v.origin for v in ins], eqn)
        if origin is None:
            return plain(walk, eqn, ins)
        return [Value(evaluate(eqn, [v.data for v in ins])[0], origin)]

    return rule


def apart(views_of: Callable[[View, Any], list[View | None]]) -> Rule:
    """A parameter cut into several: `views_of(view, eqn)`."""

    def rule(walk: Walk, eqn: Any, ins: list[Value]) -> list[Value]:
        origin = ins[0].origin
        if origin.view is None:
            return plain(walk, eqn, ins)
        outs, views = evaluate(eqn, [ins[0].data]), views_of(origin.view, eqn)
        return [
            Value(x, viewed(view) if view else derived([origin], x.shape))
            for x, view in zip(outs, views, strict=True)
        ]

    return rule


def _table(*rows: tuple[Sequence[str], Rule]) -> dict[str, Rule]:
    return {name: rule for names, rule in rows for name in names}


PRIMITIVES: dict[str, Rule] = _table(
    (("dot_general",), dot_general),
    (("ragged_dot", "ragged_dot_general"), ragged_dot),
    (("conv_general_dilated",), convolution),
    (("gather",), gather),
    (("name",), name),
    (("add", "sub", "add_any"), added),
    (tuple(VIEWS), rearranged),
    (("concatenate",), joined(lambda os, eqn: concatenated(os, eqn.params["dimension"]))),
    (("stack",), joined(lambda os, eqn: stacked(os, eqn.params["axis"]))),
    (
        ("split",),
        apart(lambda v, eqn: split(v, [int(n) for n in eqn.params["sizes"]], eqn.params["axis"])),
    ),
    (("unstack",), apart(lambda v, eqn: unstacked(v, eqn.params["axis"]))),
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
            "reshard",
            "pvary",
            "pcast",
        ),
        unchanged,
    ),
    (("jit", "pjit"), construct(reissued(jit), takes_stored=True)),
    (("remat", "remat2", "checkpoint"), construct(reissued(checkpoint), takes_stored=True)),
    (("closed_call", "core_call", "eval_jaxpr"), construct(inlined("call_jaxpr"))),
    (("custom_vmap_call",), construct(inlined("call"))),
    (("custom_jvp_call", "custom_vjp_call"), construct(with_own_gradient("call_jaxpr"))),
    (("cond",), construct(cond, takes_stored=True)),
    (("scan",), construct(scan, takes_stored=True)),
    (("while",), construct(while_loop, takes_stored=True)),
    (("shard_map",), construct(shard_map)),
)
