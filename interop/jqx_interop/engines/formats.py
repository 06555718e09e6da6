# SPDX-License-Identifier: Apache-2.0
"""Formats: in which ways the linears of a checkpoint are stored, whether it exists or is planned.

It is all that decides whether an engine knows what it is given; the tensors decide the rest.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from jqx.config import KV_FORMATS, Choice
from jqx_interop.targets import METHOD, TARGETS, find_algo
from jqx_interop.targets.ct_schemes import arguments, block_of, find_scheme
from jqx_interop.targets.modelopt import KV_ALGOS

from .description_ct import ct_name
from .facts import FUSED, Facts, kv_leaves
from .schemes import CT, MIXED, MODELOPT, PLAIN, SCHEMES


@dataclass(frozen=True, kw_only=True, slots=True)
class Use:
    """One way in which linears are stored: `paths` of them. `size`: columns to a scale if that
    varies; `extra`: leaf that the layout does not always have -> linears that have it.
    """

    scheme: str
    size: int | None
    paths: tuple[str, ...]
    extra: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Formats:
    """`uses`: how linears are stored; `mixed`: whether the description lists them one by one;
    `kv`: what keys and values are called; `biases`: whether they have biases.
    """

    layout: str
    uses: tuple[Use, ...]
    mixed: bool = False
    kv: str | None = None
    biases: bool = False


def formats_of(facts: Facts) -> Formats:
    """Those of a checkpoint."""
    groups: dict[tuple[str, int | None], list[str]] = {}
    for path, linear in facts.linears.items():
        if linear.group is not None:
            size = linear.dims.g if linear.dims and _varies(linear.leaves) else linear.group.size
            groups.setdefault((linear.group.scheme, size), []).append(path)
    return Formats(
        layout=facts.layout,
        uses=tuple(_use(facts, *key, paths) for key, paths in groups.items()),
        mixed=facts.said.layers is not None,
        kv=facts.said.kv,
        biases=any(leaf.endswith("_bias") for _, leaf, _ in kv_leaves(facts)),
    )


def _varies(leaves: Iterable[str]) -> bool:
    return not {"weight_scale", "scales"}.isdisjoint(leaves)


def _use(facts: Facts, scheme: str, size: int | None, paths: list[str]) -> Use:
    row = SCHEMES.get((facts.layout, scheme))
    always = {leaf.name for leaf in row.leaves if leaf.needed} if row else set()
    known = {leaf.name for leaf in row.leaves} if row else set()
    extra: dict[str, list[str]] = {}
    for path in paths:
        for leaf in facts.linears[path].leaves:
            if leaf in known and leaf not in always:
                extra.setdefault(leaf, []).append(path)
    told = {leaf: tuple(found) for leaf, found in extra.items()}
    return Use(scheme=scheme, size=size, paths=tuple(paths), extra=told)


def planned(choices: Mapping[str, Choice], target: str, kv: str | None) -> Formats:
    """Those that writing `choices`, path -> formats, and keys and values in `kv` in the layout
    `target` would give.
    """
    groups: dict[tuple[str, int | None, bool], list[str]] = {}
    for path, choice in choices.items():
        factor = choice.variant is not None
        key = (scheme_name(choice, target), block_of(choice.weight or ""), factor)
        groups.setdefault(key, []).append(path)
    uses = []
    for (scheme, size, factor), paths in groups.items():
        own = [p for p in paths if not is_fused(p) or scheme == "NVFP4_SVD"]
        extra = {"pre_quant_scale": tuple(own)} if factor and target == MODELOPT else {}
        uses.append(Use(scheme=scheme, size=size, paths=tuple(paths), extra=extra))
    row = KV_FORMATS[kv] if kv else None
    return Formats(
        layout=TARGETS[target].method if uses else PLAIN,
        uses=tuple(uses),
        mixed=target == MODELOPT and len({(use.scheme, use.size) for use in uses}) > 1,
        kv=_kv(target, kv),
        biases=row is not None and row.affine,
    )


def _kv(target: str, kv: str | None) -> str | None:
    if kv is None:
        return None
    return KV_ALGOS[kv] if target == MODELOPT else "FP8"


def scheme_name(choice: Choice, target: str) -> str:
    """What a choice is called in the layout `target`; its formats where that has no name."""
    return _NAMES.get(target, _integers)(choice)


def _modelopt_name(choice: Choice) -> str:
    algo = find_algo(choice)
    return algo.quant_algo.upper() if algo else str(choice.weight)


def _ct_name(choice: Choice) -> str:
    scheme = find_scheme(choice)
    if scheme is None:
        return str(choice.weight)
    inputs: Mapping[str, Any] | None = scheme.inputs and arguments(scheme.inputs)
    return ct_name(arguments(scheme.weights, block_of(choice.weight or "")), inputs)


def _integers(choice: Choice) -> str:
    name = choice.weight or ""
    return {"int4": "W4A16", "int8": "W8A16"}.get(name.partition("_")[0], name)


_NAMES = {MODELOPT: _modelopt_name, METHOD: _ct_name}


def is_fused(path: str) -> bool:
    """Whether engines make one matrix of this linear and others."""
    return path.rpartition(".")[2] in FUSED


def mixed_name(formats: Formats) -> str | None:
    """The algorithm that stands for linears listed one by one."""
    return MIXED if formats.mixed and formats.layout in (MODELOPT, CT) else None
