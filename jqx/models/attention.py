# SPDX-License-Identifier: Apache-2.0
"""Causal grouped-query attention, with or without a sliding window, as 2-D products or batched.

    out = softmax(scale * q kT where 0 <= query - key < window) v

Scores and sums of a softmax are float32; its exponentials are rounded to the compute dtype before
they meet the values, and the division comes last, as fused attention kernels do. XLA multiplies 2-D
matrices on a CPU four times as fast as batched ones, hence the two forms; query heads that share
keys are stacked as rows of one product.
"""

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from .layers import Params, linear, module, norm, settle
from .rope import Turns, rotate, turns
from .spec import Attention, Compute, Names

_CHUNK, _MOST_CHUNKS = 128, 16  # queries per product; more chunks than that only cost compile time
_MASKED = float(np.finfo(np.float32).min)  # finite: a row with nothing to see stays a number


def self_attention(
    row: Attention,
    names: Names,
    params: Params,
    x: Float[Array, "b t k"],
    positions: Int[Array, "b t"],
    compute: Compute,
) -> Float[Array, "b t k"]:
    """Attention over the normed input `x`, out-projection included. Keys at negative positions are
    never seen.

    Keys, after they are rotated, and values pass through `checkpoint_name` as [b, kv_heads, t,
    head_dim].
    """
    by = turns(row.rope, row.head_dim, positions, compute)
    q = _heads(row, names.q, names.q_norm, params, x, compute)
    k, v = keys_and_values(row, names, params, x, by, compute)
    k, v = checkpoint_name(k, names.kept_k), checkpoint_name(v, names.kept_v)
    q = rotate(q, by, compute).reshape(*k.shape[:2], row.heads // row.kv_heads, *k.shape[2:])
    attend = ATTENTIONS[compute.attention]
    y = attend(row, q, k, v, positions >= 0, compute)
    b, t = x.shape[:2]
    y = y.reshape(b, row.heads, t, row.head_dim).transpose(0, 2, 1, 3).reshape(b, t, -1)
    return linear(module(params, names.out), y, compute)


def keys_and_values(
    row: Attention,
    names: Names,
    params: Params,
    x: Float[Array, "b t k"],
    by: Turns,
    compute: Compute,
) -> tuple[Float[Array, "b h t d"], Float[Array, "b h t d"]]:
    """Rotated keys and values of the normed input `x`."""
    k = _heads(row, names.k, names.k_norm, params, x, compute)
    v = _split(linear(module(params, names.v), x, compute), row.head_dim)
    return rotate(k, by, compute), v


def _heads(
    row: Attention, name: str, norm_name: str, params: Params, x: Array, compute: Compute
) -> Array:
    y = _split(linear(module(params, name), x, compute), row.head_dim)
    if row.qk_norm is None:
        return y
    return norm(row.qk_norm, module(params, norm_name), y, compute)


def _split(y: Float[Array, "b t n"], head_dim: int) -> Float[Array, "b h t d"]:
    return y.reshape(*y.shape[:2], -1, head_dim).transpose(0, 2, 1, 3)


def _in_chunks(
    row: Attention,
    q: Float[Array, "b h g t d"],
    k: Float[Array, "b h t d"],
    v: Float[Array, "b h t d"],
    seen: Bool[Array, "b t"],
    compute: Compute,
) -> Float[Array, "b h g t d"]:
    b, h, g, t, d = q.shape
    chunk = max(_CHUNK, -(-t // _MOST_CHUNKS))

    def one_head(operands: tuple[Array, Array, Array, Array]) -> Array:
        q, k, v, seen = operands
        outs = []
        for start in range(0, t, chunk):
            stop = min(start + chunk, t)
            first = 0 if row.window is None else max(0, start - row.window + 1)
            allowed = _allowed(row, (start, stop), (first, stop)) & seen[None, first:stop]
            keys, values = k[first:stop], v[first:stop]
            outs.append(_softmax_values(row, q[:, start:stop], keys, values, allowed, compute))
        return jnp.concatenate(outs, axis=1)

    flat = [a.reshape(b * h, *a.shape[2:]) for a in (q, k, v)]
    out = lax.map(one_head, (*flat, jnp.repeat(seen, h, axis=0)))
    return out.reshape(b, h, g, t, d)


def _batched(
    row: Attention,
    q: Float[Array, "b h g t d"],
    k: Float[Array, "b h t d"],
    v: Float[Array, "b h t d"],
    seen: Bool[Array, "b t"],
    compute: Compute,
) -> Float[Array, "b h g t d"]:
    t = q.shape[-2]
    allowed = _allowed(row, (0, t), (0, t))[None] & seen[:, None, :]
    return _softmax_values(row, q, k, v, allowed[:, None], compute)


def _allowed(row: Attention, queries: tuple[int, int], keys: tuple[int, int]) -> Bool[Array, "q e"]:
    distance = jnp.arange(*queries)[:, None] - jnp.arange(*keys)[None, :]
    causal = distance >= 0
    return causal if row.window is None else causal & (distance < row.window)


def _softmax_values(
    row: Attention,
    q: Float[Array, "*lead g c d"],
    k: Float[Array, "*lead e d"],
    v: Float[Array, "*lead e d"],
    allowed: Bool[Array, "*some c e"],
    compute: Compute,
) -> Float[Array, "*lead g c d"]:
    *lead, g, c, d = q.shape
    product = {"precision": compute.precision, "preferred_element_type": jnp.float32}
    scores = jnp.einsum("...qd,...ed->...qe", q.reshape(*lead, g * c, d), k, **product)
    scores = scores.reshape(*lead, g, c, -1) * row.scale
    scores = jnp.where(allowed[..., None, :, :], scores, _MASKED)
    weights = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    weights = settle(weights, compute).reshape(*lead, g * c, -1)
    out = jnp.einsum("...qe,...ed->...qd", weights, v, **product).reshape(*lead, g, c, d)
    return settle(out / total, compute)


ATTENTIONS = {"chunks": _in_chunks, "batched": _batched}
"""Compute.attention -> function of (row, q, k, v, seen, compute)."""
