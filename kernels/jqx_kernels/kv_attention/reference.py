# SPDX-License-Identifier: Apache-2.0
"""What attention to stored keys and values means, in plain jnp.

    k, v = round(code * step)                              step = scale, or scale * scale of token
    s    = scale * q kT   where seen, in float32           w = exp(s - max(s)), 0 where not seen
    out  = (round(w) v) / sum(w)                           0 for a query that sees nothing

`round` is to `dtype`. What no query sees is taken as zero, NaN too.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, Int32

from jqx_kernels.bits import divide, round_to
from jqx_kernels.codecs import CODECS
from jqx_kernels.matmul.reference import operand_dtype, precision
from jqx_kernels.packing import PACKINGS
from jqx_kernels.scale_rules import STEPS
from jqx_kernels.storage import Storage

from .request import AttentionRequest, Stored
from .sight import MASKED, seen


def decoded(stored: Stored, storage: Storage) -> Float32[Array, "n slots d"]:
    """The numbers that codes and scales stand for, in float32."""
    n, slots, _ = stored.codes.shape
    codes = PACKINGS[storage.packing].unpack(stored.codes.reshape(n * slots, -1))
    blocks = codes.reshape(n, slots, stored.scale.shape[2], -1)
    outer = jnp.float32(1) if stored.outer is None else stored.outer
    step = STEPS[storage.scale](stored.scale, outer)
    return (CODECS[storage.element].decode(blocks) * step[..., None]).reshape(n, slots, -1)


def attention(
    q: Float[Array, "n g t d"],
    keys: Stored,
    values: Stored,
    start: Int32[Array, ""],
    pads: Int32[Array, "n"],
    request: AttentionRequest,
) -> Float[Array, "n g t d"]:
    """What the queries find, in `request.out_dtype`; all slots are decoded at once."""
    n, g, t, d = q.shape
    both = operand_dtype(request.q_dtype, request.dtype)
    k, v = (round_to(decoded(stored, request.storage), request.dtype) for stored in (keys, values))
    slot = jnp.arange(request.slots, dtype=jnp.int32)[None, None, :]
    at = start + jnp.arange(t, dtype=jnp.int32)[None, :, None]
    mask = seen(slot, at, pads[:, None, None], request.window)
    v = jnp.where(jnp.any(mask, axis=1)[:, :, None], v, 0)
    how = {"precision": precision(both), "preferred_element_type": jnp.float32}
    rows = q.reshape(n, g * t, d).astype(both)
    s = lax.dot_general(rows, k.astype(both), (((2,), (2,)), ((0,), (0,))), **how)
    mask = jnp.broadcast_to(mask[:, None], (n, g, t, request.slots)).reshape(s.shape)
    s = jnp.where(mask, s * jnp.float32(request.scale), MASKED)
    w = jnp.where(mask, jnp.exp(s - jnp.max(s, axis=-1, keepdims=True)), 0)
    total = jnp.sum(w, axis=-1, keepdims=True)
    w = round_to(w, request.dtype).astype(both)
    out = lax.dot_general(w, v.astype(both), (((2,), (1,)), ((0,), (0,))), **how)
    return divide(out, total).astype(request.out_dtype).reshape(q.shape)
