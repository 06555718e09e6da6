# SPDX-License-Identifier: Apache-2.0
"""axes: how a function uses each of its parameters, read from the function itself."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import index
from typing import Any

import jax.numpy as jnp

from jqx.errors import InputError, nearest
from jqx.tensors.layout import layout_of

from .interpret import PRODUCTS, Record, Use, named_arrays
from .observe import record


@dataclass(frozen=True, kw_only=True, slots=True)
class Axes:
    """How a function uses one parameter of this shape.

    `contracted` are the axes that products sum over; of a table that is only looked up, those of a
    row. `stack` are axes along which one member at a time is used: layers that are scanned or
    indexed, experts. The other axes are rows: outputs of the linear. `ops` are the ways it is used
    ("dot", "ragged_dot", "conv", "gather", "elementwise"). `problem` says why it cannot be stored,
    None if it can.
    """

    shape: tuple[int, ...]
    contracted: tuple[int, ...] = ()
    stack: tuple[int, ...] = ()
    ops: tuple[str, ...] = ()
    problem: str | None = None

    @property
    def is_matrix(self) -> bool:
        """Whether it is a matrix, or a stack of them, that products or lookups use."""
        others = len(self.shape) - len(self.contracted) - len(self.stack)
        return bool(self.contracted) and others > 0 and bool(set(self.ops) - {"elementwise"})


def axes(f: Callable[..., Any], params: Any, *args: Any) -> dict[str, Axes]:
    """How `f(params, *args)` uses every parameter, by path, in the order of the tree.

    A parameter that meets no activation is left out. Nothing is computed: leaves may be
    ShapeDtypeStructs. A QTensor is not expected here: give dense parameters.
    """
    seen = record(f, params, args)
    return axes_from(seen, {n: tuple(x.shape) for n, x in named_arrays(params).items()})


def names_of(seen: Record) -> list[str]:
    """The names of activations, in the order of the function."""
    return [u.path for u in seen.uses if u.op == "name"]


def axes_from(seen: Record, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Axes]:
    """The same from what tracing told, for parameters of these shapes."""
    by_path: dict[str, list[Use]] = {}
    for use in seen.uses:
        if use.op != "name":
            by_path.setdefault(use.path, []).append(use)
    return {
        path: _axes(shape, by_path.get(path, []), path in seen.untracked)
        for path, shape in shapes.items()
        if path in by_path or path in seen.untracked
    }


def axes_given(told: Any, arrays: Mapping[str, Any]) -> dict[str, Axes]:
    """The same from what somebody says: by path what `axes` returns or the contraction axes (an int
    or several), or those of all `arrays` of floats with two axes or more. Other axes but the last
    are a stack.

    Raises InputError, naming the path, for one that is not there and for axes that do not fit.
    """
    if isinstance(told, Mapping):
        return {path: _given(path, arrays, one) for path, one in told.items()}
    matrices = {
        path: x
        for path, x in arrays.items()
        if len(x.shape) > 1 and jnp.issubdtype(x.dtype, jnp.floating)
    }
    return {path: _given(path, matrices, told) for path in matrices}


def axes_from_json(row: Mapping[str, Any]) -> Axes:
    """An Axes from the fields that statistics hold."""
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in row.items()}
    return Axes(**values)


def _given(path: str, arrays: Mapping[str, Any], told: Any) -> Axes:
    if isinstance(told, Axes):
        return told
    if path not in arrays:
        raise nearest(path, arrays, "parameter in axes:")
    shape = tuple(arrays[path].shape)
    try:
        several = tuple(index(a) for a in (told if isinstance(told, Sequence) else (told,)))
    except TypeError:
        raise InputError(
            f"axes={told!r} for {path}: give the axes of {shape} that products sum over, an int or "
            "a tuple of them, or what jqx.axes(apply_fn, params, *batch) returns"
        ) from None
    try:
        layout_of(shape, several)
    except InputError as error:
        raise InputError(f"axes={told!r} for {path}: {error}") from None
    contracted = tuple(sorted(a % len(shape) for a in several))
    rest = _rest(shape, contracted)
    return Axes(shape=shape, contracted=contracted, stack=rest[:-1], ops=("dot",))


def _axes(shape: tuple[int, ...], uses: Iterable[Use], lost: bool) -> Axes:
    uses = list(uses)
    ops = tuple(dict.fromkeys(use.op for use in uses))
    products = {(u.weight_axes, u.stack_axes): u for u in uses if u.op in PRODUCTS}
    tables = [u for u in uses if u.op == "gather"]
    ways = list(products)
    if not ways:
        ways = [(_rest(shape, u.weight_axes + u.stack_axes), u.stack_axes) for u in tables[:1]]
    contracted, stack = ways[0] if ways else ((), ())
    problem = None
    if lost:
        problem = (
            "meets an activation in a way that is not followed (it is changed first, or is inside "
            "a construct that is not walked)"
        )
    elif len(ways) > 1:
        problem = f"is used in products {' and '.join(_way(*way) for way in ways)}"
    elif "elementwise" in ops and set(ops) - {"elementwise"} and _matrix(shape):
        problem = "meets an activation elementwise, too"
    return Axes(shape=shape, contracted=contracted, stack=stack, ops=ops, problem=problem)


def _way(contracted: tuple[int, ...], stack: tuple[int, ...]) -> str:
    along = f" of members along {stack}" if stack else ""
    return f"over the axes {contracted}{along}"


def _rest(shape: tuple[int, ...], taken: Iterable[int]) -> tuple[int, ...]:
    return tuple(a for a in range(len(shape)) if a not in set(taken))


def _matrix(shape: tuple[int, ...]) -> bool:
    return sum(n > 1 for n in shape) > 1
