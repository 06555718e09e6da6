# SPDX-License-Identifier: Apache-2.0
"""Scores of all linears of a checkpoint, one block in memory at a time. Statistics and scores are
kept, and a run that is killed goes on where it was.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jqx.auto.sensitivity import method_of
from jqx.config import to_json
from jqx.errors import InputError
from jqx.recipes import Recipe, find_recipe
from jqx.steps import with_option
from jqx_interop.calibrate import joined
from jqx_interop.checkpoints import Workspace, digest
from jqx_interop.data import CalibrationSet
from jqx_interop.device import compute_of
from jqx_interop.job import Job, prepare
from jqx_interop.pipeline import load_inputs
from jqx_interop.progress import Progress
from jqx_interop.settings import Settings

from .candidates import Candidate, groups_of
from .divergences import divergence_scores
from .gradients import gradient_scores
from .mixes import check_mix
from .passes import Task
from .statistics import collected

VERSION = 2
FILE = "scores.json"

Score = Callable[..., tuple[dict[str, dict[str, float]], dict[str, float]]]

METHODS: Mapping[str, Score] = {
    "gradient": gradient_scores,
    "fisher": gradient_scores,
    "kl": divergence_scores,
}
"""Method -> what scores by it."""


@dataclass(frozen=True, kw_only=True)
class Scored:
    """What a model's linears score, by group, called by its first member, and candidate. `loss`:
    that of the model on the `data`, where the method takes it.
    """

    candidates: tuple[Candidate, ...]
    groups: tuple[tuple[str, ...], ...]
    scores: Mapping[str, Mapping[str, float]]
    method: str
    loss: float | None = None
    data: CalibrationSet | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Scoring:
    """How linears are scored: as every one of `recipes`, by `method`, a row of METHODS. Those that
    match one of the globs `disabled` stay as they are, and so do those that choose with them.
    """

    recipes: tuple[str | Recipe, ...]
    method: str = "gradient"
    disabled: tuple[str, ...] = ()


def scored(
    model: str | Path,
    scoring: Scoring,
    folder: str | Path,
    settings: Settings,
    progress: Progress,
) -> Scored:
    """The scores of a model's linears, kept in `folder`, where they are taken from if they are of
    this model, these data, these recipes and this method.

    Raises InputError for models that are not defined here, and for kept scores of something else.
    """
    method = method_of(scoring.method)
    if not scoring.recipes:
        raise InputError("no formats are given: name those that linears may take (--formats)")
    recipes, settings = _with_options(scoring.recipes, settings)
    folder = Path(folder)
    settings = replace(settings, fuse_experts=False)  # in mixtures each has scales of its own
    plans = [prepare(model, recipe, settings) for recipe in recipes]
    base = joined(plans)
    if base.spec is None:
        raise InputError(
            f"{base.checkpoint.path}: scores need the model, and model_type "
            f"{base.checkpoint.config.get('model_type')!r} is not defined here"
        )
    groups = tuple(groups_of(base, plans, scoring.disabled))
    check_mix(plans, groups)
    data = _data_of(base)
    jobs = collected(plans, folder, data, progress)
    candidates = tuple(Candidate(name=job.recipe.name, job=job) for job in jobs)
    facts = _facts(base, candidates, data) | {
        "method": method,
        "disabled": sorted(scoring.disabled),
    }
    kept = kept_in(folder / "scores" / FILE, facts)
    if kept is None:
        kept = _score(base, candidates, groups, data, (folder, facts, progress))
    return Scored(
        candidates=candidates,
        groups=groups,
        scores=kept["scores"],
        method=method,
        loss=kept.get("loss"),
        data=data,
    )


def _with_options(
    recipes: Sequence[str | Recipe], settings: Settings
) -> tuple[list[Recipe], Settings]:
    """The recipes as `--algorithm` and `--set` change them, each by what it knows of. Raises
    InputError for what none knows.
    """
    found = [find_recipe(r) if isinstance(r, str) else r for r in recipes]
    if settings.algorithm is not None:
        raise InputError("an algorithm is given for all formats: name recipes that have it")
    for key, value in settings.options:
        changed, problem = [], None
        for recipe in found:
            try:
                changed.append(replace(recipe, config=with_option(recipe.config, key, value)))
            except InputError as error:
                problem = problem or error
                changed.append(recipe)
        if problem is not None and changed == found:
            raise problem
        found = changed
    return found, replace(settings, options=())


def _data_of(job: Job) -> CalibrationSet:
    """The data that scores are taken on, whether or not a recipe needs any."""
    found = load_inputs(replace(job, asked=dict.fromkeys(job.choices, ("amax",)))).calibration
    assert found is not None
    return found


def _facts(job: Job, candidates: Sequence[Candidate], data: CalibrationSet) -> dict[str, Any]:
    return {
        "jqx_scores": VERSION,
        "model": digest(job.checkpoint),
        "calibration": data.digest,
        "formats": {c.name: json.loads(json.dumps(to_json(c.job.config))) for c in candidates},
        "compute": repr(compute_of(job.settings.compute, job.dtype)),
    }


def kept_in(path: Path, facts: Mapping[str, Any]) -> dict[str, Any] | None:
    """What was kept of the same `facts` in the file `path`; None where there is none. Raises
    InputError for a file that is no JSON or of something else.
    """
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
    groups: tuple[tuple[str, ...], ...],
    data: CalibrationSet,
    where: tuple[Path, dict[str, Any], Progress],
) -> dict[str, Any]:
    folder, facts, progress = where
    method = facts["method"]
    with Workspace(folder / "scores", job.checkpoint.path) as space:
        records = space.begin(facts, restart=job.settings.restart)
        space.files.mkdir(exist_ok=True)
        task = Task(
            job=job,
            candidates=candidates,
            groups=groups,
            data=data,
            folder=space.directory,
            method=method,
        )
        scores, more = METHODS[method](task, space, records, progress)
        kept = {"facts": facts, **more, "scores": scores}
        (space.files / FILE).write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
        space.publish()
    return kept
