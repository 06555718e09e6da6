# SPDX-License-Identifier: Apache-2.0
"""Matrices to the codes and scales that store them, by the first implementation that can."""

from jaxtyping import Array, Float, Float32, UInt8

from jqx_kernels.dispatch import Device, Implementation, Table, find_implementation
from jqx_kernels.storage import Storage

from . import gpu, reference, tpu, xla
from .request import EncodeRequest, inexact

ENCODE: Table = (
    Implementation(name="triton", run=gpu.encode, lacks=gpu.lacks_encode),
    Implementation(name="tpu", run=tpu.encode, lacks=tpu.lacks_encode),
    Implementation(name="xla", run=xla.encode, lacks=inexact),
    Implementation(name="reference", run=reference.encode, lacks=inexact),
)

CODES: Table = (
    Implementation(name="triton", run=gpu.codes, lacks=gpu.lacks),
    Implementation(name="tpu", run=tpu.codes, lacks=tpu.lacks),
    Implementation(name="xla", run=xla.codes, lacks=inexact),
    Implementation(name="reference", run=reference.codes, lacks=inexact),
)


def encode(  # noqa: PLR0913  the choice of an implementation is three
    w: Float[Array, "n k"],
    tensor_scale: Float32[Array, ""] | None,
    *,
    storage: Storage,
    double_rounding: bool = False,
    implementation: str | None = None,
    device: Device | None = None,
    interpret: bool = False,
) -> tuple[UInt8[Array, "..."], Array]:
    """The packed codes and the scales that store `w` (bfloat16, float16 or float32), in one pass.

    Scales are those of `scale_rules`, one for every block: uint8 for e4m3, which lie below
    `tensor_scale`, and for e8m0; else float32 [blocks of rows, blocks of columns], and
    `tensor_scale` is None. `double_rounding`: quotients are rounded to the dtype of `w` before they
    are coded. A NaN becomes any code. `implementation`: the name of a row of `ENCODE`; `device`:
    what the program will run on, where that is not the current one; `interpret`: kernels run
    anywhere, slowly.

    Raises Unsupported where nothing can do it, as on a GPU that has no kernel: encode on the CPU
    there. ValueError for a missing `tensor_scale`.
    """
    request = EncodeRequest(w.shape, w.dtype, storage, double_rounding, interpret)
    row = find_implementation("encode", ENCODE, request, device, implementation)
    if storage.scale == "e4m3" and tensor_scale is None:
        raise ValueError(f"{storage} lie below a tensor scale: give tensor_scale.")
    return row.run(w, tensor_scale, request)


def codes(  # noqa: PLR0913  the choice of an implementation is three
    w: Float[Array, "n k"],
    step: Float32[Array, "..."],
    *,
    storage: Storage,
    double_rounding: bool = False,
    implementation: str | None = None,
    device: Device | None = None,
    interpret: bool = False,
) -> UInt8[Array, "..."]:
    """The packed codes of `w` divided by `step`, what the codes of a block are multiplied by.

    `step` broadcasts against [blocks of rows, blocks of columns]; [] and [1, 1] are one for all.
    How scales are stored does not matter here. The rest as in `encode`.

    Raises Unsupported where nothing can do it, ValueError where `step` does not broadcast.
    """
    request = EncodeRequest(w.shape, w.dtype, storage, double_rounding, interpret)
    row = find_implementation("codes", CODES, request, device, implementation)
    return row.run(w, step.reshape(step.shape or (1, 1)), request)
