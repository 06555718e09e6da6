# SPDX-License-Identifier: Apache-2.0
"""observe: the function that also returns a reduction of what each parameter was multiplied with.

Works on any function of a pytree of parameters: `module.apply` of Linen, the functional form of NNX
(`nnx.split`, then `lambda state, x: nnx.merge(graph, state)(x)`), a plain function. Nothing in the
function says what to observe.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from .interpret import Met, Record, Use, Walk, arrays_of, interpret
from .primitives import PRIMITIVES


def observe(
    f: Callable[..., Any],
    collect: Callable[[Use, Any], Any],
    merge: Callable[[Any, Any], Any] = jnp.maximum,
) -> Callable[..., tuple[Any, dict[str, Any]]]:
    """The function `(params, *args) -> (f(params, *args), {path: collected})`.

    `collect(use, x)` is called for each matrix product ("dot") and row lookup ("gather", where `x`
    are the indices) of a parameter with an activation `x`, and for each named activation ("name");
    it returns a pytree of arrays, or None for nothing. Several uses of one path are merged leaf by
    leaf with `merge`, which also merges the iterations of a scan over a parameter that is the same
    in all; for one that a scan takes apart they are stacked.

    The output is what `f` computes, the same operations in the same order. Jit the result, as you
    would jit `f`.

    Raises InputError if two uses of one path collect arrays of different shapes.
    """

    def handler(met: Met) -> tuple[Any, Any]:
        return met.apply(met.x, met.w), collect(met.use, met.x)

    def observed(params: Any, *args: Any) -> tuple[Any, dict[str, Any]]:
        return interpret(f, Walk(PRIMITIVES, handler, merge), params, args)

    return observed


def uses(f: Callable[..., Any], params: Any, *args: Any) -> list[Use]:
    """Every different way in which a parameter of `f` meets an activation, and every named
    activation.

    In the order of first meeting. Nothing is computed: `jax.ShapeDtypeStruct` leaves are enough.
    """
    return list(_record(f, params, args).uses)


def untracked(f: Callable[..., Any], params: Any, *args: Any) -> list[str]:
    """Paths of parameters that meet an activation in a way that is not a use (see `interpret`):
    they are not observed, or not everywhere. Nothing is computed.
    """
    return list(_record(f, params, args).untracked)


def _record(f: Callable[..., Any], params: Any, args: tuple[Any, ...]) -> Record:
    record = Record()

    def handler(met: Met) -> tuple[Any, Any]:
        return met.apply(met.x, met.w), None

    walk = Walk(PRIMITIVES, handler, jnp.maximum, record)
    arrays, rebuild = arrays_of((params, args))

    def run(xs: list[Any]) -> Any:
        p, a = rebuild(xs)
        return interpret(f, walk, p, a)[0]

    jax.eval_shape(run, arrays)
    return record
