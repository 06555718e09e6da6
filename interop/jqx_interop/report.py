# SPDX-License-Identifier: Apache-2.0
"""What a run did, or will do: formats, sizes, and the share of the model that is quantized."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .carrying import count
from .checkpoints import ShardPlan
from .job import Job


@dataclass(frozen=True, kw_only=True, slots=True)
class Coverage:
    """How much of a model a recipe reaches.

    `parameters`: all numbers in the source; `quantized`: those that get codes; `left`: linears that
    stay as they are; `formats`: "weight format, input format" -> number of linears; `source`: how
    the weights were stored, where they are decoded first; `kept`: linears, of those with codes,
    that have those of the source.
    """

    parameters: int
    quantized: int
    linears: int
    left: tuple[str, ...]
    formats: dict[str, int]
    source: str | None = None
    kept: int = 0

    @property
    def share(self) -> float:
        """The quantized share of the parameters, 0 to 1."""
        return self.quantized / max(self.parameters, 1)

    @property
    def line(self) -> str:
        """One line for people: how much was quantized, and which linears were not."""
        text = f"{self.share:.1%} of {self.parameters:,} parameters quantized"
        text += f" in {self.linears} linears"
        count = "1 linear" if self.kept == 1 else f"{self.kept} linears"
        kept = f", {count} kept as stored" if self.kept else ""
        source = "" if self.source is None else f"; source: {self.source}, decoded{kept}"
        if not self.left:
            return f"{text}; no linear was left out{source}"
        left = "1 linear" if len(self.left) == 1 else f"{len(self.left)} linears"
        return f"{text}; {left} left as they are: {', '.join(summary(self.left))}{source}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """The outcome of a run. Sizes in bytes; `bits` is stored bits per parameter, everything
    counted. `report`: the directory with what became of every linear, if asked for; `errors_of`:
    what its errors are of, "outputs", or "weights" where no inputs could be had; `carried`: what
    became of blocks of an MXFP4 source that need no rounding, or little; `experts`: how many were
    sent few tokens.
    """

    out: str
    recipe: str
    kv_cache: str
    target: str
    source_bytes: int
    output_bytes: int
    bits: float
    files: tuple[str, ...]
    coverage: Coverage
    seconds: float
    report: str | None = None
    errors_of: str | None = None
    carried: str | None = None
    experts: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        data = asdict(self)
        data["coverage"]["share"] = self.coverage.share
        return data


def coverage_of(job: Job) -> Coverage:
    """What the recipe of `job` reaches."""
    numel = {name: math.prod(job.checkpoint.tensors[name].shape) for name in job.inventory.tensors}
    linears = [m.path for m in job.inventory.modules if m.kind == "linear"]
    choices = job.described
    pairs = Counter(f"{c.weight}, {c.input or 'inputs as they are'}" for c in choices.values())
    return Coverage(
        parameters=sum(numel.values()),
        quantized=sum(numel[path + ".weight"] for path in choices),
        linears=len(choices),
        left=tuple(path for path in linears if path not in choices),
        formats=dict(pairs),
        source=job.checkpoint.source,
        kept=len(job.kept),
    )


def report_of(job: Job, out: Path, plans: Sequence[ShardPlan], seconds: float) -> Report:
    """The report of a finished job."""
    coverage = coverage_of(job)
    written, folder = sum(plan.size for plan in plans), job.settings.report
    return Report(
        out=str(out),
        recipe=job.recipe.name,
        kv_cache=job.kv or "none",
        target=job.settings.target,
        source_bytes=sum(file.stat().st_size for file in job.checkpoint.files),
        output_bytes=written,
        bits=8 * written / max(coverage.parameters, 1),
        files=tuple(plan.file for plan in plans),
        coverage=coverage,
        seconds=round(seconds, 3),
        report=None if folder is None else str(folder),
        errors_of=None if folder is None else "outputs" if job.reports_outputs else "weights",
        carried=None if (cast := count(job)) is None else cast.line,
    )


def summary(paths: Sequence[str], most: int = 6) -> list[str]:
    """Paths for people: the same linear of many layers is one entry, `model.layers.*.mlp.up_proj
    (x30)`.
    """
    merged = Counter(".".join("*" if p.isdigit() else p for p in path.split(".")) for path in paths)
    lines = [name if count == 1 else f"{name} (x{count})" for name, count in merged.items()]
    return lines[:most] + ([f"and {len(lines) - most} more"] if len(lines) > most else [])
