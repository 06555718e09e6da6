# SPDX-License-Identifier: Apache-2.0
"""The parameters of a configuration's algorithms: of the right type, and changed by name."""

import dataclasses
import typing
from typing import Any

from .algorithms.table import ALGORITHMS, params_of
from .config import Algorithm, QuantConfig, with_block
from .errors import InputError, nearest

WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a name"}
TRUTH = {"true": True, "false": False}


def check_steps(config: QuantConfig) -> QuantConfig:
    """`config`, with whole numbers as floats where parameters are floats.

    Raises InputError, with the nearest names, for steps that are no rows of ALGORITHMS, and for
    parameters they do not have or values of another type or out of range.
    """
    steps = tuple(_checked(step) for step in config.steps)
    factored = [step.method for step in steps if ALGORITHMS[step.method].variant]
    if "svdquant" in factored[:-1]:
        raise InputError(
            f"{factored[-1]} after svdquant would scale inputs again, and not the low-rank part: "
            "leave one of them out"
        )
    if not any(step.params for step in steps):
        return config
    several = isinstance(config.algorithm, tuple)
    return dataclasses.replace(config, algorithm=steps if several else steps[0])


def _checked(step: Algorithm) -> Algorithm:
    types, params = parameters(step.method), []
    for key, value in step.params:
        if key in types and not any(_is(value, kind) for kind in _kinds(types[key])):
            raise InputError(f"{step.method}: {key} is {value!r}; give {_told(types[key])}")
        whole = type(value) is int and int not in _kinds(types.get(key))
        params.append((key, float(value) if whole else value))
    found = Algorithm(step.method, tuple(params))
    params_of(found)
    return found


def parameters(method: str) -> dict[str, Any]:
    """The parameters of an algorithm and their types. Raises InputError for another name."""
    if method not in ALGORITHMS:
        raise nearest(method, ALGORITHMS, "algorithm")
    return typing.get_type_hints(ALGORITHMS[method].params)


def with_option(config: QuantConfig, key: str, text: str) -> QuantConfig:
    """`config` with one thing changed: the `block` of its weights, a parameter of every step that
    has it, or `method.parameter` of one.

    Raises InputError for another key, with the nearest ones, and for text that is no such value.
    """
    if key == "block":
        if not text.isdecimal() or int(text) < 1:
            raise InputError(f"--set block={text}: block is a positive whole number")
        return with_block(config, int(text))
    method, _, name = key.rpartition(".")
    steps = config.steps
    changed = tuple(
        _changed(step, name, text)
        if name in parameters(step.method) and method in ("", step.method)
        else step
        for step in steps
    )
    if changed == steps and not _has(steps, method, name):
        raise nearest(key, _options(steps), "option of --set")
    several = isinstance(config.algorithm, tuple)
    return dataclasses.replace(config, algorithm=changed if several else changed[0])


def _has(steps: tuple[Algorithm, ...], method: str, name: str) -> bool:
    return any(method in ("", s.method) and name in parameters(s.method) for s in steps)


def _options(steps: tuple[Algorithm, ...]) -> list[str]:
    """What --set may change."""
    names = [(step.method, name) for step in steps for name in parameters(step.method)]
    dotted = [f"{method}.{name}" for method, name in names] if len(steps) > 1 else []
    return list(dict.fromkeys(["block", *(name for _, name in names), *dotted]))


def _changed(step: Algorithm, key: str, text: str) -> Algorithm:
    """`step` with the parameter `key` read from `text`."""
    kind = parameters(step.method)[key]
    for each in _kinds(kind):
        value = _parsed(text, each)
        if value is not None or (each is type(None) and text.lower() in ("none", "null")):
            return Algorithm.of(step.method, **{**dict(step.params), key: value})
    raise InputError(f"--set {key}={text}: {key} of {step.method} is {_told(kind)}")


def _parsed(text: str, kind: Any) -> Any:
    """The value of this type that `text` says, None if it says none."""
    if kind is bool:
        return TRUTH.get(text.lower())
    try:
        return kind(text) if kind in WORDS else None
    except ValueError:
        return None


def _kinds(kind: Any) -> tuple[Any, ...]:
    """The types that a union is of, text last."""
    return tuple(sorted(typing.get_args(kind) or (kind,), key=lambda each: each is str))


def _is(value: Any, kind: Any) -> bool:
    if kind not in WORDS:
        return value is None if kind is type(None) else True
    if isinstance(value, bool) or kind is bool:
        return isinstance(value, bool) and kind is bool
    return isinstance(value, int | float if kind is float else kind)


def _told(kind: Any) -> str:
    """A type in words."""
    return " or ".join(WORDS.get(each, "none") for each in _kinds(kind))
