# SPDX-License-Identifier: Apache-2.0
"""The attributes of ModelOpt's quantizers -> names of formats, as rows.

`num_bits` is a number of bits or (exponent bits, mantissa bits); `blocks` the values that share a
scale along each axis; `block_type` whether ModelOpt finds those scales anew for every tensor.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from .config import only
from .errors import InputError
from .formats import find_format

FLOATS = {"e4m3": (4, 3), "e5m2": (5, 2), "e3m2": (3, 2), "e2m3": (2, 3), "e2m1": (2, 1)}
FLOATS |= {"e8m0": (8, 0)}
IGNORED = (
    "enable",
    "effective_bits",
    "fake_quant",
    "learn_amax",
    "trt_high_precision_dtype",
    "pass_through_bwd",
    "backend_extra_args",
)
"""Attributes that do not change which numbers are stored; `enable` is that of the entry."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Attributes:
    """What a quantizer does to a tensor; the defaults are ModelOpt's."""

    num_bits: Any = 8
    axis: Any = None
    blocks: tuple[tuple[int, int | None], ...] = ()
    block_type: str = "static"
    scale_bits: Any = None
    scale_block_sizes: Any = None
    four_over_six: bool = False
    type: str = "static"
    bias: tuple[tuple[str, Any], ...] = ()
    unsigned: bool = False
    narrow_range: bool = False
    calibrator: str = "max"
    rotate: Any = False
    backend: str | None = None
    use_constant_amax: bool = False
    constant_amax: float | None = None

    def __str__(self) -> str:
        """The attributes that are not the default, and always the bits."""
        said = {f.name: getattr(self, f.name) for f in fields(self)}
        kept = [f"{name} {said[name]}" for name in said if said[name] != _default(name)]
        return ", ".join(kept if said["num_bits"] != 8 else ["num_bits 8", *kept])


def _default(name: str) -> Any:
    return Attributes.__dataclass_fields__[name].default


PLAIN = tuple(f.name for f in fields(Attributes) if f.name not in ("blocks", "block_type"))
IN_BLOCKS = ("type", "scale_bits", "scale_block_sizes", "four_over_six")
KEYS = (*(key for key in PLAIN if key not in IN_BLOCKS or key == "type"), "block_sizes", *IGNORED)


def _row(bits: Any, block: int | None = None, scale: Any = None, **more: Any) -> Attributes:
    """Attributes with `block` values of the last axis to a scale of `scale` bits."""
    blocks = () if block is None else ((-1, block),)
    return Attributes(num_bits=bits, blocks=blocks, scale_bits=scale, **more)


E4M3, E2M1, E8M0 = FLOATS["e4m3"], FLOATS["e2m1"], FLOATS["e8m0"]
DYNAMIC: dict[str, Any] = {"block_type": "dynamic"}
MEAN = (("-2", None), ("-4", None), ("type", "static"))
NVFP4 = _row(E2M1, 16, E4M3, **DYNAMIC)

WEIGHTS = {
    _row(E4M3): "fp8",
    _row(E4M3, axis=0): "fp8_channel",
    Attributes(num_bits=E4M3, blocks=((-2, 128), (-1, 128))): "fp8_block",
    _row(8): "int8_tensor",
    _row(8, axis=0): "int8",
    _row(4, 128): "int4",
    NVFP4: "nvfp4",
    _row(E2M1, 16, E4M3): "nvfp4",
    _row(E2M1, 16, E4M3, four_over_six=True): "nvfp4_46",
    _row(E2M1, 32, E8M0, **DYNAMIC): "mxfp4",
    _row(E4M3, 32, E8M0, **DYNAMIC): "mxfp8",
    _row(FLOATS["e3m2"], 32, E8M0, **DYNAMIC): "mxfp6",
    _row(8, 32, E8M0, **DYNAMIC): "mxint8",
}
INPUTS = {
    _row(E4M3): "fp8",
    Attributes(num_bits=E4M3, blocks=((-1, None),), type="dynamic"): "fp8_token",
    _row(8): "int8",
    NVFP4: "nvfp4",
    **{_row(bits, 32, E8M0, **DYNAMIC): name for bits, name in ((E2M1, "mxfp4"), (E4M3, "mxfp8"))},
    _row(FLOATS["e3m2"], 32, E8M0, **DYNAMIC): "mxfp6",
    _row(8, 32, E8M0, **DYNAMIC): "mxint8",
}
KEYS_AND_VALUES = {
    _row(E4M3): "fp8",
    _row(E4M3, bias=MEAN): "fp8_affine",
    _row(E4M3, use_constant_amax=True): "fp8_cast",
    NVFP4: "nvfp4",
    _row(E2M1, 16, E4M3, bias=MEAN, **DYNAMIC): "nvfp4_affine",
    _row(E2M1, 16, E4M3, use_constant_amax=True, **DYNAMIC): "nvfp4_cast",
}
TABLES = {"weight": WEIGHTS, "input": INPUTS, "output": INPUTS, "kv": KEYS_AND_VALUES}
"""Field of a rule -> attributes -> name."""
SECOND_STAGES: dict[tuple[str, ...], str] = {("int4", "fp8"): "int4_fp8"}
"""The formats of two quantizers in turn -> one format."""


def read_attributes(data: Mapping[str, Any]) -> Attributes:
    """The attributes in a `cfg`, with what JSON and YAML make of tuples and numbers put right.

    Raises InputError for a key that is none, with the nearest ones, and for rotations.
    """
    only(data, KEYS, "attribute")
    rotate = data.get("rotate", False)
    if rotate.get("enable", False) if isinstance(rotate, Mapping) else rotate:
        raise InputError(NO_ROTATION)
    said = {key: data[key] for key in PLAIN if data.get(key) is not None}
    said["rotate"] = False
    given = data.get("block_sizes") or {}
    for key, value in (("block_sizes", given), ("bias", data.get("bias") or {})):
        if not isinstance(value, Mapping):
            raise InputError(f"{key}: {value!r} is no mapping from axes to numbers, as {{-1: 16}}")
    sizes = {str(key): value for key, value in given.items()}
    axes = {int(key): sizes.pop(key) for key in list(sizes) if key.lstrip("-").isdecimal()}
    only(sizes, IN_BLOCKS, "key of block_sizes")
    said["blocks"] = tuple(sorted(axes.items()))
    said["block_type"] = sizes.pop("type", "static")
    if said["blocks"] == ((-1, None),) and said["block_type"] == "dynamic":
        said |= {"block_type": "static", "type": "dynamic"}
    said |= sizes
    if data.get("bias"):
        bias = {"type": "static"} | {str(key): value for key, value in data["bias"].items()}
        said["bias"] = tuple(sorted(item for item in bias.items() if item != ("method", "mean")))
    return Attributes(**{key: _plain(key, value) for key, value in said.items()})


NO_ROTATION = (
    "rotations (NVFP4_KV_ROTATE_CFG) are not done here: queries and keys would have to be "
    "multiplied by a Hadamard matrix in the model itself; take NVFP4_KV_CFG"
)


def _plain(key: str, value: Any) -> Any:
    if key in ("num_bits", "scale_bits") and isinstance(value, str):
        return FLOATS.get(value.lower(), value)
    if key == "scale_block_sizes" and isinstance(value, Mapping):
        return tuple(sorted((str(axis), size) for axis, size in value.items()))
    if key == "four_over_six":
        return bool(value)
    return tuple(value) if isinstance(value, list) else value


def format_of(field: str, stages: list[Attributes]) -> str:
    """The name of the format that a field of a rule gets from the quantizers in turn.

    Raises InputError for attributes that none has, with the nearest that one has.
    """
    names = [_name("weight" if len(stages) > 1 else field, stage) for stage in stages]
    if len(names) == 1:
        return names[0]
    first, _, block = names[0].partition("_b")
    found = SECOND_STAGES.get((first, *names[1:])) if field == "weight" else None
    if found is None:
        known = ", ".join(" then ".join(pair) for pair in SECOND_STAGES)
        raise InputError(f"{' then '.join(names)} is no {field} format; known in turn: {known}")
    return f"{found}_b{block}" if block else found


def _name(field: str, found: Attributes) -> str:
    table = TABLES[field]
    if found in table:
        return table[found]
    ((axis, block), *more) = found.blocks or ((0, None),)
    if field == "weight" and axis == -1 and block and not more:
        for row, name in table.items():
            if len(row.blocks) == 1 and replace(row, blocks=found.blocks) == found:
                return find_format(f"{name}_b{block}").name
    row = min(table, key=lambda row: _distance(row, found))
    what = {"kv": "format of keys and values"}.get(field, f"{field} format")
    raise InputError(f"no {what} has {found}; the nearest known is {table[row]}, {row}")


def _distance(a: Attributes, b: Attributes) -> int:
    """How many attributes differ, twice where only one has it; bits count most."""
    far = 0 if a.num_bits == b.num_bits else 6
    for f in fields(a):
        x, y = getattr(a, f.name), getattr(b, f.name)
        far += (x != y) * (1 + (f.default in (x, y)))
    return far
