# SPDX-License-Identifier: Apache-2.0
"""calibrate: the statistics that recipes need, written once for all of them (see saved_stats)."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from jqx.calibration.histograms import BINS, MOST_BINS
from jqx.calibration.moments import Wanted
from jqx.errors import InputError
from jqx.recipes import Recipe

from .attentions import Attention
from .checkpoints import ShardWriter, TensorOut, Workspace, digest, dtype_name, plan_file
from .collecting import kinds_of, readers, wanted_of
from .job import Job, prepare
from .pipeline import Inputs, fingerprint, load_inputs, source_of
from .progress import Progress
from .runner import BlockStats
from .saved_stats import FACTS, FILE, VERSION
from .settings import Settings

EVERYTHING = ("amax", "channel_amax", "channel_mean", "square", "block_gram", "gram", "block_log2")
"""What any algorithm but those of histograms needs."""


def job_for(model: str | Path, recipes: Iterable[str | Recipe], settings: Settings) -> Job:
    """What is collected for `recipes`, or for all of them where there are none: a job that writes
    nothing.
    """
    jobs = [prepare(model, recipe, settings) for recipe in recipes]
    if jobs:
        return joined(jobs)
    if settings.options:
        raise InputError("--set changes recipes: name those that it is for (--qformat, --recipe)")
    base = prepare(model, "int8", settings)
    return replace(base, asked=dict.fromkeys(base.choices, EVERYTHING))


def joined(jobs: Sequence[Job]) -> Job:
    """The job that collects what all of these need."""
    asked: dict[str, dict[str, None]] = {}
    for job in jobs:
        for path in job.choices:
            asked.setdefault(path, {}).update(dict.fromkeys(kinds_of(job, path)))
    widest = max(jobs, key=lambda job: len(job.choices))
    choices = {path: choice for job in jobs for path, choice in job.choices.items()}
    order = [path for path in widest.modules if path in choices]
    kinds = {path: tuple(asked[path]) for path in order if asked[path]}
    return replace(widest, choices={path: choices[path] for path in order}, asked=kinds)


def calibrate(
    model: str | Path,
    out: str | Path,
    recipes: Iterable[str | Recipe],
    settings: Settings,
    progress: Progress,
) -> dict[str, Any]:
    """Write the statistics that `recipes` need (all that any needs, if there are none) to the
    directory `out`, which appears complete or not at all; returns the facts about them.

    Raises InputError for what would stop a run of these recipes, and where none needs statistics.
    """
    job = job_for(model, recipes, settings)
    inputs = load_inputs(job)
    entries = dict(_entries(job, inputs))
    if not entries:
        raise InputError("these recipes need no statistics: quantize without them")
    facts = _facts(job, inputs, entries)
    plan = plan_file(FILE, [t for _, tensors in entries.values() for t in tensors])
    with Workspace(out, job.checkpoint.path) as space:
        kept = {"stats": facts, "tensors": [tensor.name for tensor in plan.tensors]}
        records = space.begin({**kept, **fingerprint(job, inputs)}, restart=settings.restart)
        done = {record["unit"] for record in records if "unit" in record}
        finished = {t.name for unit, tensors in entries.values() if unit in done for t in tensors}
        with ShardWriter(space.files, (plan,), finished if done else None) as writer:
            left = [unit for unit in range(len(job.inventory.units)) if unit not in done]
            source = source_of(job, inputs, space, progress)
            source.prepare(left, records)
            for unit in left:
                stats, extra = source.of_unit(unit)
                for name, array in _arrays(job, unit, stats):
                    writer.write(name, array)
                writer.sync()
                told = {"experts": dict(stats.experts)} if stats.experts else {}
                records.append({"unit": unit, **told, **extra})
                space.record(records[-1])
            writer.finish()
        if experts := [record["experts"] for record in records if "experts" in record]:
            facts["experts"] = experts
        (space.files / FACTS).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        space.publish()
    return {**facts, "bytes": plan.size, "out": str(out)}


def _facts(job: Job, inputs: Inputs, entries: Mapping[str, Any]) -> dict[str, Any]:
    read = {}
    for unit in range(len(job.inventory.units)):
        for leader, members in readers(job, unit).items():
            read |= dict.fromkeys(members, leader)
    return {
        "jqx_stats": VERSION,
        "model": digest(job.checkpoint),
        "calibration": inputs.calibration.digest if inputs.calibration else None,
        "activations": inputs.activations.digest if inputs.activations else None,
        "source": inputs.calibration.source if inputs.calibration else None,
        "tokens": inputs.tokens,
        "compute": job.settings.compute,
        "observed": "raw",
        "readers": read,
        "kv": job.kv if job.needs_kv else None,
        "entries": len(entries),
    }


def _entries(job: Job, inputs: Inputs) -> Iterator[tuple[str, tuple[int, list[TensorOut]]]]:
    """What will be written: path -> (unit, tensors)."""
    for unit in range(len(job.inventory.units)):
        inside = set(job.inventory.units[unit])
        kept = readers(job, unit)
        for path in job.choices:
            if path + ".weight" in inside and "amax" in job.wanted(path):
                yield f"{path}|amax", (unit, [TensorOut(f"{path}|amax", "F32", ())])
        for leader, members in kept.items():
            tokens = _tokens_of(inputs, (leader, *members))
            wanted = wanted_of(job, members, tokens)
            yield leader, (unit, list(_tensors(leader, wanted)))
    for attention in job.attentions if job.needs_kv else ():
        yield attention.path, (attention.unit, list(_kv_tensors(job, attention)))


def _tokens_of(inputs: Inputs, paths: Iterable[str]) -> int:
    """How many tokens of the input of these linears are met."""
    if (recorded := inputs.activations) is None:
        return inputs.tokens
    path = next((p for p in paths if p in recorded.modules()), None)
    if path is None:
        return inputs.tokens
    return sum(int(np.prod(x.shape[:-1])) for x in recorded.batches(path))


def _tensors(path: str, wanted: Wanted) -> Iterator[TensorOut]:
    k, b = wanted.width, wanted.block
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {
        "channel_amax": ("F32", (k,)),
        "channel_mean": ("F32", (k,)),
        "square": ("F32", (k,)),
        "gram": ("F32", (k, k)),
        "root": ("F32", (wanted.tokens, k)),
        "block_gram": ("F32", (k // b, b, b) if b else ()),
        "block_log2": ("I32", (BINS,)),
        "histogram": ("I32", (MOST_BINS,)),
        "histogram_width": ("F32", ()),
    }
    for kind in (*wanted.kinds, "tokens"):
        if kind in shapes:
            yield TensorOut(f"{path}|{kind}", *shapes[kind])
    yield TensorOut(f"{path}|tokens", "I32", ())


def _kv_tensors(job: Job, attention: Attention) -> Iterator[TensorOut]:
    for letter in "kv":
        yield TensorOut(f"{attention.path}.{letter}|amax", "F32", ())
        if job.kv_format.affine:
            shape = (1, attention.kv_heads, 1, attention.head_dim)
            yield TensorOut(f"{attention.path}.{letter}|affine_bias", dtype_name(job.dtype), shape)


def _arrays(job: Job, unit: int, stats: BlockStats) -> Iterator[tuple[str, np.ndarray]]:
    inside = set(job.inventory.units[unit])
    for path in job.choices:
        if path + ".weight" in inside and "amax" in job.wanted(path):
            yield f"{path}|amax", np.asarray(stats.inputs[path]["amax"], np.float32)
    for leader, members in readers(job, unit).items():
        for kind, value in stats.inputs[members[0]].items():
            if kind == "amax":
                continue
            array = np.asarray(value)
            if kind == "histogram":
                array = np.pad(array, (0, MOST_BINS - len(array)))
            yield f"{leader}|{kind}", array
    for path, (amax, bias) in stats.kv.items():
        yield f"{path}|amax", np.asarray(amax, np.float32)
        if bias is not None:
            yield f"{path}|affine_bias", bias
