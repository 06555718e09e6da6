# SPDX-License-Identifier: Apache-2.0
"""Ways to count what a choice costs: bits a weight, bytes of memory, time of a token.

modelopt      nominal bits; linears that nobody may quantize, and heads, count at 16
quantizable   bits as stored, with scales, of the linears that may be quantized alone
bytes         all that is stored of the model
latency       microseconds of all linears, from a table of what each format takes in each shape
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from jqx.auto import NONE, PLAIN_BITS, Found, Group, Weighting, monotone
from jqx.errors import InputError, nearest
from jqx_interop.job import Job

from .candidates import Candidate
from .run import Scored

LATENCY = "latency"


@dataclass(frozen=True, kw_only=True, slots=True)
class Way:
    """Scores with costs in one way of counting: the groups, what nobody chooses (`fixed`), and what
    the sum of both is divided by. `unit` says it to people.
    """

    name: str
    unit: str
    groups: list[Group]
    fixed: float = 0.0
    per: float = 1.0

    @property
    def least(self) -> float:
        """What the cheapest choice costs."""
        return (sum(min(group.costs) for group in self.groups) + self.fixed) / self.per

    def cost(self, found: Found) -> float:
        """What a choice costs."""
        picked = ((g, g.candidates.index(found.choices[g.name])) for g in self.groups)
        return (sum(g.costs[c] for g, c in picked) + self.fixed) / self.per


def way_of(name: str, scored: Scored, weighting: Weighting, table: Path | None = None) -> Way:
    """One way of counting, with the scores. Raises InputError for a name that is none, and for a
    table of latencies that is missing or lacks a shape.
    """
    if name == LATENCY:
        if table is None:
            raise InputError("latency is counted from a table: give one (--latency-table FILE)")
        return _latency(scored, table)
    if name not in WAYS:
        raise nearest(name, (*WAYS, LATENCY), "way to count")
    return WAYS[name](scored, weighting)


def _groups(
    scored: Scored, cost: Callable[[tuple[str, ...], Candidate | None], float]
) -> list[Group]:
    """The groups, no candidate of which scores worse than a cheaper one."""
    found = []
    for paths in scored.groups:
        mine = scored.scores[paths[0]]
        group = Group(
            members=paths,
            candidates=(*(c.name for c in scored.candidates), NONE),
            scores=(*(mine[c.name] for c in scored.candidates), 0.0),
            costs=tuple(cost(paths, c) for c in (*scored.candidates, None)),
        )
        found.append(monotone(group))
    return found


def _numel(job: Job, path: str) -> int:
    return math.prod(job.modules[path].shape)


def _bits(scored: Scored, weighting: Weighting, *, name: str, scales: bool, whole: bool) -> Way:
    """Bits a weight. `scales`: with those of blocks; `whole`: of linears that nobody may quantize,
    too.
    """
    job = scored.candidates[0].job

    def cost(paths: tuple[str, ...], candidate: Candidate | None) -> float:
        bits = (
            PLAIN_BITS if candidate is None else candidate.bits(path, scales=scales)
            for path in paths
        )
        numel = (_numel(job, path) for path in paths)
        return weighting.of(paths) * sum(b * n for b, n in zip(bits, numel, strict=True))

    groups = _groups(scored, cost)
    weights = sum(group.costs[-1] for group in groups) / PLAIN_BITS
    fixed = 0.0
    if whole:
        mine = {path for paths in scored.groups for path in paths}
        linears = [m.path for m in job.inventory.modules if m.kind == "linear"]
        fixed = sum(weighting.of((p,)) * _numel(job, p) for p in linears if p not in mine)
        fixed += sum(weighting.of((p,)) for p in job.inventory.absent) * _head_size(job)
    per = weights + fixed
    if per <= 0:
        raise InputError("no weight counts: leave out less (--exclude-cost), or other linears")
    return Way(name=name, unit="bits a weight", groups=groups, fixed=PLAIN_BITS * fixed, per=per)


def _head_size(job: Job) -> int:
    """Weights of a tied head, which owns no tensor and is a linear all the same."""
    return job.spec.vocab * job.spec.hidden if job.spec is not None else 0


def _bytes(scored: Scored, _: Weighting) -> Way:
    """Bytes of memory that the weights take, all that is no choice included."""
    job = scored.candidates[0].job
    mine = {path for paths in scored.groups for path in paths}

    def cost(paths: tuple[str, ...], candidate: Candidate | None) -> float:
        if candidate is None:
            return float(sum(job.checkpoint.tensors[f"{path}.weight"].nbytes for path in paths))
        return sum(_numel(job, p) * candidate.bits(p, scales=True) / 8 for p in paths)

    tensors = (t for t in job.inventory.tensors if t.removesuffix(".weight") not in mine)
    fixed = float(sum(job.checkpoint.tensors[name].nbytes for name in tensors))
    return Way(name="bytes", unit="bytes", groups=_groups(scored, cost), fixed=fixed)


WAYS: Mapping[str, Callable[[Scored, Weighting], Way]] = {
    "modelopt": partial(_bits, name="modelopt", scales=False, whole=True),
    "quantizable": partial(_bits, name="quantizable", scales=True, whole=False),
    "bytes": _bytes,
}
"""Ways to count that need no more than the scores."""

BIT_COUNTS = ("modelopt", "quantizable")
"""Those that count bits a weight."""


def _latency(scored: Scored, path: Path) -> Way:
    """Microseconds of all linears, one after the other."""
    known, job = read_table(path), scored.candidates[0].job
    mine = {p for paths in scored.groups for p in paths}

    def each(p: str, name: str) -> float:
        n, k = job.modules[p].shape
        if (name, n, k) not in known:
            have = sorted({row[0] for row in known if row[1:] == (n, k)})
            raise InputError(
                f"{path} has no time of {name} for {n} x {k} ({p}), only of "
                f"{', '.join(have) or 'other shapes'}: add a row"
            )
        return known[name, n, k]

    def cost(paths: tuple[str, ...], candidate: Candidate | None) -> float:
        return sum(each(p, NONE if candidate is None else candidate.name) for p in paths)

    linears = [m.path for m in job.inventory.modules if m.kind == "linear"]
    fixed = sum(each(p, NONE) for p in linears if p not in mine)
    return Way(name=LATENCY, unit="microseconds", groups=_groups(scored, cost), fixed=fixed)


def read_table(path: Path) -> dict[tuple[str, int, int], float]:
    """A table of latencies: JSON, {"rows": [{"format", "n", "k", "microseconds"}, ...]}, where a
    format is the name of a recipe, or "none", and n and k are rows and columns of a weight.

    Raises InputError for a file that is none.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file; a table of latencies is JSON")
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
        known = {
            (str(row["format"]), int(row["n"]), int(row["k"])): float(row["microseconds"])
            for row in rows
        }
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f'{path} is no table of latencies, {{"rows": [{{"format": "fp8", "n": 576, "k": 1536, '
            f'"microseconds": 9.5}}, ...]}}: {type(error).__name__} {error}'
        ) from error
    wrong = [key for key, value in known.items() if not (math.isfinite(value) and value >= 0)]
    if wrong:
        raise InputError(f"{path}: the time of {wrong[0]} is {known[wrong[0]]}")
    return known
