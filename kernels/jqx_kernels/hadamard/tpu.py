# SPDX-License-Identifier: Apache-2.0
"""Products with a Hadamard matrix on TPUs, in Mosaic.

A run of a 128 values is `a` pieces of 128 lanes: the matrix unit multiplies every piece by H_128,
and sums and differences of whole pieces are the product with H_a. Nothing moves between lanes.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Float32

from jqx_kernels.dispatch import Device
from jqx_kernels.pallas import cdiv, tpu

from .exact import summed
from .matrices import base_of, hadamard_matrix
from .request import HadamardRequest, lacks_dtype, lacks_tiles

MOST = 1 << 15
"""The longest run: a tile holds whole ones."""

VALUES = 1 << 18
"""Values in a tile of short runs."""

_LANES = 128
_ROWS = 16  # the least of a tile: what fills registers with bfloat16


def lacks(device: Device, request: HadamardRequest) -> str | None:
    """Other devices, float16, and runs that are not whole registers."""
    order = request.order
    if device.platform != "tpu":
        return f"needs a TPU, not {device.platform}"
    if request.dtype == "float16":
        return "multiplies bfloat16 and float32, not float16"
    if order > MOST:
        return f"holds runs of {MOST} values, not of {order}"
    if order % _LANES and order != request.shape[-1]:
        return f"needs runs of whole rows or of a multiple of {_LANES} values, not of {order}"
    return lacks_dtype(device, request) or lacks_tiles(request)


def _width(order: int) -> int:
    """Values of a run that the matrix unit multiplies at a time: all, where the power of two in it
    fills less than half of the lanes.
    """
    doubled = order // (base_of(order) or 1)
    return order if order <= _LANES or doubled < _LANES // 2 else min(doubled, _LANES)


def _signed(pieces: list[Array], column: np.ndarray) -> Array:
    total = pieces[0] if column[0] > 0 else -pieces[0]
    for piece, sign in zip(pieces[1:], column[1:], strict=True):
        total = total + piece if sign > 0 else total - piece
    return total


def _across(pieces: list[Array], request: HadamardRequest) -> list[Array]:
    """Sums and differences of pieces: all of them times the factors of their number."""
    base = base_of(len(pieces)) or 1
    step = doubled = len(pieces) // base
    while step > 1:
        step //= 2
        pieces = [
            pieces[i - step] - piece if i & step else piece + pieces[i + step]
            for i, piece in enumerate(pieces)
        ]
    if base == 1:
        return pieces
    columns = request.oriented(hadamard_matrix(base)).T
    groups = [pieces[i::doubled] for i in range(doubled)]
    return [_signed(group, column) for column in columns for group in groups]


def _times(x: Array, h: Array) -> Float32[Array, "m n"]:
    return lax.dot_general(x, h, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)


def _kernel(x_ref: Any, h_ref: Any, out_ref: Any, *, request: HadamardRequest) -> None:
    h, width = h_ref[...], h_ref.shape[0]
    at = [slice(i, i + width) for i in range(0, request.order, width)]
    pieces = [summed(x_ref[:, s], lambda part: _times(part, h)) for s in at]
    for s, piece in zip(at, _across(pieces, request), strict=True):
        out_ref[:, s] = (piece * request.scale).astype(out_ref.dtype)


def transform(x: Float[Array, "m k"], request: HadamardRequest) -> Float[Array, "m k"]:
    """Every run of x times the factors of the matrix, in the dtype of `x`."""
    (m, k), order = request.shape, request.order
    width = _width(order)
    rows = min(m, max(VALUES // order // _ROWS * _ROWS, _ROWS), 512)
    h = jnp.asarray(request.oriented(hadamard_matrix(width)), jnp.bfloat16)
    # rows beyond the last are anything, and no other row depends on them
    return pl.pallas_call(
        partial(_kernel, request=request),
        grid=(cdiv(m, rows), k // order),
        in_specs=[
            pl.BlockSpec((rows, order), lambda i, j: (i, j)),
            pl.BlockSpec((width, width), lambda i, j: (0, 0)),
        ],
        out_specs=pl.BlockSpec((rows, order), lambda i, j: (i, j)),
        out_shape=jax.ShapeDtypeStruct((m, k), x.dtype),
        name="hadamard",
        **tpu(request.interpret, "parallel", "parallel"),
    )(x, h)
