# SPDX-License-Identifier: Apache-2.0
"""Name of an element -> the functions that turn float32 into its code and back."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from jaxtyping import Array, Float32, UInt8

from . import bits as b
from .e3m2 import e3m2_code, e3m2_value
from .nf4 import nf4_code, nf4_value


@dataclass(frozen=True, slots=True)
class Codec:
    """The two directions of an element, elementwise and exact."""

    encode: Callable[[Float32[Array, "*s"], Float32[Array, "*s"]], UInt8[Array, "*s"]]
    """(x divided by its scale, x itself) -> the code in a byte of its own."""
    decode: Callable[[UInt8[Array, "*s"]], Float32[Array, "*s"]]


CODECS = {
    "e4m3": Codec(lambda q, x: b.e4m3_code(q), b.e4m3_value),
    "e2m1": Codec(b.e2m1_code, b.e2m1_value),
    "e2m1_down": Codec(b.e2m1_code_down, b.e2m1_value),
    "e3m2": Codec(lambda q, x: e3m2_code(q), e3m2_value),
    "int8": Codec(lambda q, x: b.int_code(q, 8), partial(b.int_value, width=8)),
    "int4": Codec(lambda q, x: b.int_code(q, 4), partial(b.int_value, width=4)),
    "nf4": Codec(lambda q, x: nf4_code(q), nf4_value),
}
