# SPDX-License-Identifier: Apache-2.0
"""Linears of a quantized source that stay as they are: codes and scales go on as they lie, by the
names that the layout of the destination has for them.
"""

from collections.abc import Mapping

import numpy as np

from jqx.config import Choice
from jqx.errors import InputError
from jqx.models import ModelSpec
from jqx.tensors import QTensor

from .checkpoints import Checkpoint, TensorOut, refuse
from .inventory import Inventory
from .orientation import laid_outputs, matrix
from .sources import DecodedCheckpoint, Weight
from .targets import INNER, Target, input_factor
from .unfused import UnfusedCheckpoint

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
    if checkpoint.source is None:
        raise InputError(
            f"{checkpoint.path} is not quantized, so there is nothing to keep: leave --keep-source "
            "out"
        )
    left = [m for m in inventory.modules if m.path not in choices and m.kind == "linear"]
    weights = {m.path: w for m in left if (w := _weight(checkpoint, m.weight)) is not None}
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
    checkpoint: Checkpoint, weight: Weight, shape: tuple[int, ...], target: Target
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
            found = _decoded(checkpoint).stored(weight.name)
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
    (spec, dtype), weight = model, _weight(checkpoint, f"{path}.weight")
    assert weight is not None
    assert weight.choice is not None
    choice, parts = weight.choice, weight.parts
    shape = matrix(spec, path, checkpoint.tensors[f"{path}.weight"].shape)
    static = any(leaf in parts for leaf in STATIC)
    found = laid_outputs(spec, path, target.outputs(path, choice, shape, dtype, static))
    if "pre_quant_scale" in parts:
        found.append(input_factor(path, shape, dtype))
    return found


def kept_codes(checkpoint: Checkpoint, path: str) -> QTensor:
    """The codes and scales [n, k] of a linear that stays as it is."""
    name, source = f"{path}.weight", _decoded(checkpoint)
    if not lies_fused(checkpoint, path):
        return source.stored(name)
    assert isinstance(checkpoint, UnfusedCheckpoint)
    at = checkpoint.own[name][1]
    found = source.stored_member(at.tensor, at.e, at.rows)
    assert found is not None
    return found


def lies_fused(checkpoint: Checkpoint, path: str) -> bool:
    """Whether a linear is a piece of a tensor of all experts."""
    return isinstance(checkpoint, UnfusedCheckpoint) and f"{path}.weight" in checkpoint.own


def _weight(checkpoint: Checkpoint, name: str) -> Weight | None:
    """The quantized weight that the tensor `name` is, or a piece of; None for a plain one."""
    if isinstance(checkpoint, UnfusedCheckpoint) and name in checkpoint.own:
        name = checkpoint.own[name][1].tensor
    return _decoded(checkpoint).weights.get(name)


def _decoded(checkpoint: Checkpoint) -> DecodedCheckpoint:
    found = checkpoint.base if isinstance(checkpoint, UnfusedCheckpoint) else checkpoint
    assert isinstance(found, DecodedCheckpoint)
    return found
