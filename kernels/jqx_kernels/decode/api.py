# SPDX-License-Identifier: Apache-2.0
"""Stored codes and scales back to matrices, by the first implementation that can."""

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, UInt8

from jqx_kernels.dispatch import Device, Implementation, Table, find_implementation
from jqx_kernels.packing import unpacked_shape
from jqx_kernels.storage import Storage
from jqx_kernels.tiles import no_storage

from . import gpu, reference, tpu, xla
from .request import DecodeRequest

DECODE: Table = (
    Implementation(name="triton", run=gpu.decode, lacks=gpu.lacks),
    Implementation(name="tpu", run=tpu.decode, lacks=tpu.lacks),
    Implementation(name="xla", run=xla.decode, lacks=no_storage),
    Implementation(name="reference", run=reference.decode, lacks=no_storage),
)


def decode(  # noqa: PLR0913  three arrays, and the choice of an implementation is three
    codes: UInt8[Array, "..."],
    scale: Array,
    tensor_scale: Float32[Array, ""] | None,
    *,
    storage: Storage,
    dtype: DTypeLike,
    implementation: str | None = None,
    device: Device | None = None,
    interpret: bool = False,
) -> Float[Array, "n k"]:
    """The matrix that packed codes stand for: code * (scale * tensor_scale) in float32, then cast
    to `dtype`.

    `scale`: uint8 for e4m3 and e8m0, else float32; it broadcasts against [blocks of rows, blocks of
    columns], [] and [1, 1] are one for all. `tensor_scale` counts for e4m3 alone. Numbers below
    2^-126 become zeros where the device reads them as zeros. `implementation`: the name of a row of
    `DECODE`; `device`: what the program will run on, where that is not the current one;
    `interpret`: kernels run anywhere, slowly.

    Raises Unsupported where nothing can do it, ValueError where `scale` does not broadcast and for
    a missing `tensor_scale`.
    """
    shape = unpacked_shape(storage.packing, codes.shape)
    request = DecodeRequest(shape, jnp.dtype(dtype), storage, interpret)
    row = find_implementation("decode", DECODE, request, device, implementation)
    if storage.scale == "e4m3" and tensor_scale is None:
        raise ValueError(f"{storage} lie below a tensor scale: give tensor_scale.")
    outer = jnp.float32(1) if tensor_scale is None else tensor_scale.reshape(())
    return row.run(codes, scale.reshape(scale.shape or (1, 1)), outer, request)
