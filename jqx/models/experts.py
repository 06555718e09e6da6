# SPDX-License-Identifier: Apache-2.0
"""Experts: a router chooses some for every token, each sees the rows of its tokens, and what they
make is added up.

    front     norms, attention, router and what all tokens take: Front
    expert    one expert, on rows of the states it reads
    combine   the states after the block, from the sums of what experts made

`block` is those three with all experts in one program: rows are sorted by expert and lie in tiles,
each of one expert. XLA's grouped products multiply all rows with all experts on a CPU, so there a
loop over tiles picks the matrices of each; tiles without rows are skipped.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Float32, Int

from .layers import Groups, Inside, settle, wide
from .mlp import mlp
from .routing import route
from .spec import Experts
from .stores import EXPERT, member, stacks

MOST_ROWS = 128
"""Rows of a tile at most."""


class Routed(NamedTuple):
    """What experts read, one row a token, and which of them with what weights."""

    x: Float[Array, "t k"]
    ids: Int[Array, "t c"]
    weights: Float[Array, "t c"]


def routed(row: Experts, inside: Inside, x: Float[Array, "b t k"]) -> Routed:
    """The experts of every token of `x`."""
    rows = x.reshape(-1, x.shape[-1])
    linear = inside.exact_linear if row.router.exact else inside.linear
    logits = linear(inside.names.router, rows)
    correction = inside.tensor(inside.names.correction) if row.router.corrected else None
    return Routed(rows, *route(row, logits, inside.compute, correction))


def beside(row: Experts, inside: Inside, x: Float[Array, "b t k"]) -> Float[Array, "b t k"] | None:
    """What all tokens take beside experts, None where there is nothing."""
    if row.shared is None:
        return None
    names = inside.names
    own = replace(names, gate=names.shared_gate, up=names.shared_up, down=names.shared_down)
    y = mlp(row.shared, inside._replace(names=own), x)
    if not row.shared_gate:
        return y
    score = inside.linear(names.shared_scorer, x)
    gate = settle(jax.nn.sigmoid(wide(score)), inside.compute)
    return settle(wide(gate) * wide(y), inside.compute)


def residual(row: Experts, inside: Inside, x: Float[Array, "b t k"]) -> Float[Array, "b t k"]:
    """What the MLP beside experts makes of its normed input."""
    assert row.residual is not None
    names = inside.names
    own = replace(names, gate=names.residual_gate, up=names.residual_up, down=names.residual_down)
    return mlp(row.residual, inside._replace(names=own), x)


def one_expert(
    row: Experts,
    inside: Inside,
    x: Float[Array, "r k"],
    weights: Float[Array, "r"],
    real: Bool[Array, "r"] | None = None,
) -> Float32[Array, "r k"]:
    """What the expert whose parameters are those of `inside` adds to the sum of each of its rows.

    Rows that are not `real` fill up: they are zeros to all its linears, and so is what they add.
    """
    scale = weights[:, None]
    if row.weighs_input:
        x = settle(wide(x) * scale, inside.compute)
    inside = inside._replace(names=EXPERT)
    y = wide(mlp(row.each, inside, _kept(x, real), lambda inner: _kept(inner, real)))
    return _kept(y if row.weighs_input else wide(settle(y * scale, inside.compute)), real)


def _kept(x: Float[Array, "r k"], real: Bool[Array, "r"] | None) -> Float[Array, "r k"]:
    return x if real is None else jnp.where(real[:, None], x, jnp.zeros_like(x))


def all_experts(row: Experts, inside: Inside, given: Routed) -> Float32[Array, "t k"]:
    """The sums of what experts make of every row."""
    own = inside._replace(params=stacks(row, inside.names, inside.params))
    return GROUPINGS[inside.compute.attention](row, own, given)


class Tiles(NamedTuple):
    """Where pairs of a token and an expert lie: `expert` and `pairs` of every tile, the latter
    their numbers token * k + choice, and whether they are `real`; `place` of every pair.
    """

    expert: Int[Array, "n"]
    pairs: Int[Array, "n r"]
    real: Bool[Array, "n r"]
    place: Int[Array, "m"]


def tiles_of(ids: Int[Array, "t k"], experts: int, rows: int) -> Tiles:
    """Tiles of `rows` pairs, as many as there may be: those of one expert begin a tile."""
    pairs = ids.reshape(-1)
    m = pairs.shape[0]
    most = min(m, -(-m // rows) + min(experts, m) - 1)
    order = jnp.argsort(pairs, stable=True).astype(jnp.int32)
    sizes = jnp.bincount(pairs, length=experts).astype(jnp.int32)
    until = jnp.cumsum((sizes + rows - 1) // rows).astype(jnp.int32)
    first = until - (sizes + rows - 1) // rows
    begins = jnp.cumsum(sizes).astype(jnp.int32) - sizes
    own = pairs[order]
    place = first[own] * rows + jnp.arange(m, dtype=jnp.int32) - begins[own]
    laid = jnp.full(most * rows, -1, jnp.int32).at[place].set(order).reshape(most, rows)
    number = jnp.minimum(jnp.arange(most, dtype=jnp.int32), until[-1] - 1)
    expert = jnp.searchsorted(until, number, side="right", method="compare_all")
    back = jnp.zeros(m, jnp.int32).at[order].set(place)
    return Tiles(expert.astype(jnp.int32), jnp.maximum(laid, 0), laid >= 0, back)


def rows_of_tiles(pairs: int, experts: int) -> int:
    """Rows of a tile: about those of an expert, a power of two."""
    return min(1 << (max(-(-pairs // experts), 1) - 1).bit_length(), MOST_ROWS)


def _in_tiles(row: Experts, own: Inside, given: Routed) -> Float32[Array, "t k"]:
    k = given.ids.shape[1]
    rows = rows_of_tiles(given.ids.size, row.number)
    tiles = tiles_of(given.ids, row.number, rows)
    weights = given.weights.reshape(-1)

    def run(tile: tuple[Array, Array, Array]) -> Array:
        e, pairs, real = tile
        inside = own._replace(params=member(own.params, e))
        return one_expert(row, inside, given.x[pairs // k], weights[pairs], real)

    def skipped(tile: tuple[Array, Array, Array]) -> Array:
        return jnp.zeros((rows, given.x.shape[1]), jnp.float32)

    # recomputed for gradients: what each tile picks of the stacks is not kept
    one = jax.checkpoint(lambda tile: lax.cond(tile[2][0], run, skipped, tile))
    y = lax.map(one, (tiles.expert, tiles.pairs, tiles.real)).reshape(-1, given.x.shape[1])
    return jnp.sum(y[tiles.place].reshape(-1, k, y.shape[1]), axis=1)


def _in_groups(row: Experts, own: Inside, given: Routed) -> Float32[Array, "t k"]:
    k, pairs = given.ids.shape[1], given.ids.reshape(-1)
    order = jnp.argsort(pairs, stable=True)
    sizes = jnp.bincount(pairs, length=row.number).astype(jnp.int32)
    inside = own._replace(groups=Groups(sizes, pairs[order]))
    y = one_expert(row, inside, given.x[order // k], given.weights.reshape(-1)[order])
    back = jnp.argsort(order)
    return jnp.sum(y[back].reshape(-1, k, y.shape[1]), axis=1)


GROUPINGS: dict[str, Callable[[Experts, Inside, Routed], Array]] = {
    "chunks": _in_tiles,
    "batched": _in_groups,
}
"""Compute.attention -> function to the sums."""
