# SPDX-License-Identifier: Apache-2.0
"""Rotary parameters from a config: `rope_parameters`, or the older `rope_theta` beside
`rope_scaling`.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from jqx import InputError
from jqx.models import Rope

_LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor")
SCALING_KEYS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"default": (), "linear": ("factor",), "dynamic": ("factor",), "llama3": _LLAMA3}
)
"""rope_type -> the parameters it needs; "llama3" may also give original_max_position_embeddings."""

_COMMON = ("rope_type", "type", "rope_theta", "partial_rotary_factor")


def rope_from_config(config: Mapping[str, Any], theta: float, context: int) -> Rope:
    """The rotary row of `config`. `theta` and `context` (max_position_embeddings) hold where the
    parameters are silent.

    Raises InputError for a rope_type that is not defined here, a missing parameter, or one that
    would be ignored.
    """
    where = "rope_parameters" if config.get("rope_parameters") else "rope_scaling"
    given = config.get(where) or {}
    if not isinstance(given, Mapping):
        raise InputError(f"{where} is a {type(given).__name__}, not an object")
    kind = given.get("rope_type") or given.get("type") or "default"
    if kind not in SCALING_KEYS:
        known = ", ".join(SCALING_KEYS)
        raise InputError(
            f"{where} asks for rope_type {kind!r}, which is not supported; known: {known}"
        )
    _check_parameters(where, given, kind)
    top = config.get("original_max_position_embeddings")
    original = top or given.get("original_max_position_embeddings") or context
    trained = {"dynamic": context, "llama3": original}
    return Rope(
        theta=float(given.get("rope_theta") or theta),
        scaling=kind,
        trained_length=int(trained.get(kind, 0)),
        **{key: float(given[key]) for key in SCALING_KEYS[kind]},
    )


def _check_parameters(where: str, given: Mapping[str, Any], kind: str) -> None:
    missing = [key for key in SCALING_KEYS[kind] if given.get(key) is None]
    if missing:
        raise InputError(f"{where} with rope_type {kind!r} lacks {', '.join(missing)}")
    numbers = [key for key in (*SCALING_KEYS[kind], "rope_theta") if given.get(key) is not None]
    wrong = [key for key in numbers if not isinstance(given[key], int | float)]
    if wrong:
        names = ", ".join(f"{key} = {given[key]!r}" for key in wrong)
        raise InputError(f"{where} needs numbers, but has {names}")
    allowed = {*_COMMON, *SCALING_KEYS[kind], "original_max_position_embeddings"}
    extra = [key for key in given if key not in allowed and given[key] is not None]
    if extra:
        names = ", ".join(f"{key} = {given[key]!r}" for key in extra)
        raise InputError(f"{where} with rope_type {kind!r} has no use for {names}")
    if given.get("partial_rotary_factor", 1.0) not in (None, 1, 1.0):
        raise InputError(
            f"{where} asks for partial_rotary_factor {given['partial_rotary_factor']}; "
            "only 1.0 is supported"
        )
