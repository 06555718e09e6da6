# SPDX-License-Identifier: Apache-2.0
"""probe: the function with something added to the result of every product with a parameter.

    y = x W + p      with p = 0, so that dL/dp = dL/dy

The gradient with respect to what is added is that of the loss to the product's result, without a
change to the function, and without keeping more than one backward pass keeps.
"""

from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp

from jqx.errors import InputError, nearest

from .interpret import PRODUCTS, Acts, Met, Output, Walk, interpret
from .observe import record
from .primitives import PRIMITIVES

Probes = dict[str, tuple[Any, ...]]


def probes(
    f: Callable[..., Any], params: Any, *args: Any, paths: Collection[str] | None = None
) -> Probes:
    """What `probe(f)` adds, all zeros: by path of the parameter, an array for each of its uses in
    products, in the order of `f`; in a scan with an axis of iterations in front.

    `paths`: of these parameters only. Leaves may be ShapeDtypeStructs: only shapes are needed.
    Raises InputError for a use inside a while loop or a shard_map, and for a path without one.
    """
    found: dict[str, list[Any]] = {}
    outputs = record(f, params, args).outputs
    used = dict.fromkeys(output.path for output in outputs)
    for path in paths or ():
        if path not in used:
            raise nearest(path, used, "parameter in a product:")
    for output in outputs:
        if paths is None or output.path in paths:
            found.setdefault(output.path, []).append(_zeros(output))
    return {path: tuple(arrays) for path, arrays in found.items()}


def _zeros(output: Output) -> jax.Array:
    if None in output.loops:
        raise InputError(
            f"{output.path} is used inside a while loop or a shard_map, where the result of every "
            "use cannot be probed: leave it out with paths=, or scan a known number of times"
        )
    return jnp.zeros((*output.loops, *output.shape), output.dtype)


def probe(f: Callable[..., Any]) -> Callable[..., Any]:
    """The function `(params, added, *args) -> f(params, *args)` in which `added[path][i]` is added
    to the result of the i-th product of an activation with the parameter at `path`.

    `added` comes from `probes`; `jax.grad` with respect to it is the gradient to the results.
    Linear operations see no difference between a weight's change dW and the probe x dW.

    Raises InputError if `added` does not fit `f`, and where a gradient is taken through a function
    with a gradient of its own (`custom_jvp`, `custom_vjp`) that has a product inside.
    """

    def change(met: Met, walk: Walk) -> Any:
        waiting = (walk.given or {}).get(met.use.path)
        if met.use.op not in PRODUCTS or waiting is None:
            return None
        out = met.apply(met.x, met.w)
        if not waiting or waiting[0].shape != out.shape:
            have = waiting[0].shape if waiting else "none"
            raise InputError(
                f"The probe of {met.use.path} is {have}, and its product {out.shape}: make probes "
                "for this function and this batch"
            )
        return out + waiting.pop(0)

    def probed(params: Any, added: Probes, *args: Any) -> Any:
        given = {path: list(arrays) for path, arrays in added.items()}
        walk = Walk(PRIMITIVES, Acts(change=change), given=given)
        out, _ = interpret(f, walk, params, args)
        left = [path for path, arrays in given.items() if arrays]
        if left:
            raise InputError(
                f"The function has fewer products with {', '.join(left)} than there are probes: "
                "make probes for this function and this batch"
            )
        return out

    return probed
