# SPDX-License-Identifier: Apache-2.0
"""Where a model's parameters lie: tensor names, shapes and order.

Order is always that of the modules (layer 2 before layer 10), as a checkpoint lists them, never
that of a sorted tree.
"""

from collections.abc import Collection, Iterator
from dataclasses import fields, replace
from fnmatch import fnmatchcase

from jqx.tensors.stacks import members

from .spec import LAYOUTS, Attention, BlockKind, Experts, Latent, Mlp, ModelSpec, Norm
from .stores import linears_of, tensor_shapes

Shape = tuple[int, ...]


def kinds(spec: ModelSpec) -> tuple[BlockKind, ...]:
    """The kind of every block, in order."""
    return spec.blocks


def block_prefix(spec: ModelSpec, i: int) -> str:
    """The name of block `i`, the first part of its tensors' names: "model.layers.3"."""
    return spec.names.block.format(i)


def param_shapes(spec: ModelSpec) -> dict[str, Shape]:
    """Name and shape of every tensor of a checkpoint, in module order. A tied model has no head of
    its own.
    """
    return members(leaf_shapes(spec))


def leaf_shapes(spec: ModelSpec) -> dict[str, Shape]:
    """`param_shapes` as parameters are in memory: tensors that each expert has are one stack, under
    their name with "{}" in the place of its number.
    """
    shapes = _first_shapes(spec)
    for i, kind in enumerate(spec.blocks):
        prefix = block_prefix(spec, i)
        own = block_leaf_shapes(spec, kind)
        shapes |= {f"{prefix}.{name}": shape for name, shape in own.items()}
    return shapes | _last_shapes(spec)


def _first_shapes(spec: ModelSpec) -> dict[str, Shape]:
    """What the hidden states before the first block are made of."""
    names, width = spec.names, spec.embed_width or spec.hidden
    shapes: dict[str, Shape] = {f"{names.embed}.weight": (spec.vocab, width)}
    if spec.positions is not None:
        shapes[f"{names.positions}.weight"] = (spec.positions[0], spec.hidden)
    if spec.embed_norm is not None:
        shapes |= _norm(spec.embed_norm, names.embed_norm, (spec.hidden,))
    if spec.embed_width is not None:
        shapes[f"{names.project_in}.weight"] = (spec.hidden, spec.embed_width)
    return shapes


def _last_shapes(spec: ModelSpec) -> dict[str, Shape]:
    """What logits are made with, but for a tied embedding."""
    names, width = spec.names, spec.embed_width or spec.hidden
    shapes: dict[str, Shape] = {}
    if spec.final_norm is not None:
        shapes |= _norm(spec.final_norm, names.final_norm, (spec.hidden,))
    if spec.embed_width is not None:
        shapes[f"{names.project_out}.weight"] = (spec.embed_width, spec.hidden)
    if not spec.tied:
        shapes |= _linear(names.head, (spec.vocab, width), spec.head_bias)
    return shapes


def embed_tensors(spec: ModelSpec) -> tuple[str, ...]:
    """The names of the parameters that `embed` needs, the embedding first."""
    return tuple(_first_shapes(spec))


def head_tensors(spec: ModelSpec) -> tuple[str, ...]:
    """The names of the parameters that `head` needs, the tensor that makes logits last."""
    found = list(_last_shapes(spec))
    weight = f"{spec.names.embed if spec.tied else spec.names.head}.weight"
    return (*(name for name in found if name != weight), weight)


def block_shapes(spec: ModelSpec, kind: BlockKind) -> dict[str, Shape]:
    """Name, relative to the block, and shape of every tensor of one block, in module order."""
    return members(block_leaf_shapes(spec, kind))


def block_leaf_shapes(spec: ModelSpec, kind: BlockKind) -> dict[str, Shape]:
    """`block_shapes` as parameters are in memory."""
    return front_shapes(spec, kind) | expert_shapes(spec, kind)


def expert_shapes(spec: ModelSpec, kind: BlockKind) -> dict[str, Shape]:
    """Those of `block_leaf_shapes` that experts are made of."""
    row = kind.mlp
    return tensor_shapes(row, spec.names, spec.hidden) if isinstance(row, Experts) else {}


def front_shapes(spec: ModelSpec, kind: BlockKind) -> dict[str, Shape]:
    """Those of `block_leaf_shapes` that are no experts': all of a block without any."""
    shapes: dict[str, Shape] = {}
    for name, n, k, bias in _attention_linears(spec, kind):
        shapes |= _linear(name, (n, k), bias, kind.transposed)
    if isinstance(kind.attention, Attention):
        shapes |= _attention_extras(spec, kind.attention)
    for name, n, k, bias in _mlp_linears(spec, kind):
        shapes |= _linear(name, (n, k), bias, kind.transposed)
    if isinstance(kind.mlp, Experts) and kind.mlp.router.corrected:
        shapes[spec.names.correction] = (kind.mlp.number,)
    for name in _norms(spec, kind):
        shapes |= _norm(kind.norm, name, (spec.hidden,))
    return shapes


def _attention_extras(spec: ModelSpec, row: Attention) -> dict[str, Shape]:
    """What attention has besides linears."""
    names, shapes = spec.names, _qk_norms(spec, row)
    if row.sinks:
        shapes[names.sinks] = (row.heads,)
    if (latent := row.latent) is not None:
        if latent.q_rank is not None:
            shapes |= _norm(latent.norm, names.q_a_norm, (latent.q_rank,))
        shapes |= _norm(latent.norm, names.kv_a_norm, (latent.kv_rank,))
    return shapes


def _norms(spec: ModelSpec, kind: BlockKind) -> Iterator[str]:
    names, row = spec.names, LAYOUTS[kind.layout]
    if kind.attention is not None:
        yield from (names.input_norm,) if row.before else ()
        yield from (names.attention_end,) if row.after or row.summed else ()
    if kind.mlp is not None:
        yield from (names.mlp_norm,) if row.before and row.own >= row.parallel else ()
        yield from (names.residual_norm,) if row.aside else ()
        yield from (names.mlp_end,) if row.after or row.summed else ()


def _attention_linears(spec: ModelSpec, kind: BlockKind) -> Iterator[tuple[str, int, int, bool]]:
    names, row = spec.names, kind.attention
    if row is None:
        return
    if not isinstance(row, Attention):
        yield names.replaced_attention, spec.hidden, spec.hidden, False
        return
    queries, keys = row.heads * row.head_dim, row.kv_heads * row.head_dim
    if row.qkv == "separate":
        yield names.q, queries, spec.hidden, row.qkv_bias
        yield names.k, keys, spec.hidden, row.qkv_bias
        yield names.v, keys, spec.hidden, row.qkv_bias
    elif row.latent is not None:
        yield from _latent_linears(spec, row, row.latent)
    else:
        yield names.qkv, queries + 2 * keys, spec.hidden, row.qkv_bias
    yield names.out, spec.hidden, row.heads * row.values, row.out_bias


def _latent_linears(
    spec: ModelSpec, row: Attention, latent: Latent
) -> Iterator[tuple[str, int, int, bool]]:
    names, queries = spec.names, row.heads * row.head_dim
    if latent.q_rank is None:
        yield names.q, queries, spec.hidden, False
    else:
        yield names.q_a, latent.q_rank, spec.hidden, row.qkv_bias
        yield names.q_b, queries, latent.q_rank, False
    yield names.kv_a, latent.kv_rank + latent.rotating, spec.hidden, row.qkv_bias
    still = row.head_dim - latent.rotating
    yield names.kv_b, row.heads * (still + row.values), latent.kv_rank, False


def _mlp_linears(spec: ModelSpec, kind: BlockKind) -> Iterator[tuple[str, int, int, bool]]:
    names, row = spec.names, kind.mlp
    if row is None:
        return
    if isinstance(row, Experts):
        yield from _beside_experts(spec, row)
    elif isinstance(row, Mlp):
        yield from _mlp_of(spec, row, "")
    else:
        yield names.replaced_mlp, spec.hidden, spec.hidden, False


def _mlp_of(spec: ModelSpec, row: Mlp, which: str) -> Iterator[tuple[str, int, int, bool]]:
    """The linears of an MLP whose names begin with `which` in Names."""
    for linear, n, k in linears_of(row, spec.hidden):
        yield getattr(spec.names, f"{which}{linear}"), n, k, row.bias


def _beside_experts(spec: ModelSpec, row: Experts) -> Iterator[tuple[str, int, int, bool]]:
    """The router, and what all tokens take beside experts."""
    yield spec.names.router, row.number, spec.hidden, row.router.bias
    if row.shared is not None:
        yield from _mlp_of(spec, row.shared, "shared_")
    if row.shared_gate:
        yield spec.names.shared_scorer, 1, spec.hidden, False
    if row.residual is not None:
        yield from _mlp_of(spec, row.residual, "residual_")


def _qk_norms(spec: ModelSpec, row: Attention) -> dict[str, Shape]:
    shapes: dict[str, Shape] = {}
    if row.qk_norm is None:
        return shapes
    for name, heads in ((spec.names.q_norm, row.heads), (spec.names.k_norm, row.kv_heads)):
        for path, shape in QK_NORM_SHAPES[row.qk_norm_of](name, heads, row.head_dim).items():
            shapes |= _norm(row.qk_norm, path, shape)
    return shapes


QK_NORM_SHAPES = {
    "head": lambda name, heads, size: {name: (size,)},
    "heads": lambda name, heads, size: {name: (heads, size)},
    "each": lambda name, heads, size: {f"{name}.norms.{i}": (size,) for i in range(heads)},
    "all": lambda name, heads, size: {name: (heads * size,)},
}
"""Attention.qk_norm_of -> the norms of queries or keys."""


def _linear(name: str, shape: Shape, bias: bool, transposed: bool = False) -> dict[str, Shape]:
    weight = shape[::-1] if transposed else shape
    return {f"{name}.weight": weight} | ({f"{name}.bias": shape[:1]} if bias else {})


def _norm(row: Norm, name: str, shape: Shape) -> dict[str, Shape]:
    return {f"{name}.weight": shape} | ({f"{name}.bias": shape} if row.bias else {})


def is_ignored(spec: ModelSpec, name: str) -> bool:
    """Whether a checkpoint may hold the tensor `name` although it is no parameter.

    True for buffers that old checkpoints keep, and for the copy of the embedding some tied models
    ship as a head.
    """
    if spec.tied and name == f"{spec.names.head}.weight":
        return True
    return any(fnmatchcase(name, glob) for glob in spec.names.buffers)


def named_as(spec: ModelSpec, tensors: Collection[str]) -> ModelSpec:
    """`spec` with the names that a checkpoint with these `tensors` has: without the prefix of all
    names, where none of them begins with it.
    """
    prefix = spec.names.prefix
    if not prefix or any(name.startswith(prefix) for name in tensors):
        return spec
    values = {f.name: getattr(spec.names, f.name) for f in fields(spec.names)}
    bare = {k: v.removeprefix(prefix) for k, v in values.items() if isinstance(v, str)}
    return replace(spec, names=replace(spec.names, **{**bare, "prefix": ""}))
