# SPDX-License-Identifier: Apache-2.0
"""A choice under a budget, from scores: what every linear takes, what that costs, and the curve of
all budgets.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jqx.auto import BIT_COUNTS, NONE, PLAIN_BITS, Way, Weighting
from jqx.errors import InputError, nearest
from jqx.recipes import Recipe
from jqx_interop.checkpoints import parse_size

from .candidates import composed
from .run import Scored
from .ways import LATENCY, ways_of

DEFAULT_BITS = 4.8  # ModelOpt's


@dataclass(frozen=True, kw_only=True, slots=True)
class Limit:
    """A budget: at most `most`, counted in the way `count`, a key of `ways_of`: "latency" reads
    `table`. `weighting`: how much weights of experts and of linears left out count as bits.
    """

    most: float
    count: str = "modelopt"
    table: Path | None = None
    weighting: Weighting = field(default_factory=Weighting)


def limit_of(given: Mapping[str, Any], count: str = "modelopt", table: Path | None = None) -> Limit:
    """The budget that is given, one of "bits" (a number; 4.8 if none is given), "bytes" (one, or
    text such as "90MiB") and "latency" (microseconds). Raises InputError for two, and for text that
    is no size.
    """
    named = {name: value for name, value in given.items() if value is not None}
    if len(named) > 1:
        raise InputError(f"budgets of {' and '.join(named)} are given: give one")
    if table is not None and "latency" not in named:
        raise InputError("a table of latencies is given, and no latency: give --max-latency")
    if "bytes" in named:
        return Limit(most=float(parse_size(named["bytes"])), count="bytes")
    if "latency" in named:
        return Limit(most=float(named["latency"]), count=LATENCY, table=table)
    if count not in BIT_COUNTS:
        raise nearest(count, BIT_COUNTS, "way to count bits")
    return Limit(most=float(named.get("bits", DEFAULT_BITS)), count=count)


@dataclass(frozen=True, kw_only=True, slots=True)
class Tried:
    """A choice that was measured: `kl`, its divergence a token of the calibration data in nats."""

    kl: float
    choices: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """`choices`: linear -> candidate; `score`: the sum of theirs; `costs` by way of counting;
    `scores`: group, called by its first member -> candidate -> score; `curve`: points (cost, score)
    of all budgets in the way `count`; `recipe`: what quantizes so; `tried`: choices that were
    measured, in their order, of which it is the best.
    """

    choices: dict[str, str]
    score: float
    costs: dict[str, float]
    scores: Mapping[str, Mapping[str, float]]
    count: str
    unit: str
    curve: tuple[tuple[float, float], ...]
    recipe: Recipe
    tried: tuple[Tried, ...] = ()

    @property
    def counts(self) -> dict[str, int]:
        """Candidate -> how many linears take it, those that stay as they are last."""
        counts: dict[str, int] = {}
        for name in self.choices.values():
            counts[name] = counts.get(name, 0) + 1
        return dict(sorted(counts.items(), key=lambda pair: pair[0] == NONE))

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        points = [{"cost": cost, "score": score} for cost, score in self.curve]
        return {
            "choices": self.choices,
            "score": self.score,
            "costs": self.costs,
            "scores": {group: dict(row) for group, row in self.scores.items()},
            "curve": {"count": self.count, "unit": self.unit, "points": points},
            "tried": [{"kl": row.kl, "choices": dict(row.choices)} for row in self.tried],
        }


def chosen(scored: Scored, limit: Limit, choices: Mapping[str, str] | None = None) -> Chosen:
    """The choice with the smallest sum of scores within `limit` (of "kl", as ModelOpt chooses), or
    these `choices`, linear -> candidate.

    Raises InputError for another way to count, and for less than can be reached, with the least and
    another way.
    """
    ways = _checked_ways(scored, limit)
    way = ways[limit.count]
    found = way.found(choices) if choices else way.best(limit.most, scored.method)
    choices = way.members(found)
    return Chosen(
        choices=choices,
        score=found.score,
        costs={name: other.cost(found) for name, other in ways.items()},
        scores=scored.scores,
        count=limit.count,
        unit=way.unit,
        curve=way.curve(),
        recipe=composed(f"auto-{limit.most:g}", scored.candidates, choices),
    )


def choices_within(scored: Scored, limit: Limit) -> dict[str, str]:
    """The `choices` of `chosen` alone."""
    way = _checked_ways(scored, limit)[limit.count]
    return way.members(way.best(limit.most, scored.method))


def _checked_ways(scored: Scored, limit: Limit) -> dict[str, Way]:
    """All ways to count, among them one that `limit` is reached in. Raises InputError as `chosen`
    does.
    """
    ways = ways_of(scored, limit.weighting, limit.table)
    if limit.count == LATENCY and limit.table is None:
        raise InputError("latency is counted from a table: give one (--latency-table FILE)")
    if limit.count not in ways:
        raise nearest(limit.count, (*ways, LATENCY), "way to count")
    _check_number(limit.most, ways[limit.count])
    _check_reachable(limit.most, ways[limit.count], ways)
    return ways


def _check_number(most: float, way: Way) -> None:
    bits = way.name in BIT_COUNTS
    if not most > 0 or (bits and most > PLAIN_BITS):
        within = f"in (0, {PLAIN_BITS:g}]" if bits else "above 0"
        raise InputError(f"the budget is {most:g} {way.unit}; give a number {within}")


def _said(amount: float) -> str:
    return f"{amount:,.0f}" if amount >= 1000 else f"{amount:.4g}"


def _check_reachable(most: float, way: Way, ways: Mapping[str, Way]) -> None:
    if way.reaches(most):
        return
    others = [
        f"--count {name}, by which the least is {_said(other.least)}"
        for name, other in ways.items()
        if name != way.name and other.unit == way.unit and other.least <= most
    ]
    way_out = f", or count another way: {others[0]}" if others else ""
    raise InputError(
        f"{_said(most)} {way.unit} cannot be reached with these formats: the least is "
        f"{_said(way.least)}, "
        f"counted as {way.name} does; give as many, a smaller format{way_out}"
    )
