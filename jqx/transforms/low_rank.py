# SPDX-License-Identifier: Apache-2.0
"""The second product of a parameter with a low-rank part B A, whose inputs are scaled and not
rounded.

    y = Q(x p) W^T + ((x p) A^T) B^T

B is put where the use has W: its view of the parameter says how, with `rank` in the place of the
axes that are summed over.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jqx.errors import InputError

from .entries import everywhere, explicit, vary, varying
from .inputs import Treatment, chosen, treated
from .interpret import Met
from .placing import back, by_member, pieces_of, seen
from .views import Piece, View


def check_lookup(treatment: Treatment | None, met: Met) -> None:
    """Raises InputError where rows of a parameter with a low-rank part are looked up: they would be
    those of its other part.
    """
    if met.use.op == "gather" and treatment is not None and treatment.low_rank is not None:
        raise InputError(
            f"{met.use.path} has a low-rank part, which products add, and rows of it are looked "
            "up: drop its low_rank"
        )


def low_rank_product(
    treatment: Treatment, met: Met, settle: Callable[[Array], Array]
) -> Float[Array, "..."]:
    """What the low-rank part of a parameter adds to its product; `settle` is applied to results
    between.
    """
    scaled = replace(treatment, input_format=None, input_scale=None)
    x = settle(treated(scaled, met))
    if met.groups is not None or explicit(x):
        return met.apply(x, _whole(treatment, met))
    narrow, main = settle(_narrow(treatment, met, x)), _main(met)
    shape = [1 if a in met.use.activation_axes else size for a, size in enumerate(x.shape)]
    shape[main] = narrow.shape[-1]
    narrow = back(met, narrow, jax.ShapeDtypeStruct(tuple(shape), x.dtype))
    return met.apply(vary(narrow, varying(met.x)), _outer(treatment, met, main))


def _narrow(treatment: Treatment, met: Met, x: Array) -> Float[Array, "*members tokens rank"]:
    """The inputs times A, in their dtype."""
    sizes = tuple(p.size for p in pieces_of(met))
    rows = by_member(met, x)
    inner = chosen(treatment, met, treatment.low_rank[1], sizes).astype(x.dtype)
    batch = tuple(range(len(sizes))) if treatment.stack else ()
    numbers = ((rows.ndim - 1,), (inner.ndim - 1,)), (batch, batch)
    precision, wide = lax.Precision.HIGHEST, jnp.float32
    z = lax.dot_general(rows, inner, numbers, precision, preferred_element_type=wide)
    return z.astype(x.dtype)


def _main(met: Met) -> int:
    """The longest axis of the activation that is summed over."""
    return max(met.use.activation_axes, key=lambda a: met.x.shape[a])


def _outer(treatment: Treatment, met: Met, main: int) -> Array:
    """B in the place of the parameter: the rank lies along what meets the axis `main`, and other
    axes that are summed over have one place.
    """
    assert met.view is not None
    outer, first = treatment.low_rank[0], treatment.columns[0]
    rank = outer.shape[-1]
    longest = met.summed[met.use.activation_axes.index(main)]

    def narrowed(pieces: tuple[Piece, ...]) -> tuple[Piece, ...]:
        if pieces is longest:
            return (Piece(first, rank),)
        return () if any(pieces is other for other in met.summed) else pieces

    axes = tuple(narrowed(pieces) for pieces in met.view.axes)
    sizes = (rank, *(1 for _ in treatment.columns[1:]))
    view = View(met.view.path, met.view.shape, axes, met.view.fixed)
    return _seen(treatment, met, view, outer, sizes)


def _whole(treatment: Treatment, met: Met) -> Array:
    """B A in the place of the parameter."""
    assert met.view is not None
    outer, inner = (everywhere(part).astype(jnp.float32) for part in treatment.low_rank)
    product = jnp.matmul(outer, inner, precision=lax.Precision.HIGHEST)
    sizes = tuple(treatment.shape[a] for a in treatment.columns)
    return _seen(treatment, met, met.view, product, sizes)


def _seen(treatment: Treatment, met: Met, view: View, m: Array, sizes: tuple[int, ...]) -> Any:
    """The matrices `m` [*stack, n, k] as a view of an array with the axes of the parameter; `sizes`
    of those that are summed over.
    """
    shape, stack, columns = treatment.shape, treatment.stack, treatment.columns
    rows = [a for a in range(len(shape)) if a not in (*stack, *columns)]
    order = (*stack, *rows, *columns)
    apart = m.reshape(*(shape[a] for a in (*stack, *rows)), *sizes)
    array = jnp.transpose(apart, [order.index(a) for a in range(len(order))])
    return vary(seen(view, array).astype(met.w.dtype), varying(met.w))
