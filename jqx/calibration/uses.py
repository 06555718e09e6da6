# SPDX-License-Identifier: Apache-2.0
"""What is reduced from the activation of one use: `REDUCTIONS`, kind of statistic -> function.

Each returns an array that begins with the members of the stack that are met (see
`jqx.transforms.placing.pieces_of`), so that experts and batched layers have statistics of their
own.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, Int32

from jqx.errors import InputError
from jqx.transforms.entries import vary, varying
from jqx.transforms.interpret import Met
from jqx.transforms.placing import by_member, channels, pieces_of

from .reductions import amax


def input_amax(met: Met) -> Float32[Array, "*members"]:
    """The largest magnitude, in the precision of the activation's dtype; NaN if there is one."""
    x = met.x
    if met.groups is not None:
        rows = jnp.moveaxis(x, met.ragged, 0).reshape(x.shape[met.ragged], -1)
        return _largest_in_groups(jax.vmap(lambda row: amax(row, x.dtype))(rows), met)
    if not pieces_of(met):
        return amax(x, x.dtype)
    each = by_member(met, x)
    flat = each.reshape(-1, *each.shape[-2:])
    return jax.vmap(lambda one: amax(one, x.dtype))(flat).reshape(each.shape[:-2])


def channel_amax(met: Met) -> Float32[Array, "*members k"]:
    """The largest magnitude of each channel; of a convolution, of each feature."""
    x = met.x
    if met.groups is not None:
        axes = [met.ragged, *(i for i in range(x.ndim) if i != met.ragged)]
        axes = [a for a in axes if a not in met.use.activation_axes] + [*met.use.activation_axes]
        rows = jnp.transpose(x, axes)
        k = math.prod(x.shape[a] for a in met.use.activation_axes)
        found = _largest_in_groups(_columns(rows.reshape(x.shape[met.ragged], -1, k)), met)
    else:
        each = by_member(met, x)
        flat = each.reshape(-1, *each.shape[-2:])
        found = _columns(flat).reshape(*each.shape[:-2], each.shape[-1])
    at = channels(met) if met.use.op in ("dot", "ragged_dot") else None
    if at is None:
        return found
    assert met.view is not None
    k = math.prod(met.view.shape[a] for a in met.use.weight_axes)
    return jnp.zeros((*found.shape[:-1], k), found.dtype).at[..., at].set(found)


def tokens(met: Met) -> Int32[Array, "*members"]:
    """How many rows were met: of an activation all its axes count but members and channels.

    In a shard_map a row counts once, also where every device has a part of its channels, or
    multiplies it with a part of the parameter.
    """
    sizes = tuple(p.size for p in pieces_of(met))
    taken = {*met.use.activation_axes, *(axis for axis, _ in met.batch)}
    others = math.prod(n for i, n in enumerate(met.x.shape) if i not in taken)
    count = jnp.full(sizes, others, jnp.int32)
    if met.groups is not None:
        count = jnp.asarray(met.groups, jnp.int32) * others
    return vary(count, varying(met.x) - _sharded_over(met))


def _sharded_over(met: Met) -> frozenset[str]:
    """The mesh axes along which the rows or the channels of the parameter are sharded."""
    pieces = [p for dim in met.view.axes for p in dim] + [*met.view.fixed] if met.view else []
    offsets = [p.offset for p in pieces if p.axis not in met.use.stack_axes]
    return frozenset().union(*(varying(o) for o in offsets if not isinstance(o, int)))


def magnitudes(met: Met) -> Float32[Array, "*members k"]:
    """The sum of the magnitudes of each channel."""
    return _by_rows(met, lambda rows: jnp.sum(jnp.abs(rows), axis=0))


def square(met: Met) -> Float32[Array, "*members k"]:
    """The sum of squares of each channel."""
    return _by_rows(met, lambda rows: jnp.sum(rows * rows, axis=0))


def gram(met: Met) -> Float32[Array, "*members k k"]:
    """The second moments of all channels."""
    return _by_rows(met, lambda rows: jnp.matmul(rows.T, rows, precision=lax.Precision.HIGHEST))


def block_gram(met: Met, block: int) -> Float32[Array, "*members blocks b b"]:
    """The second moments within blocks of `block` channels."""

    def one(rows: Float32[Array, "tokens k"]) -> Float32[Array, "blocks b b"]:
        parts = rows.reshape(rows.shape[0], -1, block)
        return jnp.einsum("tki,tkj->kij", parts, parts, precision=lax.Precision.HIGHEST)

    return _by_rows(met, one)


def _by_rows(
    met: Met, one: Callable[[Float32[Array, "tokens k"]], Float32[Array, "..."]]
) -> Float32[Array, "..."]:
    """`one` of the rows that every member meets. Raises InputError for a convolution, and for a
    product over a part of the channels: what channels have to do with each other is not seen then.
    """
    use = met.use
    if use.op not in ("dot", "ragged_dot") or channels(met) is not None:
        how = "a convolution" if use.op == "conv" else "a product over a part of its channels"
        raise InputError(
            f"{use.path} is used in {how}, which gives no moments of all its inputs: take an "
            f'algorithm that needs none ("max") for it, or leave it out with '
            f'Rule(path_glob="{use.path}", weight=None, input=None)'
        )
    if met.groups is not None:
        return _in_groups(met, one)
    each = by_member(met, met.x).astype(jnp.float32)
    flat = each.reshape(-1, *each.shape[-2:])
    found = jax.vmap(one)(flat)
    return found.reshape(*each.shape[:-2], *found.shape[1:])


def _in_groups(
    met: Met, one: Callable[[Float32[Array, "tokens k"]], Float32[Array, "..."]]
) -> Float32[Array, "groups ..."]:
    """`one` of the rows of every group, the others being zeros: they add nothing to sums."""
    axes = [met.ragged, *(i for i in range(met.x.ndim) if i != met.ragged)]
    axes = [a for a in axes if a not in met.use.activation_axes] + [*met.use.activation_axes]
    k = math.prod(met.x.shape[a] for a in met.use.activation_axes)
    rows = jnp.transpose(met.x, axes).reshape(met.x.shape[met.ragged], -1, k).astype(jnp.float32)
    ends = jnp.cumsum(met.groups)
    at = jnp.arange(rows.shape[0], dtype=ends.dtype)

    def of_group(group: tuple[Array, Array]) -> Float32[Array, "..."]:
        size, end = group
        mine = ((at >= end - size) & (at < end))[:, None, None]
        return one(jnp.where(mine, rows, jnp.float32(0)).reshape(-1, k))

    return lax.map(of_group, (met.groups, ends))


REDUCTIONS: dict[str, Callable[[Met], Any]] = {
    "amax": input_amax,
    "channel_amax": channel_amax,
    "tokens": tokens,
    "channel_mean": magnitudes,
    "square": square,
    "gram": gram,
}
"""Kind of statistic -> reduction of one use. That of "channel_mean" are sums, which the batch's
tokens divide when it is complete.
"""


def _columns(x: Float[Array, "members tokens k"]) -> Float32[Array, "members k"]:
    """The largest magnitude of each column; NaN if there is one in it."""
    wide = x.astype(jnp.float32)
    bits = lax.bitcast_convert_type(wide, jnp.int32) & jnp.int32(0x7FFFFFFF)
    return lax.bitcast_convert_type(jnp.max(bits, axis=1, initial=0), jnp.float32)


def _largest_in_groups(x: Float32[Array, "rows ..."], met: Met) -> Float32[Array, "groups ..."]:
    """The largest of the magnitudes of every group's rows; 0 for a group without rows."""
    count, rows = met.groups.shape[0], x.shape[0]
    ends = jnp.cumsum(met.groups)
    # rows after the last group belong to none
    group = jnp.searchsorted(ends, jnp.arange(rows, dtype=ends.dtype), side="right")
    bits = lax.bitcast_convert_type(x, jnp.int32)  # of magnitudes: ordered like them, NaN last
    most = jax.ops.segment_max(bits, group, num_segments=count)
    return lax.bitcast_convert_type(jnp.maximum(most, 0), jnp.float32)
