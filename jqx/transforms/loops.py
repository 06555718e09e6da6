# SPDX-License-Identifier: Apache-2.0
"""Rules of loops: scan (which `fori_loop` with known bounds is, too) and while."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core as jex

from jqx.tensors import QTensor

from .control import keep_all, opened
from .decoding import dense
from .entries import nothing, scanned, vary, varying
from .interpret import Value, Walk, plain
from .views import ACTIVATION, Origin, derived, taken_apart, viewed


def scan(walk: Walk, eqn: Any, ins: list[Value]) -> list[Value]:
    """A scan: parameters may be constants of the body, be taken apart along their leading axis, or
    be carried unchanged.

    What is collected for a parameter that is taken apart is stacked along a new leading axis, one
    entry an iteration, and so are named activations of such a scan; otherwise it is merged over the
    iterations.
    """
    if not any(v.origin.active for v in ins):
        return plain(walk, eqn, ins)
    consts, carry, xs = split_scan(eqn.params, ins)
    jaxpr, closed = opened(eqn.params["jaxpr"])
    moving = _moving(jaxpr, len(consts), len(carry))
    walk.escape([carry[i] for i in moving], -1)
    depth, length = len(walk.loops), eqn.params["length"]
    stacks = (depth,) if any(v.origin.paths for v in xs) else ()
    ys: list[Origin] = []

    def body(c: Any, x: Any) -> Any:
        slices, iteration, given = x
        level = walk.inner(loops=(*walk.loops, length), stacks=walk.stacks + stacks, given=given)
        args = [*consts, *_carried(carry, moving, c)]
        args += [
            Value(d, _taken(v.origin, iteration, depth)) for d, v in zip(slices, xs, strict=True)
        ]
        outs = level.run(jaxpr, closed, args)
        ys[:] = [v.origin for v in outs[len(carry) :]]
        data = [dense(v.data) for v in outs]
        return [data[i] for i in moving], (data[len(carry) :], level.found)

    start = [dense(carry[i].data) for i in moving]
    taken = [_to_slice(v.data) for v in xs], jnp.arange(length, dtype=jnp.int32)
    given = _given(walk, eqn, ins)
    settings = {key: eqn.params[key] for key in ("length", "reverse", "unroll")}
    last, (results, found) = lax.scan(body, start, (*taken, given), **settings)
    keep_all(walk, {p: scanned(e, depth, walk.acts.merge) for p, e in found.items()})
    made = [
        Value(x, Origin(o.paths, rank=o.rank + 1) if o.paths else ACTIVATION)
        for x, o in zip(results, ys, strict=True)
    ]
    return [*_after(carry, moving, last), *made]


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


def while_loop(walk: Walk, eqn: Any, ins: list[Value]) -> list[Value]:
    """A while loop: parameters may be constants of the body or be carried unchanged; those in the
    condition are untracked. What is collected is carried, and merged.
    """
    if not any(v.origin.active for v in ins):
        return plain(walk, eqn, ins)
    n_cond, n_body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    tests, consts, carry = ins[:n_cond], ins[n_cond : n_cond + n_body], ins[n_cond + n_body :]
    jaxpr, closed = opened(eqn.params["body_jaxpr"])
    condition = jex.jaxpr_as_fun(eqn.params["cond_jaxpr"])
    moving = _moving(jaxpr, n_body, len(carry))
    walk.escape([*tests, *(carry[i] for i in moving)], -1)

    def step(c: list[Any]) -> Any:
        level = walk.inner(loops=(*walk.loops, None))
        outs = level.run(jaxpr, closed, [*consts, *_carried(carry, moving, c)])
        return [dense(outs[i].data) for i in moving], level.found

    def goes_on(state: Any) -> Any:
        values = [dense(v.data) for v in (*tests, *_carried(carry, moving, state[0]))]
        return condition(*values)[0]

    def body(state: Any) -> Any:
        c, found = step(state[0])
        level = walk.inner()
        keep_all(level, state[1])
        keep_all(level, found)
        return c, level.found

    start = [dense(carry[i].data) for i in moving]
    first, shapes = jax.eval_shape(step, start)
    start = [vary(x, varying(y)) for x, y in zip(start, first, strict=True)]
    empty = {path: nothing(entry, walk.acts.neutral) for path, entry in shapes.items()}
    last, found = lax.while_loop(goes_on, body, (start, empty))
    keep_all(walk, found)
    return _after(carry, moving, last)


def _moving(jaxpr: Any, consts: int, carried: int) -> list[int]:
    """Which of the carried values a body changes; the others are constants of it."""
    entering = jaxpr.invars[consts : consts + carried]
    return [i for i in range(carried) if jaxpr.outvars[i] is not entering[i]]


def _carried(carry: Sequence[Value], moving: list[int], now: Sequence[Any]) -> list[Value]:
    """The carried values in an iteration; what changes there is an activation."""
    values = list(carry)
    for i, x in zip(moving, now, strict=True):
        values[i] = Value(x, ACTIVATION)
    return values


def _after(carry: Sequence[Value], moving: list[int], last: Sequence[Any]) -> list[Value]:
    return _carried(carry, moving, last)


def _to_slice(data: Any) -> Any:
    """What a scan takes apart: a stack of stored matrices as it is, if its members are such."""
    if isinstance(data, QTensor) and data.stack and data.stack[0] == 0:
        return data
    return dense(data)


def _taken(origin: Origin, iteration: Any, depth: int) -> Origin:
    """The origin of what an iteration sees of a value that is taken apart."""
    if not origin.paths:
        return origin
    view = taken_apart(origin.view, iteration, depth) if origin.view else None
    return viewed(view) if view else derived([origin], (2,) * origin.rank)


def _given(walk: Walk, eqn: Any, ins: list[Value]) -> dict[str, list[Any]] | None:
    """For `probe`: the next given array of every product in the body, with an axis of iterations in
    front.
    """
    if walk.given is None:
        return None
    dry = walk.dry()
    jax.eval_shape(lambda: [v.data for v in scan(dry, eqn, ins)])
    taken: dict[str, list[Any]] = {}
    for output in dry.record.outputs:
        if output.path in walk.given:
            taken.setdefault(output.path, []).append(walk.given[output.path].pop(0))
    return taken
