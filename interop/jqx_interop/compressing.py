# SPDX-License-Identifier: Apache-2.0
"""Weights that are compressed as they are read: of the full-precision model one group of linears is
there at a time.
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jqx.algorithms.table import needed
from jqx.errors import InputError
from jqx.formats import find_format
from jqx.models import ModelSpec, param_shapes
from jqx.tensors import QTensor
from jqx.tensors.paths import unflatten
from jqx.tensors.stacks import stack_all

from .architecture import own_head, spec_for
from .checkpoints import Checkpoint, open_checkpoint
from .experts import linears_of_experts
from .job import Job, decide
from .orientation import turned
from .recipe_files import recipe_of
from .searched import Search
from .settings import Settings
from .stored import Source, copied, plain
from .unfused import UnfusedCheckpoint
from .weights import linear_groups, stored_group


def read_compressed(model: str | Path, recipe: Any) -> tuple[Source, dict[str, Any]]:
    """The checkpoint `model` and its parameters, a nested tree in which what `recipe` selects is
    stored as it says, without scales of inputs. Codes and scales of weights are those that `ptq`
    writes. Experts that lie in one tensor have linears of their own if it selects some of them.

    Raises InputError for what cannot be read, and for a recipe that needs calibration for more than
    scales of inputs.
    """
    job = decide(open_checkpoint(model), recipe_of(recipe), Settings(), in_memory=True)
    _refuse_calibrated(job)
    checkpoint, spec = _read_as(job)
    spec = replace(spec, kv_cache=job.kv)
    source = Source(checkpoint=checkpoint, spec=spec, choices={}, dtype=job.dtype)
    names = tuple(param_shapes(spec))
    leaves: dict[str, Any] = dict(compressed(job, names))
    leaves |= {name: plain(source, name) for name in names if name not in leaves}
    stack_all(leaves, source.leaves)
    return source, unflatten(leaves)


def compressed(job: Job, names: Iterable[str]) -> Iterator[tuple[str, QTensor]]:
    """The weights among the tensors `names` that a job quantizes, stored, on the default device."""
    searched = any(step.method != "max" for step in job.config.steps)
    for group in linear_groups(job, names):
        found = Search(job, [group], {}).compressed() if searched else stored_group(job, group)
        for path, q in found:
            q = jax.tree.map(lambda leaf: copied(np.asarray(leaf)), q)
            yield f"{path}.weight", turned(job.spec, path, q)
            job.checkpoint.release(path + ".weight")


def _read_as(job: Job) -> tuple[Checkpoint, ModelSpec]:
    """The names and the architecture of the parameters of a job: `load` reads what `ptq` writes,
    where experts of which none is quantized stay in one tensor.
    """
    checkpoint, spec = job.checkpoint, job.spec
    assert spec is not None
    quantized = linears_of_experts(spec) & job.choices.keys()
    if quantized or not isinstance(checkpoint, UnfusedCheckpoint):
        return checkpoint, spec
    assert checkpoint.base is not None
    fused = spec_for(checkpoint.base.config, checkpoint.base.tensors)
    return checkpoint.base, own_head(checkpoint.base, fused)


def _refuse_calibrated(job: Job) -> None:
    """Raise InputError for a job that chooses codes, or scales of the cache, by what it meets."""
    way_out = "quantize with jqx quantize (ji.ptq) and load what it writes"
    formats = dict.fromkeys(choice.weight or "" for choice in job.choices.values())
    steps = [s for s in job.config.steps if any(needed((s,), find_format(f)) for f in formats)]
    if steps:
        raise InputError(
            f"recipe {job.recipe.name}: {', '.join(step.method for step in steps)} needs "
            f"calibration data, and weights are compressed here before any is met: {way_out}, or "
            "take a recipe with the algorithm max"
        )
    if job.needs_kv:
        raise InputError(
            f"recipe {job.recipe.name}: keys and values in {job.kv} need scales, and none are "
            f"known when weights are read: {way_out}, or take a recipe without a KV cache format"
        )
