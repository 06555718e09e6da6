# SPDX-License-Identifier: Apache-2.0
"""Encoding on NVIDIA GPUs: kernels that Triton compiles, with IEEE division.

A program reads a few rows of some blocks. Two rows that share bytes are planes of a tile, so that
no value moves between threads to be packed.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Float32, Int32, UInt8

from jqx_kernels.bits import MAGNITUDE, SIGN, bits, from_bits
from jqx_kernels.dispatch import Device
from jqx_kernels.kernel_codecs import KERNEL_CODECS
from jqx_kernels.pallas import exact_divide, triton
from jqx_kernels.scale_rules import Divide
from jqx_kernels.tiles import (
    SHIFTS,
    Tile,
    gpu_block,
    gpu_tile,
    no_gpu,
    no_kernel,
    row_grid,
    shrink,
    stretch,
)

from .request import EncodeRequest, several_rows
from .rules import RULES, code


def lacks(device: Device, request: EncodeRequest) -> str | None:
    """Why `codes` cannot do it."""
    return no_kernel(request, no_gpu(device))


def lacks_encode(device: Device, request: EncodeRequest) -> str | None:
    """Why `encode` cannot do it."""
    return lacks(device, request) or several_rows(request)


class _Plan(NamedTuple):
    """A matrix cut up: `planes` of rows, blocks of `block` columns, `blocks` of them in a row."""

    request: EncodeRequest
    planes: int
    block: int
    blocks: int
    tile: Tile

    @property
    def rows(self) -> int:
        """Rows of each plane."""
        return self.request.shape[0] // self.planes

    @property
    def bytes_of_block(self) -> int:
        """The packed length of a block."""
        return self.block // self.request.storage.per_byte[1]

    def divide(self) -> Divide:
        """IEEE division which, as on a CPU, reads subnormal numbers as zero."""
        exact = exact_divide(self.request.interpret)
        return lambda x, d: exact(_flushed(x), d)


def _flushed(x: Float32[Array, "*s"]) -> Float32[Array, "*s"]:
    b = bits(x)
    return from_bits(jnp.where((b & MAGNITUDE) < 1 << 23, b & SIGN, b))


def _plan(request: EncodeRequest) -> _Plan:
    (n, k), planes = request.shape, request.storage.per_byte[0]
    block, blocks = gpu_block(request.columns), pl.cdiv(k, request.columns)
    return _Plan(request, planes, block, blocks, gpu_tile(n // planes, block, blocks))


def encode(
    w: Float[Array, "n k"], tensor_scale: Float32[Array, ""] | None, request: EncodeRequest
) -> tuple[UInt8[Array, "..."], Array]:
    """As `reference.encode`."""
    plan = _plan(request)
    outer = jnp.ones(1, jnp.float32) if tensor_scale is None else tensor_scale.reshape(1)
    rows, groups, planes = plan.tile.rows, plan.tile.groups, plan.planes
    scale_dtype = jnp.float32 if request.storage.scale == "float32" else jnp.uint8
    packed, scale = pl.pallas_call(
        partial(_encode_kernel, plan=plan),
        grid=(plan.rows // rows, plan.blocks // groups),
        in_specs=[
            pl.BlockSpec((1,), lambda i, j: (0,)),
            pl.BlockSpec((rows, planes, groups * plan.block), lambda i, j: (i, 0, j)),
        ],
        out_specs=[
            pl.BlockSpec((rows, groups * plan.bytes_of_block), lambda i, j: (i, j)),
            pl.BlockSpec((rows, planes, groups), lambda i, j: (i, 0, j)),
        ],
        out_shape=[
            jax.ShapeDtypeStruct((plan.rows, plan.blocks * plan.bytes_of_block), jnp.uint8),
            jax.ShapeDtypeStruct((plan.rows, planes, plan.blocks), scale_dtype),
        ],
        name="encode",
        **triton(request.interpret),
    )(outer, _in_planes(w, plan))
    return _cut(packed, plan), scale.reshape(request.shape[0], plan.blocks)


def codes(
    w: Float[Array, "n k"], step: Float32[Array, "..."], request: EncodeRequest
) -> UInt8[Array, "..."]:
    """As `reference.codes`."""
    plan = _plan(request)
    rows, groups, planes = plan.tile.rows, plan.tile.groups, plan.planes
    span, whole = plan.tile.span, groups * plan.block
    per_byte = request.storage.per_byte[1]
    steps = row_grid(step, request.storage, request.shape)
    packed = pl.pallas_call(
        partial(_codes_kernel, plan=plan),
        grid=(plan.rows // rows, plan.blocks * plan.block // span),
        in_specs=[
            pl.BlockSpec((rows, planes, groups), lambda i, j: (i, 0, j * span // whole)),
            pl.BlockSpec((rows, planes, span), lambda i, j: (i, 0, j)),
        ],
        out_specs=pl.BlockSpec((rows, span // per_byte), lambda i, j: (i, j)),
        out_shape=jax.ShapeDtypeStruct((plan.rows, plan.blocks * plan.bytes_of_block), jnp.uint8),
        name="codes",
        **triton(request.interpret),
    )(steps.reshape(plan.rows, planes, plan.blocks), _in_planes(w, plan))
    return _cut(packed, plan)


def _in_planes(w: Float[Array, "n k"], plan: _Plan) -> Float[Array, "rows planes columns"]:
    longer = stretch(w, plan.request.columns, plan.block)
    if plan.request.interpret:  # its loops on a CPU may lose subnormal numbers of 16 bits
        longer = longer.astype(jnp.float32)
    return longer.reshape(plan.rows, plan.planes, longer.shape[1])


def _cut(packed: UInt8[Array, "..."], plan: _Plan) -> UInt8[Array, "..."]:
    per_byte = plan.request.storage.per_byte[1]
    shape = (plan.rows, plan.request.shape[1] // per_byte)
    return shrink(packed, plan.request.columns // per_byte, plan.bytes_of_block, shape)


def _encode_kernel(outer_ref: Any, x_ref: Any, codes_ref: Any, scale_ref: Any, *, plan: _Plan):
    rule, divide = RULES[plan.request.storage.scale], plan.divide()
    factors = []
    for plane in range(plan.planes):
        amax = _amax(x_ref, plane, plan)
        scale, factor = rule.find(amax, outer_ref[0], plan.request, divide)
        scale_ref[:, plane, :] = scale
        factors.append(factor)
    size = plan.tile.span // plan.request.storage.per_byte[1]

    def quotient(x: Array, factor: Array) -> Array:
        return rule.quotient(x, factor, divide)

    def store(i: Any, carry: Any) -> Any:
        codes_ref[:, pl.ds(i * size, size)] = _coded(x_ref, i, factors, quotient, plan)
        return carry

    _loop(plan, store, jnp.int32(0))


def _codes_kernel(step_ref: Any, x_ref: Any, codes_ref: Any, *, plan: _Plan):
    steps = [step_ref[:, plane, :] for plane in range(plan.planes)]
    codes_ref[...] = _coded(x_ref, 0, steps, plan.divide(), plan)


def _loop(plan: _Plan, step: Callable[[Any, Any], Any], start: Any) -> Any:
    """Over the tiles of a block."""
    tiles = plan.block // plan.tile.columns
    return step(0, start) if tiles == 1 else lax.fori_loop(0, tiles, step, start)


def _values(x_ref: Any, plane: int, i: Any, plan: _Plan) -> Float32[Array, "rows groups columns"]:
    """Tile `i` of the blocks."""
    x = x_ref[:, plane, pl.ds(i * plan.tile.span, plan.tile.span)]
    return x.astype(jnp.float32).reshape(plan.tile)


def _amax(x_ref: Any, plane: int, plan: _Plan) -> Float32[Array, "rows groups"]:
    """The largest magnitudes of the blocks, by their bits."""

    def larger(i: Any, most: Int32[Array, "rows groups"]) -> Int32[Array, "rows groups"]:
        magnitude = bits(_values(x_ref, plane, i, plan)) & MAGNITUDE
        return jnp.maximum(most, jnp.max(magnitude, axis=-1))

    return from_bits(_loop(plan, larger, jnp.zeros(plan.tile[:2], jnp.int32)))


def _coded(
    x_ref: Any, i: Any, factors: list[Array], quotient: Divide, plan: _Plan
) -> UInt8[Array, "rows bytes"]:
    """The packed codes of tile `i`."""
    found = []
    for plane, factor in enumerate(factors):
        x = _values(x_ref, plane, i, plan)
        c = code(quotient(x, factor[:, :, None]), x, plan.request, KERNEL_CODECS)
        found.append(c.reshape(plan.tile.rows, plan.tile.span))
    if plan.planes == 2:
        return (found[0] & 15) | (found[1] << 4)
    return _pairs(found[0], plan.request.storage.packing)


def _pairs(c: UInt8[Array, "rows columns"], packing: str) -> UInt8[Array, "rows bytes"]:
    if packing not in SHIFTS:
        return c
    even, odd = jnp.unstack(c.reshape(c.shape[0], -1, 2), axis=-1)
    first, second = SHIFTS[packing]
    return (even << first) | (odd << second)
