# SPDX-License-Identifier: Apache-2.0
"""SCHEMES: what a quantized linear consists of on disk, as rows: layout and scheme -> tensors.

A matrix is [n, k] with g columns to a scale. A scheme has the name that the layout's description
gives it; in compressed-tensors, AutoAWQ and GPTQ, which only list arguments, that of the preset.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

from jqx_interop.targets import INNER, METHOD, OUTER

MODELOPT, CT, AWQ, GPTQ, PLAIN = "modelopt", METHOD, "awq", "gptq", "unquantized"
MIXED = "MIXED_PRECISION"

FLOAT = ("BF16", "F16", "F32")
F32, F8, U8, I8, I32 = ("F32",), ("F8_E4M3",), ("U8",), ("I8",), ("I32",)
E8M0 = ("U8", "F8_E8M0")

Shape = tuple[int, ...]


class Dims(NamedTuple):
    """A matrix [n, k] with `g` columns to a scale."""

    n: int
    k: int
    g: int


@dataclass(frozen=True, slots=True)
class Leaf:
    """One tensor of a linear: its name, dtypes, and the shapes it may have; a tensor of one number
    may have any. `needed`: whether the layout always has it.
    """

    name: str
    dtypes: tuple[str, ...]
    shapes: Callable[[Dims], tuple[Shape, ...]]
    needed: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class Scheme:
    """A way to store a linear. `leaves`: its tensors, codes first; `matrix`: [n, k] from the shape
    of the codes; `size`: how many columns share a scale where the layout leaves no choice.
    """

    layout: str
    name: str
    leaves: tuple[Leaf, ...]
    matrix: Callable[[Shape], Shape]
    size: int | None = None

    @property
    def codes(self) -> Leaf:
        """The tensor of codes."""
        return self.leaves[0]


def _up(a: int, b: int) -> int:
    return -(-a // b)


def _one(d: Dims) -> tuple[Shape, ...]:
    return ((), (1,))


def _whole(d: Dims) -> tuple[Shape, ...]:
    return ((d.n, d.k),)


def _halves(d: Dims) -> tuple[Shape, ...]:
    return ((d.n, _up(d.k, 2)),)


def _blocks(d: Dims) -> tuple[Shape, ...]:
    return ((d.n, _up(d.k, d.g)),)


def _rows(d: Dims) -> tuple[Shape, ...]:
    return ((d.n,), (d.n, 1))


def _tensor_or_rows(d: Dims) -> tuple[Shape, ...]:
    return (*_one(d), (1, 1), *_rows(d))


def _squares(d: Dims) -> tuple[Shape, ...]:
    n, k = _up(d.n, 128), _up(d.k, 128)
    return ((n, 1, k, 1), (n, k))


def _inputs(d: Dims) -> tuple[Shape, ...]:
    return ((d.k,),)


def _same(shape: Shape) -> Shape:
    return shape[:2]


def _twice_k(shape: Shape) -> Shape:
    return (shape[0], 2 * shape[1])


def _twice_n(shape: Shape) -> Shape:
    return (2 * shape[0], shape[1])


INPUT_SCALE = Leaf("input_scale", F32, _one)
TENSOR_SCALE = Leaf("weight_scale_2", F32, _one)
FACTOR = Leaf("pre_quant_scale", FLOAT, _inputs, needed=False)
WHOLE8, PAIRS = Leaf("weight", F8, _whole), Leaf("weight", U8, _halves)
FP4_SCALES = Leaf("weight_scale", F8, _blocks)
MX_SCALES = Leaf("weight_scale", E8M0, _blocks)
ROW_PAIRS = Leaf("weight", U8, lambda d: ((_up(d.n, 2), d.k),))
LOW_RANK = (
    Leaf(INNER, FLOAT, lambda d: (), needed=False),
    Leaf(OUTER, FLOAT, lambda d: (), needed=False),
)

_MO = partial(Scheme, layout=MODELOPT)
NVFP4 = _MO(
    name="NVFP4",
    leaves=(PAIRS, FP4_SCALES, TENSOR_SCALE, INPUT_SCALE),
    matrix=_twice_k,
)
MXFP4 = _MO(name="MXFP4", leaves=(PAIRS, MX_SCALES), matrix=_twice_k, size=32)
INT4 = _MO(
    name="W4A16_AWQ",
    leaves=(ROW_PAIRS, Leaf("weight_scale", FLOAT, _blocks), FACTOR),
    matrix=_twice_n,
)
MODELOPT_SCHEMES = (
    _MO(name="FP8", leaves=(WHOLE8, Leaf("weight_scale", F32, _one), INPUT_SCALE), matrix=_same),
    _MO(
        name="FP8_PER_CHANNEL_PER_TOKEN",
        leaves=(WHOLE8, Leaf("weight_scale", F32, _rows)),
        matrix=_same,
    ),
    _MO(name="FP8_PB_WO", leaves=(WHOLE8, Leaf("weight_scale", F32, _squares)), matrix=_same),
    NVFP4,
    replace(NVFP4, name="NVFP4_AWQ", leaves=(*NVFP4.leaves, FACTOR)),
    replace(NVFP4, name="NVFP4_SVD", leaves=(*NVFP4.leaves, FACTOR, *LOW_RANK)),
    replace(NVFP4, name="W4A8_NVFP4_FP8"),
    replace(
        NVFP4,
        name="W4A16_NVFP4",
        leaves=(*NVFP4.leaves[:3], replace(INPUT_SCALE, needed=False)),
    ),
    MXFP4,
    replace(
        MXFP4,
        name="W4A8_MXFP4_FP8",
        leaves=(*MXFP4.leaves, replace(INPUT_SCALE, needed=False)),
    ),
    _MO(name="MXFP8", leaves=(WHOLE8, MX_SCALES), matrix=_same, size=32),
    INT4,
    replace(INT4, name="W4A8_AWQ", leaves=(*INT4.leaves, TENSOR_SCALE, INPUT_SCALE)),
    _MO(
        name="W8A16",
        leaves=(Leaf("weight", I8, _whole), Leaf("weight_scale", FLOAT, _rows)),
        matrix=_same,
    ),
    _MO(
        name="W8A8_SQ_PER_CHANNEL",
        leaves=(
            *(Leaf("weight", I8, _whole), Leaf("weight_scale", FLOAT, _rows)),
            *(INPUT_SCALE, FACTOR),
        ),
        matrix=_same,
    ),
)

_CT = partial(Scheme, layout=CT)
MATRIX = Leaf("weight_shape", ("I64", "I32"), lambda d: ((2,),))
CT_SCALE, CT_INPUT = Leaf("weight_scale", FLOAT, _tensor_or_rows), Leaf("input_scale", FLOAT, _one)
CT_NVFP4 = (
    Leaf("weight_packed", U8, _halves),
    FP4_SCALES,
    Leaf("weight_global_scale", F32, _one),
)
CT_MXFP4 = (Leaf("weight_packed", U8, _halves), MX_SCALES)
CT_FP8, CT_INT8 = (WHOLE8, CT_SCALE), (Leaf("weight", I8, _whole), CT_SCALE)
ORDER = Leaf("weight_g_idx", I32, _inputs, needed=False)


def _words(bits: int) -> tuple[Leaf, ...]:
    """Codes of so many bits in int32 words along the columns."""
    packed = Leaf("weight_packed", I32, lambda d: ((d.n, _up(d.k * bits, 32)),))
    return packed, Leaf("weight_scale", FLOAT, _blocks), MATRIX, ORDER


def _unpacked(bits: int, shape: Shape) -> Shape:
    return (shape[0], shape[1] * 32 // bits)


ZERO_POINTS = Leaf("weight_zero_point", I32, lambda d: ((_up(d.n * 4, 32), _up(d.k, d.g)),))
CT_SCHEMES = (
    _CT(name="FP8", leaves=(*CT_FP8, CT_INPUT), matrix=_same),
    _CT(name="FP8_DYNAMIC", leaves=CT_FP8, matrix=_same),
    _CT(name="FP8A16", leaves=CT_FP8, matrix=_same),
    _CT(
        name="FP8_BLOCK",
        leaves=(WHOLE8, Leaf("weight_scale", FLOAT, _squares)),
        matrix=_same,
    ),
    _CT(name="INT8", leaves=(*CT_INT8, CT_INPUT), matrix=_same),
    _CT(name="INT8_DYNAMIC", leaves=CT_INT8, matrix=_same),
    _CT(name="W4A16", leaves=_words(4), matrix=partial(_unpacked, 4)),
    _CT(name="W4A16_ASYM", leaves=(*_words(4), ZERO_POINTS), matrix=partial(_unpacked, 4)),
    _CT(name="W8A16", leaves=_words(8), matrix=partial(_unpacked, 8)),
    _CT(
        name="NVFP4",
        leaves=(*CT_NVFP4, Leaf("input_global_scale", F32, _one)),
        matrix=_twice_k,
        size=16,
    ),
    _CT(name="NVFP4A16", leaves=CT_NVFP4, matrix=_twice_k, size=16),
    _CT(name="MXFP4", leaves=CT_MXFP4, matrix=_twice_k, size=32),
    _CT(name="MXFP4A16", leaves=CT_MXFP4, matrix=_twice_k, size=32),
    _CT(name="MXFP8", leaves=(WHOLE8, MX_SCALES), matrix=_same, size=32),
)


def _zeros(bits: int) -> Leaf:
    return Leaf("qzeros", I32, lambda d: ((_up(d.k, d.g), d.n * bits // 32),))


SCALES = Leaf("scales", FLOAT, lambda d: ((_up(d.k, d.g), d.n),))


def _gptq(bits: int, name: str) -> Scheme:
    codes = Leaf("qweight", I32, lambda d: ((d.k * bits // 32, d.n),))
    return Scheme(
        layout=GPTQ,
        name=name,
        leaves=(codes, _zeros(bits), SCALES, Leaf("g_idx", I32, _inputs, needed=False)),
        matrix=lambda shape: (shape[1], shape[0] * 32 // bits),
    )


AWQ_SCHEME = Scheme(
    layout=AWQ,
    name="W4A16",
    leaves=(Leaf("qweight", I32, lambda d: ((d.k, d.n * 4 // 32),)), _zeros(4), SCALES),
    matrix=lambda shape: (shape[1] * 8, shape[0]),
)

SCHEMES = {
    (row.layout, row.name): row
    for row in (
        *MODELOPT_SCHEMES,
        *CT_SCHEMES,
        AWQ_SCHEME,
        _gptq(4, "W4A16"),
        _gptq(8, "W8A16"),
        _gptq(4, "W4A16_ASYM"),
    )
}
"""(layout, scheme) -> row."""

KV_LEAVES = ("k_scale", "v_scale", "k_bias", "v_bias")
LEAVES = {
    *(leaf.name for row in SCHEMES.values() for leaf in row.leaves),
    *(*KV_LEAVES, "weight_scale_inv", "q_scale", "output_scale"),
}
"""Every name of a tensor of a quantized linear, or of the cache."""

MARKS = frozenset(
    ("weight_scale", "weight_scale_2", "weight_scale_inv", "weight_global_scale", "weight_packed")
    + ("qweight", "qzeros")
)
"""Names whose presence tells that a linear is quantized; others may be parameters of a model."""
