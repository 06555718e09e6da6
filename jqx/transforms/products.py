# SPDX-License-Identifier: Apache-2.0
"""Products with stored matrices by the kernels of a device, where there is one for them.

A kernel reads codes and decodes them on the way; elsewhere the decoded matrix is multiplied. Both
mean the same: the decoded matrix in its own dtype, and sums in float32. Where inputs are rounded
like the weight, codes are multiplied with codes.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jqx.errors import InputError
from jqx.formats import step_of, storage_of, with_float_scales
from jqx.tensors import QTensor
from jqx_kernels.dispatch import Unsupported, current_device

from .entries import varying
from .inputs import Treatment
from .interpret import Met
from .scaled_products import multiplies_codes, scaled_product
from .views import Pieces

NARROW = (jnp.dtype("bfloat16"), jnp.dtype("float16"))
"""Activations that kernels are for; of others every number is more work than a weight."""


def matmul(*args: Any, **how: Any) -> Array:
    """`jqx_kernels.matmul.matmul`, imported where it is needed: Pallas takes a while."""
    from jqx_kernels.matmul import matmul as kernel

    return kernel(*args, **how)


def grouped_matmul(*args: Any, **how: Any) -> Array:
    """`jqx_kernels.grouped_matmul.grouped_matmul`, as `matmul`."""
    from jqx_kernels.grouped_matmul import grouped_matmul as kernel

    return kernel(*args, **how)


def has_kernels(implementation: str | None) -> bool:
    """Whether products with one matrix may be computed by one: not on CPUs, unless an
    implementation is asked for.
    """
    return implementation is not None or current_device().platform != "cpu"


def stacks(stored: Mapping[str, QTensor]) -> set[str]:
    """The parameters whose products may be computed by kernels on any device: stacks, of which few
    members may be met.
    """
    return {name for name, q in stored.items() if q.stack}


def kernel_product(
    met: Met, implementation: str | None = None, treatment: Treatment | None = None
) -> Array | None:
    """The result of `met`, a product of an activation and one stored matrix, or of rows in groups
    and a stored stack; None where it is no such product, or no kernel is better than decoding: on
    CPUs for one matrix, elsewhere for activations in float32.

    `implementation`: the row of MATMUL, GROUPED_MATMUL or SCALED_MATMUL to take, on any device;
    `treatment`: how the activation was rounded. Raises InputError if that row cannot compute it.
    """
    way = _WAYS.get(met.use.op)
    if way is None or met.stored is None or not _along(met, met.stored) or _cut(met.x, met.stored):
        return None
    slow = has_kernels(None) and met.x.dtype not in NARROW
    return (
        None if implementation is None and slow else way(met, met.stored, implementation, treatment)
    )


def _dot(
    met: Met, q: QTensor, implementation: str | None, treatment: Treatment | None
) -> Array | None:
    if q.stack or met.batch or not has_kernels(implementation):
        return None
    free = [axis for axis in range(met.x.ndim) if axis not in met.use.activation_axes]

    def product(rows: Array) -> Array:
        return _multiplied(matmul, met, q, (rows,), implementation)

    if treatment is not None and multiplies_codes(q, treatment, implementation):
        how = {"dtype": _result_dtype(met, q), "implementation": implementation}
        with _named(met):
            y = scaled_product(_rows(met, free), q, treatment, product, how)
    else:
        y = product(_rows(met, free))
    y = y.reshape(*(met.x.shape[axis] for axis in free), *(q.shape[axis] for axis in q.rows))
    if met.first:  # its axes come first in the result
        y = jnp.moveaxis(y, range(len(free)), range(len(q.rows), y.ndim))
    return y


def _ragged_dot(
    met: Met, q: QTensor, implementation: str | None, treatment: Treatment | None
) -> Array | None:
    free = [axis for axis in range(met.x.ndim) if axis not in met.use.activation_axes]
    if met.view is None or len(q.stack) != 1 or free != [met.ragged] or _varies(met, q):
        return None
    [(_, members)], own = met.batch, met.view.axes[q.stack[0]]
    if met.groups.shape != (q.shape[q.stack[0]],) or _axes(members) != _axes(own):
        return None
    sizes = jnp.asarray(met.groups)  # a constant is a NumPy array
    y = _multiplied(grouped_matmul, met, q, (_rows(met, free), sizes), implementation)
    return y.reshape(y.shape[0], *(q.shape[axis] for axis in q.rows))


_WAYS = {"dot": _dot, "ragged_dot": _ragged_dot}
"""The op of a use -> what computes it by a kernel."""


def _rows(met: Met, free: list[int]) -> Float[Array, "m k"]:
    """The activation as a matrix, with the axes that are summed over last."""
    k = prod(met.x.shape[axis] for axis in met.use.activation_axes)
    return jnp.transpose(met.x, (*free, *met.use.activation_axes)).reshape(-1, k)


def _multiplied(
    kernel: Callable[..., Array],
    met: Met,
    q: QTensor,
    given: tuple[Array, ...],
    implementation: str | None,
) -> Float[Array, "m n"]:
    """`kernel` of the rows, the stored arrays, and the groups if any."""
    scale, outer = q.scale, q.tensor_scale
    if with_float_scales(q.format) != q.format:
        step = partial(step_of, fmt=q.format)
        scale = (jax.vmap(step) if q.stack else step)(q.scale, q.tensor_scale)
    if q.format.scale.name != "e4m3":  # what is beside other scales is no part of the matrix
        outer = None
    how: dict[str, Any] = {"weight_dtype": q.dtype, "out_dtype": _result_dtype(met, q)}
    how |= {"storage": storage_of(q.format), "implementation": implementation}
    with _named(met):
        return kernel(given[0], q.codes, scale, outer, *given[1:], **how)


def _result_dtype(met: Met, q: QTensor) -> Any:
    return jax.eval_shape(met.apply, met.x, jax.ShapeDtypeStruct(q.shape, q.dtype)).dtype


@contextmanager
def _named(met: Met) -> Iterator[None]:
    """Where no implementation can do it, the error names the parameter."""
    try:
        yield
    except Unsupported as error:
        raise InputError(f"{met.use.path}: {error}") from error


def _along(met: Met, q: QTensor) -> bool:
    """Whether the product sums over the axes along which the matrices are stored, all of them."""
    if met.view is None:
        return False
    summed = {i for i, pieces in enumerate(met.view.axes) if _axes(pieces) & {*met.use.weight_axes}}
    sizes = prod(met.x.shape[axis] for axis in met.use.activation_axes)
    columns = {axis for axis in q.columns if q.shape[axis] > 1}
    return summed == columns and sizes == prod(q.shape[axis] for axis in q.columns)


def _axes(pieces: Pieces) -> set[int]:
    return {piece.axis for piece in pieces if piece.size > 1}


def _cut(x: Any, q: QTensor) -> bool:
    """Whether devices have parts of either: kernels see whole arrays."""
    return any(
        any(axis is not None for axis in jax.typeof(a).sharding.spec) for a in (x, q.codes, q.scale)
    )


def _varies(met: Met, q: QTensor) -> bool:
    """Whether types say that devices have different arrays, which loops and kernels do not say."""
    return any(map(varying, (met.x, met.groups, q.codes, q.scale)))
