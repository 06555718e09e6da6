# SPDX-License-Identifier: Apache-2.0
"""Products of activations with a stored matrix: the rows that compute them, and their gradient."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jqx_kernels.dispatch import Device, Implementation, Table, current_device, find_implementation
from jqx_kernels.storage import Storage

from . import gpu, reference, tpu, xla
from .request import MatmulRequest, as_bytes, check_shapes, lacks_meaning
from .steps import outer_scale

MATMUL: Table = (
    Implementation(name="triton", run=gpu.matmul, lacks=gpu.lacks),
    Implementation(name="tpu", run=tpu.matmul, lacks=tpu.lacks),
    Implementation(name="xla", run=xla.matmul, lacks=xla.lacks),
    Implementation(name="reference", run=reference.matmul, lacks=lacks_meaning),
)


class _Way(NamedTuple):
    """How a product is computed, static."""

    row: Implementation
    request: MatmulRequest


def matmul(  # noqa: PLR0913  four arrays, and what is static about them
    x: Array,
    codes: Array,
    scale: Array,
    tensor_scale: Array | None,
    *,
    storage: Storage,
    weight_dtype: DTypeLike,
    out_dtype: DTypeLike | None = None,
    implementation: str | None = None,
    device: Device | None = None,
    interpret: bool = False,
) -> Float[Array, "m n"]:
    """`x` times the transpose of the stored matrix [n, k], in `out_dtype`, that of `x` if None.

    The matrix is decoded to `weight_dtype` with one rounding, code * (scale * tensor_scale), and
    products are summed in float32, whatever row of MATMUL does it: the first that can on `device`,
    the current one if None, or the one called `implementation`. `interpret` runs a Pallas kernel on
    any device, slowly. `codes` are packed bytes; `scale` is [] for one scale, else [blocks of rows,
    blocks of columns], in bytes where they have eight bits. `tensor_scale` counts for scales in
    E4M3 alone. The gradient goes to `x`, none to the stored arrays.

    Raises ValueError if the shapes do not belong together, dispatch.Unsupported where no row, or
    not the one that is asked for, can do it.
    """
    shape = check_shapes(x, codes, scale, storage)
    out_dtype = x.dtype if out_dtype is None else out_dtype
    wide, out = jnp.dtype(weight_dtype).name, jnp.dtype(out_dtype).name
    device = current_device() if device is None else device
    request = MatmulRequest(
        x.shape, x.dtype.name, storage, shape, wide, out, interpret, device.kind
    )
    row = find_implementation("matmul", MATMUL, request, device, implementation)
    outer = outer_scale(tensor_scale, storage.scale)
    return _product(_Way(row, request), x, as_bytes(codes), as_bytes(scale), outer)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(way: _Way, x: Array, codes: Array, scale: Array, outer: Array) -> Array:
    return way.row.run(x, codes, scale, outer, way.request)


def _forward(way: _Way, x: Array, codes: Array, scale: Array, outer: Array) -> Any:
    return _product(way, x, codes, scale, outer), (codes, scale, outer)


def _backward(way: _Way, stored: Any, dy: Array) -> Any:
    """dy w, summed in float32, for the decoded matrix w."""
    codes, scale, outer = map(jnp.asarray, stored)  # a constant comes back as a NumPy scalar
    request = way.request
    w = reference.stored_matrix(codes, scale, outer, request.storage).astype(request.weight_dtype)
    both = reference.operand_dtype(dy.dtype, w.dtype)
    dx = lax.dot_general(
        dy.astype(both),
        w.astype(both),
        (((1,), (0,)), ((), ())),
        precision=reference.precision(both),
        preferred_element_type=jnp.float32,
    )
    return dx.astype(request.x_dtype), None, None, None


_product.defvjp(_forward, _backward)
