# SPDX-License-Identifier: Apache-2.0
"""What is known of a product with a stored matrix before it is computed, and what refuses it."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jqx_kernels.codecs import CODECS
from jqx_kernels.dispatch import Device
from jqx_kernels.packing import unpacked_shape
from jqx_kernels.scale_rules import STEPS
from jqx_kernels.storage import Storage

from .steps import SCALE_DTYPES

FLOATS = ("bfloat16", "float16", "float32")
"""The dtypes of activations and of decoded matrices."""

MANY = 256
"""Rows of activations from which on it is faster to decode a matrix once than in every tile."""

_LEAST = {"rows": 16, "columns": 8}  # of bytes in a block that spans several


class MatmulRequest(NamedTuple):
    """The static facts about one product: `weight_shape` is [n, k], that of the matrix itself.
    `interpret`: Pallas kernels run anywhere; `device`: the kind of it, whose tiles are taken.
    """

    x_shape: tuple[int, ...]
    x_dtype: str
    storage: Storage
    weight_shape: tuple[int, ...]
    weight_dtype: str = "bfloat16"
    out_dtype: str = "bfloat16"
    interpret: bool = False
    device: str = ""

    def __str__(self) -> str:
        """As it is told in errors."""
        matrix = f"{self.weight_dtype} {self.weight_shape} stored as {self.storage}"
        return f"{self.x_dtype} {self.x_shape} with {matrix}"


def lacks_meaning(device: Device, request: MatmulRequest) -> str | None:
    """Why nothing here can compute it on any device; None where something can."""
    return no_product(request.x_dtype, request.weight_dtype) or no_meaning(request.storage)


def no_product(*dtypes: str) -> str | None:
    """Why numbers of these dtypes are not multiplied; None if they are."""
    unknown = [dtype for dtype in dtypes if dtype not in FLOATS]
    return f"multiplies {', '.join(FLOATS)}, not {unknown[0]}" if unknown else None


def no_meaning(storage: Storage) -> str | None:
    """Why codes and scales that are stored so stand for no numbers here; None if they do."""
    if storage.element not in CODECS:
        return f"knows no element '{storage.element}'"
    if storage.scale not in STEPS:
        return f"knows no scales in '{storage.scale}'"
    return None


def lacks_blocks(request: MatmulRequest) -> str | None:
    """Why kernels that work on tiles of bytes cannot read such blocks; None where they can."""
    if 0 in (*request.x_shape, *request.weight_shape):
        return f"has no tiles for empty matrices, {request.x_shape} and {request.weight_shape}"
    for size, axis, per_byte in zip(
        request.storage.block, ("rows", "columns"), request.storage.per_byte, strict=True
    ):
        if size is not None and size & (size - 1):
            return f"needs blocks of a power of two, not of {size} {axis}"
        if size is not None and size > 1 and size // per_byte < _LEAST[axis]:
            return f"needs blocks of at least {_LEAST[axis] * per_byte} {axis}, not {size}"
    return None


def check_shapes(x: Array, codes: Array, scale: Array, storage: Storage) -> tuple[int, ...]:
    """The shape [n, k] of the stored matrix. Raises ValueError where the arrays do not belong
    together.
    """
    if x.ndim != 2 or codes.ndim != 2:
        raise ValueError(
            f"A product takes matrices, not activations {x.shape} and codes {codes.shape}."
        )
    if codes.dtype.itemsize != 1:
        raise ValueError(f"Codes are bytes, not {codes.dtype}.")
    n, k = unpacked_shape(storage.packing, codes.shape)
    if x.shape[1] != k:
        raise ValueError(
            f"Activations {x.shape} have {x.shape[1]} columns, and the matrix {(n, k)} in codes "
            f"{codes.shape} has {k}: {storage}, packed by {storage.packing}."
        )
    whole = storage.block == (None, None)
    blocks = zip((n, k), storage.block, strict=True)
    grid = tuple(1 if size is None else -(-axis // size) for axis, size in blocks)
    if scale.shape != grid and not (whole and scale.shape == ()):
        raise ValueError(
            f"{storage} has scales of shape {grid} for a matrix {(n, k)}, not {scale.shape}."
        )
    if scale.dtype.name not in SCALE_DTYPES.get(storage.scale, (scale.dtype.name,)):
        allowed = " or ".join(SCALE_DTYPES[storage.scale])
        raise ValueError(f"Scales in {storage.scale} come as {allowed}, not {scale.dtype}.")
    return n, k


def as_bytes(x: Array) -> Array:
    """Codes and scales of eight bits as uint8; others as they are."""
    return lax.bitcast_convert_type(x, jnp.uint8) if x.dtype.itemsize == 1 else x
