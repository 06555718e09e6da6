# SPDX-License-Identifier: Apache-2.0
"""Known: what the configuration of a checkpoint asks for, as names and shapes of parameters."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from jqx.errors import InputError
from jqx.models import Experts, ModelSpec, linear_shapes, param_shapes
from jqx_interop.architecture import optional_tensors, spec_for
from jqx_interop.families import FAMILIES
from jqx_interop.families.family import REQUIRED
from jqx_interop.families.from_config import reader_of
from jqx_interop.families.reader import Reader

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Known:
    """`parameters`: name -> shape of everything there should be, empty where that is not known;
    `linears`: path -> [n, k] of what could be quantized; `spec`: of families that are defined here;
    `optional`: globs of what else there may be; `problems`: (rule, text).
    """

    parameters: Shapes
    linears: Shapes
    spec: ModelSpec | None = None
    optional: tuple[str, ...] = ()
    problems: tuple[tuple[str, str], ...] = ()


def read_known(config: Mapping[str, Any], tensors: Collection[str]) -> Known:
    """What `config` asks for; experts that are `tensors` of three axes are compared with nothing.

    Sizes that are none are a problem of the configuration; an architecture that is not defined here
    is none, and is told.
    """
    plain = {k: v for k, v in config.items() if k != "quantization_config"}
    kind = plain.get("model_type")
    if not plain:
        return _nothing()
    if not isinstance(kind, str):
        return _nothing(("config", f"config.json has model_type {kind!r:.40}, no name"))
    if problems := _sizes(kind, plain):
        return _nothing(*problems)
    try:
        if kind in FAMILIES and not any(name.endswith(STACKS) for name in tensors):
            known = _defined(plain, tensors)
            if known.spec is None or not _in_one_tensor(known.spec):
                return known
    except InputError as error:
        return _nothing(("model-type", f"names and shapes were not compared: {error}"))
    what = "keeps experts in one tensor" if kind in FAMILIES else "is not defined here"
    text = f"model_type {kind!r:.40} {what}: names and shapes were not compared"
    return _nothing(("model-type", text))


STACKS = (".experts.gate_up_proj", ".experts.down_proj")
"""Ends of names of experts in one tensor."""


def _nothing(*problems: tuple[str, str]) -> Known:
    return Known(parameters={}, linears={}, problems=problems)


def _sizes(kind: str, config: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Sizes without which no engine builds the model."""
    if kind not in FAMILIES:
        return []
    try:
        read = reader_of(config)
    except InputError as error:
        return [("config", str(error))]
    problems = []
    for meaning in REQUIRED:
        value, name = _size(read, meaning), next(iter(read.keys(meaning)), meaning)
        if type(value) is not int or value < 1:
            text = f"config.json has {name} {value!r:.40}, not a whole number from 1"
            problems.append(("config", text))
    return problems


def _size(read: Reader, meaning: str) -> Any:
    try:
        return read(meaning)
    except (TypeError, ArithmeticError):  # one that is computed from others, which are no numbers
        return None


def _in_one_tensor(spec: ModelSpec) -> bool:
    """Whether experts lie in one tensor, which quantized checkpoints call in several ways."""
    rows = (kind.mlp for kind in spec.blocks)
    return any(isinstance(row, Experts) and row.store != "separate" for row in rows)


def _defined(config: dict[str, Any], tensors: Collection[str]) -> Known:
    spec = spec_for(config, tensors)
    return Known(
        parameters=param_shapes(spec),
        linears=linear_shapes(spec),
        spec=spec,
        optional=optional_tensors(spec),
    )
