# SPDX-License-Identifier: Apache-2.0
"""Where the pre_quant_scale of a linear goes: into the norm before it, into the rows of the linear
before it, or to disk beside it.

A norm takes it only where all linears that read the norm share it: one that stays as it is would
read scaled inputs.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from jqx.config import Choice
from jqx.models import GAIN_OFFSETS, ModelSpec, block_prefix, kinds, norm_readers, row_feeders

from .families import FAMILIES
from .targets import find_algo


@dataclass(frozen=True, kw_only=True, slots=True)
class Folds:
    """What is folded in one model.

    `norms`: linear -> the norm that takes its factor; `rows`: linear -> the one whose rows take it;
    `plus_one`: norms that multiply by their gain + 1.
    """

    norms: Mapping[str, str] = field(default_factory=dict)
    rows: Mapping[str, str] = field(default_factory=dict)
    plus_one: frozenset[str] = frozenset()

    def keeps(self, path: str) -> bool:
        """Whether the factor of a linear stays beside it."""
        return path not in self.norms and path not in self.rows


def plan_folds(spec: ModelSpec | None, choices: Mapping[str, Choice]) -> Folds:
    """What is folded where linears are quantized as `choices` say; nothing in a model that is not
    defined here.
    """
    if spec is None:
        return Folds()
    norms, rows, plus_one = {}, {}, set()
    for i, kind in enumerate(kinds(spec)):
        prefix = block_prefix(spec, i)
        for norm, readers in norm_readers(spec, kind).items():
            members = [f"{prefix}.{reader}" for reader in readers]
            if _folds_together(choices, members):
                norms |= dict.fromkeys(members, f"{prefix}.{norm}")
                if GAIN_OFFSETS[kind.norm.kind]:
                    plus_one.add(f"{prefix}.{norm}")
        if FAMILIES[spec.family].folds_rows:
            pairs = row_feeders(spec, kind).items()
            rows |= dict(_row_folds(choices, {f"{prefix}.{a}": f"{prefix}.{b}" for a, b in pairs}))
    return Folds(norms=norms, rows=rows, plus_one=frozenset(plus_one))


def _folds_together(choices: Mapping[str, Choice], members: list[str]) -> bool:
    """Whether linears that read one norm, all of them, have one factor that it can take."""
    found = {choices.get(path) for path in members}
    choice = next(iter(found))
    if len(members) < 2 or len(found) > 1 or choice is None or choice.variant != "awq":
        return False
    algo = find_algo(choice)
    return algo is not None and algo.folds


def _row_folds(choices: Mapping[str, Choice], pairs: dict[str, str]) -> Iterator[tuple[str, str]]:
    for source, target in pairs.items():
        choice = choices.get(source)
        if choice is None or choices.get(target) != choice or choice.variant != "awq":
            continue
        algo = find_algo(choice)
        if algo is not None and algo.folds_rows:
            yield source, target
