# SPDX-License-Identifier: Apache-2.0
"""Products of two matrices of FP8 or INT8 codes on TPUs, in Mosaic."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Float32

from jqx_kernels.dispatch import Device
from jqx_kernels.matmul.reference import NT
from jqx_kernels.matmul.tiles import Table, size_of
from jqx_kernels.matmul.tuned import tiles_of
from jqx_kernels.pallas import cdiv, tpu

from .kinds import KINDS, ScaledRequest, Stored, lacks_dtype, lacks_kind

SUBLANES = 32  # rows of a tile of bytes
_WITHOUT = ("TPU v2", "TPU v3", "TPU v4")  # which multiply no bytes


def lacks(device: Device, request: ScaledRequest) -> str | None:
    """Other devices, old ones, float16 and other kinds."""
    if device.platform != "tpu":
        return f"needs a TPU, not {device.platform}"
    if device.kind.startswith(_WITHOUT):
        return f"needs a TPU that multiplies bytes, not {device.kind}"
    if request.dtype == "float16":
        return "returns bfloat16 and float32, not float16"
    return lacks_kind(request, ("fp8", "int8")) or lacks_dtype(device, request)


def _kernel(x_ref: Any, w_ref: Any, rows: Any, columns: Any, out: Any, total: Any) -> None:
    i = pl.program_id(2)

    @pl.when(i == 0)
    def _() -> None:
        total[...] = jnp.zeros_like(total)

    total[...] += lax.dot_general(x_ref[...], w_ref[...], NT, preferred_element_type=total.dtype)

    @pl.when(i == pl.num_programs(2) - 1)
    def _() -> None:
        out[...] = (total[...].astype(jnp.float32) * rows[...] * columns[...]).astype(out.dtype)


def multiply(
    x: Stored,
    w: Stored,
    outer: Float32[Array, ""],
    request: ScaledRequest,
    table: Table | None = None,
) -> Float[Array, "m n"]:
    """The product in `request.dtype`; another table than that of the device is for tuning."""
    row, (m, k), n = KINDS[request.kind], x.codes.shape, w.codes.shape[0]
    table = tiles_of("scaled_matmul", request.device, "tpu") if table is None else table
    tiles = table[row.element, size_of(m)]
    high = min(tiles.rows, m + -m % SUBLANES)
    wide, depth = min(tiles.columns, n), min(tiles.depth, k)
    rows = jnp.broadcast_to(x.scale * outer, (m, 1))
    columns = jnp.broadcast_to(w.scale.T, (1, n))
    pad = (0, -m % high)
    # zeros beyond the last column: what lies there would be read, NaN too
    codes = [
        lax.bitcast_convert_type(jnp.pad(c, (p, (0, -k % depth))), jnp.dtype(row.dtype))
        for c, p in ((x.codes, pad), (w.codes, (0, 0)))
    ]
    y = pl.pallas_call(
        _kernel,
        grid=((m + pad[1]) // high, cdiv(n, wide), cdiv(k, depth)),
        in_specs=[
            pl.BlockSpec((high, depth), lambda i, j, l: (i, l)),  # noqa: E741
            pl.BlockSpec((wide, depth), lambda i, j, l: (j, l)),  # noqa: E741
            pl.BlockSpec((high, 1), lambda i, j, l: (i, 0)),  # noqa: E741
            pl.BlockSpec((1, wide), lambda i, j, l: (0, j)),  # noqa: E741
        ],
        out_specs=pl.BlockSpec((high, wide), lambda i, j, l: (i, j)),  # noqa: E741
        out_shape=jax.ShapeDtypeStruct((m + pad[1], n), jnp.dtype(request.dtype)),
        scratch_shapes=[pltpu.VMEM((high, wide), jnp.dtype(row.total))],
        name="scaled_matmul",
        **tpu(request.interpret, "parallel", "parallel", "arbitrary"),
    )(*codes, jnp.pad(rows, (pad, (0, 0))), columns)
    return y[:m]
