# SPDX-License-Identifier: Apache-2.0
"""States on disk: what goes forward and back through the blocks, far more than memory holds.

They are read and written, not mapped: pages of a mapping count as memory of the process.
"""

import os
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
            with open(path, "wb") as file:
                allocate(file.fileno(), size)
        self._path, self._dtype = path, dtype
        self._count, self._shape = shape[1], shape[2:]
        self._size = int(np.prod(self._shape)) * dtype.itemsize

    def get(self, turn: int, i: int) -> Float[np.ndarray, "rows tokens width"]:
        """Array `i` of one turn."""
        found = np.empty(self._shape, self._dtype)
        with open(self._path, "rb", buffering=0) as file:
            file.seek((turn * self._count + i) * self._size)
            if file.readinto(found.reshape(-1).view(np.uint8).data) != self._size:
                raise OSError(f"{self._path} ends too early")
        return found

    def put(self, turn: int, i: int, states: Float[np.ndarray, "rows tokens width"]) -> None:
        """Replace array `i` of one turn."""
        data = np.ascontiguousarray(states, self._dtype).reshape(-1).view(np.uint8).data
        with open(self._path, "r+b", buffering=0) as file:
            file.seek((turn * self._count + i) * self._size)
            if file.write(data) != self._size:
                raise OSError(f"{self._path}: the disk took only a part")

    def flush(self) -> None:
        """Make sure that what was put is on disk."""
        with open(self._path, "r+b") as file:
            os.fsync(file.fileno())
