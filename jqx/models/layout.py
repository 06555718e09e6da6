# SPDX-License-Identifier: Apache-2.0
"""Where a model's parameters lie: tensor names, shapes and order.

Order is always that of the modules (layer 2 before layer 10), as a checkpoint lists them, never
that of a sorted tree.
"""

from collections.abc import Collection, Iterator
from dataclasses import fields, replace
from fnmatch import fnmatchcase

from .spec import LAYOUTS, Attention, BlockKind, Mlp, ModelSpec, Norm

Shape = tuple[int, ...]


def kinds(spec: ModelSpec) -> tuple[BlockKind, ...]:
    """The kind of every block, in order."""
    return spec.blocks


def block_prefix(spec: ModelSpec, i: int) -> str:
    """The name of block `i`, the first part of its tensors' names: "model.layers.3"."""
    return spec.names.block.format(i)


def param_shapes(spec: ModelSpec) -> dict[str, Shape]:
    """Name and shape of every parameter, in module order. A tied model has no head of its own."""
    shapes = _first_shapes(spec)
    for i, kind in enumerate(spec.blocks):
        prefix = block_prefix(spec, i)
        shapes |= {f"{prefix}.{name}": shape for name, shape in block_shapes(spec, kind).items()}
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
    """Name, relative to the block, and shape of every parameter of one block, in module order."""
    shapes: dict[str, Shape] = {}
    for name, n, k, bias in _attention_linears(spec, kind):
        shapes |= _linear(name, (n, k), bias, kind.transposed)
    if isinstance(kind.attention, Attention):
        shapes |= _qk_norms(spec, kind.attention)
    for name, n, k, bias in _mlp_linears(spec, kind):
        shapes |= _linear(name, (n, k), bias, kind.transposed)
    for name in _norms(spec, kind):
        shapes |= _norm(kind.norm, name, (spec.hidden,))
    return shapes


def _norms(spec: ModelSpec, kind: BlockKind) -> Iterator[str]:
    names, row = spec.names, LAYOUTS[kind.layout]
    if kind.attention is not None:
        yield from (names.input_norm,) if row.before else ()
        yield from (names.attention_end,) if row.after or row.summed else ()
    if kind.mlp is not None:
        yield from (names.mlp_norm,) if row.before and row.own >= row.parallel else ()
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
    else:
        yield names.qkv, queries + 2 * keys, spec.hidden, row.qkv_bias
    yield names.out, spec.hidden, queries, row.out_bias


def _mlp_linears(spec: ModelSpec, kind: BlockKind) -> Iterator[tuple[str, int, int, bool]]:
    names, row = spec.names, kind.mlp
    if row is None:
        return
    if not isinstance(row, Mlp):
        yield names.replaced_mlp, spec.hidden, spec.hidden, False
        return
    for field, times in MLP_INPUTS[row.form]:
        yield getattr(names, field), times * row.inner, spec.hidden, row.bias
    yield names.down, spec.hidden, row.inner, row.bias


MLP_INPUTS: dict[str, tuple[tuple[str, int], ...]] = {
    "gated": (("gate", 1), ("up", 1)),
    "fused_gated": (("gate_up", 2),),
    "plain": (("up", 1),),
    "gegelu": (("gate_up", 2),),
}
"""Mlp.form -> the linears that read its input, as fields of Names, and their rows to a channel."""


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
