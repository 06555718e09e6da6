# SPDX-License-Identifier: Apache-2.0
"""Scores of all linears of a checkpoint, one block in memory at a time.

    forward:  the states before every block go to a file
    backward: from the gradient to the last states, block by block, the scores of its linears

Statistics and scores are kept, and a run that is killed goes on where it was.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jqx.config import to_json
from jqx.errors import InputError
from jqx.formats import find_format
from jqx.models import ModelSpec, block_prefix, head_tensors, kinds
from jqx.recipes import Recipe
from jqx.tensors.paths import unflatten
from jqx_interop.calibrate import calibrate, job_for
from jqx_interop.chain import embed_rows, rows_per_call
from jqx_interop.checkpoints import Workspace, digest
from jqx_interop.data import CalibrationSet
from jqx_interop.device import compute_of
from jqx_interop.evaluation.passes import chunk_of
from jqx_interop.hidden import HiddenStates
from jqx_interop.job import Job, prepare
from jqx_interop.pipeline import load_inputs
from jqx_interop.progress import Progress
from jqx_interop.runner import load_block, read_leaf
from jqx_interop.saved_stats import SavedStats
from jqx_interop.searched import Search
from jqx_interop.settings import Settings
from jqx_interop.weights import linear_groups, read_tensor

from .candidates import Candidate, groups_of
from .scoring import Program, Simulated, block_scores, head_gradient, run_block
from .states import States

VERSION = 1
FILE = "scores.json"


@dataclass(frozen=True, kw_only=True)
class Scored:
    """What a model's linears score: by linear and candidate, and what that rests on."""

    candidates: tuple[Candidate, ...]
    groups: tuple[tuple[str, ...], ...]
    scores: Mapping[str, Mapping[str, float]]
    loss: float
    facts: Mapping[str, Any]


def scored(
    model: str | Path,
    recipes: Sequence[str | Recipe],
    folder: str | Path,
    settings: Settings,
    progress: Progress,
) -> Scored:
    """The scores of `recipes` on `model`, kept in `folder`, where they are taken from if they are
    of this model, these data and these recipes.

    Raises InputError for models that are not defined here, and for kept scores of something else.
    """
    if not recipes:
        raise InputError("no formats are given: name those that linears may take (--formats)")
    folder = Path(folder)
    stats = folder / "stats"
    base = job_for(model, recipes, settings)
    if base.spec is None:
        raise InputError(
            f"{base.checkpoint.path}: gradients need the model, and model_type "
            f"{base.checkpoint.config.get('model_type')!r} is not defined here"
        )
    data = _data_of(base)
    if not stats.is_dir() and any(base.asked or {}):
        calibrate(model, stats, recipes, settings, progress)
    given = replace(settings, stats=stats if stats.is_dir() else None)
    jobs = [prepare(model, recipe, given) for recipe in recipes]
    candidates = tuple(Candidate(name=job.recipe.name, job=job) for job in jobs)
    groups = groups_of(base, candidates)
    facts = _facts(base, candidates, data)
    kept = _kept(folder / "scores" / FILE, facts)
    if kept is None:
        kept = _score(base, candidates, groups, data, (folder, facts, progress))
    return Scored(
        candidates=candidates,
        groups=tuple(groups),
        scores=kept["scores"],
        loss=kept["loss"],
        facts=facts,
    )


def _data_of(job: Job) -> CalibrationSet:
    """The data that gradients are taken on, whether or not a recipe needs any."""
    found = load_inputs(replace(job, asked=dict.fromkeys(job.choices, ("amax",)))).calibration
    assert found is not None
    return found


def _facts(job: Job, candidates: Sequence[Candidate], data: CalibrationSet) -> dict[str, Any]:
    return {
        "jqx_scores": VERSION,
        "model": digest(job.checkpoint),
        "calibration": data.digest,
        "formats": {c.name: json.loads(json.dumps(to_json(c.job.config))) for c in candidates},
        "method": "gradient",
        "compute": repr(compute_of(job.settings.compute, job.dtype)),
    }


def _kept(path: Path, facts: Mapping[str, Any]) -> dict[str, Any] | None:
    """Scores that were kept; None where there are none."""
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not JSON: {' '.join(str(error).split())}") from error
    have = found.get("facts", {}) if isinstance(found, dict) else {}
    for key, value in facts.items():
        if have.get(key) != value:
            raise InputError(
                f"{path} has scores of another {key} than is asked for; score into another folder, "
                "or remove it"
            )
    return found


def _score(
    job: Job,
    candidates: Sequence[Candidate],
    groups: Sequence[tuple[str, ...]],
    data: CalibrationSet,
    where: tuple[Path, dict[str, Any], Progress],
) -> dict[str, Any]:
    folder, facts, progress = where
    with Workspace(folder / "scores", job.checkpoint.path) as space:
        records = space.begin(facts, restart=job.settings.restart)
        space.files.mkdir(exist_ok=True)
        passes = _Passes(job, candidates, groups, data, space.directory)
        done = {r["block"]: r for r in records if "block" in r}
        loss = next((r["loss"] for r in records if "loss" in r), None)
        blocks = len(kinds(passes.spec))
        progress.phase("forward", 0 if loss is not None else blocks * passes.count)
        if loss is None:
            loss = passes.forward(progress)
            space.record({"loss": loss})
        progress.phase("scoring", (blocks - len(done)) * passes.count)
        for i in reversed(range(blocks)):
            if i not in done:
                done[i] = {"block": i, "scores": passes.backward(i, progress)}
                space.record(done[i])
        scores = {path: row for record in done.values() for path, row in record["scores"].items()}
        kept = {"facts": facts, "loss": loss, "scores": scores}
        (space.files / FILE).write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
        space.publish()
    return kept


class _Passes:
    """The data on their way forward and back through the blocks."""

    def __init__(
        self,
        job: Job,
        candidates: Sequence[Candidate],
        groups: Sequence[tuple[str, ...]],
        data: CalibrationSet,
        folder: Path,
    ):
        """`folder`: where files of states lie."""
        assert job.spec is not None
        self.spec: ModelSpec = job.spec
        self._job, self._candidates = job, candidates
        self._saved = {
            c.name: SavedStats(c.job, c.job.settings.stats)
            for c in candidates
            if c.job.settings.stats is not None
        }
        self._grouped = {path for group in groups for path in group}
        self._ids = np.concatenate(data.batches)
        shares = (np.full(len(b), 1 / (b.size - len(b) or 1), np.float32) for b in data.batches)
        self._share = np.concatenate([*shares])
        self._compute = compute_of(job.settings.compute, job.dtype)
        n, tokens = self._ids.shape
        self._rows = rows_per_call(n, tokens, job.settings.batch_size)
        self.count = -(-n // self._rows)
        size = (self.count, self._rows, tokens, job.spec.hidden)
        carrier = np.dtype(self._compute.carrier)
        self._states = States(
            folder / "hidden-states.bin", (len(kinds(self.spec)) + 1, *size), carrier
        )
        self._gradients = States(folder / "hidden-gradients.bin", (2, *size), np.dtype(np.float32))

    def forward(self, progress: Progress) -> float:
        """Run the model, keep the states before every block and the gradient to those after the
        last; returns the mean loss of a batch. Raises InputError if it is not finite.
        """
        job, spec = self._job, self.spec
        shape = (len(self._ids), self._ids.shape[1], spec.hidden)
        hidden = HiddenStates(shape, self._rows, np.dtype(self._compute.carrier), None)
        embed_rows(spec, partial(read_tensor, job), self._ids, hidden, self._compute)
        for n in range(self.count):
            self._states.put(0, n, np.asarray(hidden.get(n)))
        del hidden
        for i, kind in enumerate(kinds(spec)):
            params = load_block(job, i, self._compute)
            program = Program(spec, kind, self._compute)
            for n in range(self.count):
                h = run_block(params, jnp.asarray(self._states.get(i, n)), program=program)
                self._states.put(i + 1, n, np.asarray(h))
                progress.advance(1)
        self._states.flush()
        loss = self._heads()
        if not np.isfinite(loss):
            raise InputError(
                f"{job.checkpoint.path}: the loss on these data is {loss}, and has no gradient; "
                "check the weights, or compute in another precision (--compute)"
            )
        return loss

    def _heads(self) -> float:
        """Put the gradients to the last states; returns the mean loss of a batch."""
        job, spec, compute = self._job, self.spec, self._compute
        leaves = {name: read_leaf(job, name, compute) for name in head_tensors(spec)}
        params, last = unflatten(leaves), len(kinds(spec))
        program = Program(spec, kinds(spec)[-1], compute)
        chunk, total = chunk_of(spec.vocab), 0.0
        for n in range(self.count):
            h = self._states.get(last, n)
            flat, (targets, share) = h.reshape(-1, h.shape[-1]), self._targets(n)
            found = np.zeros(flat.shape, np.float32)
            for start in range(0, len(flat), chunk):
                at = np.resize(np.arange(start, min(start + chunk, len(flat))), chunk)
                weights = np.where(np.arange(chunk) < len(flat) - start, share[at], 0)
                g, loss = head_gradient(
                    params,
                    jnp.asarray(flat[at]),
                    jnp.asarray(targets[at]),
                    jnp.asarray(weights, jnp.float32),
                    program=program,
                )
                found[at[: len(flat) - start]] = np.asarray(g, np.float32)[: len(flat) - start]
                total += float(loss)
            self._gradients.put(last % 2, n, found.reshape(h.shape))
        self._gradients.flush()
        return total / (float(np.sum(self._share)) * max(self._ids.shape[1] - 1, 1))

    def _targets(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        """The next token of every place of call `n`, and its share of the loss; 0 where there is
        none.
        """
        rows = np.arange(n * self._rows, (n + 1) * self._rows)
        real, rows = rows < len(self._ids), np.minimum(rows, len(self._ids) - 1)
        ids = self._ids[rows]
        share = np.repeat((self._share[rows] * real)[:, None], ids.shape[1], axis=1)
        share[:, -1] = 0
        return np.roll(ids, -1, axis=1).reshape(-1).astype(np.int32), share.reshape(-1)

    def backward(self, i: int, progress: Progress) -> dict[str, dict[str, float]]:
        """The scores of the linears of block `i`, by linear and candidate, and the gradients to the
        states before it.
        """
        prefix = block_prefix(self.spec, i)
        params = load_block(self._job, i, self._compute)
        linears = {c.name: self._linears(c, i) for c in self._candidates}
        program = Program(self.spec, kinds(self.spec)[i], self._compute)
        sums: dict[str, dict[str, float]] = {}
        for n in range(self.count):
            h, g = self._states.get(i, n), self._gradients.get((i + 1) % 2, n)
            g, found = block_scores(
                params, linears, jnp.asarray(h), jnp.asarray(g), program=program
            )
            self._gradients.put(i % 2, n, np.asarray(g, np.float32))
            for name, row in found.items():
                for path, score in row.items():
                    mine = sums.setdefault(f"{prefix}.{path}", {})
                    mine[name] = mine.get(name, 0.0) + float(score)
            progress.advance(1)
        self._gradients.flush()
        return sums

    def _linears(self, candidate: Candidate, i: int) -> dict[str, Simulated]:
        """The linears of block `i` as a candidate would have them, each by itself."""
        job, prefix = candidate.job, block_prefix(self.spec, i) + "."
        unit = job.inventory.blocks[i]
        saved = self._saved.get(candidate.name)
        inputs = {} if saved is None else saved.of_unit(unit)[0].inputs
        groups = linear_groups(job, job.inventory.units[unit])
        mine = [tuple(p for p in group if p in self._grouped) for group in groups]
        found = {}
        for path, linear in Search(job, [group for group in mine if group], inputs).alone():
            choice = job.choices[path]
            fmt, name = find_format(choice.weight or ""), path.removeprefix(prefix)
            found[name] = Simulated.of(linear._replace(facts={}), fmt, choice.input)
        return found
