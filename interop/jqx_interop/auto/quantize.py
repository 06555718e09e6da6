# SPDX-License-Identifier: Apache-2.0
"""auto_quantize: scores, a choice, and the checkpoint that it gives."""

from dataclasses import dataclass, field, replace
from pathlib import Path

from jqx.auto import NONE, Weighting
from jqx.auto.keywords import COST_MODELS
from jqx.errors import InputError, nearest
from jqx.recipes import Recipe
from jqx_interop.job import Job, prepare
from jqx_interop.pipeline import Inputs, run
from jqx_interop.progress import Progress, Silent
from jqx_interop.report import Report
from jqx_interop.settings import Settings

from .choosing import Chosen, Limit
from .curve import write_curve
from .experts import active_ratio
from .rounds import refined
from .run import Scored, Scoring, scored
from .statistics import SeveralStats


@dataclass(frozen=True, kw_only=True, slots=True)
class AutoSettings:
    """What is asked for: `formats`, recipes that linears may take, within `limit`; scored by
    `method`, a row of METHODS. Linears that match one of the globs `disabled` stay as they are.
    `scores`: the directory where statistics, scores and the curve are kept, and taken from where
    they are of the same model, data and recipes. `rounds`: how often the choice is corrected by
    what the model with it does, of methods whose scores are divergences.

    Where bits are counted, the `cost_model` "active_moe" counts weights of routed experts
    `expert_ratio` times (None: as config.json says), and linears that match `excluded` count
    nothing.
    """

    formats: tuple[str | Recipe, ...]
    scores: str | Path
    limit: Limit = field(default_factory=lambda: Limit(most=4.8))
    method: str = "gradient"
    rounds: int = 0
    disabled: tuple[str, ...] = ()
    cost_model: str = "weight"
    expert_ratio: float | None = None
    excluded: tuple[str, ...] = ()


def auto_quantize(
    model: str | Path,
    out: str | Path,
    asked: AutoSettings,
    settings: Settings | None = None,
    *,
    progress: Progress | None = None,
) -> tuple[Chosen, Report]:
    """Quantize the checkpoint `model` to `out`, every linear by that one of the recipes asked for,
    or none, with which the sum of scores is least within the limit asked for.

    Raises InputError for what cannot be scored, reached or written.
    """
    given, progress = settings or Settings(), progress or Silent()
    scoring = Scoring(recipes=asked.formats, method=asked.method, disabled=asked.disabled)
    found = scored(model, scoring, asked.scores, given, progress)
    weighting = _weighting(asked, found.candidates[0].job)
    limit = replace(asked.limit, weighting=weighting)
    choice = refined(found, limit, asked.rounds, Path(asked.scores), progress)
    write_curve(choice, found.method, Path(asked.scores))
    return choice, _export(model, out, choice, found, (given, progress))


def _weighting(asked: AutoSettings, job: Job) -> Weighting:
    """How much weights count. Raises InputError for another cost model, and for a share of experts
    that is not known, or not asked for.
    """
    if asked.cost_model not in COST_MODELS:
        raise nearest(asked.cost_model, COST_MODELS, "cost model")
    ratio = asked.expert_ratio
    if asked.cost_model == "active_moe":
        ratio = active_ratio(job.checkpoint.config, job.spec) if ratio is None else ratio
    elif ratio is not None:
        raise InputError("a share of experts is given, and all weights count: --cost-model weight")
    return Weighting(experts=1.0 if ratio is None else ratio, excluded=asked.excluded)


def _export(
    model: str | Path,
    out: str | Path,
    choice: Chosen,
    scored: Scored,
    given: tuple[Settings, Progress],
) -> Report:
    """Quantize as was chosen, with the statistics that every candidate was scored with."""
    settings, progress = given
    places = {c.name: c.job.settings.stats for c in scored.candidates}
    picked = {p: places[name] for p, name in choice.choices.items() if name != NONE}
    folders = {path: Path(place) for path, place in picked.items() if place is not None}
    stats = next(iter(folders.values()), None)
    job = prepare(model, choice.recipe, replace(settings, stats=stats))
    saved = None if stats is None else SeveralStats(job, folders)
    return run(job, out, progress, None if saved is None else Inputs(saved=saved))
