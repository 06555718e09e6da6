# SPDX-License-Identifier: Apache-2.0
"""Where a model's parameters lie: tensor names, shapes and order, which linears a block has, which
share an input.

Order is always that of the modules (layer 2 before layer 10), as a checkpoint lists them, never
that of a sorted tree.
"""

from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import NamedTuple

from .spec import BlockKind, ModelSpec

Shape = tuple[int, ...]


def kinds(spec: ModelSpec) -> tuple[BlockKind, ...]:
    """The kind of every block, in order."""
    return spec.blocks


def block_prefix(spec: ModelSpec, i: int) -> str:
    """The name of block `i`, the first part of its tensors' names: "model.layers.3"."""
    return spec.names.block.format(i)


def param_shapes(spec: ModelSpec) -> dict[str, Shape]:
    """Name and shape of every parameter, in module order. A tied model has no head of its own."""
    names = spec.names
    shapes: dict[str, Shape] = {f"{names.embed}.weight": (spec.vocab, spec.hidden)}
    for i, kind in enumerate(spec.blocks):
        prefix = block_prefix(spec, i)
        shapes |= {f"{prefix}.{name}": shape for name, shape in block_shapes(spec, kind).items()}
    shapes[f"{names.final_norm}.weight"] = (spec.hidden,)
    if not spec.tied:
        shapes[f"{names.head}.weight"] = (spec.vocab, spec.hidden)
    return shapes


def block_shapes(spec: ModelSpec, kind: BlockKind) -> dict[str, Shape]:
    """Name, relative to the block, and shape of every parameter of one block, in module order."""
    names, attention, mlp = spec.names, kind.attention, kind.mlp
    shapes: dict[str, Shape] = {}
    for name, n, k, bias in _attention_linears(spec, kind):
        shapes |= _linear(name, n, k, bias)
    if attention.qk_norm is not None:
        shapes |= {f"{name}.weight": (attention.head_dim,) for name in (names.q_norm, names.k_norm)}
    shapes |= _linear(names.gate, mlp.inner, spec.hidden, mlp.bias)
    shapes |= _linear(names.up, mlp.inner, spec.hidden, mlp.bias)
    shapes |= _linear(names.down, spec.hidden, mlp.inner, mlp.bias)
    return shapes | {
        f"{name}.weight": (spec.hidden,) for name in (names.input_norm, names.mlp_norm)
    }


def _attention_linears(spec: ModelSpec, kind: BlockKind) -> Iterator[tuple[str, int, int, bool]]:
    names, row = spec.names, kind.attention
    queries, keys = row.heads * row.head_dim, row.kv_heads * row.head_dim
    yield names.q, queries, spec.hidden, row.qkv_bias
    yield names.k, keys, spec.hidden, row.qkv_bias
    yield names.v, keys, spec.hidden, row.qkv_bias
    yield names.out, spec.hidden, queries, row.out_bias


def _linear(name: str, n: int, k: int, bias: bool) -> dict[str, Shape]:
    return {f"{name}.weight": (n, k)} | ({f"{name}.bias": (n,)} if bias else {})


def input_groups(spec: ModelSpec, kind: BlockKind) -> tuple[tuple[str, ...], ...]:
    """The linears of a block in module order, those that read the same input together; names
    relative to the block.
    """
    names = spec.names
    return ((names.q, names.k, names.v), (names.out,), (names.gate, names.up), (names.down,))


def norm_readers(spec: ModelSpec, kind: BlockKind) -> dict[str, tuple[str, ...]]:
    """Norm -> the linears that read its output, all of them; names relative to the block."""
    names = spec.names
    return {names.input_norm: (names.q, names.k, names.v), names.mlp_norm: (names.gate, names.up)}


def row_feeders(spec: ModelSpec, kind: BlockKind) -> dict[str, str]:
    """Linear -> the one whose output channels are its input channels, each times something that the
    other does not know; names relative to the block.
    """
    names, row = spec.names, kind.attention
    found = {names.down: names.up}
    return found | ({names.out: names.v} if row.heads == row.kv_heads else {})


class Shared(NamedTuple):
    """How the input channels of an output projection share those of the values: channel
    (key head, query head of it, channel of a head) is channel (key head, channel) of the values.
    """

    kv_heads: int
    group: int
    head_dim: int


def value_reader(spec: ModelSpec, kind: BlockKind) -> tuple[str, str, Shared]:
    """The linear that reads values after attention has mixed tokens, the one that makes them, and
    how their channels belong together; names relative to the block.
    """
    row = kind.attention
    shared = Shared(row.kv_heads, row.heads // row.kv_heads, row.head_dim)
    return spec.names.out, spec.names.v, shared


def linears(spec: ModelSpec, kind: BlockKind) -> tuple[str, ...]:
    """The linears of a block in module order; names relative to the block."""
    return tuple(name for group in input_groups(spec, kind) for name in group)


def is_ignored(spec: ModelSpec, name: str) -> bool:
    """Whether a checkpoint may hold the tensor `name` although it is no parameter.

    True for buffers that old checkpoints keep, and for the copy of the embedding some tied models
    ship as a head.
    """
    if spec.tied and name == f"{spec.names.head}.weight":
        return True
    return any(fnmatchcase(name, glob) for glob in spec.names.buffers)
