# SPDX-License-Identifier: Apache-2.0
"""Causal grouped-query attention, with or without a sliding window, as 2-D products or batched.

    out = softmax(scale * q kT where 0 <= query - key < window) v

Scores and sums of a softmax are float32; its exponentials are rounded to the compute dtype before
they meet the values, and the division comes last, as fused attention kernels do. XLA multiplies 2-D
matrices on a CPU four times as fast as batched ones, hence the two forms; query heads that share
keys are stacked as rows of one product.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from .cache import CACHE_FORMATS, Kept, Past, Slots
from .layers import Params, linear, module, norm, settle
from .rope import Turns, rotate, turns
from .spec import Attention, Compute, Names

_CHUNK, _MOST_CHUNKS = 128, 16  # queries per product; more chunks than that only cost compile time
_FEW = 8  # queries that are not worth a loop over heads
_MASKED = float(np.finfo(np.float32).min)  # finite: a row with nothing to see stays a number


class Sight(NamedTuple):
    """What queries may look at: the keys marked `real` that are not after them, where the first
    query is beside key `first`.
    """

    real: Bool[Array, "n e"]
    first: Int[Array, ""] | int = 0


def self_attention(
    row: Attention,
    names: Names,
    params: Params,
    x: Float[Array, "b t k"],
    positions: Int[Array, "b t"],
    compute: Compute,
) -> tuple[Float[Array, "b t k"], None]:
    """Attention over the normed input `x`, out-projection included, and nothing that is kept. Keys
    at negative positions are never seen.

    Keys, after they are rotated, and values pass through `checkpoint_name` as [b, kv_heads, t,
    head_dim].
    """
    q, k, v = _projected(row, names, params, x, positions, compute)
    sight = Sight(jnp.repeat(positions >= 0, row.kv_heads, axis=0))
    y = _attended(row, q, k, v, sight, compute)
    return linear(module(params, names.out), y, compute), None


def cached_attention(
    row: Attention,
    names: Names,
    params: Params,
    x: Float[Array, "b t k"],
    past: Past,
    compute: Compute,
) -> tuple[Float[Array, "b t k"], Kept]:
    """`self_attention` of tokens that come after those in `past`, and what is kept then: the keys
    and values of both.
    """
    positions = past.slots.positions(x.shape[1])
    q, k, v = _projected(row, names, params, x, positions, compute)
    kept = past.kept.with_tokens(k, v, past.slots.start, compute)
    y = looked_back(row, q, kept, past.slots, compute)
    return linear(module(params, names.out), y, compute), kept


def looked_back(
    row: Attention, q: Float[Array, "n g t d"], kept: Kept, slots: Slots, compute: Compute
) -> Float[Array, "b t k"]:
    """What the queries find in what is kept. Few of them read codes where they are."""
    if compute.cache is not None and q.shape[2] <= _FEW:
        return _side_by_side(row, _in_codes(row, q, kept, slots, compute))
    sight = Sight(jnp.repeat(slots.real(kept.slots), row.kv_heads, axis=0), slots.start)
    k, v = kept.read(compute)
    if compute.cache is not None:  # what codes stand for in empty slots may be no number
        empty = jnp.arange(kept.slots, dtype=jnp.int32) >= slots.start + q.shape[2]
        v = jnp.where((sight.real & ~empty[None, :])[:, :, None], v, 0)
    return _attended(row, q, k, v, sight, compute)


def _in_codes(
    row: Attention, q: Float[Array, "n g t d"], kept: Kept, slots: Slots, compute: Compute
) -> Float[Array, "n g t d"]:
    from jqx_kernels.kv_attention import kv_attention  # Pallas takes a while

    assert compute.cache is not None
    y = kv_attention(
        q,
        kept.keys,
        kept.values,
        slots.start,
        jnp.repeat(slots.pads, row.kv_heads),
        storage=CACHE_FORMATS[compute.cache].storage,
        scale=row.scale,
        window=row.window,
        dtype=compute.dtype,
        out_dtype=jnp.float32,
    )
    return settle(y, compute)


def _projected(
    row: Attention, names: Names, params: Params, x: Array, positions: Array, compute: Compute
) -> tuple[Float[Array, "n g t d"], Float[Array, "n t d"], Float[Array, "n t d"]]:
    """Rotated queries, keys and values, and the latter two under the names they are kept under;
    n = b * kv_heads.
    """
    by = turns(row.rope, row.head_dim, positions, compute)
    q = rotate(_heads(row, names.q, names.q_norm, params, x, compute), by, compute)
    k, v = keys_and_values(row, names, params, x, by, compute)
    k, v = checkpoint_name(k, names.kept_k), checkpoint_name(v, names.kept_v)
    t, d = k.shape[2:]
    q = q.reshape(-1, row.heads // row.kv_heads, t, d)
    return q, k.reshape(-1, t, d), v.reshape(-1, t, d)


def _attended(
    row: Attention, q: Array, k: Array, v: Array, sight: Sight, compute: Compute
) -> Float[Array, "b t n"]:
    """What the queries find, heads side by side."""
    attend = ATTENTIONS["batched" if q.shape[2] <= _FEW else compute.attention]
    return _side_by_side(row, attend(row, q, k, v, sight, compute))


def _side_by_side(row: Attention, y: Float[Array, "n g t d"]) -> Float[Array, "b t k"]:
    t, d = y.shape[2:]
    heads = y.reshape(-1, row.heads, t, d).transpose(0, 2, 1, 3)
    return heads.reshape(heads.shape[0], t, -1)


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
    q: Float[Array, "n g t d"],
    k: Float[Array, "n e d"],
    v: Float[Array, "n e d"],
    sight: Sight,
    compute: Compute,
) -> Float[Array, "n g t d"]:
    t = q.shape[2]
    chunk = max(_CHUNK, -(-t // _MOST_CHUNKS))

    def one_head(operands: tuple[Array, Array, Array, Array]) -> Array:
        q, k, v, real = operands
        outs = []
        for start in range(0, t, chunk):
            stop = min(start + chunk, t)
            first, last = _reach(row, sight, start, stop)
            allowed = _allowed(row, sight, (start, stop), (first, last)) & real[None, first:last]
            keys, values = k[first:last], v[first:last]
            outs.append(_softmax_values(row, q[:, start:stop], keys, values, allowed, compute))
        return jnp.concatenate(outs, axis=1)

    return lax.map(one_head, (q, k, v, sight.real))


def _batched(
    row: Attention,
    q: Float[Array, "n g t d"],
    k: Float[Array, "n e d"],
    v: Float[Array, "n e d"],
    sight: Sight,
    compute: Compute,
) -> Float[Array, "n g t d"]:
    near = _allowed(row, sight, (0, q.shape[2]), (0, k.shape[1]))
    return _softmax_values(row, q, k, v, near[None] & sight.real[:, None, :], compute)


def _reach(row: Attention, sight: Sight, start: int, stop: int) -> tuple[int, int]:
    """The range of keys that the queries from `start` to `stop` can see, as far as it is known."""
    if not isinstance(sight.first, int):
        return 0, sight.real.shape[1]
    first = sight.first + start
    return 0 if row.window is None else max(0, first - row.window + 1), sight.first + stop


def _allowed(
    row: Attention, sight: Sight, queries: tuple[int, int], keys: tuple[int, int]
) -> Bool[Array, "q e"]:
    at = sight.first + jnp.arange(*queries, dtype=jnp.int32)
    distance = at[:, None] - jnp.arange(*keys, dtype=jnp.int32)[None, :]
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
"""Compute.attention -> function of (row, q, k, v, sight, compute)."""
