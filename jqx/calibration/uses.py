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


REDUCTIONS: dict[str, Callable[[Met], Any]] = {
    "amax": input_amax,
    "channel_amax": channel_amax,
    "tokens": tokens,
}
"""Kind of statistic -> reduction of one use."""


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
