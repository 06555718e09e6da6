# SPDX-License-Identifier: Apache-2.0
"""What linears may become: recipes as candidates, which of them choose together, the recipe that
a choice of candidates is.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from jqx.auto import Mixable, mixed
from jqx.errors import InputError
from jqx.recipes import Recipe
from jqx_interop.job import Job

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


def groups_of(
    job: Job, candidates: Sequence[Job], disabled: Sequence[str] = ()
) -> list[tuple[str, ...]]:
    """The linears that choose together, in module order: those that read one input, and experts of
    one module. A group stays as it is if one of `candidates` does not quantize all of it, if a
    member matches one of the globs `disabled`, and if it is in no block.

    Raises InputError for a glob that matches no linear.
    """
    linears = [m.path for m in job.inventory.modules if m.kind == "linear"]
    siblings = {path: group for group in job.inventory.siblings for path in group}
    found: dict[object, list[str]] = {}
    for path in linears:
        found.setdefault(_module(path) or siblings.get(path, (path,)), []).append(path)
    off = _matching(disabled, [*linears, *job.inventory.absent])
    inside = {name for i in job.inventory.blocks for name in job.inventory.units[i]}
    chosen = [set(candidate.choices) for candidate in candidates]

    def open_to_choice(path: str) -> bool:
        in_block = f"{path}.weight" in inside
        return in_block and path not in off and all(path in choices for choices in chosen)

    return [tuple(paths) for paths in found.values() if all(map(open_to_choice, paths))]


def _module(path: str) -> str | None:
    """What an expert is below."""
    return next((m["module"] for p in EXPERTS if (m := p.fullmatch(path))), None)


def _matching(globs: Sequence[str], linears: Sequence[str]) -> set[str]:
    found: set[str] = set()
    for glob in globs:
        mine = {path for path in linears if fnmatchcase(path, glob)}
        if not mine:
            raise InputError(f"{glob!r} matches no linear of this model, such as {linears[0]}")
        found |= mine
    return found


def composed(name: str, candidates: Sequence[Candidate], choices: Mapping[str, str]) -> Recipe:
    """The recipe in which every linear takes the candidate of `choices`, path -> name.

    Raises InputError for candidates that choose scales of one format in different ways.
    """
    given = (
        Mixable(name=c.name, choices=c.job.choices, steps=c.job.config.steps) for c in candidates
    )
    return Recipe(name=name, config=mixed(given, choices, _globs(candidates, choices)))


def _globs(candidates: Sequence[Candidate], choices: Mapping[str, str]) -> dict[str, str]:
    """Linear -> what a rule says for it: one glob for all experts of a module that are alike, of
    which there may be thousands.
    """
    jobs = {c.name: c.job for c in candidates}
    alike: dict[str, set[object]] = {}
    for path, name in choices.items():
        if name in jobs and (module := _module(path)) is not None:
            alike.setdefault(module, set()).add(jobs[name].choices[path])
    whole = {module for module, kinds in alike.items() if module.endswith(".experts")}
    whole = {module for module in whole if len(alike[module]) == 1}
    return {p: f"={m}.*" if (m := _module(p)) in whole else f"={p}" for p in choices}
