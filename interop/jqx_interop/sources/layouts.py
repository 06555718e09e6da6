# SPDX-License-Identifier: Apache-2.0
"""Layouts that TARGETS write, read as sources: ModelOpt's, and that of compressed-tensors.

W = decode(codes) + low rank part,  times pre_quant_scale, by which inputs are not multiplied
any more
"""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np

from jqx.config import Choice
from jqx.errors import InputError
from jqx.formats import check_divides, find_format
from jqx.models import linear_shapes
from jqx.tensors import QTensor
from jqx_interop.checkpoints import TensorInfo
from jqx_interop.notes import SCALARS
from jqx_interop.orientation import is_turned, laid_outputs, straight
from jqx_interop.stored_checks import differs, linear_tensors
from jqx_interop.targets import METHOD, TARGETS, ZERO_POINT, Said, Target, zeros_of

from .fused import fused_weights
from .weight import Arrays, Found, Given, Shape, Weight, bad_index, decoded

UNPACKED = ("weight", "weight_packed")
ORDER = "weight_g_idx"


def modelopt_weights(given: Given) -> Found:
    """Linears by their descriptions, and experts that share a tensor."""
    yield from linears(given, TARGETS["modelopt"])
    yield from fused_weights(given)


def linears(given: Given, target: Target) -> Found:
    """Every linear that has a scale, as the descriptions say; those that have none are plain."""
    marked = {n.rpartition(".")[0] for n in given.tensors if n.rpartition(".")[2] == target.scale}
    known = linear_shapes(given.spec) if given.spec is not None else {}
    shapes: dict[str, Shape] = {}
    for path in sorted(marked):
        shape = known.get(path) or matrix_shape(given, path)
        if shape is None:
            yield f"{path} has a {target.scale} and no codes"
        else:
            shapes[path] = shape
    stored = {name: info.shape for name, info in given.tensors.items()}
    inline = _any_order(given.said) or None
    meant = target.read(Said(inline=inline, file=given.file, linears=shapes, stored=stored))
    choices = meant.choices if meant is not None else {}
    for path, shape in shapes.items():
        if path not in choices:
            yield f"{path} has a {target.scale}, and the descriptions leave it alone"
            continue
        problems = list(_problems(given, target, path, choices[path], shape))
        yield from problems
        if not problems:
            yield _weight(given, target, path, choices[path], shape)


def _any_order(said: Mapping[str, Any]) -> dict[str, Any]:
    """A description without what the tensors tell, the order of columns and zero points, and
    without those of inputs, which are left behind.
    """
    groups = said.get("config_groups")
    if not isinstance(groups, Mapping):
        return dict(said)
    return {**said, "config_groups": {name: _unordered(group) for name, group in groups.items()}}


def _unordered(group: Any) -> Any:
    if not isinstance(group, Mapping):
        return group
    changed = {}
    for part in ("weights", "input_activations"):
        if isinstance(said := group.get(part), Mapping):
            rest = {k: v for k, v in said.items() if k != "actorder"}
            changed[part] = {**rest, "symmetric": True}
    return {**group, **changed}


def matrix_shape(given: Given, path: str) -> Shape | None:
    """[n, k] of a linear by its tensors alone."""
    codes = next((n for leaf in UNPACKED if (n := f"{path}.{leaf}") in given.tensors), None)
    if codes is None:
        return None
    info, scale = given.tensors[codes], given.tensors[f"{path}.weight_scale"]
    if info.dtype == "I32":
        return _told_shape(given, path) or (info.shape[0], info.shape[1] * 8)
    if info.dtype != "U8" or len(info.shape) != 2:
        return info.shape
    n, half = info.shape
    return (2 * n, half) if scale.shape and scale.shape[0] == 2 * n else (n, 2 * half)


def _told_shape(given: Given, path: str) -> Shape | None:
    """What `weight_shape` says, a tensor of two numbers."""
    name = f"{path}.weight_shape"
    if name not in given.tensors or given.tensors[name].shape != (2,):
        return None
    n, k = (int(size) for size in given.read(name))
    return (n, k)


def _problems(
    given: Given, target: Target, path: str, choice: Choice, shape: Shape
) -> Iterator[str]:
    """What is wrong with the headers of a linear."""
    try:
        check_divides(find_format(choice.weight or ""), shape)
    except InputError as error:
        yield f"{path}: {error}"
        return
    have: Mapping[str, TensorInfo] = given.tensors
    expected = linear_tensors(have, path, choice, (shape, given.dtype), target)
    for tensor in laid_outputs(given.spec, path, expected):
        yield from differs(have.get(tensor.name), tensor)
    zeros, n = have.get(f"{path}.{ZERO_POINT}"), shape[0]
    good = zeros is None or zeros.dtype == "I32"  # packed, and looked at above
    if zeros and not good and (zeros.dtype, zeros.shape) not in (("I8", (n,)), ("I8", (n, 1))):
        yield f"tensor {zeros.name} is {zeros.dtype} {zeros.shape}, not I8 {(n, 1)}"
    if (order := f"{path}.{ORDER}") in have:
        blocks = have[f"{path}.{target.scale}"].shape[-1]
        problem = "" if have[order].shape == (shape[1],) else f"tensor {order} is not [{shape[1]}]"
        if problem := problem or bad_index(given, order, blocks):
            yield problem


def _weight(given: Given, target: Target, path: str, choice: Choice, shape: Shape) -> Weight:
    leaves = (*target.leaves, ORDER)
    parts = {leaf: n for leaf in leaves if (n := f"{path}.{leaf}") in given.tensors}
    turned = is_turned(given.spec, path)
    alone = ZERO_POINT in parts and "weight_packed" not in parts  # zero points that share no words
    exact = {leaf: given.notes[n] for leaf in SCALARS if (n := f"{path}.{leaf}") in given.notes}

    def stored(arrays: Arrays) -> QTensor:
        arrays = {k: a for k, a in {**arrays, **exact}.items() if not (alone and k == ZERO_POINT)}
        if "weight" in arrays:
            arrays["weight"] = straight(given.spec, path, arrays["weight"])
        return target.gathered(arrays, choice, shape, given.dtype)

    def floats(arrays: Arrays, dtype: np.dtype) -> np.ndarray:
        q = stored(arrays)
        shifted = ZERO_POINT in arrays or ORDER in arrays
        found = _integers(q, arrays).astype(dtype) if shifted else plain(q, dtype)
        return np.ascontiguousarray(found.T) if turned else found

    return Weight(
        name=f"{path}.weight",
        shape=shape[::-1] if turned else shape,
        parts=parts,
        floats=floats,
        choice=None if alone or ORDER in parts else choice,
        stored=None if alone or ORDER in parts else stored,
    )


def _integers(q: QTensor, arrays: Arrays) -> np.ndarray:
    """Integers with zero points, or with columns in another order."""
    n, k = q.shape
    codes = decoded(q.replace(scale=np.ones_like(q.scale), low_rank=None), np.dtype(np.float32))
    scale = np.asarray(q.scale, np.float32)
    index = arrays.get(ORDER, np.arange(k) // (k // scale.shape[1]))
    zeros = arrays.get(ZERO_POINT, np.zeros(scale.shape, np.int8))
    if zeros.dtype == np.int32:
        zeros = zeros_of(arrays, q.format.element.bits, n)
    wide = np.broadcast_to(zeros.astype(np.float32).reshape(n, -1), scale.shape)
    return (codes - wide[:, index]) * scale[:, index]


def plain(q: QTensor, dtype: np.dtype) -> np.ndarray:
    """The weight of a linear that does alone what `q` does with its factor and low-rank part."""
    if q.low_rank is None and q.pre_quant_scale is None:
        return decoded(q, dtype)
    found = decoded(q, np.dtype(np.float32))
    if q.low_rank is not None:
        outer, inner = (np.asarray(part, np.float32) for part in q.low_rank)
        found = found + outer @ inner
    if q.pre_quant_scale is not None:
        found = found * np.asarray(q.pre_quant_scale, np.float32)
    return found.astype(dtype)


compressed_weights = partial(linears, target=TARGETS[METHOD])
