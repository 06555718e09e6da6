# SPDX-License-Identifier: Apache-2.0
"""Which pairs of stored matrices are multiplied as they are, and what refuses a product of them."""

from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array

from jqx_kernels.dispatch import Device
from jqx_kernels.packing import unpacked_shape


@dataclass(frozen=True, slots=True)
class Kind:
    """How both operands are stored. `block`: columns that share a scale, None where there is one
    scale for each row or one for all; `total`: the dtype that products of codes are summed in.
    """

    element: str
    packing: str
    scale: str
    block: int | None
    dtype: str
    scale_dtype: str
    total: str = "float32"


KINDS = {
    "fp8": Kind("e4m3", "bytes", "float32", None, "float8_e4m3fn", "float32"),
    "int8": Kind("int8", "bytes", "float32", None, "int8", "float32", total="int32"),
    "nvfp4": Kind("e2m1", "columns", "e4m3", 16, "float4_e2m1fn", "float8_e4m3fn"),
    "mxfp8": Kind("e4m3", "bytes", "e8m0", 32, "float8_e4m3fn", "float8_e8m0fnu"),
}
"""Name -> how both operands are stored."""


class ScaledRequest(NamedTuple):
    """The static facts about one product; the shapes are those of the matrices themselves.
    `interpret`: Pallas kernels run anywhere; `device`: the kind of it, whose tiles are taken.
    """

    kind: str
    x_shape: tuple[int, ...]
    weight_shape: tuple[int, ...]
    dtype: str
    interpret: bool = False
    device: str = ""

    def __str__(self) -> str:
        """As it is told in errors."""
        return f"{self.kind} {self.x_shape} with {self.kind} {self.weight_shape} in {self.dtype}"


class Stored(NamedTuple):
    """One operand: `codes`, bytes; `scale`, [1, 1], [rows, 1] or [rows, blocks]."""

    codes: Array
    scale: Array


def lacks_dtype(device: Device, request: ScaledRequest) -> str | None:
    """Results in other dtypes than those of activations."""
    if request.dtype in ("bfloat16", "float16", "float32"):
        return None
    return f"returns bfloat16, float16 or float32, not {request.dtype}"


def lacks_kind(request: ScaledRequest, kinds: tuple[str, ...]) -> str | None:
    """Kinds that a kernel does not multiply, and empty matrices."""
    if request.kind not in kinds:
        return f"multiplies {' and '.join(kinds)}, not {request.kind}"
    if 0 in (*request.x_shape, *request.weight_shape):
        return f"has no tiles for empty matrices, {request.x_shape} and {request.weight_shape}"
    return None


def check_operand(what: str, codes: Array, scale: Array, name: str) -> tuple[int, ...]:
    """The shape of the matrix that an operand stores. Raises ValueError where its arrays do not
    belong together.
    """
    kind = KINDS[name]
    if codes.ndim != 2 or codes.dtype.itemsize != 1:
        raise ValueError(
            f"{name} takes a matrix of bytes as {what}, not {codes.dtype} {codes.shape}."
        )
    rows, columns = unpacked_shape(kind.packing, codes.shape)
    blocks = [(rows, columns // kind.block)] if kind.block else [(), (1, 1), (rows, 1)]
    if scale.shape not in blocks or columns % (kind.block or 1):
        each = f" in blocks of {kind.block} columns" if kind.block else ""
        fits = " or ".join(map(str, blocks))
        raise ValueError(
            f"{name} {what} {(rows, columns)}{each} has scales of shape {fits}, not {scale.shape}."
        )
    if scale.dtype not in (jnp.dtype(kind.scale_dtype), *((jnp.uint8,) if kind.block else ())):
        raise ValueError(f"Scales of {name} come as {kind.scale_dtype}, not {scale.dtype}.")
    return rows, columns
