# SPDX-License-Identifier: Apache-2.0
"""Storage: how the arrays that hold one matrix are to be read, for kernels."""

from dataclasses import dataclass

from .packing import PACKINGS


@dataclass(frozen=True, slots=True)
class Storage:
    """How a matrix [n, k] is stored. Holds no arrays; hashable, so it can be static under jit.

    `element`: a row of CODECS. `block`: (rows, columns) that share a scale, None for a whole axis.
    `scale`: "float32", "e4m3" below a tensor scale, or "e8m0". `packing`: a row of PACKINGS.
    `bound`: what scales take the largest magnitude of a block to.
    """

    element: str
    block: tuple[int | None, int | None]
    scale: str
    packing: str
    bound: float

    @property
    def per_byte(self) -> tuple[int, int]:
        """(rows, columns) of codes in one byte."""
        return PACKINGS[self.packing].per_byte

    def columns(self, k: int) -> int:
        """How many of `k` columns share a scale."""
        return self.block[1] or k

    def __str__(self) -> str:
        """In a word or two."""
        rows, columns = (size or "all" for size in self.block)
        return f"{self.element} with {self.scale} scales of {rows} x {columns}"
