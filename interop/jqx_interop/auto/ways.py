# SPDX-License-Identifier: Apache-2.0
"""Ways to count what a choice costs: bits a weight, bytes of memory, time of a token.

modelopt      nominal bits; linears that nobody may quantize, and heads, count at 16
quantizable   bits as stored, with scales, of the linears that may be quantized alone
bytes         all that is stored of the model
latency       microseconds of all linears, from a table of what each format takes in each shape
"""

import json
import math
from pathlib import Path

from jqx.auto import BIT_COUNTS, NONE, Counted, Way, Weighting, bits_way
from jqx.auto.weighting import bits_of
from jqx.errors import InputError

from .run import Scored

LATENCY = "latency"


def ways_of(scored: Scored, weighting: Weighting, table: Path | None = None) -> dict[str, Way]:
    """All ways of counting, with the scores; that of latencies where there is a table of them.
    Raises InputError for a table that is none or lacks a shape.
    """
    counted = _counted(scored)
    ways = {name: bits_way(name, counted, weighting) for name in BIT_COUNTS}
    ways["bytes"] = _bytes(counted, scored)
    if table is not None:
        ways[LATENCY] = _latency(counted, scored, table)
    return ways


def _counted(scored: Scored) -> Counted:
    """A tied head owns no tensor and is a linear all the same."""
    job = scored.candidates[0].job
    numel = {m.path: math.prod(m.shape) for m in job.inventory.modules if m.kind == "linear"}
    head = job.spec.vocab * job.spec.hidden if job.spec is not None else 0
    return Counted(
        groups=scored.groups,
        choices={candidate.name: candidate.job.choices for candidate in scored.candidates},
        scores=scored.scores,
        numel=numel | dict.fromkeys(job.inventory.absent, head),
    )


def _bytes(counted: Counted, scored: Scored) -> Way:
    """Bytes of memory that the weights take, all that is no choice included."""
    job = scored.candidates[0].job
    mine = {path for paths in counted.groups for path in paths}

    def cost(paths: tuple[str, ...], name: str) -> float:
        if name == NONE:
            return float(sum(job.checkpoint.tensors[f"{path}.weight"].nbytes for path in paths))
        choices = counted.choices[name]
        return sum(counted.numel[p] * bits_of(choices[p], scales=True) / 8 for p in paths)

    tensors = (t for t in job.inventory.tensors if t.removesuffix(".weight") not in mine)
    fixed = float(sum(job.checkpoint.tensors[name].nbytes for name in tensors))
    return Way(name="bytes", unit="bytes", groups=counted.priced(cost), fixed=fixed)


def _latency(counted: Counted, scored: Scored, path: Path) -> Way:
    """Microseconds of all linears, one after the other."""
    known, job = read_table(path), scored.candidates[0].job
    mine = {p for paths in counted.groups for p in paths}

    def each(p: str, name: str) -> float:
        n, k = job.modules[p].shape
        if (name, n, k) not in known:
            have = sorted({row[0] for row in known if row[1:] == (n, k)})
            raise InputError(
                f"{path} has no time of {name} for {n} x {k} ({p}), only of "
                f"{', '.join(have) or 'other shapes'}: add a row"
            )
        return known[name, n, k]

    groups = counted.priced(lambda paths, name: sum(each(p, name) for p in paths))
    linears = [m.path for m in job.inventory.modules if m.kind == "linear"]
    fixed = sum(each(p, NONE) for p in linears if p not in mine)
    return Way(name=LATENCY, unit="microseconds", groups=groups, fixed=fixed)


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
