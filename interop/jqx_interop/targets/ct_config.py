# SPDX-License-Identifier: Apache-2.0
"""What compressed-tensors says of a checkpoint in `quantization_config`, and what that means here.

A group of linears has arguments for weights and inputs, and targets: names, `re:` patterns, or the
class Linear. What `ignore` names is left alone.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from jqx.config import Choice
from jqx.errors import InputError

from .ct_schemes import METHOD, PACKED, SCHEMES, VERSION, Scheme, arguments, block_of, find_scheme

MIXED = "mixed-precision"
KV_FLOAT8 = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False}
KV_SCHEMES = {"fp8": KV_FLOAT8, "fp8_cast": KV_FLOAT8}
"""Format of keys and values -> how it is described."""

_ALL = "Linear"  # the class that stands for every linear
_FREE = ("observer", "observer_kwargs", "actorder", "zp_dtype", "scale_dtype", "symmetric")


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """Linears that are quantized alike: `targets`, and the row of SCHEMES, whose weight format has
    blocks of `size` where that varies.
    """

    targets: tuple[str, ...]
    formats: tuple[str, str | None]
    size: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Described:
    """What a description says. `kv`: whether keys and values are in FP8."""

    groups: tuple[Group, ...]
    ignored: tuple[str, ...]
    kv: bool


def quantization_config(
    choices: Mapping[str, Choice], unquantized: Iterable[str], kv: str | None
) -> dict[str, Any]:
    """The value of `quantization_config` in config.json.

    `choices`: quantized modules in module order; `unquantized`: every other module that could have
    been; `kv`: the format of keys and values.
    """
    members: dict[str, tuple[Choice, list[str]]] = {}
    for path, choice in choices.items():
        members.setdefault(str(_group(choice)), (choice, []))[1].append(path)
    groups = [
        {"targets": [_ALL] if len(members) == 1 else paths, **_group(choice)}
        for choice, paths in members.values()
    ]
    formats = {group["format"] for group in groups}
    return {
        "config_groups": {f"group_{i}": group for i, group in enumerate(groups)},
        "format": formats.pop() if len(formats) == 1 else MIXED,
        "global_compression_ratio": None,
        "ignore": sorted(unquantized),
        "kv_cache_scheme": None if kv is None else arguments(KV_SCHEMES[kv]),
        "quant_method": METHOD,
        "quantization_status": "compressed",
        "version": VERSION,
    }


def _group(choice: Choice) -> dict[str, Any]:
    scheme = find_scheme(choice)
    assert scheme is not None  # refused before
    inputs = None if scheme.inputs is None else arguments(scheme.inputs)
    return {
        "weights": arguments(scheme.weights, block_of(choice.weight or "")),
        "input_activations": inputs,
        "output_activations": None,
        "format": scheme.format,
    }


def read_described(said: Mapping[str, Any]) -> Described:
    """What a `quantization_config` of compressed-tensors means.

    Raises InputError for what has no format here: zero points but of packed integers, orders of
    columns, other numbers of bits, sparsity, outputs that are quantized.
    """
    if str(said.get("quantization_status", "compressed")) != "compressed":
        raise InputError(f"its weights are {said['quantization_status']}, not compressed")
    sparse = said.get("sparsity_config") or {}
    if not isinstance(sparse, Mapping) or sparse.get("format", "dense") != "dense":
        raise InputError("its weights are sparse, which is not read")
    groups = said.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise InputError("its quantization_config has no config_groups")
    return Described(
        groups=tuple(_read_group(str(name), group) for name, group in groups.items()),
        ignored=_names(said.get("ignore"), "ignore"),
        kv=_read_kv(said.get("kv_cache_scheme")),
    )


def choices_of(described: Described, linears: Mapping[str, tuple[int, ...]]) -> dict[str, Choice]:
    """The formats of every quantized linear, in the order of `linears`, path -> shape."""
    found = {}
    for path, shape in linears.items():
        if _matches(path, described.ignored):
            continue
        if (group := _group_of(path, described.groups)) is not None:
            found[path] = Choice(weight=_weight(group, shape), input=group.formats[1])
    return found


def _group_of(path: str, groups: Iterable[Group]) -> Group | None:
    """The group that names a linear, or has a pattern for it; else one for all linears."""
    found = [group for group in groups if _matches(path, group.targets)]
    named = [g for g in found if _matches(path, [t for t in g.targets if t != _ALL])]
    return next(iter(named or found), None)


def _weight(group: Group, shape: tuple[int, ...]) -> str:
    """The name of the format of a weight of `shape`."""
    name, size = group.formats[0], group.size
    if size is None or size == block_of(name):
        return name
    return f"{name}_b{shape[1] if size == -1 else size}"


def _read_group(name: str, group: object) -> Group:
    if not isinstance(group, Mapping):
        raise InputError(f"{name} of config_groups is no object")
    if group.get("output_activations"):
        raise InputError(f"{name} quantizes outputs, which is not read")
    weights = _arguments(group.get("weights"), f"weights of {name}")
    inputs = _arguments(group.get("input_activations"), f"input_activations of {name}")
    _check_symmetric(inputs, f"input_activations of {name}")
    if weights is None:
        raise InputError(f"{name} of config_groups quantizes no weights, which is not read")
    for formats, scheme in SCHEMES.items():
        if (size := _fits(scheme, weights, inputs)) is not None:
            if scheme.format != PACKED:
                _check_symmetric(weights, f"weights of {name}")
            varies = scheme.varies
            targets = _names(group.get("targets"), f"targets of {name}")
            return Group(targets=targets, formats=formats, size=size if varies else None)
    told = f"weights {_told(weights)} with " + (
        f"inputs {_told(inputs)}" if inputs else "no inputs"
    )
    raise InputError(f"{name} has {told}, which is no pair of formats here")


def _fits(
    scheme: Scheme, weights: Mapping[str, Any], inputs: Mapping[str, Any] | None
) -> int | None:
    """The size of groups if these are the arguments of `scheme`, else None; -1: of whole rows."""
    size = weights["group_size"] or -1
    mine = arguments(scheme.weights, weights["group_size"])
    theirs = dict(weights)
    if scheme.varies and theirs["strategy"] == "channel":  # a row is a group
        theirs, size = {**theirs, "strategy": "group", "group_size": None}, -1
        mine["group_size"] = None
    if _essential(mine) != _essential(theirs):
        return None
    wanted = None if scheme.inputs is None else _essential(arguments(scheme.inputs))
    return size if wanted == (None if inputs is None else _essential(inputs)) else None


def _essential(said: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that change what is computed; the size of groups where there are groups."""
    grouped = said["strategy"] in ("group", "tensor_group")
    kept = {k: v for k, v in said.items() if k not in _FREE and v is not None}
    return kept if grouped else {k: v for k, v in kept.items() if k != "group_size"}


def _arguments(said: object, what: str) -> dict[str, Any] | None:
    if said is None:
        return None
    if not isinstance(said, Mapping):
        raise InputError(f"{what} are no object")
    full = arguments({k: v for k, v in said.items() if v is not None})
    if full.get("actorder") in ("group", "dynamic"):
        raise InputError(f"{what} have columns in another order (actorder), which is not read")
    if full["strategy"] == "":
        full["strategy"] = "group" if full["group_size"] else "tensor"
    return full


def _check_symmetric(said: Mapping[str, Any] | None, what: str) -> None:
    if said and said["symmetric"] is not True:
        raise InputError(f"{what} have zero points, which are read for weights in {PACKED} alone")


def _read_kv(said: object) -> bool:
    if said is None:
        return False
    found = _arguments(said, "kv_cache_scheme") or {}
    _check_symmetric(found, "kv_cache_scheme")
    if _essential(found) != _essential(arguments(KV_FLOAT8)):
        raise InputError(f"kv_cache_scheme is {_told(found)}, and only FP8 with one scale is read")
    return True


def _matches(path: str, patterns: Iterable[str]) -> bool:
    """Whether a linear is one of those that names, `re:` patterns or the class Linear mean."""
    for pattern in patterns:
        if pattern in (_ALL, path) or path.startswith(pattern + "."):
            return True
        if pattern.startswith("re:") and re.match(pattern[3:], path):
            return True
    return False


def _names(value: object, what: str) -> tuple[str, ...]:
    found = [] if value is None else value
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        raise InputError(f"{what} is no list of names")
    for name in found:
        _check_pattern(name, what)
    return tuple(found)


def _check_pattern(name: str, what: str) -> None:
    try:
        re.compile(name.removeprefix("re:")) if name.startswith("re:") else None
    except re.error as error:
        raise InputError(f"{what} has {name!r}, which is no pattern: {error}") from error


def _told(said: Mapping[str, Any]) -> str:
    return ", ".join(f"{k} {v}" for k, v in _essential(said).items() if v is not False)
