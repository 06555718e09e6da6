# SPDX-License-Identifier: Apache-2.0
"""A choice under a budget, from scores: what every linear takes, what that costs, and the curve of
all budgets.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jqx.auto import Budget, Found, Group, curve, monotone, optimum
from jqx.errors import InputError, nearest
from jqx.recipes import Recipe

from .candidates import COUNTINGS, NONE, PLAIN_BITS, Counting, composed, counted, weights_counted
from .run import Scored


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """`choices`: linear -> candidate; `score` their sum; `bits` by way of counting; `curve`: points
    (bits, score) of all budgets; `recipe`: what quantizes so.
    """

    choices: dict[str, str]
    score: float
    bits: dict[str, float]
    curve: tuple[tuple[float, float], ...]
    recipe: Recipe

    @property
    def counts(self) -> dict[str, int]:
        """Candidate -> how many linears take it, those that stay as they are last."""
        counts: dict[str, int] = {}
        for name in self.choices.values():
            counts[name] = counts.get(name, 0) + 1
        return dict(sorted(counts.items(), key=lambda pair: pair[0] == NONE))

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "choices": self.choices,
            "score": self.score,
            "bits": self.bits,
            "curve": [{"bits": bits, "score": score} for bits, score in self.curve],
        }


def chosen(scored: Scored, bits: float, counting: str = "modelopt") -> Chosen:
    """The choice with the smallest sum of scores of at most `bits` a weight, counted in the way
    `counting`, a row of COUNTINGS.

    Raises InputError for another way, and for fewer bits than can be reached, with the least and
    the other way to count.
    """
    if counting not in COUNTINGS:
        raise nearest(counting, COUNTINGS, "way to count bits")
    if not 0 < bits <= PLAIN_BITS:
        raise InputError(f"bits is {bits:g}; give a number in (0, 16]")
    ways = {name: _way(scored, row) for name, row in COUNTINGS.items()}
    way = ways[counting]
    _check_reachable(bits, counting, ways)
    found = optimum(way.groups, Budget(most=bits * way.weights * (1 + 1e-12), fixed=way.fixed))
    choices = {path: found.choices[group.name] for group in way.groups for path in group.members}
    points = curve(way.groups, way.fixed)
    return Chosen(
        choices=choices,
        score=found.score,
        bits={name: other.bits(found) for name, other in ways.items()},
        curve=tuple((point.cost / way.weights, point.score) for point in points),
        recipe=composed(f"auto-{bits:g}", scored.candidates, choices, choices),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Way:
    """Scores in one way of counting: the groups with their costs, how many weights bits are about,
    and the bits of those that nobody chooses.
    """

    groups: list[Group]
    weights: int
    fixed: float

    @property
    def least(self) -> float:
        """The fewest bits a weight."""
        cheapest = sum(min(group.costs) for group in self.groups)
        return (cheapest + self.fixed) / max(self.weights, 1)

    def bits(self, found: Found) -> float:
        """Bits a weight of a choice."""
        picked = ((g, g.candidates.index(found.choices[g.name])) for g in self.groups)
        return (sum(g.costs[c] for g, c in picked) + self.fixed) / max(self.weights, 1)


def _way(scored: Scored, row: Counting) -> _Way:
    groups = counted(scored.groups, scored.scores, scored.candidates, row)
    weights = weights_counted(scored.candidates[0].job, scored.groups, row)
    mine = sum(group.costs[-1] for group in groups) / PLAIN_BITS
    fixed = PLAIN_BITS * (weights - mine)
    return _Way(groups=[monotone(group) for group in groups], weights=weights, fixed=fixed)


def _check_reachable(bits: float, counting: str, ways: Mapping[str, _Way]) -> None:
    least = ways[counting].least
    if bits >= least * (1 - 1e-12):
        return
    others = [
        f"--count {name}, by which the least is {way.least:.2f}"
        for name, way in ways.items()
        if name != counting and way.least <= bits
    ]
    way_out = f", or count another way: {others[0]}" if others else ""
    raise InputError(
        f"{bits:g} bits a weight cannot be reached with these formats: the least is {least:.2f}, "
        f"counted as {counting} does; give as many, a smaller format{way_out}"
    )
