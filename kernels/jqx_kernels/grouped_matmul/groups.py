# SPDX-License-Identifier: Apache-2.0
"""Where groups of rows lie, and the tiles of rows that kernels work on, each with one matrix.

Only the running program knows the groups, but there are never more visits, one of a tile by a
matrix each, than tiles of all rows plus groups with rows, less one: only the first tile of a group
can be the last of another, too.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int32

from jqx_kernels.pallas import cdiv


class Visits(NamedTuple):
    """Tiles of rows, in their order. `expert`: the matrix that is met, or the number of matrices
    for rows beyond all groups; `start`: the first row of the tile; `first` and `end`: of its rows
    those that are met, none in a visit too many, which is like the last one otherwise.
    """

    expert: Int32[Array, "visits"]
    start: Int32[Array, "visits"]
    first: Int32[Array, "visits"]
    end: Int32[Array, "visits"]


def spans(sizes: Int32[Array, "e"], m: int) -> tuple[Int32[Array, "e"], Int32[Array, "e"]]:
    """The first row of every group and the one after its last; none lies beyond the `m` rows."""
    ends = jnp.minimum(jnp.cumsum(sizes, dtype=jnp.int32), m)
    return jnp.concatenate([jnp.zeros_like(ends[:1]), ends[:-1]]), ends


def most_visits(m: int, experts: int, rows: int) -> int:
    """How many visits there can be of `m` rows in tiles of `rows`."""
    return cdiv(m, rows) + min(experts + 1, m) - 1


def visits_of(sizes: Int32[Array, "e"], m: int, rows: int, aligned: bool) -> Visits:
    """The visits of groups of these sizes, and of the rows beyond them. Tiles of `rows` begin where
    a group does, or, `aligned`, at a multiple of `rows`, so that several may visit one tile.
    """
    begins, ends = spans(jnp.append(sizes, m), m)
    origins = begins - begins % rows if aligned else begins
    tiles = jnp.where(ends > begins, (ends - origins + (rows - 1)) // rows, 0)
    until = jnp.cumsum(tiles, dtype=jnp.int32)
    number = jnp.arange(most_visits(m, sizes.shape[0], rows), dtype=jnp.int32)
    own = jnp.minimum(number, until[-1] - 1)
    expert = jnp.searchsorted(until, own, side="right", method="compare_all").astype(jnp.int32)
    start = origins[expert] + (own - (until - tiles)[expert]) * rows
    first = jnp.maximum(start, begins[expert])
    end = jnp.minimum(start + rows, ends[expert])
    return Visits(expert, start, first, jnp.where(number < until[-1], end, first))
