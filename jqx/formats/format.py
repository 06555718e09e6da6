# SPDX-License-Identifier: Apache-2.0
"""The formats: which element, how many values share a scale, how scales are stored.

    x ~ code * scale                   one level: scale = amax / element.max of every block
    x ~ code * scale * tensor_scale    two levels: tensor_scale = amax / tensor_bound, E4M3 scales
    x ~ code * (scale / factor + mean) two levels: eight bits a scale, see double.py

Another block size is `dataclasses.replace(fmt, block=(1, 64))`.
"""

import dataclasses
import difflib
import math
import re
from dataclasses import dataclass

from jqx.errors import InputError
from jqx_kernels.storage import Storage

from .elements import (
    DOUBLE,
    E2M1,
    E2M1_DOWN,
    E3M2,
    E4M3,
    E8M0,
    FLOAT32,
    INT4,
    INT8,
    NF4,
    Element,
)


@dataclass(frozen=True, slots=True)
class Format:
    """How one matrix [n, k] is stored. Holds no arrays and no behaviour; hashable, so it can be
    static under jit.
    """

    name: str
    element: Element
    block: tuple[int | None, int | None]  # (rows, columns) that share a scale; None: the whole axis
    scale: Element = FLOAT32
    tensor_bound: float | None = None  # two levels: the tensor scale is amax / tensor_bound
    packing: str = "bytes"  # a row of `PACKINGS`
    ragged: bool = False  # the last blocks of an axis may be smaller
    double_rounding: bool = (
        False  # quotients are rounded to the dtype of the weight before they are encoded
    )

    @property
    def bits(self) -> float:
        """Stored bits per weight with block scales; scales that serve a whole axis are not
        counted.
        """
        rows, cols = self.block
        return self.element.bits + (self.scale.bits / (rows * cols) if rows and cols else 0.0)

    @property
    def nominal_bits(self) -> int:
        """Bits of the element alone."""
        return self.element.bits


FORMATS = {
    f.name: f
    for f in (
        # torch divides a bfloat16 tensor by a 0-d scale in bfloat16, hence the double rounding
        Format("fp8", E4M3, (None, None), double_rounding=True),
        Format("fp8_channel", E4M3, (1, None)),
        Format("fp8_block", E4M3, (128, 128), ragged=True),
        Format("int8", INT8, (1, None)),
        Format("int8_tensor", INT8, (None, None)),
        Format("int4", INT4, (1, 128), packing="rows"),
        # stored as int4 with a tensor scale beside it, which engines put on an FP8 second stage
        Format("int4_fp8", INT4, (1, 128), tensor_bound=448.0, packing="rows"),
        Format("nvfp4", E2M1, (1, 16), E4M3, 6.0 * 448.0, packing="columns"),
        # a block scale may be 448 / 256 of the largest: blocks end at 6 or at 4 (four over six)
        Format("nvfp4_46", E2M1, (1, 16), E4M3, 6.0 * 256.0, packing="columns"),
        Format("nvfp4_b32", E2M1, (1, 32), E4M3, 6.0 * 448.0, packing="columns"),
        # block scales end at 448 / 6 here: the kernel decodes to e4m3 before it multiplies
        Format("nvfp4_b32_fp8", E2M1, (1, 32), E4M3, 448.0, packing="columns"),
        Format("mxfp4", E2M1_DOWN, (1, 32), E8M0, packing="columns"),
        Format("mxfp8", E4M3, (1, 32), E8M0),
        # for arithmetic alone: no layout of checkpoints has them
        Format("mxfp6", E3M2, (1, 32), E8M0),
        Format("mxint8", INT8, (1, 32), E8M0),
        Format("nf4", NF4, (1, 64), packing="columns_high", double_rounding=True),
        # double quantization: the scales have eight bits, too
        Format("nf4_double", NF4, (1, 64), DOUBLE, packing="columns_high", double_rounding=True),
    )
}


def find_format(name: str) -> Format:
    """The row of `FORMATS` called `name`; `NAME_b64` is the row NAME with 64 values to a scale.

    Raises InputError with the nearest names.
    """
    if name in FORMATS:
        return FORMATS[name]
    if (match := re.fullmatch(r"(.+?)_b([1-9]\d*)", name)) and match[1] in FORMATS:
        row = FORMATS[match[1]]
        if row.block[0] == 1 and row.block[1] is not None:
            return dataclasses.replace(row, name=name, block=(1, int(match[2])))
    near = difflib.get_close_matches(name, FORMATS, n=3) or list(FORMATS)
    raise InputError(f"There is no format '{name}'. Did you mean {', '.join(near)}?")


def grid_shape(fmt: Format, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of the scales of one matrix [n, k]: () per tensor, else [blocks of rows, blocks of
    columns].
    """
    if fmt.block == (None, None):
        return ()
    return tuple(-(-size // (b or size)) for size, b in zip(shape, fmt.block, strict=True))


def with_float_scales(fmt: Format) -> Format:
    """`fmt`, without the second quantization of its scales."""
    return dataclasses.replace(fmt, scale=FLOAT32) if fmt.scale == DOUBLE else fmt


def storage_of(fmt: Format) -> Storage:
    """What kernels need to know of a format."""
    row = with_float_scales(fmt)
    return Storage(row.element.name, row.block, row.scale.name, row.packing, row.element.max)


def check_divides(fmt: Format, shape: tuple[int, ...]) -> None:
    """Raises InputError if matrices [..., n, k] of this shape cannot be stored in `fmt`."""
    if len(shape) < 2:
        raise InputError(
            f"{fmt.name} stores matrices, and {shape} is not one. "
            "Leave it out: a rule with weight null."
        )
    check_columns(fmt, shape)
    if fmt.packing == "rows" and shape[-2] % 2:
        raise InputError(
            f"{fmt.name} packs pairs of rows, but {shape} has {shape[-2]} of them. "
            "Leave this weight out: a rule with weight null."
        )


def check_columns(fmt: Format, shape: tuple[int, ...]) -> None:
    """Raises InputError if `fmt` needs whole blocks along the last axis and `shape` does not have
    them.
    """
    cols, k = fmt.block[1], shape[-1]
    if cols is None or fmt.ragged or k % cols == 0:
        return
    fits = math.gcd(k, cols)
    smaller = f"Take blocks of {fits} (--set block={fits}), or leave" if fits >= 16 else "Leave"
    raise InputError(
        f"{fmt.name} shares one scale over {cols} values, but the last axis of {shape} has {k}. "
        f"{smaller} this weight out: a rule with weight null."
    )
