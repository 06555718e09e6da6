# SPDX-License-Identifier: Apache-2.0
"""What is quantized to what: an ordered tuple of rules, resolved field by field, the last match
wins.

A rule's glob is matched (fnmatch, case matters) against the path of a weight,
`model.layers.3.mlp.up_proj.weight`, or of an attention, `model.layers.3.self_attn`, and against the
modules it lies in: `model.layers.3.mlp` and `layers/*/attn/q_proj` cover what is inside, and
`=*.q_proj`, with a = before it, only the module itself. Parts are divided by dots or slashes. Each
field of a rule is a format name, None (leave it alone), ON (take back None: the format before it)
or KEEP (what an earlier rule said).
"""

import dataclasses
import enum
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .errors import InputError, nearest
from .formats import FORMATS, find_format
from .globs import covers


class Keep(enum.Enum):
    """The type of KEEP and ON."""

    KEEP = "keep"
    ON = "on"


KEEP = Keep.KEEP
"""Leave this field as an earlier rule set it."""

ON = Keep.ON
"""The format that an earlier rule gave this field, also where None came after it."""

FIELDS = ("weight", "input", "output", "kv")
SCALARS = (str, int, float, bool, type(None))


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """One line of a configuration: which paths, and what happens to each of their quantities.

    `kind` narrows the rule to "linear", "embedding" or "attention"; None means any. `optional`:
    whether it may match nothing.
    """

    path_glob: str = "*"
    weight: str | None | Keep = KEEP
    input: str | None | Keep = KEEP
    output: str | None | Keep = KEEP
    kv: str | None | Keep = KEEP
    kind: str | None = None
    optional: bool = False


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


VARIANTS = {
    "smooth": "a pre_quant_scale, which inputs are multiplied by",
    "awq": "a pre_quant_scale, which may be folded into the norm before",
    "svd": "a pre_quant_scale, and a low-rank part that is added",
}
"""What an algorithm may leave beside codes and scales."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """What the rules say about one path."""

    weight: str | None = None
    input: str | None = None
    output: str | None = None
    kv: str | None = None
    variant: str | None = None
    """What the algorithm leaves beside the codes, a row of VARIANTS."""

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
        InputFormat(name="int8_token", format="int8", bound=None, mode="dynamic, per token"),
        InputFormat(
            name="nvfp4",
            format="nvfp4",
            bound=6.0 * 448.0,
            mode="dynamic block scales, static tensor scale",
            code_max=6.0,
        ),
        InputFormat(name="mxfp4", format="mxfp4", bound=None, mode="dynamic, per 32"),
        InputFormat(name="mxfp8", format="mxfp8", bound=None, mode="dynamic, per 32"),
        InputFormat(name="mxfp6", format="mxfp6", bound=None, mode="dynamic, per 32"),
        InputFormat(name="mxint8", format="mxint8", bound=None, mode="dynamic, per 32"),
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


STORED_BESIDE = {("nvfp4_b32", "fp8"): "nvfp4_b32_fp8"}
"""Weight format and input format -> how the weight is stored beside such inputs."""


def resolve(config: QuantConfig, path: str, kind: str) -> Choice:
    """What `config` says about `path`: each field from the last matching rule that sets it."""
    found: dict[str, Any] = {}
    off: dict[str, bool] = {}
    for rule in config.rules:
        if rule.kind in (None, kind) and covers(rule.path_glob, path, kind):
            for field in FIELDS:
                value = getattr(rule, field)
                if value is not KEEP:
                    off[field] = value is None
                if isinstance(value, str):
                    found[field] = value
    given = {field: value for field, value in found.items() if not off[field]}
    beside = STORED_BESIDE.get((given.get("weight", ""), given.get("input", "")))
    return Choice(**(given | {"weight": beside} if beside else given))


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
    """`config` as plain JSON values; fields that KEEP are left out, ON is true."""
    rules = []
    for rule in config.rules:
        row: dict[str, Any] = {"path_glob": rule.path_glob}
        said = {f: getattr(rule, f) for f in FIELDS if getattr(rule, f) is not KEEP}
        row.update({f: True if value is ON else value for f, value in said.items()})
        row.update({f: getattr(rule, f) for f in ("kind", "optional") if getattr(rule, f)})
        rules.append(row)
    return {"rules": rules, "algorithm": _plain_algorithm(config.algorithm)}


def _plain_algorithm(given: str | Algorithm | tuple[Algorithm, ...] | None) -> Any:
    if isinstance(given, Algorithm):
        params = {k: list(v) if isinstance(v, tuple) else v for k, v in given.params}
        return {"method": given.method, **params}
    return [_plain_algorithm(step) for step in given] if isinstance(given, tuple) else given


def from_json(data: Mapping[str, Any]) -> QuantConfig:
    """The inverse of `to_json`. Raises InputError for a wrong key, with the nearest valid one, and
    for a value that is no name of what it should be; methods and their parameters are not looked up
    (`check_steps`).
    """
    only(data, ("rules", "algorithm"), "configuration key")
    rows = data.get("rules")
    if not isinstance(rows, list | tuple) or not all(isinstance(row, Mapping) for row in rows):
        raise InputError("rules is a list of mappings such as {path_glob: '*mlp*', weight: fp8}")
    algorithm = read_algorithm(data.get("algorithm", "max"))
    return QuantConfig(rules=tuple(_rule(row) for row in rows), algorithm=algorithm)


def read_algorithm(data: Any) -> str | Algorithm | tuple[Algorithm, ...] | None:
    """An algorithm from JSON: a name, {"method": name, parameter: value}, a list of those, or null.

    Raises InputError for anything else.
    """
    if isinstance(data, list | tuple):
        return tuple(_step(step) for step in data)
    return data if data is None or isinstance(data, str) else _step(data)


def _step(data: Any) -> Algorithm:
    if isinstance(data, str):
        return Algorithm(data)
    if not isinstance(data, Mapping) or not isinstance(data.get("method"), str):
        raise InputError(
            f"algorithm: {data!r} is no name; write one in quotes, {{method: NAME}}, or null"
        )
    params: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
    for key, value in params.items():
        each = value if isinstance(value, tuple) else (value,)
        if not isinstance(key, str) or not all(isinstance(v, SCALARS) for v in each):
            raise InputError(f"algorithm {data['method']}: {key!r}: {value!r} is no parameter")
    return Algorithm(params.pop("method"), tuple(sorted(params.items())))


def _rule(row: Mapping[str, Any]) -> Rule:
    only(row, tuple(field.name for field in dataclasses.fields(Rule)), "rule key")
    said: dict[str, Any] = {k: ON if k in FIELDS and v is True else v for k, v in row.items()}
    for field, value in said.items():
        none = value is None and field not in ("path_glob", "optional")
        fits = isinstance(value, bool) if field == "optional" else isinstance(value, str | Keep)
        if not fits and not none:
            raise InputError(f"{field}: {value!r} in a rule is no name; write it in quotes")
    rule = Rule(**said)
    check_names(rule)
    return rule


def only(data: Mapping[str, Any], allowed: tuple[str, ...], what: str) -> None:
    """Raises InputError for a key that is not among `allowed`, with the nearest ones."""
    for key in data:
        if key not in allowed:
            raise nearest(str(key), allowed, what)
