# SPDX-License-Identifier: Apache-2.0
"""Finishing units: their tensors are encoded and written by a few threads, then made durable and
journalled in order.

The caller goes on with the next block meanwhile. The first error stops everything and is raised
where the caller asks.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from jqx.calibration import kv_scale

from .attentions import Attention
from .checkpoints import DTYPES, ShardWriter
from .experts import linears_of_experts
from .job import Job
from .keeping import kept_codes
from .runner import BlockStats
from .searched import Facts, Search
from .together import bunched
from .weights import Groups, checked_amax, encode_group, linear_groups, read_tensor

Record = Callable[[dict[str, Any]], None]


class Finisher:
    """Writes units. A context manager: leaving it waits, and raises what went wrong."""

    def __init__(
        self,
        job: Job,
        writer: ShardWriter,
        record: Record,
        advance: Callable[[float], None],
        workers: int,
    ):
        """`record` journals one finished unit; `advance` is told the source bytes that are done."""
        self._job, self._writer, self._record, self._advance = job, writer, record, advance
        self._fusion = job.fusion
        self.facts: Facts = {}
        """What was searched and found, by linear; finite numbers."""
        self.experts: list[Mapping[str, Any]] = []
        """What is told of the experts of every block that has some."""
        self._workers = ThreadPoolExecutor(workers, thread_name_prefix="jqx-encode")
        self._closer = ThreadPoolExecutor(1, thread_name_prefix="jqx-sync")
        self._closing: list[Future[None]] = []
        self._attentions = {attention.unit: attention for attention in job.attentions}

    def __enter__(self) -> "Finisher":
        """Return the finisher itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Wait for everything, or give up what has not begun if an error is on its way."""
        self._workers.shutdown(wait=True, cancel_futures=kind is not None)
        self._closer.shutdown(wait=True, cancel_futures=kind is not None)
        if kind is None:
            self.check()

    def submit(self, unit: int, stats: BlockStats, extra: Mapping[str, Any] | None = None) -> None:
        """Write one unit with the statistics it needs; `extra` goes into its journal record."""
        self.check()
        while sum(not future.done() for future in self._closing) > 1:
            self._closing[-2].result()
        tasks = [self._workers.submit(*task, stats) for task in self._tasks(unit)]
        if attention := self._attentions.get(unit):
            tasks.append(self._workers.submit(self._write, kv_tensors(self._job, attention, stats)))
        told = {"experts": dict(stats.experts)} if stats.experts else {}
        self.experts += told.values()
        record = {**told, **(extra or {})}
        self._closing.append(self._closer.submit(self._close, unit, tasks, record))

    def drain(self) -> None:
        """Wait until everything submitted is journalled."""
        for future in self._closing:
            future.result()

    def check(self) -> None:
        """Raise the first error of what was submitted."""
        for future in self._closing:
            if future.done():
                future.result()

    def _tasks(self, unit: int) -> Iterator[tuple[Any, Any]]:
        """Pieces of work in order, as a function and its argument."""
        groups, others = self._parts(unit)
        if not self._job.searches:
            yield from ((self._encode, group) for group in groups)
        else:
            bunches = list(bunched(self._job, groups))
            if self._job.folds.norms or self._job.folds.rows:
                bunches, changed = self._folded(bunches)
                others = [name for name in others if name not in changed]
            yield from ((self._search, bunch) for bunch in bunches)
        yield from ((self._copy, name) for name in others)

    def _folded(self, bunches: list[Groups]) -> tuple[list[Groups], set[str]]:
        """All that factors may move between in one piece, and experts, which have no part in that,
        in their own; and the tensors that change besides.
        """
        experts = linears_of_experts(self._job.spec)
        own = [bunch for bunch in bunches if bunch[0][0] in experts]
        rest = [group for bunch in bunches if bunch[0][0] not in experts for group in bunch]
        changed = set(Search(self._job, rest, {}).changes())
        return [rest, *own] if rest else own, changed

    def _parts(self, unit: int) -> tuple[Groups, list[str]]:
        """The groups of linears of a unit, and the tensors that are copied unless something is
        folded into them.
        """
        names = self._job.inventory.units[unit]
        groups = linear_groups(self._job, names)
        quantized = {f"{path}.weight" for group in groups for path in group}
        return groups, [name for name in names if name not in quantized]

    def _encode(self, group: tuple[str, ...], stats: BlockStats) -> None:
        self._write(encode_group(self._job, group, stats.inputs))
        self._done(path + ".weight" for path in group)

    def _search(self, groups: Groups, stats: BlockStats) -> None:
        search = Search(self._job, groups, stats.inputs)
        self._write(search.run())
        sent = {path: {"tokens": float(n)} for path, n in stats.sent.items()}
        self.facts |= {p: _finite(f) | sent.get(p, {}) for p, f in search.facts.items()}
        self._done(f"{path}.weight" for group in groups for path in group)
        self._done(search.changes())

    def _copy(self, name: str, stats: BlockStats) -> None:
        if (path := name.removesuffix(".weight")) in self._job.kept:
            self._keep(path)
            return
        array = read_tensor(self._job, name)
        if array.dtype in (DTYPES["BF16"], DTYPES["F16"], DTYPES["F32"]):
            checked_amax(array, name)
        self._fusion.write(self._writer, name, array)
        self._job.checkpoint.release(name)
        self._done((name,))

    def _keep(self, path: str) -> None:
        """Write a linear as it lies in a quantized source."""
        job, name = self._job, f"{path}.weight"
        self._write(job.named(path, kept_codes(job.checkpoint, path)))
        job.checkpoint.release(name)
        self._done((name,))

    def _done(self, names: Iterable[str]) -> None:
        """Report the source bytes of tensors that are finished."""
        self._advance(sum(self._job.checkpoint.tensors[name].nbytes for name in names))

    def _write(self, arrays: Iterator[tuple[str, np.ndarray]]) -> None:
        for name, array in arrays:
            self._fusion.write(self._writer, name, array)

    def _close(self, unit: int, tasks: list[Future[None]], extra: dict[str, Any]) -> None:
        for task in tasks:
            task.result()
        self._writer.sync()
        self._record({"unit": unit, **self._told(unit), **extra})

    def _told(self, unit: int) -> dict[str, Facts]:
        """What a report will tell of a unit: journalled, so that a run that goes on knows it."""
        if self._job.settings.report is None:
            return {}
        paths = (name.rpartition(".")[0] for name in self._job.inventory.units[unit])
        return {"facts": {path: self.facts[path] for path in paths if path in self.facts}}


def _finite(facts: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in facts.items() if math.isfinite(value)}


def kv_tensors(
    job: Job, attention: Attention, stats: BlockStats
) -> Iterator[tuple[str, np.ndarray]]:
    """The scales, and for affine formats the biases, of one attention's keys and values."""
    for linear, letter in ((attention.k, "k"), (attention.v, "v")):
        if (path := f"{attention.path}.{letter}") in stats.kv:
            amax, bias = stats.kv[path]
            scale = np.asarray(kv_scale(amax, path), np.float32)
            yield job.target.kv_name(linear, f"{letter}_scale"), scale.reshape(job.target.kv_shape)
            if bias is not None:
                yield job.target.kv_name(linear, f"{letter}_bias"), bias
