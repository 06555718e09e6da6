# SPDX-License-Identifier: Apache-2.0
"""Attention to stored keys and values on CUDA GPUs, in Triton: flash-decoding.

A program looks at some tiles of the slots that one head sees, decodes them in registers and carries
on the largest score, the sum of the exponentials and their sum with the values. What the programs
of a head find is put together after. Slots that nothing sees are not read.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Bool, Float, Float32, Int32

from jqx_kernels.bits import divide
from jqx_kernels.dispatch import Device
from jqx_kernels.matmul.gpu_tiles import VALUES, lacks_gpu
from jqx_kernels.matmul.planes import PARTS
from jqx_kernels.matmul.reference import NT, operand_dtype, precision
from jqx_kernels.matmul.values import numbers
from jqx_kernels.pallas import cdiv, triton
from jqx_kernels.scale_rules import STEPS
from jqx_kernels.storage import Storage
from jqx_kernels.tiles import covering

from .request import AttentionRequest, Stored, lacks_blocks, lacks_meaning
from .sight import MASKED, reach, seen

LEAST = 16
"""The smallest side of a tile that tensor cores multiply."""

MOST, TALLEST = 4096, 128
"""Codes in a tile, and slots."""

WIDEST = 256
"""Bytes of a token of one head, of which a tile holds 16."""

QUERIES = 64
"""Rows of queries: they are in the registers of every program."""

PROGRAMS = 528
"""Programs that are enough: four for each of the 132 processors of an H100."""

_NN = (((1,), (0,)), ((), ()))


def lacks(device: Device, request: AttentionRequest) -> str | None:
    """Other devices, old ones, many queries, and what has no tiles."""
    (_, g, t, d), storage = request.q_shape, request.storage
    if reason := lacks_gpu(device, storage.element) or lacks_meaning(device, request):
        return reason
    if g * t > QUERIES:
        return f"holds {QUERIES} queries of a head in registers, not {g} x {t}"
    if d // storage.per_byte[1] > WIDEST:
        return f"holds {WIDEST} bytes of a token, not those of {d} channels"
    return lacks_blocks(request)


class _Plan(NamedTuple):
    """What the kernel knows when it is compiled. `rows` of queries, `width` bytes of a token and
    `blocks` of them are powers of two that cover what there is, `tile` slots and `splits`.
    """

    request: AttentionRequest
    rows: int
    width: int
    blocks: int
    tile: int
    splits: int

    @property
    def storage(self) -> Storage:
        """How tokens are stored."""
        return self.request.storage


def plan_for(
    request: AttentionRequest, tile: int | None = None, splits: int | None = None
) -> _Plan:
    """How it is cut into programs; other tiles and splits are for tuning."""
    (n, g, t, d), storage = request.q_shape, request.storage
    width = _power(d // storage.per_byte[1])
    per_block = storage.columns(d) // storage.per_byte[1]
    tile = tile or min(max(MOST // width, LEAST), TALLEST)
    most = cdiv(request.slots, tile)
    return _Plan(
        request=request,
        rows=_power(g * t),
        width=width,
        blocks=1 if storage.block[1] is None else width // per_block,
        tile=tile,
        splits=splits or min(most, max(PROGRAMS // n, 1)),
    )


def _power(size: int) -> int:
    return max(covering(size), LEAST)


def _read(ref: Any, at: Any, sizes: tuple[int, int], inside: Bool[Array, "slots 1"]) -> Array:
    """The bytes or scales of some slots of one head, zeros where they are not `inside` and beyond
    the last one of a token.
    """
    head, slot = at
    mask, first = jnp.broadcast_to(inside, sizes), 0
    if ref.shape[2] != sizes[1]:
        mask = mask & (lax.broadcasted_iota(jnp.int32, sizes, 1) < ref.shape[2])
        first = head * 0  # JAX refuses a slice beyond the end whose start it knows
    tile = ref.at[head, pl.ds(slot, sizes[0]), pl.ds(first, sizes[1])]
    return plgpu.load(tile, mask=mask, other=jnp.zeros(sizes, ref.dtype))


def _decoded(refs: Any, at: Any, inside: Array, plan: _Plan) -> list[Float[Array, "slots width"]]:
    """The numbers of some slots, rounded, a tile for every code in a byte."""
    codes_ref, scale_ref, *outer_ref = refs
    sizes, dtype = (plan.tile, plan.width), jnp.dtype(plan.request.dtype)
    both = operand_dtype(plan.request.q_dtype, plan.request.dtype)
    codes = _read(codes_ref, at, sizes, inside).astype(jnp.int32)
    scale = _read(scale_ref, at, (plan.tile, plan.blocks), inside)
    outer = _read(outer_ref[0], at, (plan.tile, 1), inside) if outer_ref else jnp.float32(1)
    step = STEPS[plan.storage.scale](scale, outer)
    found = []
    for part in PARTS[plan.storage.packing]:
        shifted = codes >> part.shift if part.shift else codes
        values = numbers(shifted, plan.storage.element, VALUES)
        if plan.blocks > 1:
            blocks = values.reshape(plan.tile, plan.blocks, -1) * step[:, :, None]
            values = blocks.reshape(sizes)
        else:
            values = values * step
        found.append(values.astype(dtype).astype(both))
    return found


def _kernel(start_ref: Any, pads_ref: Any, *refs: Any, plan: _Plan) -> None:
    request, parts = plan.request, PARTS[plan.storage.packing]
    per = 3 if plan.storage.scale == "e4m3" else 2
    keys, values, refs = refs[:per], refs[per : 2 * per], refs[2 * per :]
    q_refs, (top_ref, total_ref), outs = refs[: len(parts)], refs[-2:], refs[len(parts) : -2]
    head, split, t = pl.program_id(0), pl.program_id(1), request.q_shape[2]
    both = operand_dtype(request.q_dtype, request.dtype)
    start, pad = start_ref[0], pads_ref[head]
    first, end = reach(start, t, pad, request.window)
    end = jnp.minimum(end, request.slots)  # no bounds are checked
    per_split = lax.div(end - first + (plan.splits * plan.tile - 1), plan.splits * plan.tile)
    first = first + split * per_split * plan.tile
    query = lax.rem(lax.broadcasted_iota(jnp.int32, (plan.rows, 1), 0), t)
    xs = [q_refs[part.x][head].astype(both) for part in parts]
    how = {"precision": precision(both), "preferred_element_type": jnp.float32}

    def step(i: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
        top, total, *sums = carry
        at = first + i * plan.tile
        slot = at + lax.broadcasted_iota(jnp.int32, (plan.tile, 1), 0)
        k = _decoded(keys, (head, at), slot < end, plan)
        pairs = zip(xs, k, strict=True)
        s = sum(lax.dot_general(x, part, NT, **how) for x, part in pairs) * request.scale
        slots = at + lax.broadcasted_iota(jnp.int32, (1, plan.tile), 1)
        mask = seen(slots, start + query, pad, request.window)
        s = jnp.where(mask, s, MASKED)
        higher = jnp.maximum(top, jnp.max(s, axis=1, keepdims=True))
        w = jnp.where(mask, jnp.exp(s - higher), 0.0)
        fade = jnp.exp(top - higher)
        total = total * fade + jnp.sum(w, axis=1, keepdims=True)
        w = w.astype(request.dtype).astype(both)
        v = _decoded(values, (head, at), slot < end, plan)
        pairs = zip(sums, v, strict=True)
        sums = [o * fade + lax.dot_general(w, part, _NN, **how) for o, part in pairs]
        return higher, total, *sums

    one = jnp.zeros((plan.rows, 1), jnp.float32)
    nothing = [jnp.zeros((plan.rows, plan.width), jnp.float32) for _ in parts]
    top, total, *sums = lax.fori_loop(0, per_split, step, (one + MASKED, one, *nothing))
    top_ref[head, split] = top
    total_ref[head, split] = total
    for part, found in zip(parts, sums, strict=True):
        outs[part.x][head, split] = found


def _merged(
    tops: Float32[Array, "n splits rows 1"],
    totals: Float32[Array, "n splits rows 1"],
    outs: Float32[Array, "n splits rows d"],
) -> Float32[Array, "n rows d"]:
    """What the programs of every head found, as one."""
    fade = jnp.exp(tops - jnp.max(tops, axis=1, keepdims=True))
    return divide(jnp.sum(outs * fade, axis=1), jnp.sum(totals * fade, axis=1))


def attention(  # noqa: PLR0913  five arrays, and what is static about them
    q: Float[Array, "n g t d"],
    keys: Stored,
    values: Stored,
    start: Int32[Array, ""],
    pads: Int32[Array, "n"],
    request: AttentionRequest,
    plan: _Plan | None = None,
) -> Float[Array, "n g t d"]:
    """As `reference.attention`; another plan than `plan_for` makes is for tuning."""
    plan = plan_for(request) if plan is None else plan
    (n, g, t, d), per_byte = q.shape, plan.storage.per_byte[1]
    rows, (tall, wide) = q.reshape(n, g * t, d), (plan.rows - g * t, plan.width - d // per_byte)
    xs = [jnp.pad(rows[:, :, i::per_byte], ((0, 0), (0, tall), (0, wide))) for i in range(per_byte)]
    shape = (n, plan.splits, plan.rows)
    found = jax.ShapeDtypeStruct((*shape, plan.width), jnp.float32)
    one = jax.ShapeDtypeStruct((*shape, 1), jnp.float32)
    arrays = [a for a in (*keys, *values) if a is not None]
    *outs, tops, totals = pl.pallas_call(
        partial(_kernel, plan=plan),
        grid=(n, plan.splits),
        out_shape=[*[found] * per_byte, one, one],
        name="kv_attention",
        **triton(request.interpret),
    )(start.reshape(1), pads, *arrays, *xs)
    out = jnp.stack([o[..., : d // per_byte] for o in outs], axis=-1).reshape(*shape, d)
    y = _merged(tops, totals, out)[:, : g * t]
    return y.astype(request.out_dtype).reshape(q.shape)
