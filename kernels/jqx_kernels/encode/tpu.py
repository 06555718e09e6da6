# SPDX-License-Identifier: Apache-2.0
"""Encoding on TPUs: kernels that Mosaic compiles.

A tile is transposed, so that a block lies along sublanes, which can be reduced and taken apart, and
not along lanes, which cannot. Exact where the TPU divides exactly, which is not known.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Float32, UInt8

from jqx_kernels.bits import MAGNITUDE, bits, divide, from_bits
from jqx_kernels.blocks import block_amax
from jqx_kernels.dispatch import Device
from jqx_kernels.kernel_codecs import KERNEL_CODECS
from jqx_kernels.pallas import tpu
from jqx_kernels.scale_rules import Divide
from jqx_kernels.tiles import (
    SHIFTS,
    Tile,
    filled,
    no_kernel,
    no_tpu,
    padded,
    row_grid,
    shrink,
    stretch,
    tpu_block,
    tpu_tile,
    wide_block,
)

from .request import EncodeRequest, several_rows
from .rules import RULES, code


def lacks(device: Device, request: EncodeRequest) -> str | None:
    """Why `codes` cannot do it."""
    return no_kernel(request, no_tpu(device)) or wide_block(_plan(request).tile)


def lacks_encode(device: Device, request: EncodeRequest) -> str | None:
    """Why `encode` cannot do it."""
    return lacks(device, request) or several_rows(request)


class _Plan(NamedTuple):
    """A matrix padded to whole tiles: `rows` of `blocks` blocks of `block` columns each."""

    request: EncodeRequest
    rows: int
    block: int
    blocks: int
    tile: Tile

    @property
    def grid(self) -> tuple[int, int]:
        """Tiles along rows and columns."""
        return self.rows // self.tile.rows, self.blocks * self.block // self.tile.span

    @property
    def codes(self) -> tuple[jax.ShapeDtypeStruct, pl.BlockSpec]:
        """The packed codes, and how they are cut."""
        down, across = self.request.storage.per_byte
        shape = (self.rows // down, self.blocks * self.block // across)
        part = (self.tile.rows // down, self.tile.span // across)
        return jax.ShapeDtypeStruct(shape, jnp.uint8), pl.BlockSpec(part, lambda i, j: (i, j))

    @property
    def values(self) -> pl.BlockSpec:
        """How the matrix is cut."""
        return pl.BlockSpec((self.tile.rows, self.tile.span), lambda i, j: (i, j))

    @property
    def scales(self) -> pl.BlockSpec:
        """How the transposed grid of scales is cut."""
        alone = self.blocks == 1
        part = (self.tile.groups, self.tile.rows)
        return pl.BlockSpec(part, lambda i, j: (0 if alone else j, i))


def _plan(request: EncodeRequest) -> _Plan:
    n, k = request.shape
    block, blocks = tpu_block(request.columns, k), pl.cdiv(k, request.columns)
    # bytes fill a register by 32 sublanes, float32 by 8
    tile = tpu_tile(block, blocks, 8 if request.storage.scale == "float32" else 32)
    return _Plan(request, padded(n, tile.rows), block, padded(blocks, tile.groups), tile)


def encode(
    w: Float[Array, "n k"], tensor_scale: Float32[Array, ""] | None, request: EncodeRequest
) -> tuple[UInt8[Array, "..."], Array]:
    """As `reference.encode`."""
    plan, rule = _plan(request), RULES[request.storage.scale]
    if plan.blocks == 1:  # no tile holds a whole row
        amax = block_amax(w, request.storage.block)
        scale, factor = rule.find(amax, tensor_scale, request, divide)
        return _divided(w, factor, plan, lambda x, f: rule.quotient(x, f, divide)), scale
    outer = jnp.ones((1, 1), jnp.float32) if tensor_scale is None else tensor_scale.reshape(1, 1)
    scale_dtype = jnp.float32 if request.storage.scale == "float32" else jnp.uint8
    codes, cut = plan.codes
    packed, scale = pl.pallas_call(
        partial(_encode_kernel, plan=plan),
        grid=plan.grid,
        in_specs=[pl.BlockSpec(memory_space=pltpu.SMEM), plan.values],
        out_specs=[cut, plan.scales],
        out_shape=[codes, jax.ShapeDtypeStruct((plan.blocks, plan.rows), scale_dtype)],
        name="encode",
        **tpu(request.interpret, "parallel", "parallel"),
    )(outer, _filled(w, plan))
    blocks = pl.cdiv(request.shape[1], request.columns)
    return _cut(packed, plan), scale.T[: request.shape[0], :blocks]


def codes(
    w: Float[Array, "n k"], step: Float32[Array, "..."], request: EncodeRequest
) -> UInt8[Array, "..."]:
    """As `reference.codes`."""
    return _divided(w, row_grid(step, request.storage, request.shape), _plan(request), divide)


def _divided(
    w: Float[Array, "n k"], factor: Float32[Array, "n blocks"], plan: _Plan, quotient: Divide
) -> UInt8[Array, "..."]:
    codes, cut = plan.codes
    packed = pl.pallas_call(
        partial(_codes_kernel, plan=plan, quotient=quotient),
        grid=plan.grid,
        in_specs=[plan.scales, plan.values],
        out_specs=cut,
        out_shape=codes,
        name="codes",
        **tpu(plan.request.interpret, "parallel", "parallel"),
    )(filled(factor, plan.rows, plan.blocks).T, _filled(w, plan))
    return _cut(packed, plan)


def _filled(w: Float[Array, "n k"], plan: _Plan) -> Float[Array, "rows columns"]:
    if w.dtype == jnp.float16:  # which Mosaic does not read
        w = w.astype(jnp.float32)
    w = stretch(w, plan.request.columns, plan.block)
    return filled(w, plan.rows, plan.blocks * plan.block)


def _cut(packed: UInt8[Array, "..."], plan: _Plan) -> UInt8[Array, "..."]:
    (n, k), (down, across) = plan.request.shape, plan.request.storage.per_byte
    shape = (n // down, k // across)
    return shrink(packed, plan.request.columns // across, plan.block // across, shape)


def _encode_kernel(outer_ref: Any, x_ref: Any, codes_ref: Any, scale_ref: Any, *, plan: _Plan):
    rule, x = RULES[plan.request.storage.scale], _blocks(x_ref, plan)
    amax = from_bits(jnp.max(bits(x) & MAGNITUDE, axis=1))
    scale, factor = rule.find(amax, outer_ref[0, 0], plan.request, divide)
    scale_ref[...] = scale
    codes_ref[...] = _packed(rule.quotient(x, factor[:, None, :], divide), x, plan)


def _codes_kernel(step_ref: Any, x_ref: Any, codes_ref: Any, *, plan: _Plan, quotient: Divide):
    x = _blocks(x_ref, plan)
    codes_ref[...] = _packed(quotient(x, step_ref[...][:, None, :]), x, plan)


def _blocks(x_ref: Any, plan: _Plan) -> Float32[Array, "groups columns rows"]:
    _, groups, columns = plan.tile
    return x_ref[...].astype(jnp.float32).T.reshape(groups, columns, plan.tile.rows)


def _packed(
    q: Float32[Array, "groups columns rows"], x: Float32[Array, "groups columns rows"], plan: _Plan
) -> UInt8[Array, "..."]:
    c = code(q, x, plan.request, KERNEL_CODECS).astype(jnp.int32)  # TPUs shift no bytes
    rows, packing = plan.tile.rows, plan.request.storage.packing
    c = c.reshape(plan.tile.span, rows)
    if packing in SHIFTS:
        even, odd = SHIFTS[packing]
        pairs = c.reshape(plan.tile.span // 2, 2, rows)
        return ((pairs[:, 0] << even) | (pairs[:, 1] << odd)).T.astype(jnp.uint8)
    if packing == "rows":
        pairs = c.T.reshape(rows // 2, 2, plan.tile.span)
        return ((pairs[:, 0] & 15) | ((pairs[:, 1] & 15) << 4)).astype(jnp.uint8)
    return c.T.astype(jnp.uint8)
