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

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jqx.transforms import Met, quantized

from .attention import cached_attention, self_attention
from .cache import Kept, Past
from .compute import FLOAT32, Compute
from .inner import settling, stored_kv, through
from .layers import Inside, Params, linear, module, norm, settle, wide
from .layout import block_prefix
from .projections import queries_keys_values
from .spec import Attention, BlockKind, ModelSpec
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
        return through(kind, inside, h, attend)[0]

    named = stored_kv(spec, kind, block_params, compute)
    return quantized(run, named, settle=settling(compute))(block_params, h, positions)


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
        return through(kind, inside, h, partial(cached_attention, past=past))

    named = stored_kv(spec, kind, block_params, compute)
    product = _product(block_params, h, compute)
    return quantized(run, named, product, settling(compute))(block_params, h, past)


def _product(params: Params, h: Array, compute: Compute) -> Callable[[Met], Array | None] | None:
    """How states `h` are multiplied with weights, where not as written."""
    few = h.shape[0] * h.shape[1] <= FEW
    return few_rows(params, compute) if few and compute.attention == "chunks" else None


@_jit
def head(
    spec: ModelSpec, params: Params, h: Float[Array, "b t k"], compute: Compute = FLOAT32
) -> Float[Array, "b t v"]:
    """Float32 logits of the hidden states after the last block."""
    run = partial(_head, spec, compute=compute)
    return quantized(run, settle=settling(compute))(params, h)


@_jit
def next_logits(
    spec: ModelSpec, params: Params, h: Float[Array, "b 1 k"], compute: Compute = FLOAT32
) -> Float[Array, "b v"]:
    """`head` for the last token of every sequence alone."""
    run, product = partial(_head, spec, compute=compute), _product(params, h, compute)
    return quantized(run, None, product, settling(compute))(params, h)[:, 0]


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
