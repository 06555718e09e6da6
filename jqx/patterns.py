# SPDX-License-Identifier: Apache-2.0
"""Patterns of paths that say yes or no, the last match wins: {"*": True, "*mlp*": False}.

A pattern is a glob as in a rule: it matches the path of a parameter, or a module around it, with
dots or slashes.
"""

from collections.abc import Collection, Mapping
from typing import Any

from .config import QuantConfig, resolve
from .errors import InputError
from .globs import covers
from .selection import kinds
from .transforms import Axes


def picked(patterns: Any, config: QuantConfig, seen: Mapping[str, Axes]) -> list[str]:
    """The parameters to whose weights `config` gives a format and the last of `patterns` that
    matches says yes, in the order of `seen`.

    Raises InputError for patterns of another type, for one that matches nothing, and if nothing is
    left.
    """
    _check_types(patterns)
    given = [
        path
        for path, axes in seen.items()
        if any(resolve(config, path, kind).weight for kind in kinds(axes))
    ]
    for pattern, wanted in patterns.items():
        _check_matches(pattern, given if wanted else seen, wanted)
    found = [path for path in given if _says(patterns, path)]
    if not found:
        raise InputError(
            f"patterns {dict(patterns)!r} leave none of the {len(given)} parameters that the "
            f"configuration selects ({_some(given)}): say True to some"
        )
    return found


def _says(patterns: Mapping[str, bool], path: str) -> bool:
    """What the last pattern that matches says, no if none does."""
    said = [wanted for pattern, wanted in patterns.items() if covers(pattern, path)]
    return bool(said) and said[-1]


def _check_types(patterns: Any) -> None:
    if not isinstance(patterns, Mapping):
        raise InputError(
            f"patterns is a {type(patterns).__name__}: give globs and whether they are compressed, "
            'such as {"*mlp*": True}'
        )
    for pattern, wanted in patterns.items():
        if not isinstance(pattern, str) or not isinstance(wanted, bool):
            raise InputError(
                f"{pattern!r}: {wanted!r} is no pattern: give a glob and True or False, such as "
                '{"*mlp*": True}'
            )


def _check_matches(pattern: str, paths: Collection[str], wanted: bool) -> None:
    if not any(covers(pattern, path) for path in paths):
        told = "to which the configuration gives a format" if wanted else "that products use"
        raise InputError(
            f"the pattern {pattern!r} matches no parameter {told}; there are {_some(paths)}"
        )


def _some(paths: Collection[str]) -> str:
    """The first of these paths, and how many more there are."""
    more = f" and {len(paths) - 4} more" if len(paths) > 4 else ""
    return (", ".join(list(paths)[:4]) or "none") + more
