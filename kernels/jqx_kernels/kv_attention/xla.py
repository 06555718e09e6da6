# SPDX-License-Identifier: Apache-2.0
"""Attention to stored keys and values on CPUs: some slots at a time, which stay in the caches.

Only chunks that some query sees are read. Of each the largest score, the sum of the exponentials
and their sum with the values are carried on:

    m' = max(m, max(s)),   l' = l exp(m - m') + sum(w),   o' = o exp(m - m') + w v

Codes that share bytes are multiplied half by half, so nothing is interleaved.
"""

from functools import partial
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, Int32

from jqx_kernels.bits import divide, round_to
from jqx_kernels.codecs import CODECS
from jqx_kernels.dispatch import Device
from jqx_kernels.matmul.planes import PARTS
from jqx_kernels.scale_rules import STEPS

from .request import AttentionRequest, Stored, lacks_blocks, lacks_meaning
from .sight import MASKED, reach, seen

AT_ONCE, LEAST = 1 << 18, 64
"""Numbers that are decoded together, a MiB of float32; slots at least."""

_Contracted = tuple[tuple[tuple[int], tuple[int]], tuple[tuple[int], tuple[int]]]
_LAST: _Contracted = (((2,), (2,)), ((0,), (0,)))
_SLOTS: _Contracted = (((2,), (1,)), ((0,), (0,)))


def lacks(device: Device, request: AttentionRequest) -> str | None:
    """Accelerators, which wait for every step of a loop, and blocks that share bytes."""
    if device.platform != "cpu":
        return f"loops over what the caches of a CPU hold, which is slow on {device.platform}"
    return lacks_meaning(device, request) or lacks_blocks(request)


class _Look(NamedTuple):
    """What is the same for every chunk. `xs`: the channels of queries [n, rows, d] that meet each
    code in a byte; `at`: the slots beside queries, [1, rows, 1]; `pads`: [n, 1, 1].
    """

    xs: list[Array]
    keys: Stored
    values: Stored
    at: Array
    pads: Array
    chunk: int
    request: AttentionRequest


def attention(
    q: Float[Array, "n g t d"],
    keys: Stored,
    values: Stored,
    start: Int32[Array, ""],
    pads: Int32[Array, "n"],
    request: AttentionRequest,
) -> Float[Array, "n g t d"]:
    """As `reference.attention`."""
    (n, g, t, d), parts = q.shape, PARTS[request.storage.packing]
    chunk = _chunk(n * d, request.slots)
    # products of what was rounded to fewer bits are exact in float32, which CPUs multiply fastest
    rows = q.reshape(n, g * t, d).astype(jnp.float32)
    xs = [rows[:, :, part.x :: len(parts)] for part in parts]
    at = start + jnp.tile(jnp.arange(t, dtype=jnp.int32), g)[None, :, None]
    look = _Look(xs, keys, values, at, pads[:, None, None], chunk, request)
    one = jnp.zeros((n, g * t, 1), jnp.float32)
    nothing = [jnp.zeros(x.shape, jnp.float32) for x in xs]
    first, end = reach(start, t, jnp.min(pads), request.window)
    bounds = lax.div(first, jnp.int32(chunk)), lax.div(end + (chunk - 1), jnp.int32(chunk))
    state = (one + MASKED, one, *nothing)
    _, total, *sums = lax.fori_loop(*bounds, partial(_step, look=look), state)
    order = sorted(zip(parts, sums, strict=True), key=lambda pair: pair[0].x)
    out = jnp.stack([o for _, o in order], axis=-1).reshape(n, g * t, d)
    return divide(out, total).astype(request.out_dtype).reshape(q.shape)


def _step(i: Array, state: tuple[Array, ...], look: _Look) -> tuple[Array, ...]:
    """(largest score, sum of exponentials, their sums with values) after chunk `i`."""
    (top, total, *sums), (chunk, request) = state, look[-2:]
    at = jnp.minimum(i * chunk, request.slots - chunk)
    slot = (at + jnp.arange(chunk, dtype=jnp.int32))[None, None, :]
    mask = seen(slot, look.at, look.pads, request.window)
    mask = mask & (slot >= i * chunk)  # the last chunk reaches back into the one before
    used = jnp.any(mask, axis=1)[:, :, None]
    k, v = (_decoded(_cut(stored, at, chunk), request) for stored in (look.keys, look.values))
    pairs = zip(look.xs, k, strict=True)
    s = sum(_product(x, part, _LAST) for x, part in pairs) * jnp.float32(request.scale)
    s = jnp.where(mask, s, MASKED)
    higher = jnp.maximum(top, jnp.max(s, axis=-1, keepdims=True))
    w = jnp.where(mask, jnp.exp(s - higher), 0)
    fade = jnp.exp(top - higher)
    total = total * fade + jnp.sum(w, axis=-1, keepdims=True)
    w = round_to(w, request.dtype)
    found = [_product(w, jnp.where(used, part, 0), _SLOTS) for part in v]
    return higher, total, *(o * fade + more for o, more in zip(sums, found, strict=True))


def _chunk(numbers: int, slots: int) -> int:
    """Slots that are read at once where each has so many numbers: a power of two, or all."""
    most = max(AT_ONCE // numbers, 1)
    return min(max(1 << (most.bit_length() - 1), LEAST), slots)


def _cut(stored: Stored, at: Array, chunk: int) -> Stored:
    def cut(a: Array) -> Array:
        return lax.dynamic_slice_in_dim(a, at, chunk, axis=1)

    codes, scale, outer = stored
    return Stored(cut(codes), cut(scale), None if outer is None else cut(outer))


def _decoded(stored: Stored, request: AttentionRequest) -> list[Float32[Array, "n slots part"]]:
    """The numbers of some slots, rounded: all of them, or the even and the odd channels."""
    storage, (n, slots, _) = request.storage, stored.codes.shape
    outer = jnp.float32(1) if stored.outer is None else stored.outer
    step = STEPS[storage.scale](stored.scale, outer)[..., None]
    found = []
    for part in PARTS[storage.packing]:
        codes = stored.codes >> part.shift if part.shift else stored.codes
        blocks = codes.reshape(n, slots, step.shape[2], -1)
        numbers = (CODECS[storage.element].decode(blocks) * step).reshape(n, slots, -1)
        # or it is decoded inside the product, one number at a time
        found.append(lax.optimization_barrier(round_to(numbers, request.dtype)))
    return found


def _product(x: Array, y: Array, dimensions: _Contracted) -> Float32[Array, "..."]:
    return lax.dot_general(x, y, dimensions, precision=lax.Precision.HIGHEST)
