# SPDX-License-Identifier: Apache-2.0
"""Statistics of one expert's inputs: put together with those of others, and kept in files where
they are large.
"""

import tempfile
from pathlib import Path

import numpy as np

from jqx.algorithms import InputStats
from jqx.algorithms.quadratic import gram
from jqx.tensors.stats import MERGES, kind_of


def merged(a: InputStats | None, b: InputStats) -> InputStats:
    """The statistics of two sets of tokens together. Second moments take the place of tokens."""
    b = _with_gram(b)
    if a is None:
        return b
    found = {
        kind: MERGES[kind_of(kind).merge](a[kind], b[kind]) for kind in b if kind != "channel_mean"
    }
    if "channel_mean" in b:
        total = max(int(a["tokens"]) + int(b["tokens"]), 1)
        parts = (row["channel_mean"] * (int(row["tokens"]) / total) for row in (a, b))
        found["channel_mean"] = sum(parts)
    return found


def _with_gram(stats: InputStats) -> InputStats:
    found = {kind: np.asarray(value) for kind, value in stats.items() if kind != "root"}
    if "root" in stats:
        found["gram"] = np.asarray(gram(stats, "experts"))
    return found


def spilled(stats: InputStats, place: Path) -> InputStats:
    """`stats` with large arrays in files that vanish when nothing needs them."""
    found = {}
    for kind, value in stats.items():
        array = np.asarray(value)
        if array.nbytes > SPILLED:
            with tempfile.TemporaryFile(dir=place) as file:
                file.truncate(array.nbytes)
                kept = np.memmap(file, array.dtype, "r+", shape=array.shape)
            kept[...] = array
            array = kept
        found[kind] = array
    return found


SPILLED = 1 << 18
"""Bytes of an array from which on it lies in a file: of hundreds of experts there are many."""
