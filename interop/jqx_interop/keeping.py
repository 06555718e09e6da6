# SPDX-License-Identifier: Apache-2.0
"""Linears of a quantized source that stay as they are: codes and scales go on as they lie, by the
names that the layout of the destination has for them.
"""

from collections.abc import Mapping

import numpy as np

from jqx.config import Choice
from jqx.errors import InputError
from jqx.models import ModelSpec

from .checkpoints import Checkpoint, TensorOut, refuse
from .inventory import Inventory
from .orientation import laid_outputs, matrix
from .sources import DecodedCheckpoint, Weight
from .targets import INNER, Target, input_factor

STATIC = ("input_scale", "input_global_scale")
ZEROS = ("qzeros", "weight_zero_point")
WAY_OUT = "Leave --keep-source out to decode them, or take another target."


def kept_linears(
    checkpoint: Checkpoint, inventory: Inventory, choices: Mapping[str, Choice], target: Target
) -> dict[str, Choice]:
    """The formats of linears that a recipe with these `choices` leaves alone and that are quantized
    in the source.

    Raises InputError for a source that is not quantized, and one for all that `target` has no name
    or no place for.
    """
    if not isinstance(checkpoint, DecodedCheckpoint) and checkpoint.source is not None:
        raise InputError(
            f"the experts of {checkpoint.path} lie in one tensor and are written one by one, so "
            "they do not stay as they are: leave --keep-source out"
        )
    if not isinstance(checkpoint, DecodedCheckpoint):
        raise InputError(
            f"{checkpoint.path} is not quantized, so there is nothing to keep: leave --keep-source "
            "out"
        )
    left = [m for m in inventory.modules if m.path not in choices and m.kind == "linear"]
    weights = {m.path: w for m in left if (w := checkpoint.weights.get(m.weight)) is not None}
    shapes = {m.path: m.shape for m in left}
    problems = [
        f"{path}: {problem}"
        for path, weight in weights.items()
        if (problem := _lacks(checkpoint, weight, shapes[path], target)) is not None
    ]
    kept = {path: weight.choice for path, weight in weights.items() if weight.choice is not None}
    if not problems and (apart := target.apart({**choices, **kept})):
        problems.append(apart)
    if problems:
        refuse(checkpoint.path, problems, WAY_OUT)
    return kept


def _lacks(
    checkpoint: DecodedCheckpoint, weight: Weight, shape: tuple[int, ...], target: Target
) -> str | None:
    """Why a weight cannot stay as it is in the layout `target`."""
    if weight.choice is None:
        return f"{target.name} has no name for {checkpoint.source} as it lies here"
    if "pre_quant_scale" in weight.parts and not target.smooths:
        return f"it has a pre_quant_scale, for which {target.name} has no place"
    if INNER in weight.parts:
        return "it has a part of low rank, which is not kept"
    if (lacking := target.lacks(weight.choice, shape)) is not None:
        return lacking
    if any(leaf in weight.parts for leaf in ZEROS):
        try:
            found = checkpoint.stored(weight.name)
        except InputError as error:
            return str(error)
        checkpoint.release(weight.name)
        if found.low_rank is not None:
            return "it has zero points, for which there is no place"
    return None


def kept_outputs(
    checkpoint: Checkpoint, path: str, target: Target, model: tuple[ModelSpec | None, np.dtype]
) -> list[TensorOut]:
    """The tensors of a linear that stays as it is; `model`: its architecture and dtype."""
    assert isinstance(checkpoint, DecodedCheckpoint)
    (spec, dtype), weight = model, checkpoint.weights[f"{path}.weight"]
    choice, parts = weight.choice, weight.parts
    assert choice is not None
    shape = matrix(spec, path, weight.shape)
    static = any(leaf in parts for leaf in STATIC)
    found = laid_outputs(spec, path, target.outputs(path, choice, shape, dtype, static))
    if "pre_quant_scale" in parts:
        found.append(input_factor(path, shape, dtype))
    return found
