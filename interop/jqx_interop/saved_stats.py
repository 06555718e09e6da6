# SPDX-License-Identifier: Apache-2.0
"""Statistics of inputs on disk, used for every recipe that they suffice for.

STATS/stats.safetensors    "<linear>|<kind>", one entry for all linears that read one input
STATS/stats.json           which linears read which input, and digests of model and data
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jqx.calibration.histograms import FIRST_BINS
from jqx.config import KV_FORMATS
from jqx.errors import InputError
from jqx.recipes import RECIPES, find_kv

from .checkpoints import digest
from .checkpoints.layout import read_header
from .checkpoints.mapped import MappedTensors
from .choices import wanted_kinds
from .collecting import kinds_of
from .experts import expert_linears
from .job import Job
from .runner import BlockStats

FILE, FACTS = "stats.safetensors", "stats.json"
VERSION = 1
TOLD = {"layer", "tokens", "experts", "few", "none", "stand_in"}  # of the experts of a block


class SavedStats:
    """Statistics that were written by `collect`, as the source of a job's."""

    def __init__(self, job: Job, folder: str | Path):
        """Open them. Raises InputError if they are of another model, or if what the job needs is
        not among them, with the command that collects it.
        """
        self._job, self.path = job, Path(folder)
        self.facts = _read_facts(self.path)
        if self.facts.get("model") != digest(job.checkpoint):
            raise InputError(
                f"{folder}: statistics of another model than {job.checkpoint.path}; collect them "
                f"again: jqx calibrate {job.checkpoint.path} STATS"
            )
        header = read_header(self.path / FILE)
        if header.problems:
            raise InputError(f"{self.path / FILE}: {'; '.join(header.problems)}")
        self._names = {tensor.name for tensor in header.tensors}
        self._mapped = MappedTensors(header.tensors)
        self._check()

    @property
    def digest(self) -> str:
        """What identifies them: all that is said of them, and the size of the file."""
        told = json.dumps([self.facts, (self.path / FILE).stat().st_size], sort_keys=True)
        return hashlib.sha256(told.encode()).hexdigest()

    def _check(self) -> None:
        job = self._job
        for path in job.choices:
            for kind in kinds_of(job, path):
                if self._name(path, kind) is None:
                    raise InputError(
                        f"{self.path} has no {kind!r} of the inputs of {path}, which "
                        f"{self._needs(path, kind)}; collect it: jqx calibrate "
                        f"{job.checkpoint.path} STATS{self._recipe(path, kind)}"
                    )
        kept = self.facts.get("kv")
        if job.needs_kv and (kept is None or _affine(kept) != job.kv_format.affine):
            raise InputError(
                f"{self.path} has no statistics for --kv-cache {job.kv} (it has {kept}); collect "
                f"them: jqx calibrate {job.checkpoint.path} STATS --kv-cache {job.kv}"
            )

    def _needs(self, path: str, kind: str) -> str:
        """What it is that needs one kind."""
        job = self._job
        if kind not in wanted_kinds(job.config, job.choices[path]):
            return "the errors of outputs in a report need"
        methods = ", ".join(step.method for step in job.config.steps)
        return f"{methods} with {job.choices[path].weight} needs"

    def _recipe(self, path: str, kind: str) -> str:
        """How `jqx calibrate` is told what the job needs; it collects all where it is told
        nothing.
        """
        job = self._job
        name, other = job.recipe.name, job.settings.algorithm
        if kind not in wanted_kinds(job.config, job.choices[path]):
            return ""
        changed = "".join(f" --set {key}={value}" for key, value in job.settings.options)
        if name in RECIPES and other is None:
            return f" --qformat {name}{changed}"
        return " --recipe FILE" + (f", which says algorithm: {other}" if other else "")

    def _name(self, path: str, kind: str) -> str | None:
        """The tensor with a statistic: that of the linear, or of the one that stands for its
        input; the tokens themselves do for second moments.
        """
        leader = self.facts.get("readers", {}).get(path, path)
        kinds = (kind, "root") if kind == "gram" else (kind,)
        names = (f"{p}|{k}" for k in kinds for p in (path, leader))
        return next((name for name in names if name in self._names), None)

    def prepare(self, left: list[int], records: list[dict[str, Any]]) -> None:
        """Nothing to do: units do not depend on each other."""

    def of_unit(self, unit: int) -> tuple[BlockStats, dict[str, Any]]:
        """The statistics of the linears in one unit."""
        job, inputs = self._job, self.inputs_of(self._job.inventory.units[unit])
        kv = {}
        for attention in job.attentions if job.needs_kv else ():
            if attention.unit == unit:
                kv = {f"{attention.path}.{n}": self._kv(f"{attention.path}.{n}") for n in "kv"}
        return BlockStats(inputs=inputs, kv=kv, **self._of_experts(unit)), {}

    def inputs_of(self, tensors: Iterable[str]) -> dict[str, dict[str, Any]]:
        """The statistics of the linears whose weights are among `tensors`."""
        job, inside = self._job, set(tensors)
        inputs: dict[str, dict[str, Any]] = {}
        known: dict[str, Any] = {}
        for path in job.choices:
            if path + ".weight" not in inside:
                continue
            names = [self._name(path, kind) for kind in kinds_of(job, path)]
            for name in names:
                if name is not None and name not in known:
                    known[name] = self._read(name)
            inputs[path] = {n.rpartition("|")[2]: known[n] for n in names if n is not None}
        return inputs

    def _of_experts(self, unit: int) -> dict[str, Any]:
        """What was told of the experts of a unit when they were run, and what each was sent."""
        job, blocks = self._job, self._job.inventory.blocks
        told = next((b for b in self.facts.get("experts", ()) if blocks[b["layer"]] == unit), None)
        if told is None:
            return {}
        assert job.spec is not None
        members = expert_linears(job.spec, told["layer"])
        own = {p: n for e, n in zip(members, told["tokens"], strict=True) for p in e.values()}
        more = any(set(job.wanted(path)) - {"amax"} for path in own if path in job.choices)
        return {"sent": own, "experts": {**told, "stand_in": told["stand_in"] and more}}

    def _read(self, name: str) -> Any:
        array = self._mapped.read(name)
        if not np.isfinite(array).all():
            raise InputError(f"{self.path / FILE}: {name} is not finite; calibrate again")
        if name.endswith("|histogram"):
            used = int(np.max(np.nonzero(array)[0], initial=0)) + 1
            array = array[: max(FIRST_BINS, -(-used // FIRST_BINS) * FIRST_BINS)]
        value = np.asarray(array).copy() if array.ndim == 0 else jnp.asarray(np.array(array))
        self._mapped.release(name)
        return value

    def _kv(self, path: str) -> tuple[float, np.ndarray | None]:
        bias = f"{path}|affine_bias"
        found = np.array(self._read(bias)) if bias in self._names else None
        return float(self._read(f"{path}|amax")), found


def _affine(kv: str) -> bool:
    name = find_kv(kv)
    return name is not None and KV_FORMATS[name].affine


def _described(facts: Any) -> bool:
    return (
        isinstance(facts, dict)
        and facts.get("jqx_stats") == VERSION
        and isinstance(facts.get("readers"), dict)
        and isinstance(facts.get("kv"), str | None)
        and isinstance(told := facts.get("experts", []), list)
        and all(isinstance(row, dict) and row.keys() >= TOLD for row in told)
    )


def _read_facts(folder: Path) -> dict[str, Any]:
    path = folder / FACTS
    if not path.is_file() or not (folder / FILE).is_file():
        raise InputError(
            f"{folder} holds no statistics ({FACTS} and {FILE}): jqx calibrate writes them"
        )
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not JSON: {' '.join(str(error).split())}") from error
    if not _described(facts):
        raise InputError(f"{path} describes no statistics of a layout known here; calibrate again")
    return facts
