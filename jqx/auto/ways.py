# SPDX-License-Identifier: Apache-2.0
"""Ways to count what a choice costs: groups with costs and scores, and what nobody chooses.

modelopt      nominal bits; linears that nobody may quantize, and heads, count at 16
quantizable   bits as stored, with scales, of the linears that may be quantized alone
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from jqx.config import Choice
from jqx.errors import InputError

from .mixing import NONE
from .search import SOLVERS, Budget, Found, Group, curve, found_of, monotone
from .weighting import PLAIN_BITS, Weighting, bits_of

BIT_COUNTS = {"modelopt": (False, True), "quantizable": (True, False)}
"""Way to count bits -> whether scales count, and whether what nobody may quantize does, at 16."""


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

    def reaches(self, most: float) -> bool:
        """Whether some choice costs no more."""
        return bool(most >= self.least * (1 - 1e-12))

    def cost(self, found: Found) -> float:
        """What a choice costs."""
        return self.found(found.choices).cost / self.per

    def best(self, most: float, method: str) -> Found:
        """The choice that costs at most so much, as is usual for scores of a method."""
        budget = Budget(most=most * self.per * (1 + 1e-12), fixed=self.fixed, unit=self.unit)
        return SOLVERS[method](self.groups, budget)

    def found(self, choices: Mapping[str, str]) -> Found:
        """A choice that is given, every linear's candidate, with its score and cost."""
        picked = [group.candidates.index(choices[group.name]) for group in self.groups]
        return found_of(self.groups, picked, self.fixed)

    def members(self, found: Found) -> dict[str, str]:
        """Every linear's part in a choice."""
        return {path: found.choices[g.name] for g in self.groups for path in g.members}

    def curve(self) -> tuple[tuple[float, float], ...]:
        """The points (cost, score) of the best choices for all budgets."""
        return tuple((p.cost / self.per, p.score) for p in curve(self.groups, self.fixed))


@dataclass(frozen=True, kw_only=True)
class Counted:
    """What is counted: linears that choose together, what each of the candidates makes of every one
    of them (name -> path -> choice), and `scores` by group, called by its first member. `numel`:
    how many weights every linear has, also those that choose nothing.
    """

    groups: Sequence[tuple[str, ...]]
    choices: Mapping[str, Mapping[str, Choice]]
    scores: Mapping[str, Mapping[str, float]]
    numel: Mapping[str, int]

    def priced(self, cost: Callable[[tuple[str, ...], str], float]) -> list[Group]:
        """The groups with what each candidate, or NONE, costs; none of them scores worse than a
        cheaper one.
        """
        names = (*self.choices, NONE)
        return [
            monotone(
                Group(
                    members=paths,
                    candidates=names,
                    scores=tuple({**self.scores[paths[0]], NONE: 0.0}[name] for name in names),
                    costs=tuple(cost(paths, name) for name in names),
                )
            )
            for paths in self.groups
        ]


def bits_way(name: str, counted: Counted, weighting: Weighting) -> Way:
    """Bits a weight, counted in the way `name`, a row of BIT_COUNTS. Raises InputError where no
    weight counts.
    """
    (scales, whole), numel = BIT_COUNTS[name], counted.numel

    def bits(path: str, candidate: str) -> float:
        if candidate == NONE:
            return PLAIN_BITS
        return bits_of(counted.choices[candidate][path], scales=scales)

    def cost(paths: tuple[str, ...], candidate: str) -> float:
        return weighting.of(paths) * sum(bits(p, candidate) * numel[p] for p in paths)

    groups = counted.priced(cost)
    mine = {path for paths in counted.groups for path in paths}
    rest = [path for path in numel if path not in mine] if whole else []
    fixed = float(sum(weighting.of((path,)) * numel[path] for path in rest))
    per = sum(group.costs[-1] for group in groups) / PLAIN_BITS + fixed
    if per <= 0:
        raise InputError("no weight counts: leave out less of them in the cost (--exclude-cost)")
    return Way(name=name, unit="bits a weight", groups=groups, fixed=PLAIN_BITS * fixed, per=per)
