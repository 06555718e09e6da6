# SPDX-License-Identifier: Apache-2.0
"""The MLP of a block in its forms.

gated         down(act(gate(x)) * up(x))
fused_gated   the same, with gate and up as rows of one linear, one after the other
plain         down(act(up(x)))
gegelu        down(g(a) * (b + 1)), a and b every other row of one linear, clipped
gegelu_apart  the same, with a and b of linears of their own, gate and up
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .layers import Inside, activate, settle, wide
from .spec import Mlp


def mlp(
    row: Mlp,
    inside: Inside,
    x: Float[Array, "*lead k"],
    between: Callable[[Array], Array] = lambda inner: inner,
) -> Float[Array, "*lead k"]:
    """What the MLP makes of the normed input `x`; `between` is applied to the inner channels."""
    return inside.linear(inside.names.down, between(MLPS[row.form](row, inside, x)))


def _gated(row: Mlp, inside: Inside, x: Array) -> Array:
    gate, up = inside.linear(inside.names.gate, x), inside.linear(inside.names.up, x)
    return _product(row, inside, gate, up)


def _fused_gated(row: Mlp, inside: Inside, x: Array) -> Array:
    gate, up = jnp.split(inside.linear(inside.names.gate_up, x), 2, axis=-1)
    return _product(row, inside, gate, up)


def _product(row: Mlp, inside: Inside, gate: Array, up: Array) -> Array:
    gate = activate(row.activation, gate, inside.compute)
    return settle(wide(gate) * wide(up), inside.compute)


def _plain(row: Mlp, inside: Inside, x: Array) -> Array:
    return activate(row.activation, inside.linear(inside.names.up, x), inside.compute)


def _gegelu(row: Mlp, inside: Inside, x: Array) -> Array:
    both = wide(inside.linear(inside.names.gate_up, x))
    both = both.reshape(*both.shape[:-1], row.inner, 2)
    return _clipped(row, inside, both[..., 0], both[..., 1])


def _gegelu_apart(row: Mlp, inside: Inside, x: Array) -> Array:
    gate, up = (inside.linear(name, x) for name in (inside.names.gate, inside.names.up))
    return _clipped(row, inside, wide(gate), wide(up))


def _clipped(row: Mlp, inside: Inside, gate: Array, up: Array) -> Array:
    if row.limit is not None:
        gate, up = jnp.minimum(gate, row.limit), jnp.clip(up, -row.limit, row.limit)
    return settle(gate * jax.nn.sigmoid(1.702 * gate) * (up + 1), inside.compute)


MLPS: dict[str, Callable[[Mlp, Inside, Array], Array]] = {
    "gated": _gated,
    "fused_gated": _fused_gated,
    "plain": _plain,
    "gegelu": _gegelu,
    "gegelu_apart": _gegelu_apart,
}
"""Mlp.form -> function to the inner channels."""
