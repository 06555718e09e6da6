# SPDX-License-Identifier: Apache-2.0
"""What one stored number is: a row per element. The functions that turn float32 into its code and
back are in `jqx_kernels.codecs`.

| element | values |
|---|---|
| e4m3 | float8_e4m3fn: up to 448, steps of 2^-9 below 2^-6 |
| e2m1 | 0, .5, 1, 1.5, 2, 3, 4, 6 and their negatives |
| e3m2 | 0, 1/16, 2/16, 3/16, then four to a power of two up to 28 |
| nf4 | 16 quantiles of the normal distribution within -1..1 |
| int8, int4 | -128..127 and -8..7; scales are chosen for 127 and 7 |
| e8m0 | a power of two, 2^(code - 127) |
| double | a scale in eight bits: code / factor + mean, a factor for 256 of them |
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Element:
    """How one number is stored. Holds no arrays and no behaviour."""

    name: str
    bits: int
    max: float  # the magnitude that an amax is scaled to
    dtype: str  # of the exported array; several 4-bit codes share a uint8


E4M3 = Element("e4m3", 8, 448.0, "float8_e4m3fn")
E2M1 = Element("e2m1", 4, 6.0, "uint8")
E2M1_DOWN = Element("e2m1_down", 4, 6.0, "uint8")  # ModelOpt's MXFP4 export: ties down, zero is 8
E3M2 = Element("e3m2", 6, 28.0, "uint8")
INT8 = Element("int8", 8, 127.0, "int8")
INT4 = Element("int4", 4, 7.0, "uint8")
NF4 = Element("nf4", 4, 1.0, "uint8")
E8M0 = Element("e8m0", 8, 2.0**127, "uint8")
DOUBLE = Element("double", 8, 127.0, "int8")  # of scales: see double.py
FLOAT32 = Element("float32", 32, float.fromhex("0x1.fffffep+127"), "float32")
