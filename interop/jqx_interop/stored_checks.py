# SPDX-License-Identifier: Apache-2.0
"""Whether the tensors of a quantized checkpoint are those its descriptions promise: by headers
first, and their numbers when they are read.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import NamedTuple

import numpy as np

from jqx.config import KV_FORMATS, Choice
from jqx.errors import InputError
from jqx.formats import check_divides, find_format
from jqx.models import (
    Attention,
    ModelSpec,
    Names,
    block_prefix,
    kinds,
    linear_shapes,
    param_shapes,
)

from .checkpoints import Checkpoint, TensorInfo, TensorOut, dtype_name
from .inventory import FLOATS
from .orientation import laid_outputs
from .targets import (
    INDEX,
    INNER,
    OUTER,
    Target,
    find_algo,
    input_factor,
    low_rank_factors,
    module_and_leaf,
)

CODES = (
    *("weight", "weight_packed", "weight_shape", "weight_zero_point"),
    *("qweight", "qzeros", INDEX, "bias"),
)
"""Leaves of a linear that are no scales."""


def stored_problems(
    checkpoint: Checkpoint,
    spec: ModelSpec,
    choices: Mapping[str, Choice],
    dtype: np.dtype,
    target: Target,
    optional: Iterable[str],
) -> list[str]:
    """What is wrong with names, dtypes and shapes, one phrase each.

    `choices`: the formats of quantized linears; `dtype`: the model's; `target`: the layout;
    `optional`: globs of tensors that may be present though nothing needs them.
    """
    have, linears = checkpoint.tensors, linear_shapes(spec)
    expected: dict[str, TensorOut] = {}
    problems, told = [], set()
    for name, shape in param_shapes(spec).items():
        path = name.removesuffix(".weight")
        choice = choices.get(path) if path in linears else None
        if path in linears and (problem := _apart(have, path, choice, target)):
            problems.append(problem)
            told.add(path)
        elif choice is not None:
            try:
                check_divides(find_format(choice.weight or ""), linears[path])
            except InputError as error:
                problems.append(f"{path}: {error}")
                told.add(path)
            else:
                linear = linear_tensors(have, path, choice, (linears[path], dtype), target)
                expected |= {t.name: t for t in laid_outputs(spec, path, linear)}
        else:
            expected[name] = TensorOut(name, "", shape)
    cached = (_any_float(kv.stored(target), target) for kv in kv_tensors(spec, dtype))
    expected |= {t.name: t for t in cached}
    for tensor in expected.values():
        problems += differs(have.get(tensor.name), tensor)
    for name in have:
        known = name in expected or any(fnmatchcase(name, glob) for glob in optional)
        if not known and module_and_leaf(name)[0] not in told:
            problems.append(_unknown(name, linears, target))
    return problems


class KvTensor(NamedTuple):
    """The scale or bias `leaf` of the keys or values that the linear `path` makes, or would make if
    it were not one with others; `owner`: the linear that does.
    """

    path: str
    leaf: str
    dtype: str
    shape: tuple[int, ...]
    owner: str

    @property
    def name(self) -> str:
        """What it is called in a tree of parameters."""
        return f"{self.path}.{self.leaf}"

    def stored(self, target: Target) -> TensorOut:
        """The tensor that it is in the files of a layout."""
        shape = target.kv_shape if self.leaf.endswith("_scale") else self.shape
        return TensorOut(target.kv_name(self.path, self.leaf), self.dtype, shape)


def kv_tensors(spec: ModelSpec, dtype: np.dtype) -> Iterator[KvTensor]:
    """The scales and biases of stored keys and values; biases have the `dtype` of the model."""
    if spec.kv_cache is None or KV_FORMATS[spec.kv_cache].cast:
        return
    for i, kind in enumerate(kinds(spec)):
        row = kind.attention
        if not isinstance(row, Attention):
            continue
        prefix, names = block_prefix(spec, i), spec.names
        for name, letter in ((names.k, "k"), (names.v, "v")):
            path = f"{prefix}.{name}"
            owner = path if row.qkv == "separate" else f"{prefix}.{_maker(row, names)}"
            yield KvTensor(path, f"{letter}_scale", "F32", (), owner)
            if KV_FORMATS[spec.kv_cache].affine:
                shape = (1, row.kv_heads, 1, row.head_dim if letter == "k" else row.values)
                yield KvTensor(path, f"{letter}_bias", dtype_name(dtype), shape, owner)


def _maker(row: Attention, names: Names) -> str:
    """The linear that makes keys and values, one of several."""
    return names.qkv if row.latent is None else names.kv_b


def bad_numbers(name: str, array: np.ndarray) -> str | None:
    """Why the numbers beside codes cannot be right; None for codes and for good ones.

    Block scales may be zero, as a block that underflows has it; every other scale is positive.
    """
    leaf = module_and_leaf(name)[1]
    if leaf in CODES or not array.size:
        return None
    if array.dtype == np.uint8:
        wrong, what = array == 255, "NaN"
    elif leaf == "scales":  # AutoRound's have signs
        wide = array.astype(np.float32)
        wrong, what = ~np.isfinite(wide) | (wide == 0), "zero or not finite"
    elif leaf.endswith("_bias") or leaf in (INNER, OUTER):
        wrong, what = ~np.isfinite(array.astype(np.float32)), "NaN or infinite"
    else:
        values = array.astype(np.float32)
        block = array.dtype.itemsize == 1
        wrong = ~(np.isfinite(values) & ((values >= 0) if block else (values > 0)))
        what = "negative or NaN" if block else "not positive and finite"
    if not wrong.any():
        return None
    return f"{int(wrong.sum())} of {array.size} numbers in {name} are {what}"


def _apart(
    have: Mapping[str, TensorInfo], path: str, choice: Choice | None, target: Target
) -> str | None:
    """Why descriptions and tensors do not agree on whether `path` is quantized."""
    weight, scaled = have.get(f"{path}.weight"), f"{path}.{target.scale}" in have
    if choice is None and scaled:
        return f"{path} has a {target.scale}, and the descriptions leave it alone"
    if choice is not None and not scaled and weight is not None and weight.dtype in FLOATS:
        return (
            f"{path} is described as {choice.weight}, and its weight is {weight.dtype} "
            f"without a {target.scale}"
        )
    return None


def linear_tensors(
    have: Mapping[str, TensorInfo],
    path: str,
    choice: Choice,
    like: tuple[tuple[int, ...], np.dtype],
    target: Target,
) -> Iterator[TensorOut]:
    """The tensors of a quantized linear, with what it may have besides if it has it; `like`: the
    shape and dtype of its weight.
    """
    algo, given = find_algo(choice), f"{path}.input_scale" in have
    optional = algo is not None and algo.engine_scales_inputs
    static = choice.static_input and (given or not optional)
    for tensor in target.outputs(path, choice, *like, static):
        if module_and_leaf(tensor.name)[1] not in target.optional or tensor.name in have:
            yield _any_float(tensor, target)
    yield from (tensor for tensor in target.beside(path, choice, like[0]) if tensor.name in have)
    factor = input_factor(path, *like)
    if factor.name in have and "pre_quant_scale" in target.leaves:
        yield factor
    rank = _rank(have, path)
    if algo is not None and algo.low_rank and rank is not None:
        yield from low_rank_factors(path, like[0], rank, like[1])


def _any_float(tensor: TensorOut, target: Target) -> TensorOut:
    """Without its dtype if others store it in another floating-point one."""
    free = module_and_leaf(tensor.name)[1] in target.any_float and tensor.dtype in FLOATS
    return TensorOut(tensor.name, "", tensor.shape) if free else tensor


def _rank(have: Mapping[str, TensorInfo], path: str) -> int | None:
    """The rank that the factors of a linear have by the shape of the first one; None without."""
    found = {leaf: have.get(f"{path}.{leaf}") for leaf in (INNER, OUTER)}
    shapes = {leaf: info.shape for leaf, info in found.items() if info is not None}
    ranks = [shape[leaf == OUTER] for leaf, shape in shapes.items() if len(shape) == 2]
    return (ranks or [1])[0] if shapes else None


def differs(found: TensorInfo | None, wanted: TensorOut) -> Iterator[str]:
    """Why a tensor is not the one that is wanted."""
    if found is None:
        yield f"tensor {wanted.name} is missing"
        return
    one = math.prod(found.shape) == math.prod(wanted.shape) == 1  # [1] and [] are both written
    if found.shape != wanted.shape and not one:
        yield f"tensor {wanted.name} has shape {found.shape}, it should have {wanted.shape}"
    if found.dtype not in ({wanted.dtype} if wanted.dtype else FLOATS):
        asked = wanted.dtype or "a floating-point dtype"
        yield f"tensor {wanted.name} has dtype {found.dtype}, it should have {asked}"


def _unknown(name: str, linears: Mapping[str, object], target: Target) -> str:
    path, leaf = module_and_leaf(name)
    if leaf in target.leaves and leaf != "weight" and path not in linears:
        return f"tensor {name} belongs to no linear of the model"
    return f"tensor {name} is not part of the model"
