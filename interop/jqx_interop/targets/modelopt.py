# SPDX-License-Identifier: Apache-2.0
"""The unified Hugging Face layout of NVIDIA ModelOpt: tensor names, scale shapes, and the two JSON
descriptions.

Everything that depends on a format is a row of ALGOS: the name engines know it by, and how it is
described. Source: files written by ModelOpt 0.47 (`hf_quant_config.json`, and `quantization_config`
in `config.json`).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from jqx.config import Choice, base_format
from jqx.formats import find_format

PRODUCER = {"name": "modelopt", "version": "0.47.0"}
"""Engines recognise the layout by this name; the version is that of the layout which is written."""

FLOAT8 = {"dynamic": False, "num_bits": 8, "type": "float"}
FLOAT4 = {"dynamic": False, "num_bits": 4, "type": "float"}
INT8 = {"dynamic": False, "num_bits": 8, "type": "int"}
INT4 = {"dynamic": False, "num_bits": 4, "type": "int"}
CHANNEL = {"strategy": "channel"}
FACTORS = {"has_zero_point": False, "pre_quant_scale": True}


@dataclass(frozen=True, kw_only=True, slots=True)
class Algo:
    """How one pair of weight format and input format is called and described.

    `weights`, `inputs`: the description in a config group. `grouped`: hf_quant_config.json gives
    group_size, and `*_grouped` says which descriptions repeat it. `described`: a file with this
    format alone has a config group. `awq`: the keys has_zero_point and pre_quant_scale are written.
    `unified`: linears that read the same input share their tensor scales and their input_scale.
    `engine_scales_inputs`: no input_scale is stored although the format has one. `smoothed`: a
    linear may have a pre_quant_scale. `folds`: where a norm feeds linears that share one, it takes
    their pre_quant_scale; `folds_rows`: a linear before takes it as well, in families where
    ModelOpt does that. `low_rank`: linears have two factors beside their codes.
    """

    quant_algo: str
    weights: Mapping[str, Any] | None = None
    inputs: Mapping[str, Any] | None = None
    grouped: bool = False
    inputs_grouped: bool = False
    described: bool = False
    awq: bool = False
    unified: bool = True
    engine_scales_inputs: bool = False
    smoothed: bool = False
    folds: bool = False
    folds_rows: bool = False
    low_rank: bool = False


ALGOS: dict[tuple[str, str | None], Algo] = {
    ("fp8", "fp8"): Algo(
        quant_algo="FP8", weights=FLOAT8, inputs=FLOAT8, described=True, unified=False
    ),
    ("fp8_channel", "fp8_token"): Algo(
        quant_algo="FP8_PER_CHANNEL_PER_TOKEN", weights=FLOAT8 | CHANNEL, inputs=FLOAT8
    ),
    ("fp8_block", None): Algo(quant_algo="fp8_pb_wo"),
    ("int8", "int8"): Algo(
        quant_algo="W8A8_SQ_PER_CHANNEL", weights=INT8 | CHANNEL, inputs=INT8, smoothed=True
    ),
    ("int8", None): Algo(quant_algo="W8A16", weights=INT8),
    ("int4", None): Algo(
        quant_algo="W4A16_AWQ", weights=INT4, grouped=True, awq=True, smoothed=True, folds=True
    ),
    ("int4_fp8", "fp8"): Algo(
        quant_algo="W4A8_AWQ",
        weights=FLOAT4,
        inputs=FLOAT8,
        grouped=True,
        inputs_grouped=True,
        awq=True,
        smoothed=True,
        folds=True,
    ),
    ("nvfp4", "nvfp4"): Algo(
        quant_algo="NVFP4",
        weights=FLOAT4,
        inputs=FLOAT4,
        grouped=True,
        inputs_grouped=True,
        described=True,
    ),
    ("nvfp4", None): Algo(quant_algo="W4A16_NVFP4", weights=FLOAT4, grouped=True, described=True),
    ("nvfp4_b32", None): Algo(
        quant_algo="W4A16_NVFP4", weights=FLOAT4, grouped=True, described=True
    ),
    ("nvfp4_b32_fp8", "fp8"): Algo(
        quant_algo="W4A8_NVFP4_FP8", weights=FLOAT4, inputs=FLOAT8, grouped=True
    ),
    ("mxfp4", "mxfp4"): Algo(quant_algo="mxfp4"),
    ("mxfp4", None): Algo(quant_algo="mxfp4"),
    ("mxfp4", "fp8"): Algo(
        quant_algo="W4A8_MXFP4_FP8",
        weights=FLOAT4,
        inputs=FLOAT8,
        grouped=True,
        engine_scales_inputs=True,
    ),
    ("mxfp8", "mxfp8"): Algo(
        quant_algo="MXFP8", weights=FLOAT8, inputs=FLOAT8, grouped=True, inputs_grouped=True
    ),
}

NVFP4_AWQ = Algo(
    quant_algo="NVFP4_AWQ",
    weights=FLOAT4,
    inputs=FLOAT8,
    grouped=True,
    inputs_grouped=True,
    awq=True,
    smoothed=True,
    folds=True,
    folds_rows=True,
)
NVFP4_SVD = Algo(
    quant_algo="NVFP4_SVD",
    weights=FLOAT4,
    inputs=FLOAT4,
    grouped=True,
    inputs_grouped=True,
    described=True,
    awq=True,
    smoothed=True,
    low_rank=True,
)
VARIANT_ALGOS: dict[tuple[str, str | None, str], Algo] = {
    ("nvfp4", "nvfp4", "awq"): NVFP4_AWQ,
    ("nvfp4", "nvfp4", "svd"): NVFP4_SVD,
}
"""Pairs of formats that have another name where something is left beside the codes."""

STORED_AS = {"nvfp4_46": "nvfp4"}
"""Formats that engines read as another one: only how scales were chosen differs."""

KV_ALGOS = {
    "fp8": "FP8",
    "fp8_affine": "FP8",
    "fp8_cast": "FP8",
    "nvfp4": "NVFP4",
    "nvfp4_affine": "NVFP4_AFFINE",
    "nvfp4_cast": "NVFP4",
}


def find_algo(choice: Choice) -> Algo | None:
    """The row for `choice`, or None where the layout has no name for it."""
    name = base_format(choice.weight or "")
    pair = (STORED_AS.get(name, name), choice.input)
    if choice.variant is None:
        return ALGOS.get(pair)
    if row := VARIANT_ALGOS.get((*pair, choice.variant)):
        return row
    row = ALGOS.get(pair)
    return row if row and row.smoothed and choice.variant != "svd" else None


def describe(choices: Mapping[str, Choice], unquantized: Iterable[str], kv: str | None) -> dict:
    """The content of hf_quant_config.json.

    `choices`: quantized modules in module order; `unquantized`: every other module that could have
    been.
    """
    layers = {module: _layer(choice) for module, choice in choices.items()}
    distinct = {str(layer): layer for layer in layers.values()}
    quantization: dict[str, Any] = {
        "quant_algo": None,
        "kv_cache_quant_algo": KV_ALGOS[kv] if kv else None,
    }
    if len(distinct) > 1:
        quantization |= {"quant_algo": "MIXED_PRECISION", "quantized_layers": layers}
    elif distinct:
        quantization |= next(iter(distinct.values()))
        quantization["exclude_modules"] = summarise(unquantized, layers)
    return {"producer": dict(PRODUCER), "quantization": quantization}


def quantization_config(
    choices: Mapping[str, Choice], unquantized: Iterable[str], kv: str | None
) -> dict[str, Any]:
    """The value of `quantization_config` in config.json; arguments as in `describe`."""
    quantization = describe(choices, unquantized, kv)["quantization"]
    groups: dict[str, tuple[Choice, list[str]]] = {}
    for module, choice in choices.items():
        groups.setdefault(str(_layer(choice)), (choice, []))[1].append(module)
    out: dict[str, Any] = {}
    mixed = len(groups) > 1
    if mixed:
        out["config_groups"] = {
            f"group_{i}": {**_group(choice), "targets": sorted(modules)}
            for i, (choice, modules) in enumerate(groups.values())
        }
        out["quantized_layers"] = quantization["quantized_layers"]
    else:
        choice, _ = next(iter(groups.values()))
        if (algo := find_algo(choice)) and algo.described:
            out["config_groups"] = {"group_0": {**_group(choice), "targets": ["Linear"]}}
    out["ignore"] = quantization.get("exclude_modules", [])
    out["quant_algo"] = quantization["quant_algo"]
    if kv:
        name = KV_ALGOS[kv]
        out["kv_cache_scheme"] = dict(FLOAT8) if name == "FP8" else name
    return out | {"producer": dict(PRODUCER), "quant_method": "modelopt"}


def summarise(unquantized: Iterable[str], quantized: Iterable[str]) -> list[str]:
    """The shortest patterns that cover `unquantized` and touch nothing `quantized`, sorted.

    For each name, at each dot from the left: `prefix*`, or `prefix.*` where a longer sibling of the
    prefix is quantized; at last the name itself. (ModelOpt 0.47, export of `exclude_modules`.)
    """
    kept = tuple(quantized)
    exact = set(kept)

    def shortest(name: str) -> str:
        for i in (i for i, letter in enumerate(name) if letter == "."):
            prefix = name[:i]
            if not any(k.startswith(prefix) for k in kept):
                return prefix + "*"
            if prefix not in exact and not any(k.startswith(prefix + ".") for k in kept):
                return prefix + ".*"
        return name

    return sorted({shortest(name) for name in unquantized})


def _algo(choice: Choice) -> Algo:
    row = find_algo(choice)
    assert row is not None  # refused before
    return row


def _layer(choice: Choice) -> dict[str, Any]:
    algo = _algo(choice)
    out: dict[str, Any] = {"quant_algo": algo.quant_algo}
    if algo.grouped:
        out["group_size"] = _block(choice)
    if algo.awq:
        out |= FACTORS
    return out


def _group(choice: Choice) -> dict[str, Any]:
    algo = _algo(choice)
    if algo.weights is None:
        return {"quant_algo": algo.quant_algo}
    size = {"group_size": _block(choice)} if algo.grouped else {}
    out: dict[str, Any] = {}
    if algo.inputs is not None:
        out["input_activations"] = {**algo.inputs, **(size if algo.inputs_grouped else {})}
    out["weights"] = {**algo.weights, **size}
    return out | (FACTORS if algo.awq and algo.described else {})


def _block(choice: Choice) -> int:
    columns = find_format(choice.weight or "").block[1]
    assert columns is not None
    return columns
