# SPDX-License-Identifier: Apache-2.0
"""The folder of a report: written beside its place, and renamed to it once OUT is there.

DIR/report.json, DIR/errors.png, DIR/report.html, and for a mixture DIR/experts.png
"""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jqx.errors import InputError

from .checkpoints import one_line
from .checkpoints.workspace import SUFFIX as WORKSPACE
from .job import Job
from .report import Report
from .report_page import page
from .report_plot import plot_errors, plot_tokens
from .report_rows import report_data
from .searched import Facts

SUFFIX = ".jqx-report-partial"
DATA, PICTURE, PAGE = "report.json", "errors.png", "report.html"
EXPERTS = "experts.png"
TOLD = ("layer", "tokens")


def check_apart(folder: str | Path, out: str | Path, model: Path) -> None:
    """Raise InputError if a report in `folder` would be in the way of OUT or lie in the model."""
    folder, out, model = Path(folder).resolve(), Path(out).resolve(), model.resolve()
    for other in (out, out.with_name(out.name + WORKSPACE)):
        if folder == other or other in folder.parents or folder in other.parents:
            raise InputError(
                one_line(f"{folder}: a report and OUT are two directories, neither in the other")
            )
    if model in folder.parents:
        raise InputError(one_line(f"{folder}: is inside the model directory {model}"))


def stage_report(
    job: Job,
    report: Report,
    facts: Facts,
    data: Mapping[str, Any],
    experts: Sequence[Mapping[str, Any]],
) -> Path:
    """Write the report of a finished job beside where it belongs; returns that directory.
    `experts`: what is told of those of every block.
    """
    assert job.settings.report is not None
    folder = Path(job.settings.report).resolve()
    place = folder.with_name(folder.name + SUFFIX)
    if place.exists():
        shutil.rmtree(place)  # of a run that was killed
    place.mkdir(parents=True)
    content = report_data(job, report, facts, data)
    title = f"{report.recipe}: {len(content['linears'])} linears"
    plot_errors(content["linears"], title, place / PICTURE)
    pictures = [(place / PICTURE).read_bytes()]
    if experts:
        content["expert_tokens"] = [{key: block[key] for key in TOLD} for block in experts]
        plot_tokens(experts, (report.experts or "").partition(";")[0], place / EXPERTS)
        pictures.append((place / EXPERTS).read_bytes())
    (place / DATA).write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", "utf-8")
    text = page(content, *pictures)
    (place / PAGE).write_text(text, "utf-8", errors="backslashreplace")
    return place


def publish_report(place: Path) -> None:
    """Rename a staged report to where it belongs. Raises InputError, naming where it is, if
    something has taken its place.
    """
    folder = place.with_name(place.name.removesuffix(SUFFIX))
    try:
        os.rename(place, folder)
    except OSError as error:
        raise InputError(
            one_line(
                f"{folder}: {error.strerror}. The checkpoint is complete, its report is {place}"
            )
        ) from error
