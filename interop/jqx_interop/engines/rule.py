# SPDX-License-Identifier: Apache-2.0
"""What a rule is, and how its findings become problems."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from jqx_interop.checkpoints import one_line

from .engines import Engine
from .problem import ERROR, Problem

Subject = TypeVar("Subject")


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One thing a check found; what is None is as the rule has it."""

    text: str
    source: str | None = None
    severity: str | None = None
    way_out: str | None = None
    loads: bool | None = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule(Generic[Subject]):
    """`check`: what it finds in a subject for an engine, None for what no engine is asked about;
    `stops`: whether engines fail on what an intrinsic rule finds, but those of `spares`; `given`:
    whether that may be what a source or a recipe had, so that who wrote the checkpoint did nothing
    wrong.
    """

    name: str
    check: Callable[[Subject, Any], Iterable[Finding | str]]
    source: str
    way_out: str
    severity: str = ERROR
    stops: bool = True
    spares: frozenset[str] = frozenset()
    given: bool = False


def found_by(
    rules: Iterable[Rule[Subject]], subject: Subject, engine: Engine | None = None
) -> Iterator[Problem]:
    """Everything that `rules` find."""
    for rule in rules:
        for found in rule.check(subject, engine):
            finding = Finding(text=found) if isinstance(found, str) else found
            severity = finding.severity or rule.severity
            stops = severity == ERROR and (rule.stops if engine is None else True)
            yield Problem(
                rule=rule.name,
                severity=severity,
                text=one_line(finding.text),
                source=finding.source or rule.source,
                way_out=finding.way_out or rule.way_out,
                loads=finding.loads if stops else True,
            )
