# SPDX-License-Identifier: Apache-2.0
"""A quantized linear as the named arrays of compressed-tensors, and back.

    float-, int-, mxfp8-quantized   weight [n, k], weight_scale [1] or [blocks of rows, of columns],
                                    input_scale [1]
    pack-quantized                  weight_packed int32 [n, k bits / 32], weight_scale [n, blocks],
                                    weight_shape int64 [2]; of others weight_zero_point, packed
                                    int32 [n bits / 32, blocks]
    nvfp4-pack-quantized            weight_packed [n, k / 2], weight_scale [n, k / 16], and the
                                    reciprocals of tensor scales: weight_global_scale [1],
                                    input_global_scale [1]
    mxfp4-pack-quantized            weight_packed [n, k / 2], weight_scale [n, k / 32]

Packed integers have half of their range added, the first column in the lowest bits. Two float32
numbers may have one reciprocal, so reciprocals of reciprocals may be a last bit off;
`inexact_scales` says where.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from jqx.config import Choice
from jqx.formats import grid_shape
from jqx.tensors import QTensor
from jqx_interop.checkpoints import TensorOut, dtype_name

from .ct_schemes import find_scheme
from .layout import abstract, shift

Arrays = dict[str, np.ndarray]

ZERO_POINT = "weight_zero_point"


@dataclass(frozen=True, slots=True)
class _Form:
    """One way to lie on disk. `codes`: the name of the array that holds them; `pack` and `unpack`:
    from codes as they are in a QTensor and back, told the bits of one; `shape`: whether the shape
    of the matrix is stored; `reciprocal`: whether tensor scales are stored as such.
    """

    codes: str
    pack: Callable[[np.ndarray, int], np.ndarray] = lambda codes, bits: codes
    unpack: Callable[[np.ndarray, int, tuple[int, ...]], np.ndarray] = lambda p, bits, shape: p
    shape: bool = False
    reciprocal: bool = False


def _packed(codes: np.ndarray, bits: int) -> np.ndarray:
    """int32 words of INT8 codes [n, k], or of INT4 codes whose rows share bytes."""
    if bits == 4:
        codes = np.stack([codes & 15, codes >> 4], 1).reshape(-1, codes.shape[1])
    unsigned = codes.view(np.uint8) ^ np.uint8(1 << (bits - 1))
    per_word = 32 // bits
    unsigned = np.pad(unsigned, ((0, 0), (0, -unsigned.shape[1] % per_word)))
    if bits == 4:
        unsigned = unsigned[:, 0::2] | unsigned[:, 1::2] << 4
    return np.ascontiguousarray(unsigned).view("<i4")


def _unpacked(words: np.ndarray, bits: int, shape: tuple[int, ...]) -> np.ndarray:
    found = np.ascontiguousarray(words).view(np.uint8)
    if bits == 4:
        found = np.stack([found & 15, found >> 4], 2).reshape(found.shape[0], -1)
    codes = found[:, : shape[1]] ^ np.uint8(1 << (bits - 1))
    if bits == 8:
        return codes.view(np.int8)
    pairs = codes.reshape(-1, 2, codes.shape[1])
    return pairs[:, 0] | pairs[:, 1] << 4


_AS_THEY_ARE = _Form("weight")
_FORMS = {
    "float-quantized": _AS_THEY_ARE,
    "int-quantized": _AS_THEY_ARE,
    "mxfp8-quantized": _AS_THEY_ARE,
    "pack-quantized": _Form("weight_packed", _packed, _unpacked, shape=True),
    "nvfp4-pack-quantized": _Form("weight_packed", reciprocal=True),
    "mxfp4-pack-quantized": _Form("weight_packed"),
}

LEAVES = (
    *("weight", "weight_packed", "weight_scale", "weight_shape", "weight_global_scale"),
    *("input_scale", "input_global_scale", ZERO_POINT),
)
"""The names of all arrays a linear may have."""


def form_of(choice: Choice) -> _Form:
    """How the arrays of a linear lie on disk."""
    scheme = find_scheme(choice)
    assert scheme is not None  # refused before
    return _FORMS[scheme.format]


def named(path: str, q: QTensor) -> dict[str, Any]:
    """The arrays of the linear `path`."""
    form = form_of(Choice(weight=q.format.name, input=q.input_format))
    bits = q.format.element.bits
    grid = grid_shape(q.format, q.shape)
    arrays: dict[str, Any] = {form.codes: form.pack(np.asarray(q.codes), bits)}
    arrays["weight_scale"] = np.reshape(np.asarray(q.scale), grid or (1,))
    if form.shape:
        arrays["weight_shape"] = np.array(q.shape, np.int64)
    names = (
        ("weight_global_scale", "input_global_scale") if form.reciprocal else ("", "input_scale")
    )
    for name, scale in zip(names, (q.tensor_scale, q.input_scale), strict=True):
        if scale is not None:
            value = np.reshape(np.asarray(scale, np.float32), (1,))
            arrays[name] = reciprocal(value) if form.reciprocal else value
    return {f"{path}.{leaf}": array for leaf, array in arrays.items()}


def outputs(
    path: str, choice: Choice, shape: tuple[int, ...], dtype: np.dtype, has_input_scale: bool
) -> list[TensorOut]:
    """What `named` will give for a weight of `shape` and `dtype` stored as `choice` says."""
    form, like = form_of(choice), abstract(choice.weight or "", shape, dtype.name)
    found = {form.codes: (dtype_name(np.dtype(like.codes.dtype)), tuple(like.codes.shape))}
    if form.shape:
        per_word = 32 // like.format.element.bits
        found[form.codes] = ("I32", (shape[0], -(-shape[1] // per_word)))
    found["weight_scale"] = (
        dtype_name(np.dtype(like.scale.dtype)),
        tuple(like.scale.shape) or (1,),
    )
    if form.shape:
        found["weight_shape"] = ("I64", (2,))
    if form.reciprocal:
        found["weight_global_scale"] = ("F32", (1,))
    if has_input_scale:
        found["input_global_scale" if form.reciprocal else "input_scale"] = ("F32", (1,))
    return [TensorOut(f"{path}.{leaf}", *what) for leaf, what in found.items()]


def gathered(
    arrays: Mapping[str, np.ndarray], choice: Choice, shape: tuple[int, ...], dtype: np.dtype
) -> QTensor:
    """The QTensor of a weight of `shape` and `dtype` from its stored arrays by leaf name: what
    `named` takes apart. A tensor scale that is there as `weight_scale_2`, or `input_scale` beside a
    reciprocal, is taken as it is.
    """
    form, like = form_of(choice), abstract(choice.weight or "", shape, dtype.name)
    codes = form.unpack(arrays[form.codes], like.format.element.bits, shape)
    return QTensor(
        codes=codes.reshape(like.codes.shape),
        scale=arrays["weight_scale"].astype(like.scale.dtype).reshape(like.scale.shape),
        tensor_scale=_scale(arrays, "weight_scale_2", "weight_global_scale"),
        format=like.format,
        dtype=like.dtype,
        input_scale=_scale(arrays, "input_scale", "input_global_scale"),
        input_format=choice.input,
        low_rank=_shift(arrays, like, shape),
    )


def zero_points(path: str, choice: Choice, shape: tuple[int, ...]) -> list[TensorOut]:
    """The array of zero points that a linear may have where integers share words."""
    if not form_of(choice).shape:
        return []
    like = abstract(choice.weight or "", shape, "float32")
    words = -(-shape[0] * like.format.element.bits // 32)
    return [TensorOut(f"{path}.{ZERO_POINT}", "I32", (words, like.scale.shape[1]))]


def has_zero_points(arrays: Mapping[str, np.ndarray]) -> bool:
    """Whether the arrays of a linear have zero points."""
    return ZERO_POINT in arrays


def zeros_of(arrays: Mapping[str, np.ndarray], bits: int, rows: int) -> np.ndarray:
    """The zero points of signed codes, int32 [rows, blocks]."""
    found = np.ascontiguousarray(arrays[ZERO_POINT].T).view(np.uint8)
    if bits == 4:
        found = np.stack([found & 15, found >> 4], 2).reshape(found.shape[0], -1)
    return found[:, :rows].T.astype(np.int32) - (1 << (bits - 1))


def _shift(
    arrays: Mapping[str, np.ndarray], like: QTensor, shape: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray] | None:
    """What codes with zero points are more than symmetric ones; None where there are none."""
    if ZERO_POINT not in arrays:
        return None
    zeros = zeros_of(arrays, like.format.element.bits, shape[0])
    scale = arrays["weight_scale"].astype(np.float32).reshape(like.scale.shape)
    return shift(scale, zeros, shape[1])


def _scale(arrays: Mapping[str, np.ndarray], name: str, inverse: str) -> np.ndarray | None:
    if name in arrays:
        return arrays[name].astype(np.float32).reshape(())
    return reciprocal(arrays[inverse]).reshape(()) if inverse in arrays else None


def reciprocal(scale: np.ndarray) -> np.ndarray:
    """1 / scale in float32, rounded once."""
    return np.asarray(np.divide(np.float32(1), scale, dtype=np.float32))


RECIPROCALS = {"weight_scale_2": "weight_global_scale", "input_scale": "input_global_scale"}
"""Scale of a tensor as a number lies in ModelOpt's layout -> the name of its reciprocal here."""


def inexact_scales(
    choice: Choice, arrays: Mapping[str, np.ndarray], of: Mapping[str, str]
) -> dict[str, np.float32]:
    """Those tensor scales of a linear that would not come back from the other layout.

    `of`: leaf name here -> there; `arrays` by leaf name, those of the other layout too where a note
    keeps them.
    """
    scheme = find_scheme(choice)
    if scheme is None or not _FORMS[scheme.format].reciprocal:
        return {}
    found = {}
    for leaf, other in of.items():
        if leaf in arrays:
            there = arrays[other] if other in arrays else reciprocal(arrays[leaf])
            if np.any(reciprocal(there).reshape(()) != arrays[leaf].reshape(())):
                found[leaf] = np.float32(arrays[leaf].reshape(()))
    return found
