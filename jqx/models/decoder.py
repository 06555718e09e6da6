# SPDX-License-Identifier: Apache-2.0
"""A decoder as four functions of its parameters: embed, block (once per layer), head, and their
chain, forward.

    h = embed(ids);  h = block(h) for every layer;  logits = head(h)
    block: h = h + attention(norm(h));  h = h + mlp(norm(h)), norms where LAYOUTS says

`params` is the nested dict of the checkpoint's tensors, each bfloat16, float16 or float32, or a
QTensor: that is decoded inside the program of its block, and its inputs are quantized as it says.
`block_params` is the part of it under `block_prefix(spec, i)`. The functions are jitted: every
block of one kind runs one compiled program. Positions count from 0 in a sequence; a negative one
marks padding, which no token sees.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jqx.transforms import Met, fake_kv, quantized

from .attention import cached_attention, self_attention
from .cache import Kept, Past
from .compute import FLOAT32, Compute
from .layers import Inside, Params, linear, module, norm, settle, wide
from .layout import block_prefix
from .mlp import mlp
from .projections import queries_keys_values
from .spec import LAYOUTS, Attention, BlockKind, Mlp, ModelSpec
from .thin import FEW, few_rows

_jit = partial(jax.jit, static_argnames=("spec", "compute"))
_jit_block = partial(jax.jit, static_argnames=("spec", "kind", "compute"))


@_jit
def embed(
    spec: ModelSpec,
    params: Params,
    ids: Int[Array, "b t"],
    compute: Compute = FLOAT32,
    positions: Int[Array, "b t"] | None = None,
) -> Float[Array, "b t k"]:
    """The hidden states before the first block. `positions` as for `forward`."""
    run = partial(_embed, spec, positions=positions, compute=compute)
    return quantized(run)(params, ids)


def _embed(
    spec: ModelSpec, params: Params, ids: Array, positions: Array | None, compute: Compute
) -> Array:
    names = spec.names
    weight = module(params, names.embed)["weight"]
    h = settle(wide(weight[ids]), compute)
    if spec.embedding_scale is not None:
        scale = spec.embedding_scale
        if spec.rounded_scale:
            scale = float(np.float32(scale).astype(weight.dtype).astype(compute.dtype))
        h = settle(wide(h) * scale, compute)
    if spec.embed_width is not None:
        h = linear(module(params, names.project_in), h, compute)
    if spec.positions is not None:
        at = _counted(ids) if positions is None else jnp.maximum(positions, 0)
        table = module(params, names.positions)["weight"]
        h = settle(wide(h) + wide(table[at + spec.positions[1]]), compute)
    if spec.embed_norm is not None:
        h = norm(spec.embed_norm, module(params, names.embed_norm), h, compute)
    return h


def _counted(ids: Array) -> Int[Array, "b t"]:
    return jnp.broadcast_to(jnp.arange(ids.shape[1], dtype=jnp.int32)[None, :], ids.shape)


@_jit_block
def block(
    spec: ModelSpec,
    kind: BlockKind,
    block_params: Params,
    h: Float[Array, "b t k"],
    positions: Int[Array, "b t"],
    compute: Compute = FLOAT32,
) -> Float[Array, "b t k"]:
    """The hidden states after one block."""

    def run(params: Params, h: Array, positions: Array) -> Array:
        inside = Inside(spec.names, params, compute, kind.transposed)
        attend = partial(self_attention, positions=positions)
        return _block(kind, inside, h, attend)[0]

    named = _stored_kv(spec, kind, block_params, compute)
    return quantized(run, named, settle=_settling(compute))(block_params, h, positions)


@_jit_block
def cached_block(
    spec: ModelSpec,
    kind: BlockKind,
    block_params: Params,
    h: Float[Array, "b t k"],
    past: Past,
    compute: Compute = FLOAT32,
) -> tuple[Float[Array, "b t k"], Kept | None]:
    """`block` for tokens that come after those in `past`, and what is kept after them, if any."""

    def run(params: Params, h: Array, past: Past) -> tuple[Array, Kept | None]:
        inside = Inside(spec.names, params, compute, kind.transposed)
        return _block(kind, inside, h, partial(cached_attention, past=past))

    named = _stored_kv(spec, kind, block_params, compute)
    product = _product(block_params, h, compute)
    return quantized(run, named, product, _settling(compute))(block_params, h, past)


def _settling(compute: Compute) -> Callable[[Array], Array]:
    """What is done to rounded inputs, keys and values: they are results of operations too."""
    return lambda x: settle(wide(x), compute)


def _product(params: Params, h: Array, compute: Compute) -> Callable[[Met], Array | None] | None:
    """How states `h` are multiplied with weights, where not as written."""
    few = h.shape[0] * h.shape[1] <= FEW
    return few_rows(params, compute) if few and compute.attention == "chunks" else None


Attend = Callable[..., tuple[Array, Any]]


def _block(kind: BlockKind, inside: Inside, h: Array, attend: Attend) -> tuple[Array, Any]:
    """The states after a block, and what `attend` keeps besides its result."""
    names, row = inside.names, LAYOUTS[kind.layout]
    attention = partial(_attention, kind, inside, attend)
    if row.parallel:
        x = inside.norm(kind.norm, names.input_norm, h)
        other = inside.norm(kind.norm, names.mlp_norm, h) if row.own else x
        y, kept = attention(x)
        both = _sum(y, _mlp(kind, inside, other), inside.compute)
        return _added(kind, h, both, inside.compute), kept
    kept = None
    if kind.attention is not None:
        ends = names.input_norm, names.attention_end
        h, kept = _step(kind, inside, ends, h, attention)
    if kind.mlp is not None:
        ends = names.mlp_norm, names.mlp_end
        h, _ = _step(kind, inside, ends, h, lambda x: (_mlp(kind, inside, x), None))
    return h, kept


def _step(
    kind: BlockKind, inside: Inside, norms: tuple[str, str], h: Array, run: Attend
) -> tuple[Array, Any]:
    """The states after attention or an MLP, and what it keeps; `norms` are those before and after
    it.
    """
    row, (before, after) = LAYOUTS[kind.layout], norms
    x = inside.norm(kind.norm, before, h) if row.before else h
    y, kept = run(x)
    y = inside.norm(kind.norm, after, y) if row.after else y
    h = _added(kind, x if kind.normed_residual else h, y, inside.compute)
    return (inside.norm(kind.norm, after, h) if row.summed else h), kept


def _added(kind: BlockKind, h: Array, y: Array, compute: Compute) -> Array:
    if kind.residual_scale != 1.0:
        y = settle(wide(y) * kind.residual_scale, compute)
    return _sum(h, y, compute)


def _sum(a: Array, b: Array, compute: Compute) -> Array:
    return settle(wide(a) + wide(b), compute)


def _attention(kind: BlockKind, inside: Inside, attend: Attend, x: Array) -> tuple[Array, Any]:
    if isinstance(kind.attention, Attention):
        return attend(kind.attention, inside, x)
    return inside.linear(inside.names.replaced_attention, x), None


def _mlp(kind: BlockKind, inside: Inside, x: Array) -> Array:
    if isinstance(kind.mlp, Mlp):
        return mlp(kind.mlp, inside, x)
    return inside.linear(inside.names.replaced_mlp, x)


def _stored_kv(
    spec: ModelSpec, kind: BlockKind, params: Params, compute: Compute
) -> dict[str, Callable[[Array], Array]]:
    """What is done to keys and values, by the names they are kept under: rounded as the cache
    stores them.
    """
    names, cache = spec.names, spec.kv_cache
    if cache is None or not isinstance(kind.attention, Attention):
        return {}

    def stored(name: str, letter: str) -> Callable[[Array], Array]:
        beside = module(params, name, {})
        scale, bias = beside.get(f"{letter}_scale"), beside.get(f"{letter}_bias")
        return lambda x: _settling(compute)(fake_kv(x, cache, scale, bias))

    return {names.kept_k: stored(names.k, "k"), names.kept_v: stored(names.v, "v")}


@_jit
def head(
    spec: ModelSpec, params: Params, h: Float[Array, "b t k"], compute: Compute = FLOAT32
) -> Float[Array, "b t v"]:
    """Float32 logits of the hidden states after the last block."""
    run = partial(_head, spec, compute=compute)
    return quantized(run, settle=_settling(compute))(params, h)


@_jit
def next_logits(
    spec: ModelSpec, params: Params, h: Float[Array, "b 1 k"], compute: Compute = FLOAT32
) -> Float[Array, "b v"]:
    """`head` for the last token of every sequence alone."""
    run, product = partial(_head, spec, compute=compute), _product(params, h, compute)
    return quantized(run, None, product, _settling(compute))(params, h)[:, 0]


def _head(spec: ModelSpec, params: Params, h: Array, compute: Compute) -> Array:
    names = spec.names
    if spec.final_norm is not None:
        h = norm(spec.final_norm, module(params, names.final_norm), h, compute)
    if spec.embed_width is not None:
        h = linear(module(params, names.project_out), h, compute)
    weights = module(params, names.embed if spec.tied else names.head)
    if spec.unit_head:
        weights = {**weights, "weight": _unit_rows(weights["weight"], compute)}
    logits = wide(linear(weights, h, compute))
    if spec.logit_scale is not None:
        logits = wide(settle(logits * spec.logit_scale, compute))
    if spec.logit_cap is not None:
        logits = wide(settle(spec.logit_cap * jnp.tanh(logits / spec.logit_cap), compute))
    if spec.unused:
        lowest = float(np.finfo(np.float32).min)
        logits = logits.at[..., np.array(spec.unused)].set(lowest)
    return logits


def _unit_rows(weight: Array, compute: Compute) -> Array:
    w = wide(weight)
    length = jnp.sqrt(jnp.sum(w * w, axis=-1, keepdims=True))
    return settle(w / jnp.maximum(length, 1e-12), compute)


@_jit_block
def project_kv(
    spec: ModelSpec,
    kind: BlockKind,
    block_params: Params,
    x: Float[Array, "b t k"],
    positions: Int[Array, "b t"],
    compute: Compute = FLOAT32,
) -> tuple[Float[Array, "b h t d"], Float[Array, "b h t d"]]:
    """Rotated keys and values of one block from `x`, the normed input of its key and value linears.

    They equal what `block` names `Names.kept_k` and `Names.kept_v`, without running the rest of the
    block.
    """
    assert isinstance(kind.attention, Attention)
    inside = Inside(spec.names, block_params, compute, kind.transposed)
    return queries_keys_values(kind.attention, inside, x, positions)[1:]


def forward(
    spec: ModelSpec,
    params: Params,
    ids: Int[Array, "b t"],
    compute: Compute = FLOAT32,
    positions: Int[Array, "b t"] | None = None,
) -> Float[Array, "b t v"]:
    """Float32 logits of every token. `positions` counts 0, 1, ... unless given (`positions_of` a
    padding mask).
    """
    if positions is None:
        positions = _counted(ids)
    h = embed(spec, params, ids, compute, positions)
    for i, kind in enumerate(spec.blocks):
        h = block(spec, kind, module(params, block_prefix(spec, i), {}), h, positions, compute)
    return head(spec, params, h, compute)


def positions_of(mask: Bool[Array, "b t"]) -> Int[Array, "b t"]:
    """Positions for a batch padded on either side: `mask` is true at tokens; padding gets -1."""
    return jnp.where(mask, jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1, -1)
