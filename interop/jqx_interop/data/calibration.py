# SPDX-License-Identifier: Apache-2.0
"""Calibration data: a file of token ids or of text becomes statistics batches.

A statistics batch is what one reduction sees at a time, a property of the data: a row of a .npy
file, otherwise one sequence. How many sequences are computed together is nobody's business here.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int32

from jqx.errors import InputError
from jqx_interop.checkpoints.problems import one_line

from .chat import Chat
from .documents import READERS
from .files import find_file, read_ids
from .tokens import load_tokenizer, sequences

BUNDLED = "calibration.txt"
SHAPES = {3: "[batches, batch, length]", 2: "[sequences, length]"}


@dataclass(frozen=True, eq=False)
class CalibrationSet:
    """Token ids, batch by batch, and where they came from."""

    source: str
    batches: tuple[Int32[np.ndarray, "_batch _length"], ...]

    def __iter__(self) -> Iterator[Int32[np.ndarray, "_batch _length"]]:
        """Iterate over the statistics batches in order."""
        return iter(self.batches)

    def __len__(self) -> int:
        """Count the statistics batches."""
        return len(self.batches)

    @property
    def tokens(self) -> int:
        """Number of ids in all batches."""
        return sum(batch.size for batch in self.batches)

    @property
    def digest(self) -> str:
        """sha256 of the ids and how they are batched; the source's name does not enter."""
        total = hashlib.sha256()
        for batch in self.batches:
            total.update(repr(batch.shape).encode() + batch.astype("<i4").tobytes())
        return total.hexdigest()


def load_calibration(
    source: str | Path | None,
    *,
    tokenizer_dir: str | Path | None,
    vocab_size: int,
    size: int,
    length: int,
) -> CalibrationSet:
    """Read calibration data for a model with `vocab_size` tokens.

    `source`: a .npy file of integers, [batches, batch, length] or [sequences, length], taken as
    given; a .txt, .md, .jsonl or .parquet file; None for the bundled text. Text goes through
    tokenizer.json of `tokenizer_dir` and is cut into at most `size` sequences of `length` ids,
    one a batch. Raises InputError for everything that cannot be used, ids outside the vocabulary
    included.
    """
    directory = None if tokenizer_dir is None else Path(tokenizer_dir)
    name, path = find_file(source, BUNDLED)
    if path.suffix.lower() == ".npy":
        ids = read_ids(path, SHAPES)
        batches = [*ids] if ids.ndim == 3 else [row[None] for row in ids]
    else:
        if size < 1 or length < 1:
            raise InputError(f"{size} sequences of {length} tokens are none. Give at least 1 of 1.")
        documents = READERS[path.suffix.lower()](path, Chat(directory))
        found = sequences(documents, load_tokenizer(directory), size, length)
        if not found:
            raise InputError(one_line(f"{path}: is empty, there is no text to calibrate on."))
        batches = [row[None] for row in found]
    _check_ids(batches, vocab_size, name)
    return CalibrationSet(name, tuple(np.array(batch, np.int32) for batch in batches))


def _check_ids(batches: list[np.ndarray], vocab_size: int, source: str) -> None:
    for number, batch in enumerate(batches):
        outside = (batch < 0) | (batch >= vocab_size)
        if outside.any():
            row, column = (int(i) for i in np.argwhere(outside)[0])
            raise InputError(
                one_line(
                    f"{source}: token id {batch[row, column]} at position {column} of sequence "
                    f"{row} in batch {number} is outside the vocabulary of {vocab_size}. "
                    "These ids belong to another model."
                )
            )
