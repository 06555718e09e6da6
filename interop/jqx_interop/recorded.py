# SPDX-License-Identifier: Apache-2.0
"""Statistics from inputs of linears that were recorded elsewhere: no model is run, but for linears
of experts that were not recorded, where there are data for it.

Keys and values come from the recorded inputs of the key and value linears, by one product and the
rotation, in the arithmetic of the dtype that was recorded.
"""

from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np

from jqx.algorithms import InputStats
from jqx.calibration import amax, input_amax, stored_amax
from jqx.errors import InputError
from jqx.models import block_prefix, kinds, project_kv
from jqx.tensors.paths import unflatten

from .attentions import Attention
from .collecting import Collecting, readers, wanted_of
from .data import Activations
from .device import compute_of
from .experts import linears_of_experts
from .job import Job
from .runner import BlockStats, Folding, Runner
from .weights import read_tensor


def unrecorded(job: Job, activations: Activations) -> list[str]:
    """The linears of experts whose inputs are needed and were not recorded: the model is run for
    them, where there are data to run it on (`--calib`).

    Raises InputError for any other linear that is missing, and where there are no such data.
    """
    needed, have = _needed(job), set(activations.modules())
    missing = [path for path in needed if path not in have]
    if not missing:
        return []
    experts = linears_of_experts(job.spec)
    if job.settings.calib is not None and experts.issuperset(missing):
        return missing
    way = "record them" if job.spec is None else "give --calib in the place of --activations"
    if experts.issuperset(missing):
        way = "give --calib as well, and the model is run for these experts"
    more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
    raise InputError(
        f"{activations.path} has no inputs of {missing[0]}{more}, {len(missing)} of the "
        f"{len(needed)} linears that need them; keys are <module>|<batch>: {way}"
    )


def _needed(job: Job) -> list[str]:
    """The linears whose inputs tell what a job needs to know."""
    keys = [attention.k for attention in job.attentions] if job.needs_kv else []
    return list(dict.fromkeys([*(path for path in job.choices if job.wanted(path)), *keys]))


class Recorded:
    """The statistics of recorded activations, one block or all linears at a time; nothing of
    linears that were not recorded.
    """

    def __init__(self, job: Job, activations: Activations):
        """Raises InputError naming a linear whose width differs."""
        self._job, self._activations = job, activations
        self._have = set(activations.modules())
        for path in (path for path in _needed(job) if path in self._have):
            if activations.width(path) != job.modules[path].shape[1]:
                raise InputError(
                    f"{activations.path}: inputs of {path} are {activations.width(path)} wide, "
                    f"its weight takes {job.modules[path].shape[1]}; they belong to another model"
                )

    def prepare(self, left: list[int], records: list[dict[str, Any]]) -> None:
        """Nothing to do: units do not depend on each other."""

    def of_unit(self, unit: int) -> tuple[BlockStats, dict[str, Any]]:
        """The statistics of the linears in one unit. Raises InputError for inputs that are not
        finite.
        """
        inside = set(self._job.inventory.units[unit])
        inputs: dict[str, dict[str, Any]] = {}
        for path in self._job.choices:
            known = path + ".weight" in inside and path in self._have
            if known and "amax" in self._job.wanted(path):
                largest = input_amax(stored_amax(x) for x in self._activations.batches(path))
                if not np.isfinite(largest):
                    raise InputError(f"{self._activations.path}: inputs of {path} are not finite")
                inputs[path] = {"amax": largest}
        for leader, members in readers(self._job, unit).items():
            if self._have.isdisjoint((leader, *members)):
                continue
            for path, stats in self._moments(leader, members).items():
                inputs[path] = {**stats, **inputs.get(path, {})}
        kv = {}
        for i, attention in enumerate(self._job.attentions if self._job.needs_kv else ()):
            if attention.unit == unit:
                kv = self._keys_and_values(i, attention)
        return BlockStats(inputs=inputs, kv=kv), {}

    def _moments(self, leader: str, members: tuple[str, ...]) -> dict[str, InputStats]:
        """What is collected of the input that `members` read, a recorded batch being a statistics
        batch. The first member that was recorded tells it.
        """
        path = next(p for p in (leader, *members) if p in self._have)
        shapes = [x.shape for x in self._activations.batches(path)]
        sizes = [shape[0] if len(shape) == 3 else 1 for shape in shapes]
        tokens = sum(int(np.prod(shape[:-1])) for shape in shapes)
        collecting = Collecting(self._job, {leader: wanted_of(self._job, members, tokens)}, sizes)
        for x in self._activations.batches(path):
            collecting.add(leader, x if x.ndim == 3 else x.reshape(1, -1, x.shape[-1]))
        return collecting.results({leader: members})

    def _keys_and_values(
        self, i: int, attention: Attention
    ) -> dict[str, tuple[float, np.ndarray | None]]:
        job, spec = self._job, self._job.spec
        assert spec is not None
        prefix = block_prefix(spec, i) + "."
        unit = job.inventory.units[attention.unit]
        params = unflatten({n.removeprefix(prefix): jnp.asarray(read_tensor(job, n)) for n in unit})
        batches = [x if x.ndim == 3 else x[None] for x in self._activations.batches(attention.k)]
        fold = Folding([len(x) for x in batches], job.dtype)
        largest: dict[str, list[np.float32]] = {"k": [], "v": []}
        for batch in batches:
            x = jnp.asarray(batch)
            compute = compute_of("bf16" if x.dtype == jnp.bfloat16 else "float32", job.dtype)
            positions = jnp.broadcast_to(
                jnp.arange(x.shape[1], dtype=jnp.int32)[None, :], x.shape[:2]
            )
            k, v = project_kv(
                spec, kinds(spec)[i], params, x.astype(compute.carrier), positions, compute
            )
            for name, y in (("k", k), ("v", v)):
                largest[name].append(np.float32(amax(y, job.dtype)))
            fold.add({f"{attention.path}.k": k, f"{attention.path}.v": v})
        if job.kv_format.affine:
            return fold.results()
        return {
            f"{attention.path}.{n}": (float(input_amax(all_)), None) for n, all_ in largest.items()
        }


class Completed:
    """Recorded statistics, and those of running the model for linears that were not recorded."""

    def __init__(self, recorded: Recorded, runner: Runner):
        """Both of one job."""
        self._recorded, self._runner = recorded, runner

    def prepare(self, left: list[int], records: list[dict[str, Any]]) -> None:
        """Bring the model to where it is run from."""
        self._runner.prepare(left, records)

    def of_unit(self, unit: int) -> tuple[BlockStats, dict[str, Any]]:
        """The statistics of the linears in one unit; what was recorded counts where both are known.
        Raises InputError for inputs that are not finite.
        """
        run, extra = self._runner.of_unit(unit)
        own, _ = self._recorded.of_unit(unit)
        return replace(run, inputs={**run.inputs, **own.inputs}, kv=own.kv), extra
