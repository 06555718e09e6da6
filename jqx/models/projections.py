# SPDX-License-Identifier: Apache-2.0
"""Queries, keys and values of a block: from one linear or three, normed, turned.

separate   q, k and v are linears
stacked    rows of one linear: all queries, then all keys, then all values
grouped    rows of one linear: for every key head its query heads, its key, its value
latent     of fewer channels each; of a head those that turn come first here, last on disk
"""

import math
from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from .layers import Inside, module, normalised, settle, wide
from .rope import rotate, turns
from .spec import Attention

Flat = tuple[Float[Array, "b t q"], Float[Array, "b t k"], Float[Array, "b t v"]]
Heads = Float[Array, "b h t d"]


def queries_keys_values(
    row: Attention, inside: Inside, x: Float[Array, "b t k"], positions: Int[Array, "b t"]
) -> tuple[Heads, Float[Array, "b kv t d"], Float[Array, "b kv t m"]]:
    """Queries, keys and values of the normed input `x`, the former turned to their positions."""
    names, compute = inside.names, inside.compute
    q, k, v = PROJECTIONS[row.qkv](row, inside, x)
    q, k = _normed(row, inside, names.q_norm, q), _normed(row, inside, names.k_norm, k)
    q, k, v = (_clipped(row, y) for y in (q, k, v))
    if row.rope is not None:
        by = turns(row.rope, row.head_dim, positions, compute)
        q, k = rotate(row.rope, q, by, compute), rotate(row.rope, k, by, compute)
    if row.unit_eps is not None:
        q, k = (settle(normalised(a, row.unit_eps), compute) for a in (q, k))
    if row.log_from is not None:
        q = settle(wide(q) * _logarithms(row.log_from, positions), compute)
    if row.heat is not None:
        q = settle(wide(q) * _heat(*row.heat, positions), compute)
    return q, k, _split(v, row.values)


def _separate(row: Attention, inside: Inside, x: Array) -> Flat:
    names = inside.names
    return inside.linear(names.q, x), inside.linear(names.k, x), inside.linear(names.v, x)


def _stacked(row: Attention, inside: Inside, x: Array) -> Flat:
    queries, keys = row.heads * row.head_dim, row.kv_heads * row.head_dim
    q, k, v = jnp.split(inside.linear(inside.names.qkv, x), (queries, queries + keys), axis=-1)
    return q, k, v


def _grouped(row: Attention, inside: Inside, x: Array) -> Flat:
    y = inside.linear(inside.names.qkv, x)
    lead, group = y.shape[:-1], row.heads // row.kv_heads
    y = y.reshape(*lead, row.kv_heads, group + 2, row.head_dim)
    q, k, v = jnp.split(y, (group, group + 1), axis=-2)
    return q.reshape(*lead, -1), k.reshape(*lead, -1), v.reshape(*lead, -1)


def _latent(row: Attention, inside: Inside, x: Array) -> Flat:
    names, latent = inside.names, row.latent
    assert latent is not None
    if latent.q_rank is None:
        q = inside.linear(names.q, x)
    else:
        few = inside.norm(latent.norm, names.q_a_norm, inside.linear(names.q_a, x))
        q = inside.linear(names.q_b, few)
    still, lead = row.head_dim - latent.rotating, x.shape[:-1]
    first, last = jnp.split(q.reshape(*lead, row.heads, row.head_dim), (still,), axis=-1)
    q = jnp.concatenate([last, first], axis=-1)
    few, turning = jnp.split(inside.linear(names.kv_a, x), (latent.kv_rank,), axis=-1)
    kv = inside.linear(names.kv_b, inside.norm(latent.norm, names.kv_a_norm, few))
    k, v = jnp.split(kv.reshape(*lead, row.heads, still + row.values), (still,), axis=-1)
    shared = jnp.broadcast_to(turning[..., None, :], (*lead, row.heads, latent.rotating))
    k = jnp.concatenate([shared, k], axis=-1)
    return q.reshape(*lead, -1), k.reshape(*lead, -1), v.reshape(*lead, -1)


PROJECTIONS: dict[str, Callable[[Attention, Inside, Array], Flat]] = {
    "separate": _separate,
    "stacked": _stacked,
    "grouped": _grouped,
    "latent": _latent,
}
"""Attention.qkv -> function to queries, keys and values, heads side by side."""


def _clipped(row: Attention, y: Array) -> Array:
    return y if row.clip is None else jnp.clip(y, -row.clip, row.clip)


def _normed(row: Attention, inside: Inside, name: str, y: Float[Array, "b t n"]) -> Heads:
    """Queries or keys in heads, normed if the row says so."""
    if row.qk_norm is None:
        return _split(y, row.head_dim)
    return QK_NORMS[row.qk_norm_of](row, inside, name, y)


def _split(y: Float[Array, "b t n"], head_dim: int) -> Heads:
    return y.reshape(*y.shape[:2], -1, head_dim).transpose(0, 2, 1, 3)


def _norm_of_head(row: Attention, inside: Inside, name: str, y: Array) -> Heads:
    assert row.qk_norm is not None
    return inside.norm(row.qk_norm, name, _split(y, row.head_dim))


def _norm_of_all(row: Attention, inside: Inside, name: str, y: Array) -> Heads:
    assert row.qk_norm is not None
    return _split(inside.norm(row.qk_norm, name, y), row.head_dim)


def _norm_of_heads(row: Attention, inside: Inside, name: str, y: Array) -> Heads:
    return _by_heads(row, inside, name, y, module(inside.params, name)["weight"])


def _norm_of_each(row: Attention, inside: Inside, name: str, y: Array) -> Heads:
    tensors = module(inside.params, name)["norms"]
    weights = [tensors[str(i)]["weight"] for i in range(y.shape[-1] // row.head_dim)]
    return _by_heads(row, inside, name, y, jnp.stack(weights))


def _by_heads(row: Attention, inside: Inside, name: str, y: Array, gains: Array) -> Heads:
    assert row.qk_norm is not None
    gain = inside._replace(params={"gain": {"weight": gains[:, None, :]}})
    return gain.norm(row.qk_norm, "gain", _split(y, row.head_dim))


QK_NORMS: dict[str, Callable[[Attention, Inside, str, Array], Heads]] = {
    "head": _norm_of_head,
    "heads": _norm_of_heads,
    "each": _norm_of_each,
    "all": _norm_of_all,
}
"""Attention.qk_norm_of -> what queries or keys are normed over: each head, with one gain for all,
with a gain [heads, head_dim], or with a tensor for each; or all heads together.
"""


def _logarithms(trained: int, positions: Int[Array, "b t"]) -> Float[Array, "b 1 t 1"]:
    p = (positions + 1).astype(jnp.float32)
    grown = jnp.log(jnp.maximum(p, trained)) / math.log(trained)
    return grown[:, None, :, None]


def _heat(scale: float, floor: float, positions: Int[Array, "b t"]) -> Float[Array, "b 1 t 1"]:
    p = (positions + 1).astype(jnp.float32)
    return (1 + scale * jnp.log1p(jnp.floor(p / floor)))[:, None, :, None]
