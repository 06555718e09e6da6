# SPDX-License-Identifier: Apache-2.0
"""The programs that score the linears of one block.

    gradient   sum of (g * D)^2              g the gradient of the loss to the outputs of a linear,
    fisher     (sum of g * D)^2 / 2          D = Q(x) Q(W)^T - x W^T
    kl         sum of KL(p || p') a token    p' of the model with one group of linears as Q has it

Sums of "fisher" are over WINDOW tokens: the sum of a sequence has the expectation that is wanted,
and far too few draws; that of a token leaves out what errors of neighbours share.

A block with experts is its front here, which has all linears but theirs: `expert_programs` has the
rest. The experts of a block are one linear to the first two methods: its outputs are the sums of
what all of them make of a token, and D what those become where every expert is quantized.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

from jqx.auto.sensitivity import WINDOW, squares
from jqx.auto.simulated import Simulated, simulated
from jqx.auto.taps import tapped
from jqx.models import BlockKind, Compute, Experts, Front, ModelSpec, block, front

Linears = Mapping[str, Mapping[str, Simulated]]
"""Candidate -> linear, by its name in the block -> what it would be."""

EXPERTS = "{}"
"""What all experts of a block are called where linears are by their names in it."""

Begun = Float[Array, "b t k"] | Front
"""The states after a block, or the front of one with experts."""

Given = dict[str, dict[str, Float32[Array, "..."]]]
"""Linear, or EXPERTS -> candidate -> what it gives to a score."""


class FrontGradient(NamedTuple):
    """The gradient to what is a number in a front."""

    h: Float[Array, "b t k"]
    x: Float[Array, "rows k"]
    weights: Float[Array, "rows c"]
    beside: Float[Array, "b t k"] | None


Gradient = Float[Array, "b t k"] | FrontGradient
"""That to `Begun`."""


@dataclass(frozen=True, slots=True)
class Program:
    """What one compiled program depends on."""

    spec: ModelSpec
    kind: BlockKind
    compute: Compute
    method: str = "gradient"


@partial(jax.jit, static_argnames=("program",))
def run_block(
    params: Any,
    h: Float[Array, "b t k"],
    linears: Mapping[str, Simulated] | None = None,
    *,
    program: Program,
) -> Begun:
    """The states after a block, or its front, some of whose linears are simulated."""
    run = partial(begun, program)
    if linears:
        run = simulated(run, by_weight(linears))
    return run(params, h)


def by_weight(linears: Mapping[str, Simulated]) -> dict[str, Simulated]:
    """The same by the names of their weights."""
    return {f"{name}.weight": row for name, row in linears.items()}


def begun(program: Program, params: Any, h: Array) -> Begun:
    """A block, or its front."""
    run = front if isinstance(program.kind.mlp, Experts) else block
    return run(program.spec, program.kind, params, h, _positions(h), program.compute)


def _positions(h: Array) -> Int[Array, "b t"]:
    return jnp.broadcast_to(jnp.arange(h.shape[1], dtype=jnp.int32)[None, :], h.shape[:2])


def _products(rows: int, g: Array, change: Array) -> Float32[Array, "rows windows"]:
    product = g.astype(jnp.float32) * change.astype(jnp.float32)
    tokens = jnp.sum(product.reshape(rows, -1, product.shape[-1]), axis=-1)
    padded = jnp.pad(tokens, ((0, 0), (0, -tokens.shape[1] % WINDOW)))
    return jnp.sum(padded.reshape(rows, -1, WINDOW), axis=-1)


REDUCES: dict[str, Callable[[int, Array, Array], Array]] = {
    "gradient": lambda rows, g, change: squares(g, change),
    "fisher": _products,
}
"""Method -> what a linear gives, of the gradients and changes of so many sequences."""


@partial(jax.jit, static_argnames=("program",))
def block_scores(
    params: Any, linears: Linears, h: Float[Array, "b t k"], g: Gradient, *, program: Program
) -> tuple[Float[Array, "b t k"], Given]:
    """The gradient to the states before a block, `g` being that to the states after it or to its
    front, and what its linears give, by linear and candidate.
    """
    rows, paths = h.shape[0], dict.fromkeys(path for row in linears.values() for path in row)
    reduce = partial(REDUCES[program.method], rows)
    mine = {p: {name: row[p] for name, row in linears.items() if p in row} for p in paths}
    outputs = {f"{p}.weight": [row.outputs for row in found.values()] for p, found in mine.items()}
    zero = jax.eval_shape(reduce, h, h)
    taps = {p: [jnp.zeros(zero.shape, zero.dtype) for _ in row] for p, row in outputs.items()}
    run = tapped(partial(begun, program), outputs, reduce)
    found, to_states = gone_back(run, params, taps, h, g)
    given = {p: dict(zip(row, found[f"{p}.weight"], strict=True)) for p, row in mine.items()}
    return to_states, given


def gone_back(
    run: Callable[..., Begun], params: Any, taps: Any, h: Array, g: Gradient
) -> tuple[Any, Array]:
    """What comes to the taps of linears and to the states `h` of the gradient `g` to what
    `run(params, taps, h)` gives.
    """

    def numbers(taps: Any, h: Array) -> Gradient:
        found = run(params, taps, h)
        if not isinstance(found, Front):
            return found
        return FrontGradient(found.h, found.given.x, found.given.weights, found.beside)

    out, back = jax.vjp(numbers, taps, h)
    return back(jax.tree.map(lambda y, to_y: to_y.astype(y.dtype), out, g))
