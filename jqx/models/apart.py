# SPDX-License-Identifier: Apache-2.0
"""Experts that lie in one tensor, as if each had linears of its own.

mlp.experts.gate_up_proj [e, k, 2 n]   becomes   mlp.experts.0.gate_proj.weight [n, k], ...
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

from jqx.tensors.stacks import member_name

from .spec import BlockKind, Experts, ModelSpec, Names
from .stores import Shape, parts


class Piece(NamedTuple):
    """What a tensor of one expert is of one of all of them: the rows `rows` of expert `e` in
    `tensor`, whose part (linear, leaf) that is.
    """

    tensor: str
    e: int
    part: tuple[str, str]
    rows: slice


APART = {"fused_gated": "gated", "gegelu": "gegelu_apart"}
"""Mlp.form with gate and up in one linear -> that with two."""

ROWS = {
    "fused_gated": lambda inner: {"gate": slice(0, inner), "up": slice(inner, 2 * inner)},
    "gegelu": lambda inner: {"gate": slice(0, None, 2), "up": slice(1, None, 2)},
}
"""Mlp.form with gate and up in one linear -> where the rows of each are."""


def is_fused(kind: BlockKind) -> bool:
    """Whether a block has experts that lie in one tensor."""
    return isinstance(kind.mlp, Experts) and kind.mlp.store != "separate"


def apart(spec: ModelSpec) -> ModelSpec:
    """`spec` with experts that have linears of their own."""
    blocks = tuple(_apart(kind) if is_fused(kind) else kind for kind in spec.blocks)
    base = spec.names.experts
    names = {f"expert_{name}": f"{base}.{{}}.{name}_proj.weight" for name in ("gate", "up", "down")}
    return replace(spec, blocks=blocks, names=replace(spec.names, **names))


def _apart(kind: BlockKind) -> BlockKind:
    row = kind.mlp
    assert isinstance(row, Experts)
    each = replace(row.each, form=APART.get(row.each.form, row.each.form))
    return replace(kind, mlp=replace(row, store="separate", each=each))


def pieces(
    row: Experts, names: Names, own: Names, hidden: int
) -> Iterator[tuple[str, Piece, Shape]]:
    """The tensors that each expert has, of experts that are fused: name, where it lies, shape.
    `names`: those of the fused tensors, `own`: those of `apart`.
    """
    split = ROWS[row.each.form](row.each.inner) if row.each.form in ROWS else {}
    for part in parts(row, names, hidden):
        inside = split if part.linear == "gate_up" else {part.linear: slice(None)}
        for linear, rows in inside.items():
            stem = getattr(own, f"expert_{linear}").removesuffix("weight")
            count = len(range(*rows.indices(part.shape[0])))
            for e in range(row.number):
                piece = Piece(part.tensor, e, (part.linear, part.leaf), rows)
                yield member_name(f"{stem}{part.leaf}", e), piece, (count, *part.shape[1:])
