# SPDX-License-Identifier: Apache-2.0
"""One thing that a rule found."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

ERROR, WARNING = "error", "warning"


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """`rule`: the row of RULES that found it; `text`: what is wrong, with names and numbers;
    `source`: where the rule is from; `way_out`: what to do. `loads`: False where the engine does
    not load it, None where that is not known.
    """

    rule: str
    severity: str
    text: str
    source: str
    way_out: str
    loads: bool | None = True

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def first(paths: Iterable[str], most: int = 3) -> str:
    """A few names and how many more there are."""
    names = list(paths)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
