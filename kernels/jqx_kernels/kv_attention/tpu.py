# SPDX-License-Identifier: Apache-2.0
"""Attention to stored keys and values on TPUs, in Mosaic.

Chunks of slots are decoded as columns, so that what belongs to a token lies along lanes. Scales of
blocks are spread over the channels of a chunk by a product with a matrix of zeros and ones, which
is exact and moves no lanes. Chunks that nothing sees are neither fetched nor computed.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Float32, Int32

from jqx_kernels.bits import divide
from jqx_kernels.dispatch import Device
from jqx_kernels.matmul.planes import PARTS
from jqx_kernels.matmul.reference import NT, operand_dtype, precision
from jqx_kernels.matmul.values import INTEGERS, numbers
from jqx_kernels.pallas import cdiv, tpu
from jqx_kernels.scale_rules import STEPS

from .request import AttentionRequest, Stored, lacks_blocks, lacks_meaning
from .sight import MASKED, reach, seen

CHUNK = 512
"""Slots that are decoded at once."""

QUERIES, SUBLANES = 256, 16  # rows of queries at most; rows of a tile of bfloat16
_NN = (((1,), (0,)), ((), ()))


def lacks(device: Device, request: AttentionRequest) -> str | None:
    """Other devices, float16, and many queries."""
    if device.platform != "tpu":
        return f"needs a TPU, not {device.platform}"
    if "float16" in (request.q_dtype, request.dtype, request.out_dtype):
        return "multiplies bfloat16 and float32, not float16"
    _, g, t, _ = request.q_shape
    if g * t > QUERIES:
        return f"holds {QUERIES} queries of a head, not {g} x {t}"
    return lacks_meaning(device, request) or lacks_blocks(request)


class _Refs(NamedTuple):
    """References to the keys or the values of one chunk, as `Stored`; `scale` is [slots, blocks],
    or [1, slots] where a token has one.
    """

    codes: Any
    scale: Any
    outer: Any = None


def _step(refs: _Refs, width: int, request: AttentionRequest) -> Float32[Array, "..."]:
    """What the codes of a chunk are multiplied by: [1 or bytes of a token, slots]."""
    kind = request.storage.scale
    scale, outer = refs.scale[0], jnp.float32(1) if refs.outer is None else refs.outer[0]
    if request.storage.block[1] is None:
        return STEPS[kind](scale, outer)
    # a scale of eight bits is a bfloat16; that of the token, which is not, comes after
    values = STEPS[kind](scale, jnp.float32(1))
    dtype = jnp.float32 if kind == "float32" else jnp.bfloat16
    shape = (width, scale.shape[1])
    block = lax.shift_right_logical(
        lax.broadcasted_iota(jnp.int32, shape, 0), (width // shape[1]).bit_length() - 1
    )
    hit = block == lax.broadcasted_iota(jnp.int32, shape, 1)
    spread = lax.dot_general(
        jnp.where(hit, 1.0, 0.0).astype(dtype),
        values.astype(dtype),
        NT,
        precision=precision(dtype),
        preferred_element_type=jnp.float32,
    )
    return spread * outer if kind == "e4m3" else spread


def _decoded(refs: _Refs, request: AttentionRequest) -> list[Float32[Array, "width slots"]]:
    """The numbers of a chunk, a matrix for every code in a byte."""
    codes = refs.codes[0].astype(jnp.int32).T
    step = _step(refs, codes.shape[0], request)
    found = []
    for part in PARTS[request.storage.packing]:
        shifted = codes >> part.shift if part.shift else codes
        found.append(numbers(shifted, request.storage.element, INTEGERS) * step)
    return found


def _bounds(start: Any, pad: Any, request: AttentionRequest, chunk: int) -> tuple[Any, Any]:
    """The first and the last chunk that some query sees."""
    first, end = reach(start, request.q_shape[2], pad, request.window)
    return lax.div(first, chunk), lax.div(end - 1, chunk)


def _kernel(start_ref: Any, pads_ref: Any, *refs: Any, request: AttentionRequest) -> None:
    parts = PARTS[request.storage.packing]
    per = 3 if request.storage.scale == "e4m3" else 2
    keys, values, refs = _Refs(*refs[:per]), _Refs(*refs[per : 2 * per]), refs[2 * per :]
    xs, outs, (top, total, *sums) = (
        refs[: len(parts)],
        refs[len(parts) : 2 * len(parts)],
        refs[2 * len(parts) :],
    )
    head, i, chunk = pl.program_id(0), pl.program_id(1), keys.codes.shape[1]
    start, pad, t = start_ref[0], pads_ref[head], request.q_shape[2]
    both, dtype = operand_dtype(request.q_dtype, request.dtype), jnp.dtype(request.dtype)
    how = {"precision": precision(both), "preferred_element_type": jnp.float32}
    least, most = _bounds(start, pad, request, chunk)

    @pl.when(i == 0)
    def _() -> None:
        top[...] = jnp.full_like(top, MASKED)
        for ref in (total, *sums):
            ref[...] = jnp.zeros_like(ref)

    @pl.when((i >= least) & (i <= most))
    def _() -> None:
        shape = (top.shape[0], chunk)
        query = lax.rem(lax.broadcasted_iota(jnp.int32, shape, 0), t)
        slot = lax.broadcasted_iota(jnp.int32, shape, 1) + i * chunk
        mask = seen(slot, start + query, pad, request.window)
        s = jnp.zeros(shape, jnp.float32)
        for part, k in zip(parts, _decoded(keys, request), strict=True):
            s += lax.dot_general(
                xs[part.x][0].astype(both), k.astype(dtype).astype(both), _NN, **how
            )
        s = jnp.where(mask, s * jnp.float32(request.scale), MASKED)
        higher = jnp.maximum(top[...], jnp.max(s, axis=1, keepdims=True))
        w = jnp.where(mask, jnp.exp(s - higher), 0.0)
        fade = jnp.exp(top[...] - higher)
        top[...] = higher
        total[...] = total[...] * fade + jnp.sum(w, axis=1, keepdims=True)
        w = w.astype(dtype).astype(both)
        first, end = reach(start, t, pad, request.window)
        for part, v in zip(parts, _decoded(values, request), strict=True):
            at = lax.broadcasted_iota(jnp.int32, v.shape, 1) + i * chunk
            v = jnp.where((at >= first) & (at < end), v, 0.0)  # beyond lies anything, NaN too
            more = lax.dot_general(w, v.astype(dtype).astype(both), NT, **how)
            sums[part.x][...] = sums[part.x][...] * fade + more

    @pl.when(i == pl.num_programs(1) - 1)
    def _() -> None:
        for out, found in zip(outs, sums, strict=True):
            out[0] = divide(found[...], total[...]).astype(out.dtype)


def _arrays(stored: Stored, request: AttentionRequest) -> list[Array]:
    """As `_Refs`, but of all heads and slots."""
    codes, scale, outer = stored
    flat = (codes.shape[0], 1, request.slots)
    scale = scale.reshape(flat) if request.storage.block[1] is None else scale
    return [codes, scale, *([] if outer is None else [outer.reshape(flat)])]


def _spec(array: Array, chunk: int, request: AttentionRequest) -> pl.BlockSpec:
    """A chunk of what lies along the last axis, or the one before it."""
    along = array.shape[1] == 1 and request.slots > 1

    def at(head: Any, i: Any, start: Any, pads: Any) -> tuple[Any, ...]:
        # what is not needed is not fetched: the chunk that is there already is named again
        i = jnp.clip(i, *_bounds(start[0], pads[head], request, chunk))
        return (head, 0, i) if along else (head, i, 0)

    return pl.BlockSpec((1, 1, chunk) if along else (1, chunk, array.shape[2]), at)


def attention(
    q: Float[Array, "n g t d"],
    keys: Stored,
    values: Stored,
    start: Int32[Array, ""],
    pads: Int32[Array, "n"],
    request: AttentionRequest,
) -> Float[Array, "n g t d"]:
    """As `reference.attention`."""
    (n, g, t, d), per_byte = q.shape, request.storage.per_byte[1]
    chunk, rows = min(CHUNK, request.slots), g * t + -(g * t) % SUBLANES
    tall = jnp.pad(q.reshape(n, g * t, d), ((0, 0), (0, rows - g * t), (0, 0)))
    xs = [tall[:, :, i::per_byte] for i in range(per_byte)]
    width = d // per_byte
    whole = pl.BlockSpec((1, rows, width), lambda head, i, start, pads: (head, 0, 0))
    arrays = [*_arrays(keys, request), *_arrays(values, request)]
    outs = pl.pallas_call(
        partial(_kernel, request=request),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(n, cdiv(request.slots, chunk)),
            in_specs=[*(_spec(a, chunk, request) for a in arrays), *[whole] * per_byte],
            out_specs=[whole] * per_byte,
            scratch_shapes=[
                *[pltpu.VMEM((rows, 1), jnp.float32)] * 2,
                *[pltpu.VMEM((rows, width), jnp.float32)] * per_byte,
            ],
        ),
        out_shape=[jax.ShapeDtypeStruct((n, rows, width), jnp.dtype(request.out_dtype))] * per_byte,
        name="kv_attention",
        **tpu(request.interpret, "parallel", "arbitrary"),
    )(start.reshape(1), pads, *arrays, *xs)
    return jnp.stack(outs, axis=-1).reshape(n, rows, d)[:, : g * t].reshape(q.shape)
