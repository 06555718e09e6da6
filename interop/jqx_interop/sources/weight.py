# SPDX-License-Identifier: Apache-2.0
"""One weight of a quantized checkpoint: where its parts lie, and what they decode to.

    x = code * scale        in float32, rounded once to the dtype of the model

Values below 2^-126 decode as zeros where a QTensor decodes them, as in `jqx.formats.decode`.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import numpy as np

from jqx.config import Choice
from jqx.models import ModelSpec
from jqx.tensors import QTensor
from jqx_interop.checkpoints import TensorInfo

Arrays = Mapping[str, np.ndarray]
Shape = tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Given:
    """A quantized checkpoint before its weights are known. `said`: its quantization_config, empty
    where there is none; `file`: the content of the layout's other file; `dtype`: that of the model;
    `spec`: its architecture where that is defined here; `notes`: exact scales by name.
    """

    said: Mapping[str, Any]
    file: Any
    tensors: Mapping[str, TensorInfo]
    read: Callable[[str], np.ndarray]
    dtype: np.dtype
    spec: ModelSpec | None = None
    notes: Arrays = field(default_factory=dict)

    def has(self, *endings: str) -> bool:
        """Whether the name of some tensor ends so."""
        return any(name.endswith(endings) for name in self.tensors)


@dataclass(frozen=True, kw_only=True, slots=True)
class Weight:
    """`name` and `shape` are those of the plain tensor; `parts`: leaf -> name in the files;
    `floats`: from the arrays of all parts to the plain tensor in a dtype. `choice` and `stored`:
    the formats of a linear and its codes [n, k], where it can stay as it is. `stacked`: parts with
    an axis of experts in front; `stored` takes those of one expert then.
    """

    name: str
    shape: Shape
    parts: Mapping[str, str]
    floats: Callable[[Arrays, np.dtype], np.ndarray]
    choice: Choice | None = None
    stored: Callable[[Arrays], QTensor] | None = None
    stacked: tuple[str, ...] = ()


Found = Iterator[Weight | str]
"""Weights, and what is wrong: one phrase each."""


@partial(jax.jit, static_argnames=("dtype",))
def _decode(q: QTensor, dtype: np.dtype) -> jax.Array:
    return q.decode(dtype)


def decoded(q: QTensor, dtype: np.dtype) -> np.ndarray:
    """What codes stand for, computed on the CPU whatever the default device is."""
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        return np.asarray(_decode(q, dtype))


def whole_scales(array: np.ndarray) -> np.ndarray:
    """Scales in float32; bytes are exponents, 2^(byte - 127)."""
    if array.dtype == np.uint8:
        return np.ldexp(np.float32(1), array.astype(np.int32) - 127)
    return array.astype(np.float32)


def bad_scales(name: str, array: np.ndarray) -> str | None:
    """Why scales cannot be right: a NaN, which in bytes is 255, or an infinite one."""
    wrong = array == 255 if array.dtype == np.uint8 else ~np.isfinite(array.astype(np.float32))
    if not np.any(wrong):
        return None
    return f"{int(np.sum(wrong))} of {array.size} scales in {name} are NaN or infinite"


def bad_index(given: Given, name: str, blocks: int) -> str | None:
    """Why the index of columns cannot be right. Reads it."""
    found = given.read(name)
    if found.dtype.kind == "i" and not np.any((found < 0) | (found >= blocks)):
        return None
    return f"tensor {name} names blocks that are none of the {blocks} there are"
