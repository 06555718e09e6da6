# SPDX-License-Identifier: Apache-2.0
"""verify: does a checkpoint hold together, and which engines load it.

Headers, descriptions and scales are read, codes and weights never: it takes seconds for any model.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jqx.config import Choice
from jqx_interop.progress import Progress

from .accepts import find_accept
from .coverage import Covered, covered
from .engines import ALL, Engine, find_engines
from .facts import read_facts
from .format_rules import FORMAT_RULES
from .formats import Formats, formats_of, planned
from .intrinsic import INTRINSIC, Seen
from .loading import LOADING
from .numbers import read_numbers
from .problem import ERROR, Problem
from .rule import Rule, found_by

RULES: dict[str, Rule[Any]] = {rule.name: rule for rule in (*INTRINSIC, *FORMAT_RULES, *LOADING)}
"""Name -> rule, of all kinds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What one engine makes of a checkpoint. `loads`: None where it is not known; `problems` are
    why not, `faults` those of the checkpoint itself that keep it from loading, one a rule;
    `warnings` what it does otherwise than was calibrated; `chips`: scheme -> where it runs.
    """

    engine: str
    label: str
    evidence: str
    loads: bool | None
    problems: tuple[Problem, ...] = ()
    faults: tuple[Problem, ...] = ()
    warnings: tuple[Problem, ...] = ()
    chips: Mapping[str, str]

    @property
    def line(self) -> str:
        """One line for people."""
        if self.loads is not True:
            said = "no" if self.loads is False else "not known"
            return f"{self.label}: {said}: {_first((*self.problems, *self.faults))}"
        chips = "; ".join(dict.fromkeys(text for text in self.chips.values() if text))
        told = f"{self.label}: loads" + (f" ({chips})" if chips else "")
        return told + (f", with a warning: {_first(self.warnings)}" if self.warnings else "")

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**asdict(self), "chips": dict(self.chips)}


@dataclass(frozen=True, kw_only=True, slots=True)
class Verification:
    """What was found. `schemes`: name -> number of linears; `faults` and `warnings` are the
    checkpoint's own, whoever reads it; `verdicts`: one an engine that was asked about.
    """

    path: str
    layout: str
    schemes: Mapping[str, int]
    kv_cache: str | None
    faults: tuple[Problem, ...]
    warnings: tuple[Problem, ...]
    verdicts: tuple[Verdict, ...]
    coverage: tuple[Covered, ...]

    @property
    def good(self) -> bool:
        """Whether it has no fault and every engine asked about loads it."""
        return not self.faults and all(verdict.loads for verdict in self.verdicts)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "path": self.path,
            "layout": self.layout,
            "schemes": dict(self.schemes),
            "kv_cache": self.kv_cache,
            "good": self.good,
            "faults": [problem.to_json() for problem in self.faults],
            "warnings": [problem.to_json() for problem in self.warnings],
            "engines": {verdict.engine: verdict.to_json() for verdict in self.verdicts},
            "coverage": [row.to_json() for row in self.coverage],
        }


def verify(
    model: str | Path,
    engines: Sequence[str] = (ALL,),
    *,
    progress: Progress | None = None,
) -> Verification:
    """Check the checkpoint `model`, of any origin: its files, descriptions, tensors and scales, and
    whether each of `engines`, names of ENGINES or "all", loads it.

    Whatever is wrong is told in the result. Raises InputError where there is no checkpoint, and for
    an unknown engine.
    """
    rows = find_engines(engines)
    facts = read_facts(model)
    seen = Seen(facts=facts, numbers=read_numbers(facts, progress))
    own = tuple(found_by(INTRINSIC, seen))
    formats = formats_of(facts)
    stored = Counter(
        x.group.scheme if x.group else "not described"
        for x in facts.linears.values()
        if x.quantized
    )
    return Verification(
        path=str(facts.files.path),
        layout=facts.layout,
        schemes=dict(stored),
        kv_cache=facts.said.kv,
        faults=tuple(p for p in own if p.severity == ERROR),
        warnings=tuple(p for p in own if p.severity != ERROR),
        verdicts=tuple(_verdict(row, formats, own, seen) for row in rows),
        coverage=covered(facts),
    )


def engines_for(
    choices: Mapping[str, Choice],
    target: str,
    kv: str | None = None,
    engines: Sequence[str] = (ALL,),
) -> tuple[Verdict, ...]:
    """What engines will make of `choices`, path -> formats, written in the layout `target` with
    keys and values in `kv`: the part of `verify` that needs no tensors.
    """
    formats = planned(choices, target, kv)
    return tuple(_verdict(row, formats, (), None) for row in find_engines(engines))


class FaultyOutput(RuntimeError):
    """What was just written has a fault of its own, which is a bug here."""


def verify_written(path: str | Path, progress: Progress | None = None) -> tuple[Verdict, ...]:
    """What engines make of a checkpoint that was just written here.

    Raises FaultyOutput for a fault that neither its source nor its recipe had.
    """
    found = verify(path, progress=progress)
    bugs = [fault for fault in found.faults if not RULES[fault.rule].given]
    if bugs:
        told = "; ".join(f"{fault.rule}: {fault.text}" for fault in bugs[:3])
        raise FaultyOutput(f"{path} was written, and is faulty: {told}")
    return found.verdicts


def _verdict(
    engine: Engine, formats: Formats, own: Iterable[Problem], seen: Seen | None
) -> Verdict:
    found = list(found_by(FORMAT_RULES, formats, engine))
    known = all(problem.loads is True for problem in found)
    if seen is not None and known:  # what it does with tensors is of no interest otherwise
        found += found_by(LOADING, seen, engine)
    faults = {p.rule: p for p in own if p.loads is not True and _stops(p, engine)}
    problems = [problem for problem in found if problem.severity == ERROR]
    answers = {problem.loads for problem in (*problems, *faults.values())}
    loads = False if False in answers else None if None in answers else True
    return Verdict(
        engine=engine.name,
        label=engine.label,
        evidence=engine.evidence,
        loads=loads,
        problems=tuple(problems),
        faults=tuple(faults.values()),
        warnings=tuple(p for p in found if p.severity != ERROR),
        chips=_chips(engine, formats) if loads else {},
    )


def _stops(problem: Problem, engine: Engine) -> bool:
    return engine.name not in RULES[problem.rule].spares


def _first(problems: Iterable[Problem]) -> str:
    """The first of several, and how many more there are."""
    text, *more = (problem.text for problem in problems)
    return text + (f" ({len(more)} more)" if more else "")


def _chips(engine: Engine, formats: Formats) -> dict[str, str]:
    """Scheme -> where it runs, or with what where chips do not matter."""
    rows = [find_accept(engine.name, formats.layout, use.scheme) for use in formats.uses]
    places = {row.scheme: f"{engine.chips} {row.chips}" for row in rows if row.chips}
    return {row.scheme: row.note for row in rows if row.note and not row.differs} | places
