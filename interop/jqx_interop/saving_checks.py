# SPDX-License-Identifier: Apache-2.0
"""Whether a tree of parameters is one that a checkpoint can hold, and what it holds.

Everything that is wrong with it is collected, then raised once.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from jqx.config import Choice, base_format
from jqx.errors import InputError
from jqx.formats import Format, find_format, grid_shape
from jqx.models import (
    ModelSpec,
    block_prefix,
    input_groups,
    kinds,
    linear_shapes,
    param_shapes,
)
from jqx.tensors import QTensor
from jqx.tensors.paths import flatten
from jqx.tensors.stacks import unstacked

from .checkpoints import DTYPES, TensorOut, refuse
from .inventory import KEPT
from .orientation import turned
from .stored_checks import kv_tensors
from .targets import Target, find_algo, holds, input_factor, low_rank_factors
from .targets.modelopt import Algo

WAY_OUT = "Save the tree that load gave, or one like it."


@dataclass(frozen=True, kw_only=True, slots=True)
class Content:
    """`leaves`: every leaf of the tree by name, parameters in module order first, QTensors as
    [n, k]; `choices`: the
    formats of the quantized linears in module order; `dtype`: that of the whole model.
    """

    leaves: Mapping[str, Any]
    choices: Mapping[str, Choice]
    dtype: np.dtype


def content_of(
    spec: ModelSpec, params: Mapping[str, Any], target: Target, round_scales: bool = False
) -> Content:
    """The content of the tree `params`, checked for the layout `target`; `round_scales`: scales may
    be rounded where it stores them in float16. Raises one InputError for all that is wrong.
    """
    shapes = param_shapes(spec)
    leaves = flatten(unstacked(flatten(params)), order=shapes)
    stored = {n.removesuffix(".weight"): q for n, q in leaves.items() if isinstance(q, QTensor)}
    dtype = _dtype_of(leaves)
    wanted = shapes | {tensor.name: tensor.shape for tensor in kv_tensors(spec, dtype)}
    problems = [f"{name} is missing" for name in wanted if name not in leaves]
    problems += [f"{name} is no parameter of the model" for name in leaves if name not in wanted]
    problems += [
        f"{name} has the shape {tuple(leaf.shape)}, and the model needs {wanted[name]}"
        for name, leaf in leaves.items()
        if name in wanted and tuple(leaf.shape) != wanted[name]
    ]
    linears = linear_shapes(spec)
    problems += [f"{path} is quantized and is no linear" for path in stored if path not in linears]
    if not problems:
        stored = {path: turned(spec, path, q) for path, q in stored.items()}
        leaves |= {f"{path}.weight": q for path, q in stored.items()}
    choices: dict[str, Choice] = {}
    for path in linears if not problems else ():
        if path in stored:
            found = _choice_of(stored[path], dtype, target)
            if isinstance(found, Choice):
                choices[path] = found
            else:
                problems.append(f"{path} {found}")
    choices = _named_alike(choices)
    problems += _fused_apart(spec, stored, choices)
    if apart := target.apart(choices):
        problems.append(apart)
    if target.half_scales and not round_scales:
        problems += [problem for p, q in stored.items() if (problem := _not_half(p, q, target))]
    if spec.kv_cache is not None and spec.kv_cache not in target.kv_formats:
        problems.append(f"keys and values are in {spec.kv_cache}, which {target.name} has not")
    if spec.kv_cache is not None and not stored:
        problems.append("keys and values are quantized and no linear is: there is no name for that")
    if problems:
        refuse("the parameters", problems, WAY_OUT)
    return Content(leaves=leaves, choices=choices, dtype=dtype)


def _dtype_of(leaves: Mapping[str, Any]) -> np.dtype:
    """The one dtype of all parameters and of what QTensors stand for; scales do not count."""
    counts = Counter(
        np.dtype(leaf.dtype) for name, leaf in leaves.items() if not name.endswith(("_scale", KEPT))
    )
    found = ", ".join(f"{dtype.name} ({n})" for dtype, n in counts.most_common())
    if len(counts) != 1:
        raise InputError(f"the parameters are {found}; cast them to one dtype")
    (dtype,) = counts
    if dtype.name not in ("bfloat16", "float16", "float32"):
        raise InputError(f"the parameters are {found}; cast them to bfloat16, float16 or float32")
    return dtype


def _choice_of(q: QTensor, dtype: np.dtype, target: Target) -> Choice | str:
    """The formats of `q`, or why the layout cannot hold it."""
    if q.columns != (1,) or q.ndim != 2:
        return (
            f"is contracted over {q.columns} of {q.ndim} axes; a checkpoint has weights [out, in]"
        )
    plain = Choice(weight=_name_of(q.format), input=q.input_format)
    factor = None if q.pre_quant_scale is None else "awq"
    choice = replace(plain, variant=factor if q.low_rank is None else "svd")
    held = next((c for c in (choice, plain) if c.weight and target.supports(c)), None)
    if held is None:
        return f"is stored as {q.format.name} with {q.input_format} inputs, which has no name"
    lacking = _lacking(q, held, target)
    if lacking is None and (shape := target.lacks(held, q.shape)):
        lacking = f"does not fit: {shape}"
    if problem := lacking or _parts(q, held, target, dtype):
        return problem
    return plain if find_algo(held) is find_algo(plain) else held


def _named_alike(choices: Mapping[str, Choice]) -> dict[str, Choice]:
    """The same, a linear with nothing beside its codes under the name of those that have its
    formats: what it had was folded into what comes before.
    """
    variants: dict[Choice, set[str]] = {}
    for choice in choices.values():
        if choice.variant is not None:
            variants.setdefault(replace(choice, variant=None), set()).add(choice.variant)
    only = {plain: replace(plain, variant=min(v)) for plain, v in variants.items() if len(v) == 1}
    return {path: only.get(choice, choice) for path, choice in choices.items()}


def beside_codes(path: str, q: QTensor, dtype: np.dtype) -> list[TensorOut]:
    """The tensors of a linear that not all of its format have, in a model of `dtype`."""
    found = [] if q.pre_quant_scale is None else [input_factor(path, q.shape, dtype)]
    if q.low_rank is not None:
        rank = (*np.shape(q.low_rank[1]), 0)[0]
        found += low_rank_factors(path, q.shape, rank, dtype)
    return found


def _name_of(fmt: Format) -> str | None:
    """The name under which FORMATS has just this row; another block size has another name."""
    for name in (fmt.name, f"{base_format(fmt.name)}_b{fmt.block[1]}"):
        try:
            if replace(find_format(name), name=fmt.name) == fmt:
                return name
        except InputError:
            continue
    return None


def _called(choice: Choice, target: Target) -> tuple[Algo | None, str]:
    """The row of ALGOS of a layout that has one, and what formats are called in it."""
    algo = find_algo(choice) if "pre_quant_scale" in target.leaves else None
    return algo, target.name if algo is None else algo.quant_algo


def _lacking(q: QTensor, choice: Choice, target: Target) -> str | None:
    """What `q` has and the layout has no place for, or the other way round."""
    algo, name = _called(choice, target)
    static, optional = choice.static_input, algo is not None and algo.engine_scales_inputs
    if q.input_scale is None and static and not optional:
        return f"has no input_scale, which {choice.input} inputs need: calibrate it"
    if q.input_scale is not None and not static:
        return f"has an input_scale, and {choice.input} inputs have none"
    if q.pre_quant_scale is not None and not (algo and algo.smoothed):
        return f"has a pre_quant_scale, which {name} does not store"
    if q.low_rank is not None and not (algo and algo.low_rank):
        return f"has a low-rank part, which {name} does not store"
    return None


def _parts(q: QTensor, choice: Choice, target: Target, dtype: np.dtype) -> str | None:
    """What is wrong with the arrays of `q`."""
    if (have := tuple(q.scale.shape)) != (grid := grid_shape(q.format, q.shape)):
        return f"has scales of shape {have}, {q.format.name} has {grid} for {q.shape}"
    found = target.outputs("q", choice, q.shape, dtype, q.input_scale is not None)
    wanted = {t.name: t for t in (*found, *beside_codes("q", q, dtype))}
    for name, array in target.named("q", q).items():
        leaf, want = name.removeprefix("q."), wanted[name]
        dtype, shape = np.dtype(getattr(array, "dtype", float)), np.shape(array)
        if (dtype, shape) != (DTYPES[want.dtype], want.shape):
            _, called = _called(choice, target)
            asked = f"{called} stores {want.dtype} {want.shape}"
            return f"has a {leaf} that is {dtype.name} {shape}, and {asked}"
    return None


def _not_half(path: str, q: QTensor, target: Target) -> str | None:
    """Why float16 does not hold the scales of `q`; None if it does."""
    if holds(np.asarray(q.scale)):
        return None
    return (
        f"{path} has scales that float16 does not hold, and {target.name} stores them in it: pass "
        "round_scales=True"
    )


def _fused_apart(
    spec: ModelSpec, stored: Mapping[str, QTensor], choices: Mapping[str, Choice]
) -> Iterator[str]:
    """Linears that engines fuse because they read one input, and that differ in what is shared."""
    for i, kind in enumerate(kinds(spec)):
        for group in input_groups(spec, kind):
            paths = [f"{block_prefix(spec, i)}.{name}" for name in group]
            paths = [path for path in paths if path in choices]
            told = ", ".join(paths)
            if len({choices[path] for path in paths}) > 1:
                yield f"{told} read one input and engines fuse them: give them one format"
            elif paths and (algo := find_algo(choices[paths[0]])) and algo.unified:
                for leaf in ("tensor_scale", "input_scale"):
                    if _several(getattr(stored[path], leaf) for path in paths):
                        yield (
                            f"{told} read one input and engines fuse them, and each has its own "
                            f"{leaf}: quantize them with one amax"
                        )


def _several(scales: Iterable[Any]) -> bool:
    return len({None if scale is None else float(scale) for scale in scales}) > 1
