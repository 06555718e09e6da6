# SPDX-License-Identifier: Apache-2.0
"""The choice of formats: the smallest sum of scores whose costs stay within a budget.

    minimise  sum_g score[g, c(g)]    subject to  sum_g cost[g, c(g)] <= budget

exactly, by mixed integer linear programming (HiGHS). A score is what the model is expected to lose
when the members of a group, and nothing else, take a candidate; scores add up. (ModelOpt 0.47,
`auto_quantize`, whose KL method bisects a threshold on scores instead.)
"""

import ctypes
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np

from jqx.errors import InputError

BISECTIONS = 100  # of a threshold, as ModelOpt has them


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """Linears that take one candidate together: `members`, the first of which names it; for every
    candidate that they may take its `scores` and `costs`, candidates in an order of the caller's.
    """

    members: tuple[str, ...]
    candidates: tuple[str, ...]
    scores: tuple[float, ...]
    costs: tuple[float, ...]

    @property
    def name(self) -> str:
        """The first member."""
        return self.members[0]


@dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    """What costs may add up to: `most`, in the unit of costs, beside `fixed`, what nobody chooses;
    `unit` says it to people.
    """

    most: float
    fixed: float = 0.0
    unit: str = "bits"


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """A choice: group -> candidate, the sum of its scores and of its costs, what is fixed with
    them.
    """

    choices: dict[str, str]
    score: float
    cost: float


def monotone(group: Group) -> Group:
    """The group with no candidate that costs more scored worse: the running minimum of scores with
    ascending costs, as more bits cannot be known to hurt.
    """
    order = sorted(range(len(group.costs)), key=lambda c: (group.costs[c], group.candidates[c]))
    scores, least = list(group.scores), float("inf")
    for c in order:
        least = min(least, scores[c])
        scores[c] = least
    return replace(group, scores=tuple(scores))


def optimum(groups: Sequence[Group], budget: Budget) -> Found:
    """The choice with the smallest sum of scores within the budget, any of equal ones. Raises
    InputError if even the cheapest choice costs more, saying what it does.
    """
    # imported here: `import jqx` has no time for it
    from scipy import sparse
    from scipy.optimize import Bounds, LinearConstraint, milp

    _check(groups, budget)
    if not groups:
        return Found(choices={}, score=0.0, cost=budget.fixed)
    scores = np.concatenate([np.asarray(group.scores, np.float64) for group in groups])
    costs = np.concatenate([np.asarray(group.costs, np.float64) for group in groups])
    # numbers near 1, so that tolerances of the solver are small beside them
    unit, whole = float(np.max(np.abs(scores))) or 1.0, float(np.max(costs)) or 1.0
    sizes = [len(group.scores) for group in groups]
    rows = np.repeat(np.arange(len(groups)), sizes)
    one = sparse.csr_array((np.ones(scores.size), (rows, np.arange(scores.size))))
    room = (budget.most - budget.fixed) / whole
    limits = LinearConstraint(one, 1, 1), LinearConstraint(costs[None, :] / whole, -np.inf, room)
    with _silence():
        solved = milp(
            scores / unit,
            integrality=np.ones(scores.size),
            bounds=Bounds(0, 1),
            constraints=limits,
            options={"mip_rel_gap": 0.0},
        )
    assert solved.x is not None, solved.message  # the cheapest choice was checked to fit
    picked, start = [], 0
    for size in sizes:
        picked.append(int(np.argmax(solved.x[start : start + size])))
        start += size
    return found_of(groups, picked, budget.fixed)


@contextmanager
def _silence() -> Iterator[None]:
    """Keep what C code prints off the standard output: HiGHS leaves a line of debugging there."""
    kept = os.dup(1)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        yield
    finally:
        ctypes.CDLL(None).fflush(None)  # or it comes out later, from a buffer
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


def bisected(groups: Sequence[Group], budget: Budget) -> Found:
    """ModelOpt's choice for scores of KL: every group takes the cheapest candidate whose score is
    at most a threshold, which is bisected between the smallest and the largest score. The last
    choice whose cost is within the budget; the cheapest of all where none was.
    """
    _check(groups, budget)
    low = min((s for group in groups for s in group.scores), default=0.0)
    high = max((s for group in groups for s in group.scores), default=0.0)
    best = found_of(groups, [int(np.argmin(group.costs)) for group in groups], budget.fixed)
    for _ in range(BISECTIONS):
        threshold = (low + high) / 2
        found = found_of(groups, [_cheapest(g, threshold) for g in groups], budget.fixed)
        if found.cost <= budget.most:
            best, high = found, threshold
        else:
            low = threshold
    return best


SOLVERS: Mapping[str, Callable[[Sequence[Group], Budget], Found]] = {
    "gradient": optimum,
    "fisher": optimum,
    "kl": bisected,
}
"""Method of scores -> how a choice is found from them: as ModelOpt does where it has the method."""


def curve(groups: Sequence[Group], fixed: float, points: int = 41) -> list[Found]:
    """Optima for budgets from the cheapest choice to the dearest, without those that another beats
    or equals; by ascending cost.
    """
    least = fixed + sum(min(group.costs) for group in groups)
    most = fixed + sum(max(group.costs) for group in groups)
    kept: list[Found] = []
    for budget in np.linspace(least, most, points):
        found = optimum(groups, Budget(most=float(budget) * (1 + 1e-12), fixed=fixed))
        if not kept or found.score < kept[-1].score:
            kept.append(found)
    return kept


def _cheapest(group: Group, threshold: float) -> int:
    """The cheapest candidate of a score up to `threshold`; the one of the smallest score if there
    is none.
    """
    fitting = [c for c, score in enumerate(group.scores) if score <= threshold]
    if not fitting:
        return int(np.argmin(group.scores))
    return min(fitting, key=lambda c: group.costs[c])


def found_of(groups: Sequence[Group], picked: Sequence[int], fixed: float) -> Found:
    """The choice of the candidates with these numbers; `fixed`: what costs beside them."""
    pairs = list(zip(groups, picked, strict=True))
    return Found(
        choices={group.name: group.candidates[c] for group, c in pairs},
        score=float(sum(group.scores[c] for group, c in pairs)),
        cost=fixed + float(sum(group.costs[c] for group, c in pairs)),
    )


def _check(groups: Sequence[Group], budget: Budget) -> None:
    """Raises InputError for scores that are no numbers, and for a budget that nothing fits."""
    for group in groups:
        if not all(np.isfinite(group.scores)):
            raise InputError(
                f"{group.name} has the scores {group.scores}, not finite numbers: the loss or its "
                "gradient is NaN or infinite for this model and these data"
            )
    least = budget.fixed + sum(min(group.costs) for group in groups)
    if least > budget.most * (1 + 1e-12):
        raise InputError(
            f"the cheapest choice takes {least:.6g} {budget.unit}, and the budget is "
            f"{budget.most:.6g}: give at least as many"
        )
