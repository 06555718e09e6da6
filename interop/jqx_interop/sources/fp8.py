# SPDX-License-Identifier: Apache-2.0
"""E4M3 weights with scales in float32 or as powers of two, beside them or in the place of blocks.

    W[r, c] = code[r, c] * scale[r // 128, c // 128]        `weight_scale_inv`, a factor by any name
    W[r, c] = code[r, c] * scale[r]                         `weight_scale`, of rows or of the tensor

The last blocks of an axis may be smaller. (DeepSeek V3, transformers, AutoFP8, fbgemm.)
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from jqx.config import Choice
from jqx.errors import InputError
from jqx.formats import Format, find_format
from jqx.tensors import QTensor

from .weight import Arrays, Found, Given, Shape, Weight, decoded, whole_scales

CODES = "F8_E4M3"
SCALES = ("_scale_inv", "_scale")
INPUTS = ("activation_scale", "input_scale")
SQUARE = (128, 128)


def block_size(said: Mapping[str, Any]) -> tuple[int, int]:
    """Rows and columns that share a scale. Raises InputError for what is no size."""
    size = said.get("weight_block_size") or SQUARE
    good = isinstance(size, list | tuple) and len(size) == 2
    if not good or any(type(n) is not int or n < 1 for n in size):
        raise InputError(f"its weight_block_size is {size!r}, not two positive whole numbers")
    return (size[0], size[1])


def fp8_weights(given: Given) -> Found:
    """Every tensor of codes with its scales, by name."""
    block, used = block_size(given.said), set()
    for name, info in given.tensors.items():
        if not info.dtype.startswith("F8_") or name.endswith(SCALES):
            continue
        scale = next((name + end for end in SCALES if name + end in given.tensors), None)
        if scale is None:
            yield f"tensor {name} is {info.dtype}, and {name}{SCALES[0]} is missing"
        elif info.dtype != CODES or len(info.shape) < 2:
            yield f"tensor {name} is {info.dtype} {info.shape}: only matrices in {CODES} are read"
        else:
            used.add(scale)
            found = _grid(info.shape, given.tensors[scale].shape, block)
            yield (
                _weight(given, name, scale, found)
                if found
                else (
                    f"tensor {scale} has shape {given.tensors[scale].shape}, and {name} "
                    f"{info.shape} needs {_blocks(info.shape, block)} for blocks of "
                    f"{block[0]}x{block[1]}, one scale for every row, or one"
                )
            )
    for name in given.tensors:
        if name.endswith(tuple(f".weight{end}" for end in SCALES)) and name not in used:
            yield f"tensor {name} scales no {CODES} weight"


def _blocks(shape: Shape, block: tuple[int, int]) -> Shape:
    return (*shape[:-2], -(-shape[-2] // block[0]), -(-shape[-1] // block[1]))


def _grid(shape: Shape, scale: Shape, block: tuple[int, int]) -> tuple[Format, Shape] | None:
    """The format of codes whose scales have this shape, and the shape they have in a QTensor."""
    lead = shape[:-2]
    if scale == _blocks(shape, block):
        fmt = find_format("fp8_block")
        return replace(fmt, block=block), scale
    if math.prod(scale) == 1:
        return find_format("fp8"), lead
    if lead and scale in (lead, (*lead, 1, 1)):
        return find_format("fp8"), lead
    if scale in (shape[:-1], (*shape[:-1], 1)):
        return find_format("fp8_channel"), (*shape[:-1], 1)
    return None


def _weight(given: Given, name: str, scale: str, found: tuple[Format, Shape]) -> Weight:
    (fmt, grid), path = found, name.rpartition(".")[0]
    parts = {"codes": name, "scale": scale}
    beside = (n for n in INPUTS if f"{path}.{n}" in given.tensors)
    inputs = next((n for n in beside if math.prod(given.tensors[f"{path}.{n}"].shape) == 1), None)
    if inputs is not None:
        parts["input_scale"] = f"{path}.{inputs}"
    choice = _choice(fmt, inputs is not None)

    def stored(arrays: Arrays) -> QTensor:
        scales, static = whole_scales(arrays["scale"]), arrays.get("input_scale")
        return QTensor(
            codes=arrays["codes"],
            scale=np.broadcast_to(scales.reshape(() if scales.size == 1 else grid), grid),
            tensor_scale=None,
            format=fmt,
            dtype=given.dtype,
            input_scale=None if static is None else whole_scales(static).reshape(()),
            input_format=None if choice is None else choice.input,
        )

    matrix = len(given.tensors[name].shape) == 2
    return Weight(
        name=name,
        shape=given.tensors[name].shape,
        parts=parts,
        floats=lambda arrays, dtype: decoded(stored(arrays), dtype),
        choice=choice if matrix else None,
        stored=stored if matrix else None,
    )


def _choice(fmt: Format, static: bool) -> Choice | None:
    """What stays of a linear as it is: the formats of weight and input; None for blocks of a size
    that no layout has.
    """
    if fmt.block not in (SQUARE, (None, None), (1, None)):
        return None
    inputs = {"fp8": "fp8" if static else None, "fp8_channel": "fp8_token", "fp8_block": None}
    return Choice(weight=fmt.name, input=inputs[fmt.name])
