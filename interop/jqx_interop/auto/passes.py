# SPDX-License-Identifier: Apache-2.0
"""The data on their way forward through the blocks, and what linears of a block would be."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from jqx.auto.simulated import Simulated
from jqx.formats import find_format
from jqx.models import (
    Compute,
    Experts,
    ModelSpec,
    block_prefix,
    embed,
    embed_tensors,
    head_tensors,
    kinds,
)
from jqx.tensors.paths import unflatten
from jqx_interop.blocks import load_front, read_leaf
from jqx_interop.chain import rows_per_call, used_rows
from jqx_interop.data import CalibrationSet
from jqx_interop.device import compute_of
from jqx_interop.evaluation.passes import chunk_of
from jqx_interop.experts import linears_of_experts
from jqx_interop.job import Job
from jqx_interop.saved_stats import SavedStats
from jqx_interop.searched import Search
from jqx_interop.weights import linear_groups, read_tensor, read_weight

from .candidates import Candidate
from .scoring import EXPERTS, Program
from .states import States

Groups = tuple[tuple[str, ...], ...]


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is scored: the linears of `groups` of the model of `job`, as every one of `candidates`
    would have them, on `data`; files of states lie in `folder`.
    """

    job: Job
    candidates: Sequence[Candidate]
    groups: Groups
    data: CalibrationSet
    folder: Path
    method: str


class Passes:
    """The states before every block, written by `mixture.forward`, and what is needed to go on.

    A call takes `rows` sequences; the last is filled up by repeating one.
    """

    def __init__(self, task: Task):
        """Nothing is read yet."""
        job = task.job
        assert job.spec is not None
        self.task, self.job = task, job
        self.spec: ModelSpec = job.spec
        self.blocks = len(kinds(self.spec))
        self.compute: Compute = compute_of(job.settings.compute, job.dtype)
        self.ids = np.concatenate(task.data.batches)
        n, tokens = self.ids.shape
        self.rows = rows_per_call(n, tokens, job.settings.batch_size)
        self.count = -(-n // self.rows)
        self.shape = (self.count, self.rows, tokens, self.spec.hidden)
        self.states = self.file("hidden-states.bin", self.blocks + 1)
        self._saved = {
            c.name: SavedStats(c.job, c.job.settings.stats)
            for c in task.candidates
            if c.job.settings.stats is not None
        }
        self._grouped = {path for group in task.groups for path in group}
        self._of_experts = linears_of_experts(self.spec)

    def file(self, name: str, turns: int, copies: int = 1, dtype: Any = None) -> States:
        """A file of `turns` times so many copies of the states of all data."""
        wanted = np.dtype(self.compute.carrier) if dtype is None else np.dtype(dtype)
        shape = (turns, copies * self.shape[0], *self.shape[1:])
        return States(self.task.folder / name, shape, wanted)

    def program(self, i: int) -> Program:
        """That of block `i`."""
        return Program(self.spec, kinds(self.spec)[i], self.compute, self.task.method)

    def params(self, i: int) -> dict[str, Any]:
        """The parameters of block `i`, but for those of experts."""
        return load_front(self.job, i, self.compute)

    def mixed(self, i: int) -> bool:
        """Whether block `i` has experts."""
        return isinstance(kinds(self.spec)[i].mlp, Experts)

    def embed(self) -> None:
        """Put the states before the first block."""
        rows, params = used_rows(self.spec, partial(read_tensor, self.job), self.ids)
        for n in range(self.count):
            h = embed(self.spec, params, jnp.asarray(rows[self.picked(n)]), self.compute)
            self.states.put(0, n, np.asarray(h))
        for name in embed_tensors(self.spec):
            self.job.checkpoint.release(name)

    def picked(self, n: int) -> Int[np.ndarray, " rows"]:
        """The sequences of call `n`; what is beyond the last is the last."""
        at = np.arange(n * self.rows, (n + 1) * self.rows)
        return np.minimum(at, len(self.ids) - 1)

    def real(self, n: int) -> Bool[np.ndarray, " rows"]:
        """Which sequences of call `n` are no repetition."""
        return np.arange(n * self.rows, (n + 1) * self.rows) < len(self.ids)

    def head_params(self) -> dict[str, Any]:
        """What the head needs."""
        names = head_tensors(self.spec)
        return unflatten({name: read_leaf(self.job, name, self.compute) for name in names})

    def chunks(
        self, share: Float[np.ndarray, " tokens"]
    ) -> Iterator[tuple[Int[np.ndarray, " c"], int, Float[np.ndarray, " c"]]]:
        """The tokens of one call, a few hundred at a time: which they are, how many of them are no
        repetition, and the share of each in a sum.
        """
        chunk = chunk_of(self.spec.vocab)
        for start in range(0, len(share), chunk):
            real = min(chunk, len(share) - start)
            at = np.resize(np.arange(start, start + real), chunk)
            yield at, real, np.where(np.arange(chunk) < real, share[at], 0).astype(np.float32)

    def linears(self, candidate: Candidate, i: int) -> dict[str, Simulated]:
        """The linears of block `i` as a candidate would have them, each by itself, by their names
        in the block; not those of experts.
        """
        prefix = block_prefix(self.spec, i) + "."
        inside = self.job.inventory.units[self.job.inventory.blocks[i]]
        names = [n for n in inside if n.removesuffix(".weight") not in self._of_experts]
        found = self._simulated(candidate, names)
        return {path.removeprefix(prefix): row for path, row in found}

    def of_expert(self, candidate: Candidate, own: Mapping[str, str]) -> dict[str, Simulated]:
        """The linears of one expert, name -> path, as a candidate would have them: those that read
        one input share scales, as engines have it.
        """
        found = dict(self._simulated(candidate, [f"{p}.weight" for p in own.values()], unify=True))
        return {name: found[path] for name, path in own.items()}

    def _simulated(
        self, candidate: Candidate, names: Sequence[str], *, unify: bool = False
    ) -> Iterator[tuple[str, Simulated]]:
        """The linears that choose among the tensors `names`."""
        job, saved = candidate.job, self._saved.get(candidate.name)
        inputs = {} if saved is None else saved.inputs_of(names)
        groups = linear_groups(job, names)
        mine = [tuple(p for p in group if p in self._grouped) for group in groups]
        search = Search(job, [group for group in mine if group], inputs)
        for path, linear in search.alone(unify=unify):
            choice = job.choices[path]
            weight = jnp.asarray(read_weight(job, path))
            fmt = find_format(choice.weight or "")
            yield path, jax.block_until_ready(Simulated.of(linear, fmt, choice.input, weight))
            job.checkpoint.release(f"{path}.weight")

    def groups_of(self, i: int) -> dict[str, tuple[str, ...]]:
        """The groups of block `i`, by their names, with their members as the block calls them;
        EXPERTS where those are experts.
        """
        prefix = block_prefix(self.spec, i) + "."
        return {
            group[0]: (EXPERTS,)
            if group[0] in self._of_experts
            else tuple(path.removeprefix(prefix) for path in group)
            for group in self.task.groups
            if group[0].startswith(prefix)
        }
