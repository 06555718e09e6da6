# SPDX-License-Identifier: Apache-2.0
"""What is known of all tokens between the front of a block with experts and its end: the states,
what experts read, which of them, and the sums of what they made.
"""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int

from jqx.errors import InputError
from jqx.models import Compute, Experts, Front, Routed

from .checkpoints import allocate
from .device import callers

IN_MEMORY = 1 << 28
"""Bytes of states that stay in memory."""
MOST_ROWS, FEWEST_ROWS = 2048, 16
"""Tokens that an expert takes at once: one of few numbers, so that few programs are compiled."""


class Sent(NamedTuple):
    """The tokens of one expert, their numbers, and the weights it has for them."""

    tokens: Int[np.ndarray, " n"]
    weights: Float32[np.ndarray, " n"]

    def piece(self, at: int, count: int) -> "Sent":
        """So many of them from `at` on."""
        return Sent(self.tokens[at : at + count], self.weights[at : at + count])


def pieces_of(count: int) -> Iterator[tuple[int, int]]:
    """Where parts of so many tokens begin, and how many they are."""
    for at in range(0, count, MOST_ROWS):
        yield at, min(MOST_ROWS, count - at)


def rows_for(count: int) -> int:
    """The number of rows that `count` tokens are filled up to: a power of two, or half as much
    again.
    """
    power = max(FEWEST_ROWS, 1 << max(count - 1, 0).bit_length())
    return power * 3 // 4 if power > FEWEST_ROWS and count <= power * 3 // 4 else power


class LastFew:
    """The parameters of the last few experts that were asked for, by any of several threads."""

    def __init__(self, load: Callable[[int], Any]):
        """`load(e)` reads those of expert `e`."""
        self._load, self._lock = load, Lock()
        self._there: dict[int, Any] = {}

    def get(self, e: int) -> Any:
        """Those of expert `e`."""
        with self._lock:
            if e not in self._there:
                while len(self._there) >= callers():
                    del self._there[next(iter(self._there))]
                self._there[e] = self._load(e)
            return self._there[e]


def folder_for(shape: tuple[int, int, int, int], arrays: int, place: Path) -> Path | None:
    """`place` if so many arrays of states, `shape` of each, are too large for memory, else None."""
    return place if 4 * arrays * math.prod(shape) > IN_MEMORY else None


class RoutedStates:
    """The fronts of some calls, one after another, and the sums of their tokens."""

    def __init__(
        self,
        row: Experts,
        shape: tuple[int, int, int, int],
        real: int,
        compute: Compute,
        folder: Path | None,
    ):
        """`shape`: calls, rows, tokens, width; `real`: how many rows are data; states lie in files
        in `folder`, in memory where None.
        """
        count, rows, length, self.width = shape
        self.row, self._folder, self._files = row, folder, list[Path]()
        self._call, self._size, self._tokens = (rows, length), rows * length, count * rows * length
        self.real, self._length = real * length, length
        carrier = np.dtype(compute.carrier)
        self._x, self._h = self.states("x", carrier), self.states("h", carrier)
        self._beside = None if row.shared is None else self.states("beside", carrier)
        self.total = self.states("total", np.dtype(np.float32))
        self.ids = np.zeros((self._tokens, row.top_k), np.int32)
        """The experts of every token."""
        self._weights = np.zeros(self.ids.shape, np.float32)

    def states(self, name: str, dtype: np.dtype) -> Float[np.ndarray, "t k"]:
        """Zeros for every token, in the file experts-NAME.bin if states lie in files."""
        shape = (self._tokens, self.width)
        if self._folder is None:
            return np.zeros(shape, dtype)
        path = self._folder / f"experts-{name}.bin"
        with open(path, "wb") as file:  # a mapping that meets a full disk kills the process
            allocate(file.fileno(), int(np.prod(shape)) * dtype.itemsize)
        self._files.append(path)
        return np.memmap(path, dtype, "r+", shape=shape)  # pyright: ignore[reportCallIssue, reportArgumentType]

    def at(self, n: int) -> slice:
        """The tokens of call `n`."""
        return slice(n * self._size, (n + 1) * self._size)

    def put(self, n: int, front: Front) -> None:
        """Keep what was found of call `n`."""
        at, given = self.at(n), front.given
        self._h[at] = np.asarray(front.h).reshape(self._size, -1)
        self._x[at], self.ids[at] = np.asarray(given.x), np.asarray(given.ids)
        self._weights[at] = np.asarray(given.weights, np.float32)
        if self._beside is not None:
            assert front.beside is not None
            self._beside[at] = np.asarray(front.beside).reshape(self._size, -1)

    def sent(self) -> list[Sent]:
        """What is sent to every expert, in the order of tokens."""
        pairs = self.ids[: self.real].reshape(-1)
        weights, k = self._weights[: self.real].reshape(-1), self.row.top_k
        order = np.argsort(pairs, kind="stable")
        ends = np.searchsorted(pairs[order], np.arange(self.row.number + 1))
        own = (order[a:b] for a, b in zip(ends[:-1], ends[1:], strict=True))
        return [Sent(at // k, weights[at]) for at in own]

    def everywhere(self) -> list[Sent]:
        """As if all tokens were sent to every expert: with weight 0 where they are not. Raises
        InputError where weights multiply what experts read.
        """
        if self.row.weighs_input:
            raise InputError(
                "experts of this model read their tokens times the weights that the router gives, "
                "and other tokens have none: leave --all-experts out"
            )
        found = []
        for one in self.sent():
            weights = np.zeros(self.real, np.float32)
            weights[one.tokens] = one.weights
            found.append(Sent(np.arange(self.real), weights))
        return found

    def given(self, sent: Sent) -> tuple[Array, Array, Array]:
        """What an expert is given of some of its tokens: rows, their weights, and which of them
        are no filling.
        """
        count, size = len(sent.tokens), rows_for(len(sent.tokens))
        x = np.zeros((size, self.width), self._x.dtype)
        x[:count] = self._x[sent.tokens]
        weights = np.pad(sent.weights, (0, size - count))
        return jnp.asarray(x), jnp.asarray(weights), jnp.arange(size) < count

    def settle(self) -> None:
        """Sums are complete: the rows that the last call repeats have those of the last one."""
        self.total[self.real :] = np.resize(
            self.total[self.real - self._length : self.real],
            (self._tokens - self.real, self.width),
        )

    def front(self, n: int) -> tuple[Front, Float32[np.ndarray, "t k"]]:
        """What was put of call `n`, and its sums."""
        at, shape = self.at(n), (*self._call, self.width)
        given = Routed(*(jnp.asarray(a[at]) for a in (self._x, self.ids, self._weights)))
        beside = None if self._beside is None else jnp.asarray(self._beside[at].reshape(shape))
        h = jnp.asarray(self._h[at].reshape(shape))
        return Front(h, given, beside), np.asarray(self.total[at])

    def close(self) -> None:
        """Remove the files."""
        for path in self._files:
            path.unlink(missing_ok=True)
