# SPDX-License-Identifier: Apache-2.0
"""observe: the function that also returns a reduction of what each parameter was multiplied with.

Works on any function of a pytree of parameters: `module.apply` of Linen, the functional form of NNX
(`nnx.split`, then `lambda state, x: nnx.merge(graph, state)(x)`), a plain function. Nothing in the
function says what to observe.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jqx.errors import InputError
from jqx.tensors.paths import named_leaves

from .decoding import is_stored, split_to_observe
from .entries import Entry
from .interpret import Acts, Met, Record, Use, Walk, arrays_of, interpret
from .placing import entry
from .primitives import PRIMITIVES


def observe(
    f: Callable[..., Any],
    collect: Callable[[Use, Any], Any],
    merge: Callable[[Any, Any], Any] = jnp.maximum,
    neutral: float | int = 0,
) -> Callable[..., tuple[Any, dict[str, Any]]]:
    """The function `(params, *args) -> (f(params, *args), {path: collected})`.

    `collect(use, x)` is called for each product ("dot", "conv", "ragged_dot") and row lookup
    ("gather", where `x` are the indices) of a parameter with an activation `x`, and for each named
    activation ("name"); for "ragged_dot" `x` is a pair: the activation, whose rows lie in groups,
    and the sizes of the groups. It returns a pytree of arrays, or None for nothing.

    Several uses of one path are merged leaf by leaf with `merge`, and so are the iterations of a
    loop and the devices of a shard_map. Where a function uses one member of a stack (an iteration
    of a scan that takes it apart, an index) what is collected gets a leading axis, an entry a
    member. `neutral` is what counts as nothing for `merge`: a member, a branch or a loop that is
    not reached has it.

    The output is what `f` computes, the same operations in the same order. Jit the result, as you
    would jit `f`. Where `params` has QTensors `f` runs on what they stand for, and inputs are met
    as they are, before any rounding.

    Raises InputError for a QTensor whose inputs are scaled first, if two uses of one path collect
    arrays of different shapes, and where the result is differentiated through a function with a
    gradient of its own that a parameter is used in.
    """

    def taken(met: Met, walk: Walk) -> Entry | None:
        x = met.x if met.groups is None else (met.x, met.groups)
        what = collect(met.use, x)
        return None if what is None else entry(met, what, neutral, walk.stacks)

    def observed(params: Any, *args: Any) -> tuple[Any, dict[str, Any]]:
        shapes, stored = split_to_observe(params)
        acts = Acts(collect=taken, merge=partial(jax.tree.map, merge), neutral=neutral)
        return interpret(f, Walk(PRIMITIVES, acts, stored=stored), shapes, args)

    return observed


def uses(f: Callable[..., Any], params: Any, *args: Any) -> list[Use]:
    """Every different way in which a parameter of `f` meets an activation, and every named
    activation.

    In the order of first meeting. Nothing is computed: `jax.ShapeDtypeStruct` leaves are enough.
    """
    return list(record(f, params, args).uses)


def untracked(f: Callable[..., Any], params: Any, *args: Any) -> list[str]:
    """Paths of parameters that meet an activation in a way that is not a use (see `interpret`):
    they are not observed, or not everywhere. Nothing is computed.
    """
    return list(record(f, params, args).untracked)


def record(f: Callable[..., Any], params: Any, args: tuple[Any, ...]) -> Record:
    """All that tracing `f` tells. Nothing is computed. Raises InputError for a QTensor among
    `params`.
    """
    for path, x in named_leaves(params, is_stored):
        if is_stored(x):
            raise InputError(f"{path} is quantized: give dense parameters here (jqx.dequantize)")
    walk = Walk(PRIMITIVES)
    arrays, rebuild = arrays_of((params, args))

    def run(xs: list[Any]) -> Any:
        p, a = rebuild(xs)
        out = interpret(f, walk, p, a)[0]
        return arrays_of(out)[0]

    jax.eval_shape(run, arrays)
    return walk.record
