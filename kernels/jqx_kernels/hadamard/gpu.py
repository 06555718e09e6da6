# SPDX-License-Identifier: Apache-2.0
"""Products with a Hadamard matrix on CUDA GPUs, in Triton, by tensor cores.

A run of a b values is a matrix [a, b], which H_a multiplies from the left and H_b from the right;
some of them are a tile. Orders of more than two factors take a pass through memory for each of the
first, with float32 between.
"""

import math
from functools import partial, reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Float32

from jqx_kernels.dispatch import Device
from jqx_kernels.pallas import cdiv, triton
from jqx_kernels.tiles import covering, no_capability

from .exact import summed
from .matrices import LEAST, MOST, factors, hadamard_matrix
from .request import HadamardRequest, lacks_dtype, lacks_tiles

PROGRAMS = 1056
"""Programs that are enough: eight for each of the 132 processors of an H100."""

VALUES = 4096
"""Values in a tile that four warps have registers for; a larger matrix is a tile of its own."""


def lacks(device: Device, request: HadamardRequest) -> str | None:
    """Other devices, old ones, and what has no tiles."""
    return no_capability(device, (8, 0)) or lacks_dtype(device, request) or lacks_tiles(request)


class _Pass(NamedTuple):
    """One pass through memory over x as [runs, height, width]: `left` times every matrix, or as it
    is, then times `right`.
    """

    shape: tuple[int, int, int]
    left: np.ndarray | None
    right: np.ndarray | None
    scale: np.float32 = np.float32(1)

    @property
    def tile(self) -> tuple[int, int, int]:
        """Runs, rows and columns that are multiplied at a time, powers of two."""
        runs, height, width = self.shape
        rows = 1 if self.left is None else _covering(height)
        columns = min(width, MOST) if self.right is None else _covering(width)
        return max(min(VALUES // (rows * columns), covering(runs)), 1), rows, columns

    @property
    def grid(self) -> tuple[int, int, int]:
        """Programs along runs, rows and columns; one has all rows."""
        tiles, columns = cdiv(self.shape[0], self.tile[0]), cdiv(self.shape[2], self.tile[2])
        return cdiv(tiles, cdiv(tiles, max(PROGRAMS // columns, 1))), 1, columns

    @property
    def steps(self) -> int:
        """Tiles of every program, for all of which it reads the matrices once."""
        return cdiv(cdiv(self.shape[0], self.tile[0]), self.grid[0])

    def inside(self, starts: tuple[Any, ...]) -> Array | None:
        """Where a tile lies in x, None where all do whole: Triton checks no bounds."""
        counts = (self.grid[0] * self.steps, *self.grid[1:])
        masks = [
            lax.broadcasted_iota(jnp.int32, self.tile, axis) + start < end
            for axis, (start, end) in enumerate(zip(starts, self.shape, strict=True))
            if counts[axis] * self.tile[axis] != end
        ]
        return reduce(jnp.logical_and, masks) if masks else None


def _covering(size: int) -> int:
    return max(covering(size), LEAST)


def _passes(request: HadamardRequest) -> list[_Pass]:
    found, runs, width = [], request.runs, request.order
    *outer, last = (request.oriented(hadamard_matrix(n)) for n in factors(request.order))
    for matrix in outer:
        width //= len(matrix)
        found.append(_Pass((runs, len(matrix), width), matrix.T, None))
        runs *= len(matrix)
    # the last two factors are one pass
    both = found.pop() if found else _Pass((runs, 1, width), None, None)
    return [*found, both._replace(right=last, scale=request.scale)]


def _times(a: Array, b: Array) -> Float32[Array, "m n"]:
    return lax.dot_general(a, b, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)


def _product(x: Array, left: Array | None, right: Array | None) -> Float32[Array, "r h w"]:
    runs, rows, columns = x.shape
    if left is not None:
        # all matrices side by side: zeros of a larger matrix would carry a NaN from one to another
        side = jnp.transpose(x, (1, 0, 2)).reshape(rows, runs * columns)
        x = summed(side, lambda part: _times(left.astype(part.dtype), part))
    if right is not None:
        below = x.reshape(rows * runs, columns)
        x = summed(below, lambda part: _times(part, right.astype(part.dtype)))
    return jnp.transpose(x.reshape(rows, runs, columns), (1, 0, 2))


def _kernel(x_ref: Any, *refs: Any, one: _Pass) -> None:
    *matrices, out_ref = refs
    first, row, column = (pl.program_id(axis) for axis in range(3))
    tile = one.tile
    read = iter([ref[...] for ref in matrices])
    left, right = (None if m is None else next(read) for m in (one.left, one.right))

    def step(i: Any, carry: Any) -> Any:
        starts = ((first + i * one.grid[0]) * tile[0], row * tile[1], column * tile[2])
        at, mask = tuple(map(pl.ds, starts, tile)), one.inside(starts)
        other = None if mask is None else jnp.zeros(tile, x_ref.dtype)
        x = plgpu.load(x_ref.at[at], mask=mask, other=other)
        y = _product(x, left, right) * one.scale
        plgpu.store(out_ref.at[at], y.astype(out_ref.dtype), mask=mask)
        return carry

    lax.fori_loop(0, one.steps, step, 0)


def _padded(matrix: np.ndarray) -> Float[Array, "a a"]:
    """A matrix with zeros to a size that Triton has."""
    more = _covering(len(matrix)) - len(matrix)
    return jnp.asarray(np.pad(matrix, (0, more)), jnp.bfloat16)


def _run(x: Array, one: _Pass, dtype: str, interpret: bool) -> Array:
    warps, stages = (4, 3) if math.prod(one.tile) <= VALUES else (8, 1)
    return pl.pallas_call(
        partial(_kernel, one=one),
        grid=one.grid,
        out_shape=jax.ShapeDtypeStruct(one.shape, jnp.dtype(dtype)),
        name="hadamard",
        **triton(interpret, warps, stages),
    )(x.reshape(one.shape), *(_padded(m) for m in (one.left, one.right) if m is not None))


def transform(x: Float[Array, "m k"], request: HadamardRequest) -> Float[Array, "m k"]:
    """Every run of x times the factors of the matrix, in the dtype of `x`."""
    *outer, last = _passes(request)
    y = x
    for one in outer:
        y = _run(y, one, "float32", request.interpret)
    return _run(y, last, request.dtype, request.interpret).reshape(x.shape)
