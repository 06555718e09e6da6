# SPDX-License-Identifier: Apache-2.0
"""A choice under a budget, from scores: what every linear takes, what that costs, and the curve of
all budgets.
"""

from collections.abc import Sequence
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
    row = COUNTINGS[counting]
    groups, weights, fixed = _counted(scored, row)
    _check_reachable(scored, bits, row)
    found = optimum(groups, Budget(most=bits * weights * (1 + 1e-12), fixed=fixed))
    choices = {path: found.choices[group.name] for group in groups for path in group.members}
    return Chosen(
        choices=choices,
        score=found.score,
        bits={name: _bits_of(scored, found, other) for name, other in COUNTINGS.items()},
        curve=tuple((point.cost / weights, point.score) for point in curve(groups, fixed)),
        recipe=composed(f"auto-{bits:g}", scored.candidates, choices, choices),
    )


def _counted(scored: Scored, row: Counting) -> tuple[list[Group], int, float]:
    """The groups, how many weights bits are about, and the bits of those that nobody chooses."""
    groups = counted(scored.groups, scored.scores, scored.candidates, row)
    weights = weights_counted(scored.candidates[0].job, scored.groups, row)
    mine = sum(group.costs[-1] for group in groups) / PLAIN_BITS
    return [monotone(group) for group in groups], weights, PLAIN_BITS * (weights - mine)


def _bits_of(scored: Scored, found: Found, row: Counting) -> float:
    groups, weights, fixed = _counted(scored, row)
    cost = sum(g.costs[g.candidates.index(found.choices[g.name])] for g in groups)
    return (cost + fixed) / max(weights, 1)


def _least(scored: Scored, row: Counting) -> float:
    groups, weights, fixed = _counted(scored, row)
    return (sum(min(group.costs) for group in groups) + fixed) / max(weights, 1)


def _check_reachable(scored: Scored, bits: float, row: Counting) -> None:
    least = _least(scored, row)
    if bits >= least * (1 - 1e-12):
        return
    others: Sequence[str] = [
        f"--count {other.name}, by which the least is {_least(scored, other):.2f}"
        for other in COUNTINGS.values()
        if other != row and _least(scored, other) <= bits
    ]
    way_out = f", or count another way: {others[0]}" if others else ""
    raise InputError(
        f"{bits:g} bits a weight cannot be reached with these formats: the least is {least:.2f}, "
        f"counted as {row.name} does; give as many, a smaller format{way_out}"
    )
