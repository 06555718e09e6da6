# SPDX-License-Identifier: Apache-2.0
"""ptq: a checkpoint in, a quantized checkpoint out, one block in memory at a time.

    prepare -> for every unit: statistics -> codes and scales -> written, synced, journalled
            -> renamed to OUT

A run that is killed leaves its journal; the same command goes on from it and ends with the same
bytes.
"""

import platform
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np

from jqx.config import to_json
from jqx.errors import InputError
from jqx.recipes import Recipe
from jqx.tensors.paths import owner_of

from .chain import rows_per_call
from .checkpoints import ShardWriter, Workspace, digest, parse_size, plan_shards, small_files
from .data import Activations, CalibrationSet, load_calibration
from .describe import write_descriptions
from .device import compute_of, processors
from .experts import room_for_states
from .families import context_of
from .hidden import HiddenStates
from .job import Job, prepare
from .mixtures import experts_line
from .outputs import pieces_of
from .progress import Progress, Silent
from .recorded import Completed, Recorded, unrecorded
from .report import Report, report_of
from .report_files import check_apart, publish_report, stage_report
from .runner import BlockStats, Runner
from .saved_stats import SavedStats
from .searched import Facts
from .settings import Settings
from .units import Finisher


@dataclass(frozen=True, kw_only=True, slots=True)
class Inputs:
    """Where the statistics of a job come from; all None where none are needed. `calibration` beside
    `activations` is for what was not recorded.
    """

    calibration: CalibrationSet | None = None
    activations: Activations | None = None
    saved: SavedStats | None = None

    @property
    def tokens(self) -> int:
        """How many tokens the model will be run on."""
        return self.calibration.tokens if self.calibration else 0

    @property
    def told(self) -> dict[str, Any]:
        """What a report tells of them."""
        given = {"activations": self.activations, "statistics": self.saved}
        told = {name: str(source.path) for name, source in given.items() if source is not None}
        if (data := self.calibration) is not None:
            told |= {"data": str(data.source), "batches": len(data), "tokens": data.tokens}
        return told


def ptq(
    model: str | Path,
    out: str | Path,
    recipe: str | Recipe = "fp8",
    *,
    progress: Progress | None = None,
    **settings: Any,
) -> Report:
    """Quantize the checkpoint `model` by `recipe` and write it to `out`, which appears complete or
    not at all.

    `settings` are the fields of `Settings` (`calib`, `kv_cache`, `batch_size`, ...). Returns what
    was done. Raises InputError, before anything is written where that can be known, with a message
    for people.
    """
    job = prepare(model, recipe, Settings(**settings))
    return run(job, out, progress or Silent())


def load_inputs(job: Job) -> Inputs:
    """Open the calibration data a job needs.

    Raises InputError for data that cannot be used, and for a file that is not there even if nothing
    needs it.
    """
    given = job.settings
    for path in (given.calib, given.activations):
        if path is not None and not Path(path).exists():
            raise InputError(f"{path}: no such file; give calibration data that is on this disk")
    if given.stats is not None and not Path(given.stats).is_dir():
        raise InputError(f"{given.stats} holds no statistics: jqx calibrate writes them")
    if given.stats is not None and given.activations is not None:
        raise InputError("statistics and activations are both given: take one of them")
    if not (job.needs_inputs or job.needs_kv):
        return Inputs()
    if job.settings.stats is not None:
        return Inputs(saved=SavedStats(job, job.settings.stats))
    if job.settings.activations is None:
        return Inputs(calibration=_calibration(job))
    activations = Activations(job.settings.activations)
    more = _calibration(job) if unrecorded(job, activations) else None
    return Inputs(activations=activations, calibration=more)


def _calibration(job: Job) -> CalibrationSet:
    assert job.spec is not None
    return load_calibration(
        job.settings.calib,
        tokenizer_dir=job.checkpoint.path,
        vocab_size=job.spec.vocab,
        size=job.settings.calib_size,
        length=min(job.settings.calib_seq, context_of(job.checkpoint.config)),
    )


def run(job: Job, out: str | Path, progress: Progress, inputs: Inputs | None = None) -> Report:
    """Carry out a prepared job; `inputs` are its `load_inputs`, if they are open already."""
    started = time.monotonic()
    if (asked := job.settings.report) is not None:
        check_apart(asked, out, job.checkpoint.path)
    inputs = inputs or load_inputs(job)
    if (data := inputs.calibration) is not None:
        shape = f"{len(data)} batches, {data.tokens:,} tokens"
        progress.note(f"calibrating on {data.source}: {shape}")
    plans = plan_shards(job.outputs, job.settings.max_shard_size)
    with Workspace(out, job.checkpoint.path) as space, _told_where(space.directory):
        records = space.begin(fingerprint(job, inputs), restart=job.settings.restart)
        done = {record["unit"] for record in records if "unit" in record}
        finished = _names_in(job, done) if done else None
        with ShardWriter(space.files, plans, finished) as writer:
            if done:
                progress.note(
                    f"going on with an unfinished run: {len(done)} parts are there already"
                )
            try:
                facts, experts = _work(job, inputs, space, writer, records, progress)
            except InputError as error:
                error.add_note("after a change of the model or the data pass --restart")
                raise
            writer.finish()
        for file in small_files(job.checkpoint):
            shutil.copyfile(file, space.files / file.name)
        write_descriptions(job, space.files)
        done = report_of(job, Path(out), plans, time.monotonic() - started)
        done = replace(done, experts=experts_line(experts))
        told = (job, done, facts, inputs.told, experts)
        staged = None if asked is None else stage_report(*told)
        space.publish()
        if staged is not None:
            publish_report(staged)
    return done


@contextmanager
def _told_where(folder: Path) -> Iterator[None]:
    """Turn what the system refuses into an InputError that names a place and the way out."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{error.filename or folder}: {error.strerror or error}. What is finished is kept: "
            "once that is put right, the same command goes on where it was"
        ) from error


def fingerprint(job: Job, inputs: Inputs) -> dict[str, Any]:
    """Everything the bytes of a run depend on, as JSON."""
    device = jax.devices()[0]
    return {
        "model": digest(job.checkpoint),
        "config": to_json(job.config),
        "target": job.settings.target,
        "calibration": inputs.calibration.digest if inputs.calibration else None,
        "activations": inputs.activations.digest if inputs.activations else None,
        "stats": inputs.saved.digest if inputs.saved else None,
        "compute": repr(compute_of(job.settings.compute, job.dtype)),
        "batch_size": job.settings.batch_size,
        "max_shard_size": parse_size(job.settings.max_shard_size),
        "versions": {name: version(name) for name in ("jqx", "jax", "jaxlib")},
        "device": f"{device.platform} {device.device_kind} {platform.machine()}",
        "threads": processors(),
        "report": job.settings.report is not None,
        "low_memory": job.settings.low_memory,
        "fold": job.fold,
        "unify_fp8": job.settings.unify_fp8,
        "keep_source": job.settings.keep_source,
        "all_experts": job.settings.all_experts,
        "fuse_experts": job.settings.fuse_experts,
    }


def _names_in(job: Job, units: set[int]) -> set[str]:
    """The output tensors that belong to finished units."""
    sources = {name for unit in units for name in job.inventory.units[unit]}
    paths = {name.rpartition(".")[0] for name in job.inventory.tensors}
    mine = {name.rpartition(".")[0] for name in sources}
    found = job.fusion.names(
        tensor
        for tensor in pieces_of(job)
        if tensor.name in sources or owner_of(tensor.name, paths) in mine
    )
    kept = (job.kv_outputs(a) for a in job.attentions if job.needs_kv and a.unit in units)
    return found | {tensor.name for tensors in kept for tensor in tensors}


def _work(
    job: Job,
    inputs: Inputs,
    space: Workspace,
    writer: ShardWriter,
    records: list[dict[str, Any]],
    progress: Progress,
) -> tuple[Facts, list[Mapping[str, Any]]]:
    """Finish every unit that is not finished yet. Returns what is known of all linears, and of the
    experts of blocks.
    """
    done = {record["unit"] for record in records if "unit" in record}
    left = [unit for unit in range(len(job.inventory.units)) if unit not in done]
    source = source_of(job, inputs, space, progress)
    source.prepare(left, records)
    by_bytes = inputs.calibration is None
    if by_bytes:
        progress.phase("quantizing", sum(_bytes_of(job, unit) for unit in left))
    advance = progress.advance if by_bytes else Silent().advance
    with Finisher(job, writer, space.record, advance, max(2, min(4, processors()))) as finisher:
        for unit in left:
            stats, extra = source.of_unit(unit)
            finisher.submit(unit, stats, extra)
            if extra:  # the files of the next block replace what this record speaks of
                finisher.drain()
    before = (record.get("facts", {}) for record in records)
    facts = {path: row for rows in (*before, finisher.facts) for path, row in rows.items()}
    experts = [record["experts"] for record in records if "experts" in record]
    return facts, [*experts, *finisher.experts]


def _bytes_of(job: Job, unit: int) -> int:
    infos = (job.checkpoint.tensors[name] for name in job.inventory.units[unit])
    return sum(info.nbytes for info in infos)


@runtime_checkable
class Source(Protocol):
    """Where statistics come from, asked for units in ascending order."""

    def prepare(self, left: list[int], records: list[dict[str, Any]]) -> None:
        """Get ready for the units `left`, knowing what an earlier process journalled."""
        ...

    def of_unit(self, unit: int) -> tuple[BlockStats, dict[str, Any]]:
        """The statistics of one unit, and what to journal with it."""
        ...


class NoStatistics:
    """For formats that need none."""

    def prepare(self, left: list[int], records: list[dict[str, Any]]) -> None:
        """Nothing to do."""

    def of_unit(self, unit: int) -> tuple[BlockStats, dict[str, Any]]:
        """No statistics."""
        return BlockStats(), {}


def source_of(job: Job, inputs: Inputs, space: Workspace, progress: Progress) -> Source:
    """Where the statistics of the units of a job come from."""
    if inputs.saved is not None:
        return inputs.saved
    recorded = None if inputs.activations is None else Recorded(job, inputs.activations)
    if inputs.calibration is None:
        return NoStatistics() if recorded is None else recorded
    hidden = _hidden_states(job, inputs.calibration, space)
    runner = Runner(job, inputs.calibration, hidden, progress, space.directory)
    return runner if recorded is None else Completed(recorded, runner)


def _hidden_states(job: Job, data: CalibrationSet, space: Workspace) -> HiddenStates:
    """Room for the hidden states: on the device up to `max_memory`, else in files."""
    assert job.spec is not None
    compute = compute_of(job.settings.compute, job.dtype)
    n, tokens = sum(len(batch) for batch in data.batches), data.batches[0].shape[1]
    rows = rows_per_call(n, tokens, job.settings.batch_size)
    shape = (n, tokens, job.spec.hidden)
    size = n * tokens * job.spec.hidden * np.dtype(compute.carrier).itemsize
    spill = size > room_for_states(job.spec, parse_size(job.settings.max_memory))
    return HiddenStates(shape, rows, np.dtype(compute.carrier), space.directory if spill else None)
