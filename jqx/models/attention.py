# SPDX-License-Identifier: Apache-2.0
"""Causal grouped-query attention, with or without a sliding window, as 2-D products or batched.

    out = softmax(scale * q kT + alibi where 0 <= query - key < window) v

Scores and sums of a softmax are float32; its exponentials are rounded to the compute dtype before
they meet the values, and the division comes last, as fused attention kernels do. XLA multiplies 2-D
matrices on a CPU four times as fast as batched ones, hence the two forms; query heads that share
keys are stacked as rows of one product.
"""

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from .cache import CACHE_FORMATS, Kept, Past, Slots
from .compute import Compute
from .layers import Inside, settle, wide
from .projections import queries_keys_values
from .sight import Heads, Sight, View, heads_of, view_of
from .spec import Attention

_CHUNK, _MOST_CHUNKS = 128, 16  # queries per product; more chunks than that only cost compile time
_FEW = 8  # queries that are not worth a loop over heads
_MASKED = float(np.finfo(np.float32).min)  # finite: a row with nothing to see stays a number


def self_attention(
    row: Attention, inside: Inside, x: Float[Array, "b t k"], positions: Int[Array, "b t"]
) -> tuple[Float[Array, "b t k"], None]:
    """Attention over the normed input `x`, out-projection included, and nothing that is kept. Keys
    at negative positions are never seen.

    Keys, after they are rotated, and values pass through `checkpoint_name` as [b, kv_heads, t,
    head_dim].
    """
    q, k, v = _projected(row, inside, x, positions)
    real = positions >= 0
    slots = jnp.arange(positions.shape[1], dtype=positions.dtype)[None, :]
    pads = jnp.max(jnp.where(real, slots - positions, 0), axis=1)
    sight = Sight(_each(row, real), 0, _each(row, pads), _sinks(row, inside, len(x)))
    y = _attended(row, q, k, v, sight, inside.compute)
    return inside.linear(inside.names.out, y), None


def cached_attention(
    row: Attention, inside: Inside, x: Float[Array, "b t k"], past: Past
) -> tuple[Float[Array, "b t k"], Kept]:
    """`self_attention` of tokens that come after those in `past`, and what is kept then: the keys
    and values of both.
    """
    q, k, v = _projected(row, inside, x, past.slots.positions(x.shape[1]))
    assert past.kept is not None
    kept = past.kept.with_tokens(k, v, past.slots.start, inside.compute)
    sinks = _sinks(row, inside, len(x))
    y = looked_back(row, q, kept, past.slots, inside.compute, sinks)
    return inside.linear(inside.names.out, y), kept


def looked_back(  # noqa: PLR0913  sinks are few and rare
    row: Attention,
    q: Float[Array, "n g t d"],
    kept: Kept,
    slots: Slots,
    compute: Compute,
    sinks: Float[Array, "n g"] | None = None,
) -> Float[Array, "b t k"]:
    """What the queries find in what is kept. Few of them read codes where they are."""
    if compute.cache is not None and q.shape[2] <= _FEW and not _unlike(row):
        return _side_by_side(row, _in_codes(row, q, kept, slots, compute))
    real = _each(row, slots.real(kept.slots))
    sight = Sight(real, slots.start, _each(row, slots.pads), sinks)
    k, v = kept.read(compute)
    if compute.cache is not None:  # what codes stand for in empty slots may be no number
        empty = jnp.arange(kept.slots, dtype=jnp.int32) >= slots.start + q.shape[2]
        v = jnp.where((sight.real & ~empty[None, :])[:, :, None], v, 0)
    return _attended(row, q, k, v, sight, compute)


def _each(row: Attention, a: Array) -> Array:
    """What is known of every sequence, for each of its key/value heads."""
    return jnp.repeat(a, row.kv_heads, axis=0)


def _unlike(row: Attention) -> bool:
    """Whether scores are more than scaled products, in what the kernel sees."""
    choices = (row.cap, row.alibi, row.sparse, row.chunk, row.value_dim)
    return row.sinks or any(choice is not None for choice in choices)


def _sinks(row: Attention, inside: Inside, rows: int) -> Float[Array, "n g"] | None:
    """The score of nothing, for every query head of every key/value head of every sequence."""
    if not row.sinks:
        return None
    own = wide(inside.tensor(inside.names.sinks)).reshape(row.kv_heads, -1)
    return jnp.tile(own, (rows, 1))


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
    row: Attention, inside: Inside, x: Array, positions: Array
) -> tuple[Float[Array, "n g t d"], Float[Array, "n t d"], Float[Array, "n t m"]]:
    """Rotated queries, keys and values, and the latter two under the names they are kept under;
    n = b * kv_heads.
    """
    names = inside.names
    q, k, v = queries_keys_values(row, inside, x, positions)
    k, v = checkpoint_name(k, names.kept_k), checkpoint_name(v, names.kept_v)
    t, d = k.shape[2:]
    q = q.reshape(-1, row.heads // row.kv_heads, t, d)
    return q, k.reshape(-1, t, d), v.reshape(-1, t, row.values)


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


def _in_chunks(
    row: Attention,
    q: Float[Array, "n g t d"],
    k: Float[Array, "n e d"],
    v: Float[Array, "n e m"],
    sight: Sight,
    compute: Compute,
) -> Float[Array, "n g t m"]:
    t = q.shape[2]
    chunk = max(_CHUNK, -(-t // _MOST_CHUNKS))

    def one_head(operands: tuple[Array, Array, Array, Array, Heads]) -> Array:
        q, k, v, real, heads = operands
        outs = []
        for start in range(0, t, chunk):
            stop = min(start + chunk, t)
            keys = _reach(row, sight, start, stop)
            view = view_of(row, sight, (start, stop), keys, heads)
            seen = slice(*keys)
            view = view._replace(allowed=view.allowed & real[None, None, seen])
            outs.append(_softmax_values(row, q[:, start:stop], k[seen], v[seen], view, compute))
        return jnp.concatenate(outs, axis=1)

    return lax.map(one_head, (q, k, v, sight.real, heads_of(row, sight)))


def _batched(
    row: Attention,
    q: Float[Array, "n g t d"],
    k: Float[Array, "n e d"],
    v: Float[Array, "n e m"],
    sight: Sight,
    compute: Compute,
) -> Float[Array, "n g t m"]:
    view = view_of(row, sight, (0, q.shape[2]), (0, k.shape[1]), heads_of(row, sight))
    allowed = view.allowed.reshape((-1, *view.allowed.shape[-3:]))
    view = view._replace(allowed=allowed & sight.real[:, None, None, :])
    return _softmax_values(row, q, k, v, view, compute)


def _reach(row: Attention, sight: Sight, start: int, stop: int) -> tuple[int, int]:
    """The range of keys that the queries from `start` to `stop` can see, as far as it is known."""
    if not isinstance(sight.first, int):
        return 0, sight.real.shape[1]
    first = sight.first + start
    return 0 if row.window is None else max(0, first - row.window + 1), sight.first + stop


def _softmax_values(
    row: Attention,
    q: Float[Array, "*lead g c d"],
    k: Float[Array, "*lead e d"],
    v: Float[Array, "*lead e m"],
    view: View,
    compute: Compute,
) -> Float[Array, "*lead g c m"]:
    *lead, g, c, d = q.shape
    product = {"precision": compute.precision, "preferred_element_type": jnp.float32}
    scores = jnp.einsum("...qd,...ed->...qe", q.reshape(*lead, g * c, d), k, **product)
    scores = scores.reshape(*lead, g, c, -1) * row.scale
    if view.bias is not None:
        scores = scores + view.bias
    if row.cap is not None:
        scores = row.cap * jnp.tanh(scores / row.cap)
    scores = jnp.where(view.allowed, scores, _MASKED)
    most = jnp.max(scores, axis=-1, keepdims=True)
    if view.sinks is not None:
        most = jnp.maximum(most, view.sinks)
    weights = jnp.exp(scores - most)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    if view.sinks is not None:
        total = total + jnp.exp(view.sinks - most)
    weights = settle(weights, compute).reshape(*lead, g * c, -1)
    out = jnp.einsum("...qe,...ed->...qd", weights, v, **product)
    out = out.reshape(*lead, g, c, v.shape[-1])
    return settle(out / total, compute)


ATTENTIONS = {"chunks": _in_chunks, "batched": _batched}
"""Compute.attention -> function of (row, q, k, v, sight, compute)."""
