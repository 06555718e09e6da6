# SPDX-License-Identifier: Apache-2.0
"""What compressed-tensors calls a pair of weight format and input format, as rows.

Source: compressed-tensors 0.20, whose QuantizationArgs and formats these are.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jqx.config import Choice, base_format
from jqx.formats import find_format

from .modelopt import STORED_AS

METHOD = "compressed-tensors"
VERSION = "0.20.1"
PACKED = "pack-quantized"
"""The format of integers that share words, which alone may have zero points."""

FLOAT8 = {"num_bits": 8, "type": "float"}
FLOAT4 = {"num_bits": 4, "type": "float"}
INT8 = {"num_bits": 8, "type": "int"}
INT4 = {"num_bits": 4, "type": "int"}
TENSOR, CHANNEL = {"strategy": "tensor"}, {"strategy": "channel"}
TOKEN = {"strategy": "token", "dynamic": True}
GROUP_128 = {"strategy": "group", "group_size": 128, "dynamic": True}
GROUP_32 = {"strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"}
BLOCK = {"strategy": "block", "block_structure": [128, 128]}
NVFP4 = {"strategy": "tensor_group", "group_size": 16, "scale_dtype": "torch.float8_e4m3fn"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Scheme:
    """`format`: how arrays lie on disk; `weights` and `inputs`: the arguments that differ from
    symmetric ones that are static.
    """

    format: str
    weights: Mapping[str, Any]
    inputs: Mapping[str, Any] | None = None

    @property
    def varies(self) -> bool:
        """Whether groups of weights may have any size."""
        return self.weights["strategy"] == "group" and "group_size" not in self.weights


SCHEMES: dict[tuple[str, str | None], Scheme] = {
    ("fp8", "fp8"): Scheme(
        format="float-quantized", weights=FLOAT8 | TENSOR, inputs=FLOAT8 | TENSOR
    ),
    ("fp8_channel", "fp8_token"): Scheme(
        format="float-quantized", weights=FLOAT8 | CHANNEL, inputs=FLOAT8 | TOKEN
    ),
    # engines round inputs of such weights to blocks of 128, in ModelOpt's layout as well
    ("fp8_block", None): Scheme(
        format="float-quantized", weights=FLOAT8 | BLOCK, inputs=FLOAT8 | GROUP_128
    ),
    ("int8", "int8"): Scheme(format="int-quantized", weights=INT8 | CHANNEL, inputs=INT8 | TENSOR),
    ("int8", "int8_token"): Scheme(
        format="int-quantized", weights=INT8 | CHANNEL, inputs=INT8 | TOKEN
    ),
    ("int8", None): Scheme(format=PACKED, weights=INT8 | CHANNEL),
    ("int4", None): Scheme(format=PACKED, weights=INT4 | {"strategy": "group"}),
    ("nvfp4", "nvfp4"): Scheme(
        format="nvfp4-pack-quantized",
        weights=FLOAT4 | NVFP4,
        inputs=FLOAT4 | NVFP4 | {"dynamic": "local"},
    ),
    ("nvfp4", None): Scheme(format="nvfp4-pack-quantized", weights=FLOAT4 | NVFP4),
    ("mxfp4", "mxfp4"): Scheme(
        format="mxfp4-pack-quantized",
        weights=FLOAT4 | GROUP_32,
        inputs=FLOAT4 | GROUP_32 | {"dynamic": True},
    ),
    ("mxfp4", None): Scheme(format="mxfp4-pack-quantized", weights=FLOAT4 | GROUP_32),
    ("mxfp8", "mxfp8"): Scheme(
        format="mxfp8-quantized",
        weights=FLOAT8 | GROUP_32,
        inputs=FLOAT8 | GROUP_32 | {"dynamic": True},
    ),
}
"""(weight format, input format) -> how it is called."""


def stored_name(name: str) -> str:
    """The format that one is stored as, without the size of blocks."""
    base = base_format(name)
    return STORED_AS.get(base, base)


def find_scheme(choice: Choice) -> Scheme | None:
    """The row for `choice`; None where the layout has no name for it, or no place for what lies
    beside the codes, or for blocks of another size.
    """
    name = choice.weight or ""
    row = SCHEMES.get((stored_name(name), choice.input))
    if row is None or choice.variant is not None:
        return None
    sized = "group_size" not in row.weights or row.weights["group_size"] == block_of(name)
    return row if sized else None


def block_of(name: str) -> int | None:
    """How many columns of a weight in this format share a scale."""
    return find_format(name).block[1]


def arguments(said: Mapping[str, Any], size: int | None = None) -> dict[str, Any]:
    """All arguments that a file gives for weights or inputs; `size`: of groups that vary."""
    base = {"num_bits": 0, "type": "", "symmetric": True, "group_size": None, "strategy": ""}
    full: dict[str, Any] = {**base, "dynamic": False, **said}
    if full["strategy"] == "group" and full["group_size"] is None:
        full["group_size"] = size
    return full
