# SPDX-License-Identifier: Apache-2.0
"""Where the pre_quant_scale of a linear goes: into the norm before it, into the rows of the linear
before it, or to disk beside it.

A norm takes it only where all linears that read the norm share it: one that stays as it is would
read scaled inputs. Where nothing may stay beside linears, those whose factor has no place to go are
not scaled, and query heads share the factors of the key head whose values they read.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from jqx.config import Choice
from jqx.models import (
    GAIN_OFFSETS,
    BlockKind,
    ModelSpec,
    Shared,
    block_prefix,
    kinds,
    norm_readers,
    row_feeders,
    value_reader,
)

from .families import FAMILIES
from .targets import find_algo


@dataclass(frozen=True, kw_only=True, slots=True)
class Folds:
    """What is folded in one model.

    `norms`: linear -> the norm that takes its factor; `rows`: linear -> the one whose rows take it;
    `plus_one`: norms that multiply by their gain + 1. `values`: linears that read values -> how
    their channels share factors. `every`: whether nothing may stay beside a linear.
    """

    norms: Mapping[str, str] = field(default_factory=dict)
    rows: Mapping[str, str] = field(default_factory=dict)
    plus_one: frozenset[str] = frozenset()
    values: Mapping[str, Shared] = field(default_factory=dict)
    every: bool = False

    def keeps(self, path: str) -> bool:
        """Whether the factor of a linear, if it has one, stays beside it."""
        return path not in self.norms and path not in self.rows

    def scales(self, path: str) -> bool:
        """Whether a linear may have a factor."""
        return not (self.every and self.keeps(path))


def plan_folds(spec: ModelSpec | None, choices: Mapping[str, Choice]) -> Folds:
    """What ModelOpt folds where linears are quantized as `choices` say; nothing in a model that is
    not defined here.
    """
    if spec is None:
        return Folds()
    norms, rows = {}, {}
    for prefix, kind in _blocks(spec):
        for norm, members in _readers(spec, kind, prefix):
            if _folds_together(choices, members):
                norms |= dict.fromkeys(members, norm)
        if FAMILIES[spec.family].folds_rows:
            pairs = row_feeders(spec, kind).items()
            rows |= dict(_row_folds(choices, {f"{prefix}.{a}": f"{prefix}.{b}" for a, b in pairs}))
    return Folds(norms=norms, rows=rows, plus_one=_plus_one(spec, norms))


def fold_all(spec: ModelSpec, choices: Mapping[str, Choice], *, values: bool) -> Folds:
    """What can be folded where linears are quantized as `choices` say, so that none needs a factor
    beside it. `values`: whether the linears that make values may be scaled.
    """
    norms, rows, shares = {}, {}, {}
    for prefix, kind in _blocks(spec):
        for norm, members in _readers(spec, kind, prefix):
            chosen = {choices.get(path) for path in members}
            if len(chosen) == 1 and None not in chosen:
                norms |= dict.fromkeys(members, norm)
        feeders = row_feeders(spec, kind)
        found = value_reader(spec, kind)
        if found is not None:
            reader, maker, shared = found
            feeders.pop(reader, None)
            if values:
                feeders[reader] = maker
                shares[f"{prefix}.{reader}"] = shared
        for source, target in feeders.items():
            if f"{prefix}.{source}" in choices and f"{prefix}.{target}" in choices:
                rows[f"{prefix}.{source}"] = f"{prefix}.{target}"
    shares = {path: shared for path, shared in shares.items() if path in rows}
    return Folds(norms=norms, rows=rows, plus_one=_plus_one(spec, norms), values=shares, every=True)


def _blocks(spec: ModelSpec) -> Iterator[tuple[str, BlockKind]]:
    for i, kind in enumerate(kinds(spec)):
        yield block_prefix(spec, i), kind


def _readers(spec: ModelSpec, kind: BlockKind, prefix: str) -> Iterator[tuple[str, list[str]]]:
    """Every norm of a block, and the linears that read it."""
    for norm, readers in norm_readers(spec, kind).items():
        yield f"{prefix}.{norm}", [f"{prefix}.{reader}" for reader in readers]


def _plus_one(spec: ModelSpec, norms: Mapping[str, str]) -> frozenset[str]:
    """Those of the norms in `norms` that multiply by their gain + 1."""
    return frozenset(
        f"{prefix}.{norm}"
        for prefix, kind in _blocks(spec)
        if GAIN_OFFSETS[kind.norm.kind]
        for norm in norm_readers(spec, kind)
        if f"{prefix}.{norm}" in norms.values()
    )


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
