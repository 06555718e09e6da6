# SPDX-License-Identifier: Apache-2.0
"""tapped: the function with a tap at the result of every product that might become another one.

    y = x W          D = y' - y, with y' the result that a candidate would give
    backward: the gradient g to y passes on as it is, and reduce(g, D) goes to the tap

A tap adds nothing to the function; the derivative with respect to it is what is asked of gradients
and changes together. So one backward pass scores every candidate of every linear, inside scans and
nested functions too.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jqx.errors import InputError
from jqx.transforms.interpret import PRODUCTS, Acts, Met, Walk, interpret
from jqx.transforms.primitives import PRIMITIVES

Reduce = Callable[[Array, Array], Array]
"""A gradient to a result, and a change of it, outputs last -> an array in the shape of the tap."""

Outputs = Callable[[Met], Array]
"""A product as it is met -> what its result would be."""

Taps = Mapping[str, Sequence[Array]]
"""Path of a parameter -> zeros, an array for every candidate."""


def tapped(
    f: Callable[..., Any],
    outputs: Mapping[str, Sequence[Outputs]],
    reduce: Reduce,
    base: Mapping[str, Outputs] | None = None,
) -> Callable[..., Any]:
    """The function `(params, taps, *args) -> f(params, *args)` whose derivative with respect to
    `taps[path][i]` is the sum of `reduce(g, D)` over all uses of the parameter at `path` in
    products, D being what `outputs[path][i]` changes of the result. `base`: what the results of
    some products are in the first place, where that is something else.

    Raises InputError for a path that is in no product.
    """

    def change(met: Met, walk: Walk) -> Array | None:
        taps, other = walk.beside.get(met.use.path), (base or {}).get(met.use.path)
        if met.use.op not in PRODUCTS or (taps is None and other is None):
            return None
        y = met.apply(met.x, met.w) if other is None else other(met)
        if taps is None:
            return y
        changes = [lax.stop_gradient(out(met) - y) for out in outputs[met.use.path]]
        return tap(partial(_outputs_last, reduce, _first(met, y)), y, changes, list(taps))

    def run(params: Any, taps: Taps, *args: Any) -> Any:
        walk = Walk(PRIMITIVES, Acts(change=change), beside=taps)
        out, _ = interpret(f, walk, params, args)
        met = {use.path for use in walk.record.uses if use.op in PRODUCTS}
        if left := [path for path in taps if path not in met]:
            raise InputError(f"{', '.join(left)}: in no product that can be followed")
        return out

    return run


def _first(met: Met, y: Array) -> int:
    """How many axes of outputs a result has in front of those of inputs."""
    if met.use.op != "dot" or not met.first:
        return 0
    return y.ndim - (met.x.ndim - len(met.use.activation_axes))


def _outputs_last(reduce: Reduce, first: int, g: Array, change: Array) -> Array:
    def last(a: Array) -> Array:
        return jnp.moveaxis(a, range(first), range(a.ndim - first, a.ndim))

    return reduce(last(g), last(change))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def tap(reduce: Reduce, y: Array, changes: list[Array], taps: list[Array]) -> Array:
    """`y`, where the derivative with respect to each of `taps` is `reduce` of the gradient to `y`
    and one of `changes`.
    """
    return y


def _forward(
    reduce: Reduce, y: Array, changes: list[Array], taps: list[Array]
) -> tuple[Array, list[Array]]:
    return y, changes


def _backward(reduce: Reduce, changes: list[Array], g: Array) -> tuple[Any, ...]:
    nothing = [jnp.zeros_like(d) for d in changes]
    return g, nothing, [reduce(g, d) for d in changes]


tap.defvjp(_forward, _backward)
