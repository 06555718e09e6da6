# SPDX-License-Identifier: Apache-2.0
"""auto_quantize: scores, a choice, and the checkpoint that it gives."""

from dataclasses import dataclass, replace
from pathlib import Path

from jqx.recipes import Recipe
from jqx_interop.job import prepare
from jqx_interop.pipeline import run
from jqx_interop.progress import Progress, Silent
from jqx_interop.report import Report
from jqx_interop.settings import Settings

from .choosing import Chosen, chosen
from .run import scored


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """What is asked for: `formats`, recipes that linears may take; at most `bits` a weight, counted
    in the way `count`, a row of COUNTINGS. `scores`: the directory where statistics and scores are
    kept, and taken from where they are of the same model, data and recipes.
    """

    formats: tuple[str | Recipe, ...]
    scores: str | Path
    bits: float = 4.8
    count: str = "modelopt"


def auto_quantize(
    model: str | Path,
    out: str | Path,
    asked: Asked,
    settings: Settings | None = None,
    *,
    progress: Progress | None = None,
) -> tuple[Chosen, Report]:
    """Quantize the checkpoint `model` to `out`, every linear by that one of the recipes asked for,
    or none, with which the sum of scores is least within the bits asked for.

    Raises InputError for what cannot be scored, reached or written.
    """
    given, progress = settings or Settings(), progress or Silent()
    found = scored(model, asked.formats, asked.scores, given, progress)
    choice = chosen(found, asked.bits, asked.count)
    stats = Path(asked.scores) / "stats"
    given = replace(given, stats=stats if stats.is_dir() else None)
    return choice, run(prepare(model, choice.recipe, given), out, progress)
