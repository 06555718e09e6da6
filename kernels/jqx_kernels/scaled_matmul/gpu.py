# SPDX-License-Identifier: Apache-2.0
"""Products of two matrices of FP8 or INT8 codes on CUDA GPUs, in Triton, for few rows of x."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Float32

from jqx_kernels.dispatch import Device
from jqx_kernels.matmul.reading import inside, read_tile
from jqx_kernels.matmul.reference import NT
from jqx_kernels.matmul.request import MANY
from jqx_kernels.matmul.tiles import Table, Tiles, tiles_for
from jqx_kernels.matmul.tuned import tiles_of
from jqx_kernels.pallas import cdiv, triton
from jqx_kernels.tiles import no_capability

from .kinds import KINDS, ScaledRequest, Stored, lacks_dtype, lacks_kind
from .xla import as_codes, scaled

_OLDEST = {"fp8": (8, 9), "int8": (8, 0)}  # the first with tensor cores for these codes


def lacks(device: Device, request: ScaledRequest) -> str | None:
    """Other devices, old ones, many rows and other kinds."""
    reason = (
        no_capability(device, (0, 0))
        or lacks_kind(request, tuple(_OLDEST))
        or lacks_dtype(device, request)
        or no_capability(device, _OLDEST[request.kind])
    )
    if reason is not None:
        return reason
    if request.x_shape[0] >= MANY:
        return f"is for fewer than {MANY} rows, and there are {request.x_shape[0]}"
    return None


def _kernel(x_ref: Any, w_ref: Any, out: Any, *, tiles: Tiles, steps: int) -> None:
    (m, k), n, total = x_ref.shape, w_ref.shape[0], out.dtype
    left, row = pl.program_id(0) * tiles.rows, pl.program_id(1) * tiles.columns
    split = pl.program_id(2)
    end = None if k == steps * tiles.splits * tiles.depth else k
    rows, columns = (None if m % tiles.rows == 0 else m), (None if n % tiles.columns == 0 else n)

    def step(i: Any, sums: Array) -> Array:
        at = (split * steps + i) * tiles.depth
        x = read_tile(x_ref, (left, at), (tiles.rows, tiles.depth), (rows, end))
        w = read_tile(w_ref, (row, at), (tiles.columns, tiles.depth), (columns, end))
        return sums + lax.dot_general(w, x, NT, preferred_element_type=total)

    sums = lax.fori_loop(0, steps, step, jnp.zeros((tiles.columns, tiles.rows), total))
    mask = inside((left, row), (tiles.rows, tiles.columns), (rows, columns))
    at = out.at[split, pl.ds(left, tiles.rows), pl.ds(row, tiles.columns)]
    plgpu.store(at, sums.T, mask=mask)


def multiply(
    x: Stored,
    w: Stored,
    outer: Float32[Array, ""],
    request: ScaledRequest,
    table: Table | None = None,
) -> Float[Array, "m n"]:
    """The product in `request.dtype`; another table than that of the device is for tuning."""
    row = KINDS[request.kind]
    table = tiles_of("scaled_matmul", request.device) if table is None else table
    codes = as_codes(x, row), as_codes(w, row)
    (m, k), n = codes[0].shape, codes[1].shape[0]
    tiles = tiles_for(row.element, m, (n, k), None, table)
    steps = cdiv(cdiv(k, tiles.depth), tiles.splits)
    sums = pl.pallas_call(
        partial(_kernel, tiles=tiles, steps=steps),
        grid=(cdiv(m, tiles.rows), cdiv(n, tiles.columns), tiles.splits),
        out_shape=jax.ShapeDtypeStruct((tiles.splits, m, n), jnp.dtype(row.total)),
        name="scaled_matmul",
        **triton(request.interpret, tiles.warps, tiles.stages),
    )(*codes)
    return scaled(sums.sum(axis=0), x, w, outer).astype(request.dtype)
