# SPDX-License-Identifier: Apache-2.0
"""Products of a few rows with a large matrix, at the speed at which a CPU reads the matrix.

    y[i, n] = sum over k of x[i, k] w[n, k]

XLA's matrix products on a CPU want operands of one dtype: where x is float32 the matrix is
converted, into memory that comes from the system and goes back to it in every call. So

- one row is multiplied in a loop that converts, or decodes, numbers where it reads them: some
  slices of the columns are added up, and only then summed over the rest. (XLA does not vectorise a
  sum along a row; with more slices than 8 it converts all of the matrix before.)
- several rows are taken apart into three bfloat16 numbers each, a row of its own for each: x = a +
  b + c, products of bfloat16 are exact in float32, and matrix products of bfloat16 are fast.

What cannot be decoded at that speed is decoded into bfloat16 some rows at a time, which stay in the
caches. Packed codes are multiplied half by half, so nothing is interleaved.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jqx.formats import Encoded, Format, decode, step_of, with_float_scales
from jqx.tensors import QTensor
from jqx.tensors.paths import flatten
from jqx.transforms import Met
from jqx.transforms.views import Piece
from jqx_kernels.bits import bits, from_bits, round_to

from .compute import Compute
from .layers import Params

FEW = 16
"""Rows at most: with more, float32 products of a converted matrix are faster."""

SLICES = (8, 7, 6, 5, 4)
"""Of the columns, as many as divide them."""

AT_ONCE = 1 << 20
"""Weights that are decoded together: 2 MiB of them."""

MOST = 1 << 22
"""Partial sums of one row, 16 MiB: more would come from the system in every call."""

_BF16 = jnp.dtype("bfloat16")
_CONTRACT = (((1,), (1,)), ((), ()))


def few_rows(params: Params, compute: Compute) -> Callable[[Met], Array | None]:
    """What `quantized` takes as `product`: float32 `x @ w.T` for a few rows and a weight of
    `params` [n, k], or a member of a stack of them, stored or not; None for any other use.
    """
    leaves = flatten(params)
    exact = compute.dtype == _BF16  # the rows are bfloat16 numbers already

    def product(met: Met) -> Float[Array, "m n"] | None:
        x = met.x
        if met.use.activation_axes != (1,) or x.ndim != 2 or x.shape[0] > FEW:
            return None
        w = _matrix(met, leaves[met.use.path])
        if isinstance(w, QTensor):
            return _stored(x.astype(jnp.float32), w, exact) if w.columns == (1,) else None
        if w is None or w.dtype != _BF16:
            return None
        return _plain(x.astype(jnp.float32), w, exact)

    return product


def _matrix(met: Met, leaf: Array | QTensor) -> Array | QTensor | None:
    """What is met as it is in memory, if that is a matrix that is summed over its last axis: all of
    a parameter, or a member of a stack of packed codes. (Of others XLA picks the member as fast.)
    """
    if met.whole:
        return leaf if met.use.weight_axes == (1,) and leaf.ndim == 2 else None
    view = met.view
    if not isinstance(leaf, QTensor) or leaf.format.packing == "bytes":
        return None
    if view is None or leaf.ndim != 3 or len(view.fixed) != 1:
        return None
    whole = [(Piece(axis, leaf.shape[axis]),) for axis in (1, 2)]
    (place,) = view.fixed
    if list(view.axes) != whole or place.axis != 0 or met.use.weight_axes != (2,):
        return None
    return leaf.member(0, jnp.int32(place.offset))


def _plain(x: Float[Array, "m k"], w: Float[Array, "n k"], exact: bool) -> Float[Array, "m n"]:
    n, k = w.shape
    slices = _slices(k)
    if x.shape[0] > 1 or slices is None or n * k // slices > MOST:
        return _product(x, w, exact)
    return _row(x, slices, lambda start, stop: w[:, start:stop].astype(jnp.float32))


def _slices(k: int) -> int | None:
    return next((s for s in SLICES if k % s == 0), None)


def _row(
    x: Float[Array, "1 k"], slices: int, columns: Callable[[int, int], Float[Array, "n some"]]
) -> Float[Array, "1 n"]:
    """The product of one row, `columns` giving a range of the columns of the matrix."""
    width, x = x.shape[1] // slices, _there(x)
    starts = range(0, x.shape[1], width)
    parts = [columns(i, i + width) * x[:, i : i + width] for i in starts]
    total = sum(parts[1:], parts[0])
    return lax.dot_general(jnp.ones((1, width), jnp.float32), total, _CONTRACT)


def _there(x: Float[Array, "1 k"]) -> Float[Array, "1 k"]:
    """`x`, exactly, as the result of a product: what goes into another operation would be computed
    with it again, for every row of the matrix.
    """
    halves = jnp.full((1, 2), 0.5, jnp.float32)
    return lax.dot_general(halves, jnp.broadcast_to(x, (2, x.shape[1])), (((1,), (0,)), ((), ())))


def _product(x: Float[Array, "m k"], w: Float[Array, "n k"], exact: bool) -> Float[Array, "m n"]:
    """`x @ w.T` for a matrix that is there."""
    # apart from others with the same x, or they share what x becomes, written out for every row
    x, w = lax.optimization_barrier((x, w))
    if x.shape[0] == 1:
        return jnp.sum(w.astype(jnp.float32)[None, :, :] * x[:, None, :], axis=-1)
    if w.dtype != _BF16:
        highest = lax.Precision.HIGHEST
        return lax.dot_general(x, w.astype(jnp.float32), _CONTRACT, precision=highest)
    rows = x.astype(_BF16) if exact else _thirds(x)
    y = lax.dot_general(rows, w, _CONTRACT, preferred_element_type=jnp.float32)
    return y.reshape(-1, *x.shape[:1], y.shape[1]).sum(axis=0)


def _thirds(x: Float[Array, "m k"]) -> Float[Array, "rows k"]:
    """All of the rows' first eight bits, then their next, then their last."""
    first = _rounded(x, _BF16)
    second = _rounded(x - first, _BF16)
    return jnp.concatenate([first, second, x - first - second]).astype(_BF16)


def _stored(x: Float[Array, "m k"], q: QTensor, exact: bool) -> Float[Array, "m n"]:
    n, k = q.shape
    if with_float_scales(q.format) != q.format:  # a factor is not for whole rows
        step, plain = step_of(q.scale, q.tensor_scale, q.format), with_float_scales(q.format)
        q = q.replace(scale=step, tensor_scale=None, format=plain)
    parts, multiply = _parts(q), PRODUCTS[q.format.packing]
    slices = _slices(k) if q.format.block[1] is None and x.shape[0] == 1 else None
    if slices is not None:
        multiply, parts = _one_row, parts if n * k // slices > MOST else 1
    if parts == 1:
        return multiply(x, q, exact)
    codes = q.codes.reshape(parts, -1, q.codes.shape[1])
    if q.scale.ndim == 0:
        y = lax.map(lambda codes: multiply(x, q.replace(codes=codes), exact), codes)
    else:
        scales = q.scale.reshape(parts, -1, q.scale.shape[1])
        part = lambda a: multiply(x, q.replace(codes=a[0], scale=a[1]), exact)  # noqa: E731
        y = lax.map(part, (codes, scales))
    return y.transpose(1, 0, 2).reshape(x.shape[0], -1)


def _parts(q: QTensor) -> int:
    """Into how many parts of equal rows the matrix is cut: whole bytes and whole blocks."""
    n, k = q.shape
    unit = max(q.format.block[0] or 1, n // q.codes.shape[0])
    most = max(AT_ONCE // k, unit)
    sizes = [rows for rows in range(unit, min(most, n) + 1, unit) if n % rows == 0]
    return n // sizes[-1] if sizes else 1


def _one_row(x: Float[Array, "1 k"], q: QTensor, exact: bool) -> Float[Array, "1 n"]:
    """For codes in bytes whose scales serve whole rows or all of the matrix."""
    slices = _slices(x.shape[1])
    assert slices is not None

    def columns(start: int, stop: int) -> Float[Array, "n some"]:
        return _rounded(_values(q, q.format, q.codes[:, start:stop], q.scale), q.dtype)

    return _row(x, slices, columns)


def _as_they_are(x: Array, q: QTensor, exact: bool) -> Array:
    return _product(x, _decoded(q, q.format, q.codes, q.scale), exact)


def _by_rows(x: Array, q: QTensor, exact: bool) -> Array:
    """Even rows are the low halves of bytes, odd rows the high ones."""
    low = _product(x, _decoded(q, q.format, q.codes, q.scale[0::2]), exact)
    high = _product(x, _decoded(q, q.format, q.codes >> 4, q.scale[1::2]), exact)
    return jnp.stack([low, high], axis=-1).reshape(x.shape[0], -1)


def _by_columns(x: Array, q: QTensor, exact: bool, low: int = 0) -> Array:
    """Even columns are the low halves of bytes, odd columns the high ones; with `low` 1 the other
    way round.
    """
    rows, columns = q.format.block
    fmt = replace(q.format, block=(rows, columns and columns // 2))
    lower = _product(x[:, low::2], _decoded(q, fmt, q.codes, q.scale), exact)
    return lower + _product(x[:, 1 - low :: 2], _decoded(q, fmt, q.codes >> 4, q.scale), exact)


PRODUCTS: dict[str, Callable[[Array, QTensor, bool], Array]] = {
    "bytes": _as_they_are,
    "rows": _by_rows,
    "columns": _by_columns,
    "columns_high": partial(_by_columns, low=1),
}
"""Packing of the codes -> product with some rows."""


def _decoded(q: QTensor, fmt: Format, codes: Array, scale: Array) -> Float[Array, "n k"]:
    """A part of the matrix, one code a byte of which the low bits count, in its dtype."""
    w = _rounded(_values(q, fmt, codes, scale), q.dtype)
    if q.dtype == _BF16:  # a cast would be as exact and four times as slow
        w = lax.bitcast_convert_type((bits(w) >> 16).astype(jnp.uint16), _BF16)
    # or it is decoded inside the product, one number at a time
    return lax.optimization_barrier(w)


def _values(q: QTensor, fmt: Format, codes: Array, scale: Array) -> Float[Array, "n k"]:
    return decode(Encoded(codes, scale, q.tensor_scale), replace(fmt, packing="bytes"))


def _rounded(x: Float[Array, "*s"], dtype: jnp.dtype) -> Float[Array, "*s"]:
    """`round_to` in fewer steps for numbers that are finite."""
    if dtype != _BF16:
        return round_to(x, dtype)
    b = bits(x)
    return from_bits((b + 0x7FFF + ((b >> 16) & 1)) & -0x10000)
