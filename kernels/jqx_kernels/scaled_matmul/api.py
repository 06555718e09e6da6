# SPDX-License-Identifier: Apache-2.0
"""Products of two stored matrices, and the rows that compute them."""

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jqx_kernels.dispatch import Device, Implementation, Table, current_device, find_implementation
from jqx_kernels.matmul.request import as_bytes
from jqx_kernels.matmul.steps import outer_scale

from . import cudnn, gpu, reference, tpu, xla
from .kinds import KINDS, ScaledRequest, Stored, check_operand, lacks_dtype

SCALED_MATMUL: Table = (
    Implementation(name="cudnn", run=cudnn.multiply, lacks=cudnn.lacks),
    Implementation(name="triton", run=gpu.multiply, lacks=gpu.lacks),
    Implementation(name="tpu", run=tpu.multiply, lacks=tpu.lacks),
    Implementation(name="xla", run=xla.multiply, lacks=lacks_dtype),
    Implementation(name="reference", run=reference.multiply, lacks=lacks_dtype),
)


def scaled_matmul(  # noqa: PLR0913  five arrays, and what is static about them
    x_codes: Array,
    x_scale: Array,
    w_codes: Array,
    w_scale: Array,
    tensor_scale: Array | None = None,
    *,
    kind: str,
    dtype: DTypeLike,
    implementation: str | None = None,
    device: Device | None = None,
    interpret: bool = False,
) -> Float[Array, "m n"]:
    """The stored matrix x [m, k] times the transpose of the stored matrix w [n, k], in `dtype`.

    `kind`, a row of KINDS, is how both are stored. Scales are [], [1, 1] or one for each row,
    [m, 1]; of blocks [m, k / block], in bytes where they have eight bits. `tensor_scale`, for
    nvfp4, is the product of both tensor scales. Sums of products of codes are float32, of INT8
    int32; `implementation`, `device` and `interpret` as in `matmul`.

    Raises ValueError for a kind that is not there and shapes that do not belong together,
    dispatch.Unsupported where no row, or not the one that is asked for, can do it.
    """
    if kind not in KINDS:
        raise ValueError(f"There is no kind '{kind}' of products; there are {', '.join(KINDS)}.")
    x_shape = check_operand("x", x_codes, x_scale, kind)
    w_shape = check_operand("w", w_codes, w_scale, kind)
    if x_shape[1] != w_shape[1]:
        raise ValueError(f"{kind} x {x_shape} has {x_shape[1]} columns, w {w_shape} {w_shape[1]}.")
    device = current_device() if device is None else device
    name = jnp.dtype(dtype).name
    request = ScaledRequest(kind, x_shape, w_shape, name, interpret, device.kind)
    row = find_implementation("scaled_matmul", SCALED_MATMUL, request, device, implementation)
    outer = outer_scale(tensor_scale, KINDS[kind].scale)
    x, w = (_stored(*side) for side in ((x_codes, x_scale), (w_codes, w_scale)))
    return row.run(x, w, outer, request)


def _stored(codes: Array, scale: Array) -> Stored:
    return Stored(as_bytes(codes), as_bytes(scale.reshape(scale.shape or (1, 1))))
