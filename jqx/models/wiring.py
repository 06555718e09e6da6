# SPDX-License-Identifier: Apache-2.0
"""What is connected with what in a block: which linears read the same input, which norm they read,
and whose channels are whose. Names are relative to the block.
"""

from typing import NamedTuple

from jqx.tensors.stacks import EACH, member_name

from .layout import Shape, block_prefix, block_shapes, param_shapes
from .spec import LAYOUTS, Attention, BlockKind, Experts, Mlp, ModelSpec
from .stores import linears_of

Group = tuple[str, ...]

PASSES_FACTORS = frozenset({"relu"})
"""Activations of which a positive factor of the input is one of the output."""


def input_groups(spec: ModelSpec, kind: BlockKind) -> tuple[Group, ...]:
    """The linears of a block in module order, those that read the same input together."""
    first, *rest = _attention_groups(spec, kind)
    inner, *outer = _mlp_groups(spec, kind)
    row = LAYOUTS[kind.layout]
    if row.parallel and not row.own:
        groups = (first + inner, *rest, *outer)
    else:
        groups = (first, *rest, inner, *outer)
    return tuple(group for group in groups if group)


def linears(spec: ModelSpec, kind: BlockKind) -> tuple[str, ...]:
    """The linears of a block in module order."""
    parts = (*_attention_groups(spec, kind), *_mlp_groups(spec, kind))
    return tuple(name for group in parts for name in group)


def _attention_groups(spec: ModelSpec, kind: BlockKind) -> tuple[Group, ...]:
    """The linears that read the input of attention, further ones, and those that read what it
    found.
    """
    names, row = spec.names, kind.attention
    if row is None:
        return ((),)
    if not isinstance(row, Attention):
        return ((names.replaced_attention,),)
    if row.latent is not None:
        first = (names.q,) if row.latent.q_rank is None else (names.q_a,)
        more = () if row.latent.q_rank is None else (names.q_b,)
        return (*first, names.kv_a), more, (names.kv_b,), (names.out,)
    separate = row.qkv == "separate"
    return (names.q, names.k, names.v) if separate else (names.qkv,), (names.out,)


def _mlp_groups(spec: ModelSpec, kind: BlockKind) -> tuple[Group, ...]:
    """The linears that read the input of the MLP, and further ones. Experts, and what is beside
    them, have groups of their own: a router is not quantized with them.
    """
    names, row = spec.names, kind.mlp
    if row is None:
        return ((),)
    if isinstance(row, Experts):
        return ((names.router,), *_beside_groups(spec, row), *_expert_groups(spec, row))
    if not isinstance(row, Mlp):
        return ((names.replaced_mlp,),)
    return _groups_of(spec, row, "{}")


def _groups_of(spec: ModelSpec, row: Mlp, field: str) -> tuple[Group, Group]:
    """The linears of an MLP; `field`: their names as fields of Names."""
    *inner, last = (
        getattr(spec.names, field.format(name)).removesuffix(".weight")
        for name, _, _ in linears_of(row, spec.hidden)
    )
    return tuple(inner), (last,)


def _beside_groups(spec: ModelSpec, row: Experts) -> tuple[Group, ...]:
    found: list[Group] = []
    if row.shared is not None:
        found += _groups_of(spec, row.shared, "shared_{}")
    if row.shared_gate:
        found.append((spec.names.shared_scorer,))
    if row.residual is not None:
        found += _groups_of(spec, row.residual, "residual_{}")
    return tuple(found)


def _expert_groups(spec: ModelSpec, row: Experts) -> tuple[Group, ...]:
    """Those of each expert; none where all of them are in one tensor."""
    groups = _groups_of(spec, row.each, "expert_{}")
    if not all(EACH in name for group in groups for name in group):
        return ()
    return tuple(
        tuple(member_name(name, e) for name in group) for e in range(row.number) for group in groups
    )


def norm_readers(spec: ModelSpec, kind: BlockKind) -> dict[str, Group]:
    """Norm -> the linears that read its output, where nothing else does. Not that of experts: their
    router reads it too.
    """
    row, names = LAYOUTS[kind.layout], spec.names
    if not row.before or kind.normed_residual:
        return {}
    first, inner = _attention_groups(spec, kind)[0], _mlp_groups(spec, kind)[0]
    if isinstance(kind.mlp, Experts):
        inner = ()
    if row.parallel and not row.own:
        return {names.input_norm: first + inner}
    found = {names.input_norm: first, **_latent_readers(spec, kind), names.mlp_norm: inner}
    return {norm: readers for norm, readers in found.items() if readers}


def _latent_readers(spec: ModelSpec, kind: BlockKind) -> dict[str, Group]:
    """The linears that read the norms inside attention."""
    row, names = kind.attention, spec.names
    if not isinstance(row, Attention) or row.latent is None:
        return {}
    queries = {} if row.latent.q_rank is None else {names.q_a_norm: (names.q_b,)}
    return {**queries, names.kv_a_norm: (names.kv_b,)}


def row_feeders(spec: ModelSpec, kind: BlockKind) -> dict[str, str]:
    """Linear -> the one whose output channels are its input channels, each times something that the
    other does not know.
    """
    names, found = spec.names, {}
    if isinstance(kind.mlp, Mlp) and _feeds(kind.mlp):
        found[names.down] = names.up
    row = kind.attention
    if value_reader(spec, kind) is not None and isinstance(row, Attention):
        found |= {names.out: names.v} if row.heads == row.kv_heads else {}
    return found


def _feeds(row: Mlp) -> bool:
    return row.form == "gated" or (row.form == "plain" and row.activation in PASSES_FACTORS)


class Shared(NamedTuple):
    """How the input channels of an output projection share those of the values: channel
    (key head, query head of it, channel of a head) is channel (key head, channel) of the values.
    """

    kv_heads: int
    group: int
    head_dim: int


def value_reader(spec: ModelSpec, kind: BlockKind) -> tuple[str, str, Shared] | None:
    """The linear that reads values after attention has mixed tokens, the one that makes them, and
    how their channels belong together; None where no linear makes values alone, or they are
    clipped.
    """
    row = kind.attention
    if not isinstance(row, Attention) or row.qkv != "separate" or row.clip is not None:
        return None
    shared = Shared(row.kv_heads, row.heads // row.kv_heads, row.head_dim)
    return spec.names.out, spec.names.v, shared


def linear_shapes(spec: ModelSpec) -> dict[str, Shape]:
    """Path and [n, k] of everything that could be quantized: the linears of blocks, and a head of
    its own.
    """
    every, names = param_shapes(spec), spec.names
    found = {}
    for i, kind in enumerate(spec.blocks):
        shapes, prefix = block_shapes(spec, kind), block_prefix(spec, i)
        for name in linears(spec, kind):
            shape = shapes[f"{name}.weight"]
            found[f"{prefix}.{name}"] = shape[::-1] if kind.transposed else shape
    if not spec.tied:
        found[names.head] = every[f"{names.head}.weight"]
    return {
        path: found[path] for path in (n.removesuffix(".weight") for n in every) if path in found
    }


def transposed_linears(spec: ModelSpec) -> frozenset[str]:
    """The linears whose weights are [k, n] on disk."""
    return frozenset(
        f"{block_prefix(spec, i)}.{name}"
        for i, kind in enumerate(spec.blocks)
        if kind.transposed
        for name in linears(spec, kind)
    )
