# SPDX-License-Identifier: Apache-2.0
"""Whether an engine reads the formats of candidates side by side in one checkpoint."""

from collections.abc import Mapping, Sequence

from jqx.config import Choice
from jqx.errors import InputError
from jqx_interop.engines import engines_for
from jqx_interop.job import Job
from jqx_interop.targets import TARGETS

Groups = Sequence[tuple[str, ...]]


def check_mix(candidates: Sequence[Job], groups: Groups) -> None:
    """Raises InputError if there is no engine for a checkpoint in which groups take the candidates
    in turn, with the layouts that have one.
    """
    settings, kv = candidates[0].settings, candidates[0].kv
    turn = {
        path: candidates[i % len(candidates)].choices[path]
        for i, group in enumerate(groups)
        for path in group
    }
    if len(groups) < len(candidates) or _readers(turn, settings.target, kv):
        return
    names = " and ".join(candidate.recipe.name for candidate in candidates)
    others = {name: _readers(turn, name, kv) for name in TARGETS if name != settings.target}
    ways = [f"--target {name} ({', '.join(found)})" for name, found in others.items() if found]
    way_out = f"take {' or '.join(ways)}, or other formats" if ways else "take other formats"
    raise InputError(
        f"no engine reads {names} mixed in one checkpoint of the layout {settings.target}: "
        f"{way_out}"
    )


def _readers(choices: Mapping[str, Choice], target: str, kv: str | None) -> list[str]:
    """The engines that load it, or may."""
    try:
        found = engines_for(choices, target, kv)
    except InputError:  # the layout has no name for a format
        return []
    return [verdict.label for verdict in found if verdict.loads is not False]
