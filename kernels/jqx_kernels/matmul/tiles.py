# SPDX-License-Identifier: Apache-2.0
"""How a product is cut into programs of a device."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from jqx_kernels.pallas import cdiv
from jqx_kernels.tiles import covering

FEW = 16
"""Rows of activations up to which a product takes as long as reading the matrix."""

PROGRAMS = 1056
"""Programs that are enough: eight for each of the 132 processors of an H100."""

LEAST = 16
"""The smallest side of a tile that tensor cores multiply."""


@dataclass(frozen=True, slots=True)
class Tiles:
    """Sizes of the tiles of one kernel, powers of two. `rows`: of x; `columns`: of y, that is rows
    of bytes of the matrix; `depth`: bytes of a row that are read at once. On GPUs alone `warps`,
    `stages`, and `splits`, the most parts that rows are cut into, whose products are summed after.
    """

    rows: int
    columns: int
    depth: int
    warps: int = 4
    stages: int = 3
    splits: int = 1


# 64 rows of 128 bytes: whole cache lines, and with four stages 32 KiB under way for every program
_READ = Tiles(rows=16, columns=64, depth=128, warps=4, stages=4, splits=8)
_MULTIPLY = Tiles(rows=64, columns=64, depth=64, warps=4, stages=3, splits=4)
_TPU = Tiles(rows=256, columns=256, depth=1024)

Table = Mapping[tuple[str, str], Tiles]
"""(element, "decode" or "tile") -> tiles."""


def _table(decode: Tiles, tile: Tiles) -> Table:
    elements = ("e4m3", "e2m1", "e2m1_down", "e3m2", "int8", "int4", "nf4")
    sizes = {"decode": decode, "tile": tile}
    return {(element, size): tiles for element in elements for size, tiles in sizes.items()}


TILES = _table(_READ, _MULTIPLY)
DEFAULTS = {"gpu": TILES, "tpu": _table(_TPU, _TPU)}
"""Platform -> its tiles, by reasoning, not measured."""


def size_of(m: int) -> str:
    """The name of the tiles for `m` rows of activations."""
    return "decode" if m <= FEW else "tile"


def tiles_for(
    element: str, m: int, shape: tuple[int, int], block_rows: int | None, table: Table = TILES
) -> Tiles:
    """The tiles for `m` rows of activations and a matrix of bytes of this shape, on a GPU.

    None is larger than what it covers, or than a block of rows that spans several. Rows of bytes
    are split only as far as there are too few programs without.
    """
    rows, columns = shape
    tiles = table[element, size_of(m)]
    most = rows if block_rows is None or block_rows == 1 else block_rows
    tiles = replace(
        tiles,
        rows=_fit(tiles.rows, m),
        columns=_fit(tiles.columns, most),
        depth=_fit(tiles.depth, columns),
    )
    programs = cdiv(m, tiles.rows) * cdiv(rows, tiles.columns)
    splits = min(tiles.splits, cdiv(columns, tiles.depth), max(PROGRAMS // programs, 1))
    return replace(tiles, splits=splits)


def _fit(size: int, axis: int) -> int:
    """The least power of two that covers `axis`, between LEAST and `size`."""
    return min(size, max(LEAST, covering(axis)))
