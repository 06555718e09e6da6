# SPDX-License-Identifier: Apache-2.0
"""The operations that have kernels, as rows for people: what the README shows, and which
implementation a device takes.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from jqx.formats import FORMATS, storage_of
from jqx_kernels import decode, encode, grouped_matmul, hadamard, kv_attention, matmul
from jqx_kernels import scaled_matmul as scaled
from jqx_kernels.dispatch import Device, Table, Unsupported, find_implementation
from jqx_kernels.grouped_matmul.request import GroupedRequest
from jqx_kernels.hadamard.request import HadamardRequest
from jqx_kernels.kv_attention.request import AttentionRequest
from jqx_kernels.scaled_matmul.kinds import ScaledRequest
from jqx_kernels.storage import Storage

_BF16 = jnp.dtype("bfloat16")
_NVFP4, _FP8 = storage_of(FORMATS["nvfp4"]), storage_of(FORMATS["fp8"])
_SIDE = 4096


@dataclass(frozen=True, slots=True)
class Operation:
    """One operation: `request` is a usual one, for which the implementation is told that a device
    takes.
    """

    name: str
    what: str
    table: Table
    request: Any


def _one(rows: int) -> matmul.MatmulRequest:
    return matmul.MatmulRequest((rows, _SIDE), "bfloat16", _NVFP4, (_SIDE, _SIDE))


OPERATIONS = (
    Operation(
        "encode",
        "a matrix to codes and scales of its blocks",
        encode.ENCODE,
        encode.EncodeRequest((_SIDE, _SIDE), _BF16, _NVFP4),
    ),
    Operation(
        "codes",
        "a matrix to codes, over scales that are given",
        encode.CODES,
        encode.EncodeRequest((_SIDE, _SIDE), _BF16, _FP8, double_rounding=True),
    ),
    Operation(
        "decode",
        "codes and scales to the matrix",
        decode.DECODE,
        decode.DecodeRequest((_SIDE, _SIDE), _BF16, _NVFP4),
    ),
    Operation("matmul", "activations times a stored matrix", matmul.MATMUL, _one(1)),
    Operation(
        "grouped_matmul",
        "rows of activations times the stored matrices of their experts",
        grouped_matmul.GROUPED_MATMUL,
        GroupedRequest(_one(16), 8),
    ),
    Operation(
        "scaled_matmul",
        "a stored matrix times another",
        scaled.SCALED_MATMUL,
        ScaledRequest("fp8", (16, _SIDE), (_SIDE, _SIDE), "bfloat16"),
    ),
    Operation(
        "kv_attention",
        "a few queries look at stored keys and values",
        kv_attention.KV_ATTENTION,
        AttentionRequest(
            (8, 4, 1, 128),
            "bfloat16",
            _SIDE,
            Storage("e4m3", (1, None), "float32", "bytes", 448.0),
            "bfloat16",
            "bfloat16",
            128**-0.5,
        ),
    ),
    Operation(
        "hadamard",
        "rows times an orthogonal matrix of one magnitude",
        hadamard.HADAMARD,
        HadamardRequest((16, _SIDE), "bfloat16", _SIDE),
    ),
)


def kernel_rows() -> list[dict[str, Any]]:
    """One row an operation."""
    return [
        {
            "operation": op.name,
            "what": op.what,
            "implementations, as they are tried": ", ".join(row.name for row in op.table),
        }
        for op in OPERATIONS
    ]


def kernel_rows_on(device: Device) -> Iterator[dict[str, Any]]:
    """The same with the implementation that `device` takes for a usual request."""
    for row, op in zip(kernel_rows(), OPERATIONS, strict=True):
        try:
            taken = find_implementation(op.name, op.table, op.request, device).name
        except Unsupported:
            taken = ""
        yield {**row, "here": taken}
