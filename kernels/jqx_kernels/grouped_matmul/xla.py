# SPDX-License-Identifier: Apache-2.0
"""Grouped products with a stored stack that XLA compiles: a loop over the matrices that are met.

Each is decoded once, in the parts of `planes`, and multiplied with a few rows of its group at a
time, as many times as there are: the loops end where the groups say. So one decoded matrix is held.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int32

from jqx_kernels.dispatch import Device
from jqx_kernels.matmul import xla
from jqx_kernels.matmul.planes import Cut, Planes, apart, cut_of, joined, side_by_side
from jqx_kernels.matmul.reference import operand_dtype, precision
from jqx_kernels.matmul.request import MatmulRequest, as_bytes

from .groups import spans
from .request import GroupedRequest, Stack

ROWS = 16
"""Rows that are multiplied at once: the fastest of 8, 16, 32 and 64 on a CPU, for 512 rows of 32
groups.
"""


class _Direction(NamedTuple):
    """Which way matrices are multiplied. `made`: the axis of bytes that the columns of the result
    are, the other is summed over; `inward` and `outward`: the fields of a part that say which
    columns of the rows meet it, and to which of the result it adds.
    """

    made: int
    inward: str
    outward: str

    def sides(self, cut: Cut) -> list[tuple[int, int]]:
        """Which columns meet each part, and to which it adds."""
        return [(getattr(part, self.inward), getattr(part, self.outward)) for part in cut.parts]


_FORWARD, _BACKWARD = _Direction(0, "x", "out"), _Direction(1, "out", "x")


def lacks(device: Device, request: GroupedRequest) -> str | None:
    """Blocks that end within a byte, and what nothing can do."""
    return xla.lacks(device, request.one)


def grouped_matmul(
    x: Float[Array, "m k"], stack: Stack, sizes: Int32[Array, "e"], request: GroupedRequest
) -> Float[Array, "m n"]:
    """The product in `out_dtype`."""
    return _product(x, stack, sizes, request.one, request.one.out_dtype, _FORWARD)


def gradient(
    dy: Float[Array, "m n"], stack: Stack, sizes: Int32[Array, "e"], request: GroupedRequest
) -> Float[Array, "m k"]:
    """That of x, in its dtype: dy_i w_e(i)."""
    return _product(dy, stack, sizes, request.one, request.one.x_dtype, _BACKWARD)


def _product(  # noqa: PLR0913  either way, of the same arrays
    x: Array, stack: Stack, sizes: Array, one: MatmulRequest, dtype: DTypeLike, way: _Direction
) -> Array:
    m, rows = x.shape[0], max(min(ROWS, x.shape[0]), 1)
    cut = cut_of(stack.codes.shape[1:], stack.scale.shape[1:], one.storage)
    inward, outward = (1 + max(side) for side in zip(*way.sides(cut), strict=True))
    xs = apart(jnp.pad(x, ((0, rows), (0, 0))), inward)  # for a tile that begins with the last row
    starts, ends = spans(sizes, m)
    met = jnp.argsort(starts == ends)  # those with rows come first

    def matrix(i: Any, ys: tuple[Array, ...]) -> tuple[Array, ...]:
        e = met[i]
        own = _member(stack, e)
        p = Planes(cut, xs, own.codes, side_by_side(own.scale, cut))
        ws = [xla.decoded_part(p, part, own.outer, one.storage) for part in cut.parts]
        ws = [w.astype(one.weight_dtype) for w in ws]
        many = (ends[e] - starts[e] + (rows - 1)) // rows
        return lax.fori_loop(0, many, lambda t, ys: tile(starts[e] + t * rows, ws, ys), ys)

    def tile(at: Any, ws: list[Array], ys: tuple[Array, ...]) -> tuple[Array, ...]:
        sums: dict[int, Array] = {}
        for (side, out), w in zip(way.sides(cut), ws, strict=True):
            y = _dot(lax.dynamic_slice_in_dim(xs[side], at, rows), w, 1 - way.made)
            sums[out] = sums[out] + y if out in sums else y
        # rows beyond the group are overwritten by the next
        return tuple(
            lax.dynamic_update_slice_in_dim(y, sums[i].astype(dtype), at, 0)
            for i, y in enumerate(ys)
        )

    ys = (jnp.zeros((m + rows, cut.shape[way.made]), dtype),) * outward
    y = joined(lax.fori_loop(0, jnp.sum(starts < ends, dtype=jnp.int32), matrix, ys))[:m]
    inside = lax.broadcasted_iota(jnp.int32, y.shape, 0) < ends[-1]
    return jnp.where(inside, y, jnp.zeros_like(y))


def _member(stack: Stack, e: Array) -> Stack:
    """One matrix, in bytes."""
    # a CPU reads single numbers of FP8 as bytes only; the barrier keeps it from copying all before
    stack, e = lax.optimization_barrier((stack, e))
    return jax.tree.map(lambda a: lax.dynamic_index_in_dim(as_bytes(a), e, keepdims=False), stack)


def _dot(x: Array, w: Array, axis: int) -> Float32[Array, "..."]:
    """The product over the columns of `x` and this axis of `w`, summed in float32."""
    both = operand_dtype(x.dtype, w.dtype)
    return lax.dot_general(
        x.astype(both),
        w.astype(both),
        (((1,), (axis,)), ((), ())),
        precision=precision(both),
        preferred_element_type=jnp.float32,
    )
