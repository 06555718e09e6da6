# SPDX-License-Identifier: Apache-2.0
"""The programs of one expert, and of the end of a block with experts: forward, and back.

    front = front(h);  sums = sums of expert(x[rows], weights) over experts;  h = combine(sums)

What is wanted of an expert is told by ways: NONE is the expert as it is, any other the candidate
that all of its linears take.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32

from jqx.auto.simulated import Simulated, simulated
from jqx.models import Front, combine, expert

from .scoring import REDUCES, Program, by_weight

Sums = Float32[Array, "rows k"]


@partial(jax.jit, static_argnames=("program",))
def expert_outputs(
    params: Any,
    ways: Mapping[str, Mapping[str, Simulated]],
    x: Float[Array, "r k"],
    weights: Float32[Array, "r"],
    real: Bool[Array, "r"],
    *,
    program: Program,
) -> dict[str, Float32[Array, "r k"]]:
    """What one expert adds to the sums of its rows, by way; `ways`: its linears that are simulated,
    none of them for NONE.
    """

    def run(params: Any, x: Array) -> Array:
        return expert(program.spec, program.kind, params, x, weights, real, program.compute)

    return {
        name: (simulated(run, by_weight(row)) if row else run)(params, x)
        for name, row in ways.items()
    }


@partial(jax.jit, static_argnames=("program",))
def expert_gradients(
    params: Any,
    x: Float[Array, "r k"],
    weights: Float32[Array, "r"],
    real: Bool[Array, "r"],
    g: Float32[Array, "d r k"],
    *,
    program: Program,
) -> tuple[Float[Array, "d r k"], Float32[Array, "d r"]]:
    """The gradients to the rows that one expert reads and to their weights, each of `g` being one
    to what it adds to their sums.
    """

    def run(x: Array, weights: Array) -> Array:
        return expert(program.spec, program.kind, params, x, weights, real, program.compute)

    return jax.vmap(jax.vjp(run, x, weights)[1])(g)


@partial(jax.jit, static_argnames=("program",))
def end_gradients(
    params: Any, found: Front, total: Sums, g: Float[Array, "b t k"], *, program: Program
) -> tuple[Float[Array, "b t k"], Float[Array, "b t k"] | None, Sums]:
    """The gradients to the states and to what is beside experts in a front, and to their sums
    `total`, `g` being that to the states after the block.
    """

    def end(h: Array, beside: Array | None, total: Array) -> Array:
        own = found._replace(h=h, beside=beside)
        return combine(program.spec, program.kind, params, own, total, program.compute)

    y, back = jax.vjp(end, found.h, found.beside, total)
    return back(g.astype(y.dtype))


@partial(jax.jit, static_argnames=("rows", "program"))
def sums_given(
    g: Sums, changes: Mapping[str, Sums], *, rows: int, program: Program
) -> dict[str, Float32[Array, "..."]]:
    """What experts give to a score, by candidate: `g` is the gradient to their sums in so many
    sequences.
    """
    return {name: REDUCES[program.method](rows, g, d) for name, d in changes.items()}


@jax.jit
def sums_shifts(g: Sums, changes: Mapping[str, Sums]) -> dict[str, Float32[Array, ""]]:
    """What changes to first order where the sums do."""
    return {name: jnp.sum(g * d) for name, d in changes.items()}
