# SPDX-License-Identifier: Apache-2.0
"""Statistics of the candidates, collected once: for AWQ on the first quarter of the batches, as
ModelOpt 0.47 does while it searches, for all others on all of them.

    FOLDER/stats        FOLDER/stats-awq
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from jqx.auto.mixing import part_of, takes_part
from jqx_interop.calibrate import calibrate, joined
from jqx_interop.data import CalibrationSet
from jqx_interop.job import Job
from jqx_interop.progress import Progress
from jqx_interop.runner import BlockStats
from jqx_interop.saved_stats import SavedStats

ALL, PART = "stats", "stats-awq"
PART_IDS = "calibration-awq.npy"


def place_of(job: Job) -> str:
    """The folder that has the statistics of a recipe."""
    return PART if takes_part(job.config.steps) else ALL


def collected(
    jobs: Sequence[Job], folder: Path, data: CalibrationSet, progress: Progress
) -> list[Job]:
    """The jobs of all candidates, with the statistics that they need; what is in `folder` is not
    collected again.
    """
    places = [place_of(job) for job in jobs]
    for place in dict.fromkeys(places):
        mine = [job for job, p in zip(jobs, places, strict=True) if p == place]
        if (folder / place).is_dir() or not any(joined(mine).asked or {}):
            continue
        settings = mine[0].settings
        if place == PART:
            settings = replace(settings, calib=_part(folder, data))
        recipes = [job.recipe for job in mine]
        calibrate(mine[0].checkpoint.path, folder / place, recipes, settings, progress)
    kept = {place: folder / place for place in places if (folder / place).is_dir()}
    return [
        replace(job, settings=replace(job.settings, stats=kept.get(place)))
        for job, place in zip(jobs, places, strict=True)
    ]


def _part(folder: Path, data: CalibrationSet) -> Path:
    """The first quarter of the batches, in a file."""
    path = folder / PART_IDS
    folder.mkdir(parents=True, exist_ok=True)
    np.save(path, np.stack(part_of(data.batches)))
    return path


class SeveralStats(SavedStats):
    """The statistics of one job, of every linear in the folder where they are."""

    def __init__(self, job: Job, folders: Mapping[str, Path]):
        """`folders`: by linear."""
        parts: dict[Path, list[str]] = {}
        for path in job.choices:
            if path in folders:
                parts.setdefault(folders[path], []).append(path)
        self._parts = [SavedStats(_of(job, paths), folder) for folder, paths in parts.items()]
        self.path = self._parts[0].path
        self.facts = self._parts[0].facts

    @property
    def digest(self) -> str:
        """What identifies them all."""
        return sha256("".join(part.digest for part in self._parts).encode()).hexdigest()

    def of_unit(self, unit: int) -> tuple[BlockStats, dict[str, Any]]:
        """The statistics of the linears in one unit."""
        found = [part.of_unit(unit)[0] for part in self._parts]
        inputs = {path: row for part in found for path, row in part.inputs.items()}
        return BlockStats(inputs=inputs, kv=found[0].kv), {}


def _of(job: Job, paths: Iterable[str]) -> Job:
    return replace(job, choices={path: job.choices[path] for path in paths})
