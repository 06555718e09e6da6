# SPDX-License-Identifier: Apache-2.0
"""Grouped products with a stored stack: the rows that compute them, and their gradient."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jqx_kernels.dispatch import Device, Implementation, Table, current_device, find_implementation
from jqx_kernels.matmul.request import MatmulRequest
from jqx_kernels.storage import Storage

from . import gpu, reference, tpu, xla
from .request import GroupedRequest, Stack, check_stack, lacks_any, outer_scales

GROUPED_MATMUL: Table = (
    Implementation(name="triton", run=gpu.grouped_matmul, lacks=gpu.lacks),
    Implementation(name="tpu", run=tpu.grouped_matmul, lacks=tpu.lacks),
    Implementation(name="xla", run=xla.grouped_matmul, lacks=xla.lacks),
    Implementation(name="reference", run=reference.grouped_matmul, lacks=lacks_any),
)

_GRADIENTS: Table = (
    Implementation(name="xla", run=xla.gradient, lacks=xla.lacks),
    Implementation(name="reference", run=reference.gradient, lacks=lacks_any),
)


class _Way(NamedTuple):
    """How a product is computed, static."""

    row: Implementation
    request: GroupedRequest
    device: Device


def grouped_matmul(  # noqa: PLR0913  five arrays, and what is static about them
    x: Array,
    codes: Array,
    scale: Array,
    tensor_scale: Array | None,
    group_sizes: Array,
    *,
    storage: Storage,
    weight_dtype: DTypeLike,
    out_dtype: DTypeLike | None = None,
    implementation: str | None = None,
    device: Device | None = None,
    interpret: bool = False,
) -> Float[Array, "m n"]:
    """`jax.lax.ragged_dot` with a stored stack: every row of `x` times the transpose of the matrix
    [n, k] of its group, in `out_dtype`, that of `x` if None.

    The rows of `x` [m, k] lie in groups one after another: the first group_sizes[0] meet the first
    of the e matrices, and so on. A group may be empty; rows beyond all groups give zeros, and
    groups that reach beyond the rows end with them. Only matrices that are met are read, if it is
    not by the reference.

    Matrices are decoded to `weight_dtype` with one rounding, code * (scale * tensor_scale), and
    products are summed in float32, whatever row of GROUPED_MATMUL does it: the first that can on
    `device`, the current one if None, or the one called `implementation`. `interpret` runs a Pallas
    kernel on any device, slowly. `codes` are packed bytes [e, ...]; `scale` is [e] for one scale
    for each matrix, else [e, blocks of rows, blocks of columns], in bytes where they have eight
    bits. `tensor_scale`, [] or [e], counts for scales in E4M3 alone. The gradient goes to `x`, none
    to the stored arrays, and is computed by XLA: matrix by matrix, as the product is there.

    Raises ValueError if the shapes do not belong together, dispatch.Unsupported where no row, or
    not the one that is asked for, can do it.
    """
    shape = check_stack(x, codes, scale, group_sizes, storage)
    out_dtype = x.dtype if out_dtype is None else out_dtype
    wide, out = jnp.dtype(weight_dtype).name, jnp.dtype(out_dtype).name
    device = current_device() if device is None else device
    one = MatmulRequest(x.shape, x.dtype.name, storage, shape, wide, out, interpret, device.kind)
    request = GroupedRequest(one, codes.shape[0])
    row = find_implementation("grouped_matmul", GROUPED_MATMUL, request, device, implementation)
    outer = outer_scales(tensor_scale, storage.scale, request.experts)
    scale = scale.reshape(*scale.shape, *(1,) * (3 - scale.ndim))
    stack = Stack(codes, scale, outer)
    return _product(_Way(row, request, device), x, stack, group_sizes.astype(jnp.int32))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(way: _Way, x: Array, stack: Stack, sizes: Array) -> Array:
    return way.row.run(x, stack, sizes, way.request)


def _forward(way: _Way, x: Array, stack: Stack, sizes: Array) -> Any:
    return _product(way, x, stack, sizes), (stack, sizes)


def _backward(way: _Way, stored: Any, dy: Array) -> Any:
    """dy w for the decoded matrix w of every row, summed in float32."""
    stack, sizes = jax.tree.map(jnp.asarray, stored)  # a constant comes back as a NumPy scalar
    row = find_implementation("gradient", _GRADIENTS, way.request, way.device)
    return row.run(dy, stack, sizes, way.request), None, None


_product.defvjp(_forward, _backward)
