# SPDX-License-Identifier: Apache-2.0
"""How commands tell which engines load a checkpoint."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .console import out, print_table

if TYPE_CHECKING:
    from jqx_interop.engines import Problem, Verdict, Verification
    from jqx_interop.progress import Progress

MOST = 5
"""Problems of one rule that are told in full."""

LOADS = {True: "yes", False: "no", None: "not known"}


def complete_engines(incomplete: str) -> list[str]:
    """The names `--engine` takes that begin like `incomplete`."""
    from jqx_interop.engines import ALL, ENGINES

    return [name for name in (*ENGINES, ALL) if name.startswith(incomplete)]


def show_verification(found: "Verification") -> None:
    """Everything that was found, for people."""
    from jqx_interop.checkpoints import one_line

    stored = ", ".join(f"{name} ({_linears(count)})" for name, count in found.schemes.items())
    kv = f", keys and values in {found.kv_cache}" if found.kv_cache else ""
    told = f"{found.path}: {found.layout}: {stored or 'nothing is quantized'}{kv}"
    out.print(one_line(told), markup=False)
    rows = [
        (v.label, LOADS[v.loads], "; ".join(dict.fromkeys(v.chips.values())), v.evidence)
        for v in found.verdicts
    ]
    print_table("Engines", ("engine", "loads", "runs on", "how it is known"), rows)
    shares = [(c.kind, f"{c.parameters:,}", f"{c.share:.1%}") for c in found.coverage]
    print_table("What is quantized", ("layers", "parameters", "quantized"), shares)
    _tell("the checkpoint", (*found.faults, *found.warnings))
    for verdict in found.verdicts:
        _tell(verdict.label, (*verdict.problems, *verdict.warnings))


def _linears(count: int) -> str:
    return f"{count} linear" + ("" if count == 1 else "s")


def _tell(whose: str, problems: "Iterable[Problem]") -> None:
    """Problems by rule: the rule, its source and the way out once."""
    by_rule: dict[tuple[str, str], list[Problem]] = {}
    for problem in problems:
        by_rule.setdefault((problem.rule, problem.severity), []).append(problem)
    for (rule, severity), found in by_rule.items():
        for problem in found[:MOST]:
            out.print(f"{severity}: {whose}: {rule}: {problem.text}", markup=False)
        if len(found) > MOST:
            out.print(f"{severity}: {whose}: {rule}: and {len(found) - MOST} more", markup=False)
        out.print(f"  way out: {found[0].way_out}; known from: {found[0].source}", markup=False)


def verdicts_json(verdicts: "Iterable[Verdict]") -> dict[str, Any]:
    """Engine -> verdict, as plain JSON values."""
    return {verdict.engine: verdict.to_json() for verdict in verdicts}


def tell_engines(verdicts: "Iterable[Verdict]") -> None:
    """One line an engine."""
    for verdict in verdicts:
        out.print(verdict.line, markup=False)


def look_at(destination: Path, progress: "Progress | None" = None) -> "tuple[Verdict, ...]":
    """What engines make of what a command wrote."""
    from jqx_interop.engines import verify_written

    return verify_written(destination, progress)
