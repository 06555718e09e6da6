# SPDX-License-Identifier: Apache-2.0
"""A decoder as four functions of its parameters: embed, block (once per layer), head, and their
chain, forward.

    h = embed(ids);  h = block(h) for every layer;  logits = head(h)
    block: h = h + attention(norm(h));  h = h + mlp(norm(h))

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

from .attention import cached_attention, keys_and_values, self_attention
from .cache import Kept, Past
from .layers import Params, activate, linear, module, norm, settle, wide
from .layout import block_prefix
from .rope import turns
from .spec import FLOAT32, BlockKind, Compute, ModelSpec
from .thin import FEW, few_rows

_jit = partial(jax.jit, static_argnames=("spec", "compute"))
_jit_block = partial(jax.jit, static_argnames=("spec", "kind", "compute"))


@_jit
def embed(
    spec: ModelSpec, params: Params, ids: Int[Array, "b t"], compute: Compute = FLOAT32
) -> Float[Array, "b t k"]:
    """The hidden states before the first block."""
    return quantized(partial(_embed, spec, compute=compute))(params, ids)


def _embed(spec: ModelSpec, params: Params, ids: Array, compute: Compute) -> Array:
    weight = module(params, spec.names.embed)["weight"]
    h = settle(wide(weight[ids]), compute)
    if spec.embedding_scale is None:
        return h
    scale = float(np.float32(spec.embedding_scale).astype(weight.dtype).astype(compute.dtype))
    return settle(wide(h) * scale, compute)


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
        attend = partial(self_attention, kind.attention, spec.names, params, positions=positions)
        return _block(spec, kind, params, h, attend, compute)[0]

    named = _stored_kv(spec, block_params, compute)
    return quantized(run, named, settle=_settling(compute))(block_params, h, positions)


@_jit_block
def cached_block(
    spec: ModelSpec,
    kind: BlockKind,
    block_params: Params,
    h: Float[Array, "b t k"],
    past: Past,
    compute: Compute = FLOAT32,
) -> tuple[Float[Array, "b t k"], Kept]:
    """`block` for tokens that come after those in `past`, and what is kept after them."""

    def run(params: Params, h: Array, past: Past) -> tuple[Array, Kept]:
        attend = partial(cached_attention, kind.attention, spec.names, params, past=past)
        return _block(spec, kind, params, h, attend, compute)

    named, product = _stored_kv(spec, block_params, compute), _product(block_params, h, compute)
    return quantized(run, named, product, _settling(compute))(block_params, h, past)


def _settling(compute: Compute) -> Callable[[Array], Array]:
    """What is done to rounded inputs, keys and values: they are results of operations too."""
    return lambda x: settle(wide(x), compute)


def _product(params: Params, h: Array, compute: Compute) -> Callable[[Met], Array | None] | None:
    """How states `h` are multiplied with weights, where not as written."""
    few = h.shape[0] * h.shape[1] <= FEW
    return few_rows(params, compute) if few and compute.attention == "chunks" else None


def _block(
    spec: ModelSpec,
    kind: BlockKind,
    params: Params,
    h: Array,
    attend: Callable[..., tuple[Array, Any]],
    compute: Compute,
) -> tuple[Array, Any]:
    """The states after a block, and what `attend` keeps besides its result."""
    names = spec.names
    x = norm(kind.norm, module(params, names.input_norm), h, compute)
    y, kept = attend(x=x, compute=compute)
    h = settle(wide(h) + wide(y), compute)
    x = norm(kind.norm, module(params, names.mlp_norm), h, compute)
    return settle(wide(h) + wide(_mlp(spec, kind, params, x, compute)), compute), kept


def _stored_kv(
    spec: ModelSpec, params: Params, compute: Compute
) -> dict[str, Callable[[Array], Array]]:
    """What is done to keys and values, by the names they are kept under: rounded as the cache
    stores them.
    """
    names, cache = spec.names, spec.kv_cache
    if cache is None:
        return {}

    def stored(name: str, letter: str) -> Callable[[Array], Array]:
        beside = module(params, name)
        scale, bias = beside.get(f"{letter}_scale"), beside.get(f"{letter}_bias")
        return lambda x: _settling(compute)(fake_kv(x, cache, scale, bias))

    return {names.kept_k: stored(names.k, "k"), names.kept_v: stored(names.v, "v")}


def _mlp(spec: ModelSpec, kind: BlockKind, params: Params, x: Array, compute: Compute) -> Array:
    names = spec.names
    gate = activate(kind.mlp.activation, linear(module(params, names.gate), x, compute), compute)
    up = linear(module(params, names.up), x, compute)
    return linear(module(params, names.down), settle(wide(gate) * wide(up), compute), compute)


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
    h = norm(spec.final_norm, module(params, names.final_norm), h, compute)
    weights = module(params, names.embed if spec.tied else names.head)
    return wide(linear(weights, h, compute))


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
    row = kind.attention
    by = turns(row.rope, row.head_dim, positions, compute)
    return keys_and_values(row, spec.names, block_params, x, by, compute)


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
        positions = jnp.broadcast_to(jnp.arange(ids.shape[1])[None, :], ids.shape)
    h = embed(spec, params, ids, compute)
    for i, kind in enumerate(spec.blocks):
        h = block(spec, kind, module(params, block_prefix(spec, i)), h, positions, compute)
    return head(spec, params, h, compute)


def positions_of(mask: Bool[Array, "b t"]) -> Int[Array, "b t"]:
    """Positions for a batch padded on either side: `mask` is true at tokens; padding gets -1."""
    return jnp.where(mask, jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1, -1)
