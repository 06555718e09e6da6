# SPDX-License-Identifier: Apache-2.0
"""Products with stored matrices by the kernels of a device, where there is one for them.

A kernel reads codes and decodes them on the way; elsewhere the decoded matrix is multiplied. Both
mean the same: the decoded matrix in its own dtype, and sums in float32.
"""

from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jqx.errors import InputError
from jqx.formats import step_of, storage_of, with_float_scales
from jqx.tensors import QTensor
from jqx_kernels.dispatch import Unsupported, current_device

from .interpret import Met

NARROW = (jnp.dtype("bfloat16"), jnp.dtype("float16"))
"""Activations that kernels are for; of others every number is more work than a weight."""


def matmul(*args: Any, **how: Any) -> Array:
    """`jqx_kernels.matmul.matmul`, imported where it is needed: Pallas takes a while."""
    from jqx_kernels.matmul import matmul as kernel

    return kernel(*args, **how)


def has_kernels(implementation: str | None) -> bool:
    """Whether products may be computed by one: not on CPUs, unless an implementation is asked
    for.
    """
    return implementation is not None or current_device().platform != "cpu"


def kernel_product(met: Met, implementation: str | None = None) -> Array | None:
    """The result of `met`, a product of an activation and one stored matrix; None where it is no
    such product, or no kernel is better than decoding: on CPUs, and for activations in float32.

    `implementation`: the row of MATMUL to take, on any device. Raises InputError if that cannot
    compute it.
    """
    q, x = met.stored, met.x
    if met.use.op != "dot" or q is None or q.stack or met.batch:
        return None
    if not has_kernels(implementation) or (implementation is None and x.dtype not in NARROW):
        return None
    axes = met.use.activation_axes
    k = prod(q.shape[axis] for axis in q.columns)
    if prod(x.shape[axis] for axis in axes) != k or _cut(x, q):
        return None
    free = [axis for axis in range(x.ndim) if axis not in axes]
    rows = jnp.transpose(x, (*free, *axes)).reshape(-1, k)
    wanted = jax.eval_shape(met.apply, x, jax.ShapeDtypeStruct(q.shape, q.dtype)).dtype
    y = _multiplied(rows, q, wanted, met.use.path, implementation)
    y = y.reshape(*(x.shape[axis] for axis in free), *(q.shape[axis] for axis in q.rows))
    if met.first:  # its axes come first in the result
        y = jnp.moveaxis(y, range(len(free)), range(len(q.rows), y.ndim))
    return y


def _multiplied(
    x: Float[Array, "m k"], q: QTensor, dtype: Any, path: str, implementation: str | None
) -> Float[Array, "m n"]:
    scale, outer = q.scale, q.tensor_scale
    if q.format.scale.name != "e4m3":  # what is beside other scales is no part of the matrix
        outer = None
    if with_float_scales(q.format) != q.format:
        scale = step_of(q.scale, q.tensor_scale, q.format)
    how: dict[str, Any] = {"weight_dtype": q.dtype, "out_dtype": dtype}
    how |= {"storage": storage_of(q.format), "implementation": implementation}
    try:
        return matmul(x, q.codes, scale, outer, **how)
    except Unsupported as error:
        raise InputError(f"{path}: {error}") from error


def _cut(x: Any, q: QTensor) -> bool:
    """Whether devices have parts of either: kernels see whole arrays."""
    return any(
        any(axis is not None for axis in jax.typeof(a).sharding.spec) for a in (x, q.codes, q.scale)
    )
