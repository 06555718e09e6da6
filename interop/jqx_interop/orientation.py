# SPDX-License-Identifier: Apache-2.0
"""Weights that checkpoints keep as [k, n]: they are [n, k] wherever codes and scales are found, and
the tensor called `weight`, codes or not, lies in files as it always did.

Leaves of other names, and scales, lie as for any linear.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np

from jqx.models import ModelSpec, transposed_linears
from jqx.tensors import QTensor

from .checkpoints import TensorInfo, TensorOut


@lru_cache(maxsize=8)
def _turned(spec: ModelSpec | None) -> frozenset[str]:
    return transposed_linears(spec) if spec is not None else frozenset()


def is_turned(spec: ModelSpec | None, path: str) -> bool:
    """Whether the weight of a linear lies as [k, n]."""
    return path in _turned(spec)


def straight(spec: ModelSpec | None, path: str, array: np.ndarray) -> np.ndarray:
    """The weight of a linear as [n, k]."""
    return np.ascontiguousarray(array.T) if is_turned(spec, path) else array


def matrix(spec: ModelSpec | None, path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """[n, k] of a linear whose weight has this shape in files."""
    return shape[::-1] if is_turned(spec, path) else shape


def turned(spec: ModelSpec | None, path: str, q: QTensor) -> QTensor:
    """A QTensor of [n, k] as one of the shape that the model's parameter has, or back."""
    if not is_turned(spec, path):
        return q
    found = q.transpose((1, 0))
    assert found is not None
    return found


def laid(spec: ModelSpec | None, path: str, arrays: Mapping[str, Any]) -> dict[str, Any]:
    """The named arrays of a linear as they lie in files."""
    if not is_turned(spec, path):
        return dict(arrays)
    name = f"{path}.weight"
    codes = {name: np.ascontiguousarray(np.asarray(arrays[name]).T)} if name in arrays else {}
    return {**arrays, **codes}


def laid_outputs(
    spec: ModelSpec | None, path: str, outputs: Iterable[TensorOut]
) -> list[TensorOut]:
    """The same for what they will be."""
    found = list(outputs)
    if not is_turned(spec, path):
        return found
    name = f"{path}.weight"
    return [replace(t, shape=t.shape[::-1]) if t.name == name else t for t in found]


def straight_infos(
    spec: ModelSpec | None, tensors: Mapping[str, TensorInfo]
) -> Mapping[str, TensorInfo]:
    """Headers in which the weights of all linears are [n, k]."""
    names = {f"{path}.weight" for path in _turned(spec)} & tensors.keys()
    turned = {name: replace(tensors[name], shape=tensors[name].shape[::-1]) for name in names}
    return {name: turned.get(name, info) for name, info in tensors.items()} if turned else tensors
