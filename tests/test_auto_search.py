# SPDX-License-Identifier: Apache-2.0
"""The search for a choice of formats: against brute force, within budgets, for all groups."""

import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jqx.auto import Budget, Group, bisected, curve, monotone, optimum
from jqx.errors import InputError

NAMES, COSTS = ("nvfp4", "fp8", "none"), (4.0, 8.0, 16.0)


def drawn(seed, count, scale=1.0):
    rng = np.random.default_rng(seed)
    groups = []
    for i in range(count):
        numel = int(rng.integers(1, 50)) * 256
        scores = np.sort(rng.exponential(scale, 3))[::-1] * rng.integers(0, 2, 3)
        costs = tuple(numel * bits for bits in (4.5, 8.0, 16.0))
        groups.append(
            Group(members=(f"l{i}",), candidates=NAMES, scores=tuple(scores), costs=costs)
        )
    return [monotone(group) for group in groups]


def brute(groups, most):
    best = np.inf
    for picked in itertools.product(range(3), repeat=len(groups)):
        if sum(g.costs[c] for g, c in zip(groups, picked, strict=True)) <= most:
            best = min(best, sum(g.scores[c] for g, c in zip(groups, picked, strict=True)))
    return best


@settings(max_examples=150, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 7),
    st.floats(0, 1),
    st.sampled_from([1e-12, 1e-3, 1.0, 1e6]),
)
def test_the_optimum_is_that_of_brute_force(seed, count, share, scale):
    groups = drawn(seed, count, scale)
    least, most = (sum(pick(g.costs) for g in groups) for pick in (min, max))
    budget = least + share * (most - least)
    found = optimum(groups, Budget(most=budget))
    assert found.cost <= budget * (1 + 1e-9)
    assert set(found.choices) == {g.name for g in groups}
    assert found.score == pytest.approx(brute(groups, budget), rel=1e-9, abs=1e-15 * scale)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 30), st.floats(0, 1))
def test_a_threshold_keeps_to_the_budget_and_is_no_better(seed, count, share):
    groups = drawn(seed, count)
    least, most = (sum(pick(g.costs) for g in groups) for pick in (min, max))
    budget = Budget(most=least + share * (most - least))
    found, best = bisected(groups, budget), optimum(groups, budget)
    assert found.cost <= budget.most
    assert found.score >= best.score - 1e-9


@given(st.integers(0, 2**32 - 1), st.integers(1, 12))
@settings(max_examples=40, deadline=None)
def test_a_curve_falls(seed, count):
    groups = drawn(seed, count)
    found = curve(groups, fixed=1000.0)
    costs, scores = [f.cost for f in found], [f.score for f in found]
    assert costs == sorted(costs)
    assert scores == sorted(scores, reverse=True)
    assert len(set(scores)) == len(scores)
    assert costs[0] >= 1000.0 + sum(min(g.costs) for g in groups)
    assert scores[-1] == pytest.approx(sum(min(g.scores) for g in groups))


def test_scores_that_rise_with_bits_do_not():
    group = Group(members=("a", "b"), candidates=NAMES, scores=(2.0, 3.0, 0.0), costs=COSTS)
    assert monotone(group).scores == (2.0, 2.0, 0.0)
    turned = Group(
        members=("a",), candidates=NAMES[::-1], scores=(1.0, 3.0, 2.0), costs=COSTS[::-1]
    )
    assert monotone(turned).scores == (1.0, 2.0, 2.0)


def test_what_nobody_chooses_counts():
    groups = drawn(0, 3)
    least = sum(min(g.costs) for g in groups)
    assert optimum(groups, Budget(most=least + 10.0, fixed=10.0)).cost == least + 10.0
    with pytest.raises(InputError, match=r"takes \d+ bits, and the budget is \d+: give at least"):
        optimum(groups, Budget(most=least, fixed=10.0))
    assert optimum([], Budget(most=5.0, fixed=5.0)).cost == 5.0


def test_scores_that_are_none():
    bad = Group(members=("a",), candidates=NAMES, scores=(np.nan, 1.0, 0.0), costs=COSTS)
    with pytest.raises(InputError, match="a has the scores .* not finite"):
        optimum([bad], Budget(most=100.0))


def test_nothing_is_printed():
    """The output of programs is for what they print."""
    code = (
        "from test_auto_search import drawn; from jqx.auto import curve; curve(drawn(0, 120), 0.0);"
        "print('done')"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parent
    )
    assert (ran.returncode, ran.stdout) == (0, "done\n")
