# SPDX-License-Identifier: Apache-2.0
"""Matrices as kernels are given them: whole blocks of a length that a tile can hold, and a step
for every row of them.

Zeros fill what is missing. They change no largest magnitude, and what they become is cut off.
"""

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array

from .dispatch import Device
from .storage import Storage

SHIFTS = {"columns": (0, 4), "columns_high": (4, 0)}
"""Packing of two columns in a byte -> where the even and the odd one are."""


class Tile(NamedTuple):
    """What one program of a kernel holds at a time: `rows` times `groups` blocks, of `columns`
    values each.
    """

    rows: int
    groups: int
    columns: int

    @property
    def span(self) -> int:
        """The columns of the matrix."""
        return self.groups * self.columns


def power_of_two(size: int, most: int) -> int:
    """The largest power of two that divides `size` and is at most `most`, itself a power of two."""
    return min(size & -size, most)


def covering(size: int) -> int:
    """The least power of two that is not smaller than `size`."""
    return 1 << (size - 1).bit_length()


def padded(size: int, unit: int) -> int:
    """`size` up to the next multiple of `unit`."""
    return -(-size // unit) * unit


def filled(x: Array, rows: int, columns: int) -> Array:
    """`x` [n, k] with zeros to [rows, columns]."""
    n, k = x.shape
    return x if (n, k) == (rows, columns) else jnp.pad(x, ((0, rows - n), (0, columns - k)))


def stretch(x: Array, size: int, longer: int) -> Array:
    """`x` [n, k] in blocks of `size` columns, the last of which may be smaller, as blocks of
    `longer` columns.
    """
    n, k = x.shape
    x = filled(x, n, padded(k, size))
    if longer == size:
        return x
    blocks = x.reshape(n, x.shape[1] // size, size)
    return jnp.pad(blocks, ((0, 0), (0, 0), (0, longer - size))).reshape(n, -1)


def shrink(x: Array, size: int, longer: int, shape: tuple[int, ...]) -> Array:
    """The matrix of this `shape` that `stretch` made longer."""
    if longer != size:
        x = x.reshape(x.shape[0], x.shape[1] // longer, longer)[:, :, :size]
        x = x.reshape(x.shape[0], -1)
    return x if x.shape == shape else x[: shape[0], : shape[1]]


def grid_shape(storage: Storage, shape: tuple[int, ...]) -> tuple[int, int]:
    """(blocks of rows, blocks of columns) in a matrix of this shape."""
    rows, columns = (-(-s // (b or s)) for s, b in zip(shape, storage.block, strict=True))
    return rows, columns


def whole_grid(scale: Array, storage: Storage, shape: tuple[int, ...]) -> Array:
    """`scale` with an entry for every block. Raises ValueError where it does not broadcast."""
    grid = grid_shape(storage, shape)
    if scale.ndim != 2 or any(s not in (1, g) for s, g in zip(scale.shape, grid, strict=True)):
        raise ValueError(f"{storage} take a grid {grid} in a matrix {shape}, not {scale.shape}.")
    return jnp.broadcast_to(scale, grid)


def row_grid(scale: Array, storage: Storage, shape: tuple[int, ...]) -> Array:
    """`scale` with an entry for every row of every block: [n, blocks of columns]."""
    grid = whole_grid(scale, storage, shape)
    rows = storage.block[0] or shape[0]
    return grid if rows == 1 else jnp.repeat(grid, rows, axis=0)[: shape[0]]


def misfit(storage: Storage, shape: tuple[int, ...]) -> str | None:
    """Why a matrix of this shape cannot be stored so; None if it can."""
    if len(shape) != 2:
        return f"{shape} is no matrix"
    rows, columns = storage.per_byte
    if shape[0] % rows or shape[1] % columns:
        return f"{rows} x {columns} codes share a byte, which do not divide {shape}"
    return None


def gpu_tile(n: int, block: int, blocks: int) -> Tile:
    """Part of a matrix with `n` rows of `blocks` blocks, in powers of two as Triton has it: some
    whole blocks where a tile holds any, else part of one.
    """
    columns = power_of_two(block, 512)
    groups = power_of_two(blocks, 512 // columns) if columns == block else 1
    return Tile(power_of_two(n, 4096 // (groups * columns)), groups, columns)


def gpu_block(columns: int) -> int:
    """The length of blocks to which those of `columns` are stretched for `gpu_tile`."""
    return columns if columns & (columns - 1) == 0 else padded(columns, 16)


_LANES = 128
_WIDEST = 2048  # columns of a tile, of which a TPU holds several copies


def tpu_tile(block: int, blocks: int, groups: int) -> Tile:
    """Part of a matrix as Mosaic has it: whole blocks, the number of them a multiple of `groups`,
    or part of the only block of a row.
    """
    if blocks == 1:
        return Tile(_LANES, 1, 4 * _LANES)
    return Tile(_LANES, math.lcm(groups * block, 2 * _LANES) // block, block)


def tpu_block(columns: int, k: int) -> int:
    """The length of blocks to which those of `columns` are stretched for `tpu_tile`."""
    return padded(columns, 8 if columns < k else 4 * _LANES)


def wide_block(tile: Tile) -> str | None:
    """Why a TPU cannot hold such a tile; None if it can."""
    if tile.span <= _WIDEST:
        return None
    return f"holds {_WIDEST} columns, and {tile.groups} blocks have {tile.span}"


def no_tile(storage: Storage, shape: tuple[int, ...]) -> str | None:
    """Why a matrix cannot be taken apart in whole blocks of whole bytes; None if it can."""
    if 0 in shape:
        return f"has no tiles for an empty matrix {shape}"
    size, shared = storage.columns(shape[1]), storage.per_byte[1]
    return f"{shared} codes share a byte, and a block has {size}" if size % shared else None


def no_gpu(device: Device) -> str | None:
    """Why kernels that Triton compiles do not run on a device; None if they do."""
    if device.platform != "gpu" or device.capability is None:
        return "needs an NVIDIA GPU"
    return None if device.capability >= (8, 0) else "needs compute capability 8.0"


def no_capability(device: Device, least: tuple[int, int]) -> str | None:
    """Why a device is no CUDA GPU of this compute capability or a newer one; None if it is."""
    if device.platform != "gpu" or device.capability is None:
        return f"needs a CUDA GPU, not {device.platform}"
    if device.capability < least:
        return "needs compute capability {}.{}, not {}.{}".format(*least, *device.capability)
    return None


def no_tpu(device: Device) -> str | None:
    """Why kernels that Mosaic compiles do not run on a device; None if they do."""
    return None if device.platform == "tpu" else "needs a TPU"


def unknown_dtype(dtype: jnp.dtype) -> str | None:
    """Why kernels do not read or write matrices of this dtype; None if they do."""
    known = ("bfloat16", "float16", "float32")
    return None if dtype.name in known else f"knows {', '.join(known)}, not {dtype.name}"


def no_kernel(request: Any, elsewhere: str | None) -> str | None:
    """Why a kernel that works on tiles cannot do a request to encode or decode; None if it can.
    `elsewhere`: why it does not run on the device, which does not matter where it is interpreted.
    """
    return (
        (None if request.interpret else elsewhere)
        or unknown_dtype(request.dtype)
        or misfit(request.storage, request.shape)
        or no_tile(request.storage, request.shape)
    )


def no_storage(device: Device, request: Any) -> str | None:
    """Why the storage of a request does not fit its matrix, whatever computes it."""
    return misfit(request.storage, request.shape)
