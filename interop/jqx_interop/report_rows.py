# SPDX-License-Identifier: Apache-2.0
"""What a report tells: the run, every quantized linear, and totals; as plain JSON values.

    output_error = |X W'^T - X W^T|^2 / |X W^T|^2          weight_error = |W' - W|^2 / |W|^2

W' is the stored weight with everything beside it that acts on inputs or outputs, X the inputs that
calibration met, before they are quantized.
"""

import dataclasses
import math
import platform
import re
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from typing import Any

import jax

from jqx.recipes import Recipe

from .choices import apply_options
from .job import Job
from .recipe_files import recipe_data
from .report import Report
from .searched import Facts

MEASURES = ("output_error", "weight_error", "saturated")
"""The facts of which there are totals; the first that is known is what linears are ranked by."""

NUMBER = re.compile(r"[0-9]{1,9}")
PACKAGES = ("jqx", "jax", "jaxlib", "numpy")

Row = dict[str, Any]


def report_data(job: Job, report: Report, facts: Facts, data: Mapping[str, Any]) -> dict[str, Any]:
    """The content of report.json. `facts` by linear; `data`: what was calibrated on."""
    rows = linear_rows(job, facts)
    device = jax.devices()[0]
    return {
        "model": str(job.checkpoint.path),
        **report.to_json(),
        "algorithm": [{"method": s.method, **dict(s.params)} for s in job.config.steps],
        "calibration": dict(data) or None,
        "recipe_rules": recipe_data(recipe_of(job)),
        "versions": {
            **{name: version(name) for name in PACKAGES},
            "python": platform.python_version(),
        },
        "device": " ".join(dict.fromkeys((device.platform, device.device_kind))),
        "totals": totals(rows),
        "kinds": {
            kind: totals([row for row in rows if row["kind"] == kind])
            for kind in dict.fromkeys(row["kind"] for row in rows)
        },
        "linears": rows,
    }


def recipe_of(job: Job) -> Recipe:
    """The recipe with everything the command changed in it, as a recipe file would say it."""
    config = apply_options(job.recipe.config, job.settings)
    return dataclasses.replace(job.recipe, config=config, kv_cache=job.kv)


def linear_rows(job: Job, facts: Facts) -> list[Row]:
    """One row a quantized linear, in module order; `bits`: stored bits a weight, scales and factors
    counted.
    """
    rows, places = [], places_of(job.choices)
    for path, choice in job.choices.items():
        shape = job.modules[path].shape
        stored = sum(tensor.nbytes for tensor in job.linear_outputs(path))
        kind, layer = places[path]
        own = {"path": path, "kind": kind, "layer": layer, "shape": list(shape)}
        formats = {"weight": choice.weight, "input": choice.input}
        rows.append({**own, **formats, "bits": 8 * stored / math.prod(shape), **facts[path]})
    return rows


def totals(rows: list[Row]) -> dict[str, Any]:
    """Mean and largest of every measure that some row has, the linear that has it, and how many
    linears were measured.
    """
    found: dict[str, Any] = {"linears": len(rows)}
    for name in MEASURES:
        known = [row for row in rows if name in row]
        if known:
            worst = max(known, key=lambda row: row[name])
            mean = math.fsum(row[name] for row in known) / len(known)
            of = {"worst": worst[name], "worst_linear": worst["path"], "linears": len(known)}
            found[name] = {"mean": mean, **of}
    return found


def measure_of(rows: Iterable[Row]) -> str:
    """What linears are compared by: the error of outputs if some row has it."""
    known = {name for row in rows for name in row}
    return next((name for name in MEASURES if name in known), MEASURES[1])


def places_of(paths: Iterable[str]) -> dict[str, tuple[str, int | None]]:
    """Path -> (what kind of linear it is, the number of its layer). What lies before the number is
    told only where it differs.

        model.layers.3.self_attn.q_proj  ->  self_attn.q_proj, 3
    """
    split = {path: _split(path) for path in paths}
    several = len({prefix for prefix, layer, _ in split.values() if layer is not None}) > 1
    return {
        path: (f"{prefix}.*.{rest}" if several and layer is not None else rest, layer)
        for path, (prefix, layer, rest) in split.items()
    }


def _split(path: str) -> tuple[str, int | None, str]:
    """What lies before the first number, that number, and the rest; later numbers become `*`."""
    parts = path.split(".")
    at = next((i for i, part in enumerate(parts) if i and NUMBER.fullmatch(part)), None)
    if at is None:
        return "", None, path
    rest = ["*" if NUMBER.fullmatch(part) else part for part in parts[at + 1 :]]
    return ".".join(parts[:at]), int(parts[at]), ".".join(rest) or ".".join([*parts[:at], "*"])
