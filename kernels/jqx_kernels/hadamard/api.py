# SPDX-License-Identifier: Apache-2.0
"""Products with the orthogonal Hadamard matrix: the rows that compute them, and their gradient."""

from functools import partial
from typing import NamedTuple

import jax
from jaxtyping import Array, Float

from jqx_kernels.dispatch import Device, Implementation, Table, find_implementation

from . import gpu, reference, tpu, xla
from .request import HadamardRequest, check_shapes, lacks_dtype

HADAMARD: Table = (
    Implementation(name="triton", run=gpu.transform, lacks=gpu.lacks),
    Implementation(name="tpu", run=tpu.transform, lacks=tpu.lacks),
    Implementation(name="xla", run=xla.transform, lacks=lacks_dtype),
    Implementation(name="reference", run=reference.transform, lacks=lacks_dtype),
)


class _Way(NamedTuple):
    """How a product is computed, static."""

    row: Implementation
    request: HadamardRequest


def hadamard(  # noqa: PLR0913  the choice of an implementation is three
    x: Array,
    *,
    block: int | None = None,
    signs: Array | None = None,
    transpose: bool = False,
    implementation: str | None = None,
    device: Device | None = None,
    interpret: bool = False,
) -> Float[Array, "*lead k"]:
    """Every run of `block` values along the last axis of `x` times the orthogonal matrix H of that
    order; None: the whole axis is one run.

    H is `hadamard_matrix(block)` / sqrt(block), in natural order as of fast-hadamard-transform.
    Sums are float32, and are scaled and rounded once to the dtype of `x` (bfloat16, float16,
    float32). `signs`: +1 or -1 for every column, S; `x` S H is computed. `transpose`: what undoes
    it, `x` H^T S. The gradient is a product with the other of the two. ModelOpt's `rotate` is this
    with its `block_size`, where that is None with the largest power of two that divides k, without
    signs. `implementation`: the name of a row of HADAMARD; `device`: what the program will run on,
    where that is not the current one; `interpret`: a Pallas kernel runs anywhere, slowly.

    Raises ValueError for an order that is no power of two times 1, 12, 20, 28 or 36, and for shapes
    that do not belong together, dispatch.Unsupported where no row, or not the one that is asked
    for, can do it. (QuaRot, Ashkboos et al. 2024, arXiv 2404.00456.)
    """
    order = check_shapes(x, block, signs)
    rows = x.reshape(-1 if x.size else 0, x.shape[-1])
    request = HadamardRequest(rows.shape, x.dtype.name, order, transpose, interpret)
    row = find_implementation("hadamard", HADAMARD, request, device, implementation)
    y: Array = _transform(_Way(row, request), rows if transpose else _signed(rows, signs))
    return (_signed(y, signs) if transpose else y).reshape(x.shape)


def _signed(x: Array, signs: Array | None) -> Array:
    """`x` S, outside of kernels: XLA multiplies where `x` is made, or where it is read."""
    return x if signs is None else x * signs.astype(x.dtype)[None]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _transform(way: _Way, x: Array) -> Array:
    return way.row.run(x, way.request)


def _forward(way: _Way, x: Array) -> tuple[Array, None]:
    return _transform(way, x), None


def _backward(way: _Way, _: None, dy: Array) -> tuple[Array]:
    back = way.request._replace(transpose=not way.request.transpose)
    return (_transform(way._replace(request=back), dy),)


_transform.defvjp(_forward, _backward)
