# SPDX-License-Identifier: Apache-2.0
"""The states between all blocks, in one memory-mapped file: forward they are written, backward they
are read, one block at a time.
"""

from pathlib import Path

import numpy as np
from jaxtyping import Float

from jqx_interop.checkpoints import allocate


class States:
    """`turns` times `count` arrays [rows, tokens, width] in the file `path`, made if it is not
    there.
    """

    def __init__(self, path: Path, shape: tuple[int, int, int, int, int], dtype: np.dtype):
        """`shape`: turns, count, rows, tokens, width."""
        size = int(np.prod(shape)) * dtype.itemsize
        if not path.exists() or path.stat().st_size != size:
            with open(path, "wb") as file:  # a mapping that meets a full disk kills the process
                allocate(file.fileno(), size)
        self._path, self._shape, self._dtype = path, shape, dtype

    def get(self, turn: int, i: int) -> Float[np.ndarray, "rows tokens width"]:
        """Array `i` of one turn, a copy."""
        return np.array(self._open("r")[turn, i])

    def put(self, turn: int, i: int, states: Float[np.ndarray, "rows tokens width"]) -> None:
        """Replace array `i` of one turn."""
        self._open("r+")[turn, i] = states

    def flush(self) -> None:
        """Make sure that what was put is on disk."""
        self._open("r+").flush()

    def _open(self, mode: str) -> np.memmap:
        return np.memmap(self._path, self._dtype, mode, shape=self._shape)  # pyright: ignore[reportCallIssue, reportArgumentType]
