# SPDX-License-Identifier: Apache-2.0
"""Coordinate descent over tiles: one size is changed at a time, and what is faster is kept."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import NamedTuple

from jqx_kernels.matmul.tiles import Tiles

Sizes = Mapping[str, tuple[int, ...]]
SIZES: Mapping[str, Sizes] = {
    "gpu": {
        "columns": (32, 64, 128),
        "depth": (32, 64, 128, 256),
        "warps": (2, 4, 8),
        "stages": (2, 3, 4, 5),
        "splits": (1, 2, 4, 8, 16),
    },
    "tpu": {"columns": (128, 256, 512), "depth": (512, 1024, 2048)},
}
"""Platform -> the sizes of tiles that are tried."""

HEIGHTS: Mapping[str, Sizes] = {
    "gpu": {"rows": (16, 32, 64, 128)},
    "tpu": {"rows": (128, 256, 512)},
}
"""The same where there are many rows of activations; of few there is only one tile."""

MOST = {"gpu": 1 << 14, "tpu": 1 << 20}
"""Platform -> bytes of a tile of the matrix that, decoded, still fit what a program holds."""


def sizes_for(platform: str, size: str) -> Sizes:
    """What is tried for "decode" or "tile"."""
    return {**SIZES[platform], **(HEIGHTS[platform] if size == "tile" else {})}


class Found(NamedTuple):
    """The fastest tiles, their cost, that of the first ones, and how many were measured; costs are
    None where nothing ran.
    """

    tiles: Tiles
    cost: float | None
    first: float | None
    tried: int


def descend(start: Tiles, sizes: Sizes, most: int, cost: Callable[[Tiles], float | None]) -> Found:
    """The tiles of least `cost`, beginning with `start`, until no single change is better. `most`:
    bytes of a tile of the matrix.

    `cost` is None for tiles that cannot be compiled.
    """
    known = {start: cost(start)}
    first, best, changed = known[start], start, True
    while changed:
        changed = False
        for tiles in neighbours(best, sizes, most):
            if tiles not in known:
                known[tiles] = cost(tiles)
            if _less(known[tiles], known[best]):
                best, changed = tiles, True
    return Found(best, known[best], first, len(known))


def neighbours(tiles: Tiles, sizes: Sizes, most: int) -> Iterator[Tiles]:
    """Those that differ in one of `sizes`, and fit."""
    for field, values in sizes.items():
        for value in values:
            other = replace(tiles, **{field: value})
            if other != tiles and other.columns * other.depth <= most:
                yield other


def _less(a: float | None, b: float | None) -> bool:
    return a is not None and (b is None or a < b)
