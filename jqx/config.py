# SPDX-License-Identifier: Apache-2.0
"""What is quantized to what: an ordered tuple of rules, resolved field by field, the last match
wins.

A rule's glob is matched (fnmatch, case matters) against the path of a weight,
`model.layers.3.mlp.up_proj.weight`, or of an attention, `model.layers.3.self_attn`, and against the
modules it lies in: `model.layers.3.mlp` and `layers/*/attn/q_proj` cover what is inside. Parts are
divided by dots or slashes. Each field of a rule is a format name, None (leave it alone) or KEEP
(what an earlier rule said).
"""

import dataclasses
import enum
import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .errors import InputError, nearest
from .formats import FORMATS, find_format


class Keep(enum.Enum):
    """The type of KEEP."""

    KEEP = "keep"


KEEP = Keep.KEEP
"""Leave this field as an earlier rule set it."""

FIELDS = ("weight", "input", "output", "kv")


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """One line of a configuration: which paths, and what happens to each of their quantities.

    `kind` narrows the rule to "linear", "embedding" or "attention"; None means any.
    """

    path_glob: str = "*"
    weight: str | None | Keep = KEEP
    input: str | None | Keep = KEEP
    output: str | None | Keep = KEEP
    kv: str | None | Keep = KEEP
    kind: str | None = None


@dataclass(frozen=True, slots=True)
class Algorithm:
    """One step of choosing scales: a row of ALGORITHMS, and the parameters that differ from its
    defaults, sorted by name.
    """

    method: str
    params: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def of(cls, method: str, **params: Any) -> "Algorithm":
        """The step `method` with these parameters."""
        return cls(method, tuple(sorted(params.items())))


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantConfig:
    """Ordered rules, and the algorithm that chooses the scales: a name, a step, or steps that run
    in turn; None collects nothing.
    """

    rules: tuple[Rule, ...]
    algorithm: str | Algorithm | tuple[Algorithm, ...] | None = "max"

    @property
    def steps(self) -> tuple[Algorithm, ...]:
        """The steps in their order; none where nothing is collected."""
        given = self.algorithm
        if given is None:
            return ()
        if isinstance(given, str):
            return (Algorithm(given),)
        return (given,) if isinstance(given, Algorithm) else given


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """What the rules say about one path."""

    weight: str | None = None
    input: str | None = None
    output: str | None = None
    kv: str | None = None

    @property
    def static_input(self) -> bool:
        """Whether inputs are quantized with a scale that is stored."""
        return self.input is not None and INPUT_FORMATS[self.input].bound is not None


@dataclass(frozen=True, kw_only=True, slots=True)
class InputFormat:
    """How the input of a linear is quantized when the model runs.

    `bound`: what input_amax is divided by to give input_scale; None where the engine finds the
    scale itself. `code_max`: the largest code where blocks have scales of their own. `format`: the
    row of FORMATS whose codes the values become, tokens being rows.
    """

    name: str
    format: str
    bound: float | None
    mode: str
    code_max: float | None = None


INPUT_FORMATS = {
    row.name: row
    for row in (
        InputFormat(name="fp8", format="fp8", bound=448.0, mode="static, per tensor"),
        InputFormat(name="fp8_token", format="fp8_channel", bound=None, mode="dynamic, per token"),
        InputFormat(name="int8", format="int8_tensor", bound=127.0, mode="static, per tensor"),
        InputFormat(
            name="nvfp4",
            format="nvfp4",
            bound=6.0 * 448.0,
            mode="dynamic block scales, static tensor scale",
            code_max=6.0,
        ),
        InputFormat(name="mxfp4", format="mxfp4", bound=None, mode="dynamic, per 32"),
        InputFormat(name="mxfp8", format="mxfp8", bound=None, mode="dynamic, per 32"),
    )
}


@dataclass(frozen=True, kw_only=True, slots=True)
class KVFormat:
    """How keys and values are stored; `cast` needs no scales, `affine` subtracts a mean first.
    `format`: the row of FORMATS.
    """

    name: str
    format: str
    bound: float = 448.0
    affine: bool = False
    cast: bool = False


KV_FORMATS = {
    row.name: row
    for row in (
        KVFormat(name="fp8", format="fp8"),
        KVFormat(name="fp8_affine", format="fp8", affine=True),
        KVFormat(name="fp8_cast", format="fp8", cast=True),
        KVFormat(name="nvfp4", format="nvfp4"),
        KVFormat(name="nvfp4_affine", format="nvfp4", affine=True),
        KVFormat(name="nvfp4_cast", format="nvfp4", cast=True),
    )
}


KINDS = ("linear", "embedding", "attention")

TABLES = {
    "input": (INPUT_FORMATS, "input format"),
    "output": (INPUT_FORMATS, "output format"),
    "kv": (KV_FORMATS, "KV cache format"),
    "kind": (KINDS, "kind of module"),
}
"""Field of a rule -> the names it takes, and what they are."""


def check_names(rule: Rule) -> None:
    """Raises InputError, with the nearest names, for a value that is no name of what it should
    be.
    """
    if isinstance(rule.weight, str):
        find_format(rule.weight)
    for field, (table, what) in TABLES.items():
        value = getattr(rule, field)
        if isinstance(value, str) and value not in table:
            raise nearest(value, table, what)


def base_format(name: str) -> str:
    """The row of `FORMATS` that `name` varies: `int4` for `int4_b64`."""
    return name if name in FORMATS else name.rpartition("_b")[0]


def covers(glob: str, path: str) -> bool:
    """Whether a rule with this glob is about `path`: it matches the path or a module around it."""
    glob, parts = glob.replace("/", "."), path.split(".")
    return any(fnmatch.fnmatchcase(".".join(parts[:i]), glob) for i in range(len(parts), 0, -1))


def resolve(config: QuantConfig, path: str, kind: str) -> Choice:
    """What `config` says about `path`: each field from the last matching rule that sets it."""
    found: dict[str, Any] = {}
    for rule in config.rules:
        if rule.kind in (None, kind) and covers(rule.path_glob, path):
            for field in FIELDS:
                value = getattr(rule, field)
                if value is not KEEP:
                    found[field] = value
    return Choice(**found)


def with_block(config: QuantConfig, block: int) -> QuantConfig:
    """`config` with `block` values to a scale in every block format of its weights.

    Raises InputError if there is none.
    """
    found = {rule.weight for rule in config.rules if isinstance(rule.weight, str)}
    varied = {name: _vary(name, block) for name in found if _has_blocks(name)}
    if not varied:
        raise InputError(f"block={block}: {', '.join(sorted(found))} has no blocks to change")

    def change(rule: Rule) -> Rule:
        if isinstance(rule.weight, str) and rule.weight in varied:
            return dataclasses.replace(rule, weight=varied[rule.weight])
        return rule

    return dataclasses.replace(config, rules=tuple(change(rule) for rule in config.rules))


def _has_blocks(name: str) -> bool:
    rows, columns = find_format(name).block
    return rows == 1 and columns is not None


def _vary(name: str, block: int) -> str:
    """The format `name` with another block: the name of the row itself where that has it."""
    name = base_format(name)
    return name if FORMATS[name].block[1] == block else find_format(f"{name}_b{block}").name


def to_json(config: QuantConfig) -> dict[str, Any]:
    """`config` as plain JSON values; fields that KEEP are left out."""
    rules = []
    for rule in config.rules:
        row: dict[str, Any] = {"path_glob": rule.path_glob}
        row.update({f: getattr(rule, f) for f in FIELDS if getattr(rule, f) is not KEEP})
        if rule.kind:
            row["kind"] = rule.kind
        rules.append(row)
    return {"rules": rules, "algorithm": config.algorithm}


def from_json(data: Mapping[str, Any]) -> QuantConfig:
    """The inverse of `to_json`. Raises InputError for a wrong key, with the nearest valid one, and
    for a value that is no name of what it should be.
    """
    _only(data, ("rules", "algorithm"), "configuration key")
    rows = data.get("rules")
    if not isinstance(rows, list | tuple) or not all(isinstance(row, Mapping) for row in rows):
        raise InputError("rules is a list of mappings such as {path_glob: '*mlp*', weight: fp8}")
    algorithm = data.get("algorithm", "max")
    if not isinstance(algorithm, str | None):
        raise InputError(f"algorithm: {algorithm!r} is no name; write one in quotes, or null")
    return QuantConfig(rules=tuple(_rule(row) for row in rows), algorithm=algorithm)


def _rule(row: Mapping[str, Any]) -> Rule:
    _only(row, tuple(field.name for field in dataclasses.fields(Rule)), "rule key")
    for field, value in row.items():
        if not isinstance(value, str) and (value is not None or field == "path_glob"):
            raise InputError(f"{field}: {value!r} in a rule is no name; write it in quotes")
    rule = Rule(**row)
    check_names(rule)
    return rule


def _only(data: Mapping[str, Any], allowed: tuple[str, ...], what: str) -> None:
    for key in data:
        if key not in allowed:
            raise nearest(key, allowed, what)
