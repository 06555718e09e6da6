# SPDX-License-Identifier: Apache-2.0
"""Grouped products with a stored stack on CUDA GPUs, in Triton.

Tiles of rows begin where their group does, and every program multiplies one of them with tiles of
the bytes of its matrix, as in `matmul`. A group without rows has no tiles.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int32

from jqx_kernels.dispatch import Device
from jqx_kernels.matmul.gpu_tiles import Operands, Place, Plan, lacks_gpu, summed
from jqx_kernels.matmul.planes import Cut, apart, cut_of, joined, side_by_side
from jqx_kernels.matmul.reading import inside
from jqx_kernels.matmul.request import MANY, as_bytes
from jqx_kernels.matmul.tiles import Table, Tiles, tiles_for
from jqx_kernels.matmul.tuned import tiles_of
from jqx_kernels.pallas import cdiv, triton

from .groups import most_visits, visits_of
from .request import GroupedRequest, Stack, lacks_tiles

_SIGNED, _UNSIGNED = 2**31, 2**32  # bytes, see `_lacks_places`


def lacks(device: Device, request: GroupedRequest) -> str | None:
    """Other devices, old ones, many rows, and what has no tiles."""
    reason = lacks_gpu(device, request.one.storage.element)
    if reason is not None:
        return reason
    m, most = request.one.x_shape[0], MANY * request.experts
    if m >= most:
        return (
            "decodes a matrix in every tile of its rows, which from "
            f"{MANY} rows for each of {request.experts} on is slower than once; there are {m}"
        )
    return lacks_tiles(device, request) or _lacks_places(request)


def _lacks_places(request: GroupedRequest) -> str | None:
    """Pallas counts places in arrays of up to 4 GiB with 32 bits, which Triton takes as signed."""
    per_rows, per_columns = request.one.storage.per_byte
    n, k = request.one.weight_shape
    size = request.experts * (n // per_rows) * (k // per_columns)
    if _SIGNED < size <= _UNSIGNED:
        return f"cannot find places in {size} bytes, between 2 and 4 GiB"
    return None


def _tiles(cut: Cut, m: int, request: GroupedRequest, table: Table) -> Tiles:
    """Those of a product of the rows of an average group; rows of bytes are split only where all
    visits together are too few programs.
    """
    element, (rows, columns) = request.one.storage.element, cut.shape
    each = cdiv(m, min(request.experts, m))
    tiles = tiles_for(element, each, cut.shape, cut.block[0], table)
    visits = most_visits(m, request.experts, tiles.rows)
    together = tiles_for(element, each, (visits * rows, columns), cut.block[0], table)
    return replace(tiles, splits=together.splits)


def _kernel(
    expert_ref: Any, first_ref: Any, end_ref: Any, outer_ref: Any, *refs: Any, plan: Plan
) -> None:
    codes, scale, refs = refs[0], refs[1], refs[2:]
    tiles, halves = plan.tiles, plan.storage.per_byte[0]
    xs, outs = refs[:-halves], refs[-halves:]
    visit, row, split = pl.program_id(0), pl.program_id(1) * tiles.columns, pl.program_id(2)
    expert, first, end = expert_ref[visit], first_ref[visit], end_ref[visit]
    met = (expert < codes.shape[0]) & (first < end)
    own = jnp.where(met, expert, 0)
    steps = met.astype(jnp.int32) * plan.steps  # a choice of two literals would have 64 bits
    place = Place(first, row, split, steps, end, (own,))
    sums = summed(Operands(xs, codes, scale, outer_ref[own]), place, plan)
    for out, total in zip(outs, sums, strict=True):
        mask = inside((first, row), (tiles.rows, tiles.columns), (end, plan.limits[0]))
        at = out.at[split, pl.ds(first, tiles.rows), pl.ds(row, tiles.columns)]
        plgpu.store(at, total.T.astype(out.dtype), mask=mask)


def grouped_matmul(
    x: Float[Array, "m k"],
    stack: Stack,
    sizes: Int32[Array, "e"],
    request: GroupedRequest,
    table: Table | None = None,
) -> Float[Array, "m n"]:
    """The product in `out_dtype`; another table than that of `matmul` on the device is for
    tuning.
    """
    one, m = request.one, x.shape[0]
    cut = cut_of(stack.codes.shape[1:], stack.scale.shape[1:], one.storage)
    table = tiles_of("matmul", one.device) if table is None else table
    tiles, (rows, columns) = _tiles(cut, m, request, table), cut.shape
    plan = Plan(cut, tiles, one.storage, jnp.dtype(one.weight_dtype))
    visits = visits_of(sizes, m, tiles.rows, aligned=False)
    pad = plan.covered - columns
    xs = apart(x, one.storage.per_byte[1])
    xs = [jnp.pad(x, ((0, 0), (0, pad))) if pad else x for x in xs]
    summed_here = tiles.splits == 1
    out = jax.ShapeDtypeStruct(
        (tiles.splits, m, rows), jnp.dtype(one.out_dtype if summed_here else "float32")
    )
    outs = pl.pallas_call(
        partial(_kernel, plan=plan),
        grid=(visits.expert.size, cdiv(rows, tiles.columns), tiles.splits),
        out_shape=[out] * one.storage.per_byte[0],
        name="grouped_stored_matmul",
        **triton(one.interpret, tiles.warps, tiles.stages),
    )(
        *(visits.expert, visits.first, visits.end, stack.outer),
        *(as_bytes(stack.codes), side_by_side(as_bytes(stack.scale), cut), *xs),
    )
    return joined(tuple(y[0] if summed_here else y.sum(axis=0) for y in outs)).astype(one.out_dtype)
