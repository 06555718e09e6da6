# SPDX-License-Identifier: Apache-2.0
"""The hidden states between two blocks: on the device while they fit, otherwise in memory-mapped
files.

On disk there are two files that take turns: block i reads one and writes the other, so a run that
is killed finds the states before the block it was at, whole, with the digest the journal recorded.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from .checkpoints import allocate

FILES = ("hidden-0.bin", "hidden-1.bin")


class HiddenStates:
    """`count` arrays [rows, tokens, hidden], read before a block and replaced after it. Of all rows
    the first `real` are data; the others repeat the last of them.

    `folder`: where the files lie; None keeps everything on the device.
    """

    def __init__(
        self, shape: tuple[int, int, int], rows: int, dtype: np.dtype, folder: Path | None
    ):
        """`shape`: all states [n, tokens, hidden], taken `rows` at a time."""
        self.real, tokens, width = shape
        self.rows = rows
        self.count = -(-self.real // rows)
        self.block = 0
        self._dtype = dtype
        self.shape = (self.count, rows, tokens, width)
        self.folder = folder
        self._arrays: list[jax.Array | None] = [None] * self.count

    def batches(self, rows: np.ndarray) -> Iterator[np.ndarray]:
        """Rows of anything, as many a time as states; the last batch repeats its last row."""
        for start in range(0, len(rows), self.rows):
            part = rows[start : start + self.rows]
            fill = self.rows - len(part)
            yield np.concatenate([part, np.repeat(part[-1:], fill, axis=0)]) if fill else part

    def get(self, i: int) -> jax.Array:
        """The states of batch `i` before the present block."""
        if self.folder is None:
            array = self._arrays[i]
            assert array is not None
            return array
        return jnp.asarray(self._open(self.block, "r")[i])

    def put(self, i: int, states: jax.Array) -> None:
        """The states of batch `i` after the present block, or before the first."""
        self._arrays[i] = states
        if self.folder is not None:
            self._open(self.block + 1, "r+")[i] = np.asarray(states)
            self._arrays[i] = None

    def turn(self) -> None:
        """The present block is done: its results become the next one's input."""
        self.block += 1

    def digest(self) -> str | None:
        """Write the states before the present block out for good; returns their digest. None if
        they are not in files.
        """
        if self.folder is None:
            return None
        states = self._open(self.block, "r+")
        states.flush()
        return self._digest(states)

    def resume(self, block: int, digest: str) -> bool:
        """Take up the files as they were before `block`; False if they are not those."""
        if self.folder is None or not (self.folder / FILES[block % 2]).exists():
            return False
        if (self.folder / FILES[block % 2]).stat().st_size != self._bytes:
            return False
        self.block = block
        return self._digest(self._open(block, "r")) == digest

    @property
    def _bytes(self) -> int:
        return int(np.prod(self.shape)) * self._dtype.itemsize

    def _open(self, turn: int, mode: str) -> np.memmap:
        assert self.folder is not None
        path = self.folder / FILES[turn % 2]
        if mode == "r+" and (not path.exists() or path.stat().st_size != self._bytes):
            with open(path, "wb") as file:  # a mapping that meets a full disk kills the process
                allocate(file.fileno(), self._bytes)
        return np.memmap(path, self._dtype, mode, shape=self.shape)  # pyright: ignore[reportCallIssue, reportArgumentType]

    def _digest(self, states: np.memmap) -> str:
        total = hashlib.sha256()
        for part in states:
            total.update(np.ascontiguousarray(part).view(np.uint8).data)
        return total.hexdigest()
