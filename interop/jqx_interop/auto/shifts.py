# SPDX-License-Identifier: Apache-2.0
"""The programs of a model whose linears have been chosen: a block as it is then, and what happens
to first order if one of them takes another candidate.

    shift    sum of g * (y' - y)    g the gradient of KL(p || p') to the outputs y of a linear, p'
                                    of the model with all choices; y' what another candidate makes

Roundings of inputs pass gradients on as they are, and gradients of experts are those of experts
that are left alone.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, Int32

from jqx.auto import NONE
from jqx.auto.simulated import Simulated
from jqx.auto.taps import Outputs, tapped
from jqx.transforms.interpret import Met

from .scoring import Begun, Gradient, Linears, Program, begun, gone_back

Picked = Mapping[str, Int32[Array, ""]]
"""Linear by its name in the block -> the number of its candidate in `order`."""


def order(candidates: Iterable[str]) -> list[str]:
    """Candidates as they are numbered here: by their names, as programs are given them, and NONE
    last.
    """
    return [*sorted(candidates), NONE]


@partial(jax.jit, static_argnames=("program",))
def chosen_block(
    params: Any, h: Float[Array, "b t k"], linears: Linears, picked: Picked, *, program: Program
) -> Begun:
    """The states after a block with the linears `picked`, or its front."""
    run = tapped(partial(begun, program), {}, _product, _base(linears, picked))
    return run(params, {}, h)


@partial(jax.jit, static_argnames=("program",))
def block_shifts(
    params: Any,
    h: Float[Array, "b t k"],
    g: Gradient,
    given: tuple[Linears, Picked],
    *,
    program: Program,
) -> tuple[Float[Array, "b t k"], dict[str, list[Float32[Array, ""]]]]:
    """The gradient to the states before a block, `g` being that to the states after it or to its
    front, and the shifts of its linears to every candidate in `order`. `given` are the linears of
    `chosen_block`.
    """
    linears, picked = given
    rows = _rows(linears)
    outputs = {f"{p}.weight": [*(row.outputs for row in own), _plain] for p, own in rows.items()}
    taps = {path: [jnp.float32(0) for _ in own] for path, own in outputs.items()}
    run = tapped(partial(begun, program), outputs, _product, _base(linears, picked))
    found, to_states = gone_back(run, params, taps, h, g)
    return to_states, {path: found[f"{path}.weight"] for path in rows}


def _rows(linears: Linears) -> dict[str, list[Simulated]]:
    """Linear -> what it is with every candidate."""
    paths = dict.fromkeys(path for row in linears.values() for path in row)
    return {path: [linears[name][path] for name in sorted(linears)] for path in paths}


def _base(linears: Linears, picked: Picked) -> dict[str, Outputs]:
    return {f"{p}.weight": partial(_picked, own, picked[p]) for p, own in _rows(linears).items()}


def _plain(met: Met) -> Array:
    return met.apply(met.x, met.w)


def _picked(rows: Sequence[Simulated], number: Array, met: Met) -> Array:
    """The result of a product with one candidate; no other is computed."""
    ways = [*(partial(_operands, row, met) for row in rows), lambda: (met.x, met.w)]
    return met.apply(*lax.switch(number, ways))


def _operands(row: Simulated, met: Met) -> tuple[Array, Array]:
    x = met.x.astype(row.weight.dtype)
    p = row.pre_quant_scale
    scaled = x if p is None else x * jnp.broadcast_to(p, x.shape)
    weight = row.weight.T if met.use.weight_axes == (0,) else row.weight
    rounded = _rounded(scaled, row.inputs(x).astype(scaled.dtype))
    return rounded.astype(met.x.dtype), weight.astype(met.w.dtype)


@jax.custom_vjp
def _rounded(x: Array, y: Array) -> Array:
    """`y`, of which the gradient is that of `x`."""
    return y


_rounded.defvjp(lambda x, y: (y, None), lambda _, g: (g, jnp.zeros_like(g)))


def _product(g: Array, change: Array) -> Float32[Array, ""]:
    return jnp.sum(g.astype(jnp.float32) * change.astype(jnp.float32))
