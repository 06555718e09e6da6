# SPDX-License-Identifier: Apache-2.0
"""Statistics of inputs beyond one magnitude: collected once for all linears that read one input, in
the order of the data.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jqx.algorithms import InputStats
from jqx.calibration.histograms import FIRST_BINS, Histogram
from jqx.calibration.moments import Wanted, add, batch_ends, results, start
from jqx.errors import InputError
from jqx.formats import find_format

from .experts import linears_of_experts
from .job import Job

BLOCK = 128
"""Channels whose moments are kept together: those of smaller blocks are among them."""

Readers = Mapping[str, tuple[str, ...]]
"""Linear that stands for an input -> all linears that read it."""


def readers(job: Job, unit: int) -> dict[str, tuple[str, ...]]:
    """The inputs of one unit of which more than the amax is needed."""
    groups = {path: group for group in job.inventory.siblings for path in group}
    inside, found = set(job.inventory.units[unit]), {}
    for path in job.choices:
        if path + ".weight" in inside and set(job.wanted(path)) - {"amax"}:
            leader = groups.get(path, (path,))[0]
            found.setdefault(leader, []).append(path)
    return {leader: tuple(members) for leader, members in found.items()}


def kinds_of(job: Job, path: str) -> tuple[str, ...]:
    """What is collected for one linear: all second moments instead of those of blocks that would
    not hold the blocks of its format. What is `asked` for several recipes is that already.
    """
    kinds, width = job.wanted(path), job.modules[path].shape[1]
    columns = find_format(job.choices[path].weight or "").block[1] or width
    if job.asked is None and math.gcd(width, BLOCK) % columns:
        kinds = tuple("gram" if kind == "block_gram" else kind for kind in kinds)
    return tuple(dict.fromkeys(kinds))


def wanted_of(job: Job, members: Iterable[str], tokens: int) -> Wanted:
    """What is collected of the input of `members`, of which there are `tokens` in all: the tokens
    themselves instead of second moments where they are fewer than channels.

    Every kind is collected by itself and in one way, whatever else is: so what was kept for many
    recipes gives the bytes of each.
    """
    members = tuple(members)
    kinds = dict.fromkeys(kind for path in members for kind in kinds_of(job, path))
    width = job.modules[members[0]].shape[1]
    # how many tokens an expert will be sent is not known when a file of statistics is planned
    planned = job.asked is not None and members[0] in linears_of_experts(job.spec)
    if "gram" in kinds and tokens < width and not planned:
        kinds = {"root" if kind == "gram" else kind: None for kind in kinds}
    return Wanted(tuple(kinds), width, math.gcd(width, BLOCK), tokens)


class Collecting:
    """The statistics of some inputs, which come row by row in the order of the data."""

    def __init__(self, job: Job, wanted: Mapping[str, Wanted], sizes: Sequence[int]):
        """`wanted` by linear; `sizes`: rows in every statistics batch."""
        self._dtype, self._ends = job.dtype.name, batch_ends(sizes)
        self._moments = {path: start(row) for path, row in wanted.items()}
        self._rows = dict.fromkeys(wanted, 0)
        counted = [path for path, row in wanted.items() if "histogram" in row.kinds]
        self._histograms: dict[str, Histogram | None] = dict.fromkeys(counted)
        self._waiting: dict[str, list[np.ndarray]] = {path: [] for path in counted}

    def add(self, path: str, x: jax.Array | np.ndarray) -> None:
        """The next rows [rows, tokens, k]; what is beyond the last batch is dropped."""
        at = self._rows[path]
        count = min(len(x), len(self._ends) - at)
        ends = np.zeros(len(x), bool)
        ends[:count] = self._ends[at : at + count]
        rows, flags = jnp.asarray(x), jnp.asarray(ends)
        self._moments[path] = add(
            self._moments[path], rows, flags, jnp.int32(count), dtype=self._dtype
        )
        self._rows[path] = at + count
        if path in self._histograms:
            self._count(path, np.asarray(x)[:count], ends)

    def _count(self, path: str, rows: np.ndarray, ends: np.ndarray) -> None:
        """Take rows into the histogram, a statistics batch at a time."""
        for row, end in zip(rows.astype(self._dtype), ends, strict=False):
            self._waiting[path].append(row)
            if end:
                batch, so_far = np.stack(self._waiting[path]), self._histograms[path]
                self._waiting[path] = []
                done = Histogram.start(batch) if so_far is None else so_far.fold(batch)
                self._histograms[path] = done

    def results(self, readers: Readers) -> dict[str, InputStats]:
        """The statistics by linear. Raises InputError for inputs that are not finite."""
        found: dict[str, InputStats] = {}
        for leader, members in readers.items():
            stats = results(self._moments.pop(leader)) | self._counts(leader)
            check_finite(leader, stats)
            found |= dict.fromkeys(members, stats)
        return found

    def _counts(self, path: str) -> dict[str, np.ndarray | np.float32]:
        """The histogram of one input, if there is one, with bins to a multiple of the first."""
        if (found := self._histograms.get(path)) is None:
            return {}
        counts = np.pad(found.counts, (0, -len(found.counts) % FIRST_BINS))
        return {"histogram": counts.astype(np.int32), "histogram_width": found.width}


def check_finite(path: str, stats: Mapping[str, Any]) -> None:
    """Raises InputError for statistics that hold NaN or infinities, or of no tokens."""
    if int(stats.get("tokens", 1)) == 0:
        raise InputError(f"calibration gave {path} no tokens: give it data")
    for kind, value in stats.items():
        if not bool(np.isfinite(np.asarray(jnp.sum(value), np.float32))):
            raise InputError(
                f"the calibration inputs of {path} are not finite ({kind}); check the weights, or "
                "calibrate in another precision (--compute)"
            )
