# SPDX-License-Identifier: Apache-2.0
"""Several configurations as one: every linear takes what one of them says about it."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from jqx.algorithms.table import applicable
from jqx.config import Algorithm, Choice, QuantConfig, Rule
from jqx.errors import InputError
from jqx.formats import find_format

T = TypeVar("T")

NONE = "none"
"""The candidate that leaves linears as they are; always there."""


@dataclass(frozen=True, kw_only=True)
class Mixable:
    """A configuration under a name: the `choices` it makes for linears, and its `steps`."""

    name: str
    choices: Mapping[str, Choice]
    steps: tuple[Algorithm, ...]


AWQ_SHARE = 4  # of so many batches AWQ takes one


def takes_part(steps: Iterable[Algorithm]) -> bool:
    """Whether a candidate with these steps is calibrated on a part of the batches while formats are
    chosen: AWQ, as ModelOpt 0.47 does to save time.
    """
    return any("awq" in step.method for step in steps)


def part_of(batches: Sequence[T]) -> Sequence[T]:
    """That part: the first quarter, and at least one."""
    return batches[: max(1, len(batches) // AWQ_SHARE)]


def mixed(
    candidates: Iterable[Mixable], picked: Mapping[str, str], globs: Mapping[str, str] | None = None
) -> QuantConfig:
    """The configuration in which every linear of `picked`, path -> name, takes what the candidate
    of that name says, or stays as it is. `globs`: by path what a rule says for it, in place of the
    path itself.

    Raises InputError for candidates that choose scales of one format in different ways.
    """
    by_name = {candidate.name: candidate for candidate in candidates}
    rules, used = [Rule(path_glob="*", weight=None, input=None)], {}
    for path, name in picked.items():
        if name == NONE:
            continue
        used[name], choice = by_name[name], by_name[name].choices[path]
        glob = f"={path}" if globs is None else globs[path]
        rules.append(Rule(path_glob=glob, weight=choice.weight, input=choice.input, kind="linear"))
    return QuantConfig(rules=tuple(dict.fromkeys(rules)), algorithm=_steps(used.values()))


def _steps(candidates: Iterable[Mixable]) -> tuple[Algorithm, ...] | str:
    """The steps of all of them, each of which acts on the formats it is for."""
    of_format: dict[str, tuple[str, tuple[Algorithm, ...]]] = {}
    found: dict[Algorithm, None] = {}
    for candidate in candidates:
        for choice in dict.fromkeys(candidate.choices.values()):
            name = choice.weight or ""
            steps = tuple(
                step
                for step in applicable(candidate.steps, find_format(name))
                if step.method != "max"
            )
            before = of_format.setdefault(name, (candidate.name, steps))
            if before[1] != steps:
                raise InputError(
                    f"{before[0]} and {candidate.name} choose scales of {name} in different ways: "
                    "take one of them"
                )
            found |= dict.fromkeys(steps)
    return tuple(found) or "max"
