# SPDX-License-Identifier: Apache-2.0
"""What linears may become: recipes as candidates, which linears choose together, what each choice
costs, and the recipe that a choice of candidates is.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from jqx.algorithms.table import applicable
from jqx.auto import Group
from jqx.config import INPUT_FORMATS, Algorithm, QuantConfig, Rule
from jqx.errors import InputError
from jqx.formats import FORMATS, find_format
from jqx.recipes import Recipe
from jqx_interop.job import Job

NONE = "none"
"""The candidate that leaves linears as they are; always there."""

PLAIN_BITS = 16.0  # of a weight that is left alone, whatever its dtype: what ModelOpt counts
DYNAMIC_NVFP4 = 4.5  # what ModelOpt counts for a weight in NVFP4
EXPERTS = (
    re.compile(r"(?P<module>.*\.experts)\.\d+\..+"),
    re.compile(r"(?P<module>.*\.\d+)\.(w1|w2|w3)"),
)
"""Linears below one such module choose together. (ModelOpt 0.47, auto_quantize.)"""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One recipe, as the job that it would be: what it chooses for every linear."""

    name: str
    job: Job

    def bits(self, path: str, *, scales: bool) -> float:
        """Bits of a weight: those that ModelOpt counts, or with `scales` those that are stored."""
        choice = self.job.choices[path]
        fmt = find_format(choice.weight or "")
        if scales:
            return fmt.bits
        if choice.weight == "nvfp4":
            return DYNAMIC_NVFP4
        inputs = FORMATS[INPUT_FORMATS[choice.input].format].nominal_bits if choice.input else 16
        return float(min(fmt.nominal_bits, inputs))


@dataclass(frozen=True, kw_only=True, slots=True)
class Counting:
    """A way to count bits a weight: `scales`, whether those of blocks count; `whole`, whether
    linears that nobody may quantize, and heads, count as well, at 16 bits.
    """

    name: str
    scales: bool
    whole: bool


COUNTINGS = {
    row.name: row
    for row in (
        Counting(name="modelopt", scales=False, whole=True),
        Counting(name="quantizable", scales=True, whole=False),
    )
}


def groups_of(job: Job, candidates: Sequence[Candidate]) -> list[tuple[str, ...]]:
    """The linears that choose together, in module order: those that read one input, and experts of
    one module. Of those that some candidate does not quantize none may be quantized.
    """
    linears = [m.path for m in job.inventory.modules if m.kind == "linear"]
    siblings = {path: group for group in job.inventory.siblings for path in group}
    found: dict[object, list[str]] = {}
    for path in linears:
        expert = next((m["module"] for p in EXPERTS if (m := p.fullmatch(path))), None)
        found.setdefault(expert or siblings.get(path, (path,)), []).append(path)
    chosen = [set(candidate.job.choices) for candidate in candidates]
    return [
        tuple(paths)
        for paths in found.values()
        if all(path in choices for choices in chosen for path in paths)
    ]


def counted(
    groups: Iterable[tuple[str, ...]],
    scores: Mapping[str, Mapping[str, float]],
    candidates: Sequence[Candidate],
    counting: Counting,
) -> list[Group]:
    """The groups with what they may choose: `scores` by linear and candidate; costs in bits."""
    found = []
    for paths in groups:
        numel = {path: math.prod(candidates[0].job.modules[path].shape) for path in paths}
        costs = [
            sum(numel[p] * c.bits(p, scales=counting.scales) for p in paths) for c in candidates
        ]
        mine = [sum(scores[path][c.name] for path in paths) for c in candidates]
        found.append(
            Group(
                members=paths,
                candidates=(*(c.name for c in candidates), NONE),
                scores=(*mine, 0.0),
                costs=(*costs, PLAIN_BITS * sum(numel.values())),
            )
        )
    return found


def weights_counted(job: Job, groups: Iterable[tuple[str, ...]], counting: Counting) -> int:
    """How many weights a number of bits is about."""
    if not counting.whole:
        return sum(math.prod(job.modules[path].shape) for group in groups for path in group)
    linears = (m.shape for m in job.inventory.modules if m.kind == "linear")
    return sum(map(math.prod, linears)) + len(job.inventory.absent) * _head_size(job)


def _head_size(job: Job) -> int:
    """Weights of a tied head, which owns no tensor and is a linear all the same."""
    return job.spec.vocab * job.spec.hidden if job.spec is not None else 0


def composed(
    name: str, candidates: Sequence[Candidate], choices: Mapping[str, str], paths: Iterable[str]
) -> Recipe:
    """The recipe in which every linear of `paths` takes the candidate of `choices`, path -> name.

    Raises InputError for candidates that choose scales of one format in different ways.
    """
    by_name = {candidate.name: candidate for candidate in candidates}
    picked = {path: by_name[choices[path]] for path in paths if choices[path] != NONE}
    rules = [Rule(path_glob="*", weight=None, input=None)]
    for path, candidate in picked.items():
        choice = candidate.job.choices[path]
        rules.append(
            Rule(path_glob=f"={path}", weight=choice.weight, input=choice.input, kind="linear")
        )
    steps = _steps({c.name: c for c in picked.values()}.values())
    return Recipe(name=name, config=QuantConfig(rules=tuple(rules), algorithm=steps))


def _steps(candidates: Iterable[Candidate]) -> tuple[Algorithm, ...] | str:
    """The steps of all of them, each of which acts on the formats it is for."""
    of_format: dict[str, tuple[str, tuple[Algorithm, ...]]] = {}
    found: dict[Algorithm, None] = {}
    for candidate in candidates:
        for choice in dict.fromkeys(candidate.job.choices.values()):
            name = choice.weight or ""
            steps = tuple(
                step
                for step in applicable(candidate.job.config.steps, find_format(name))
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
