# SPDX-License-Identifier: Apache-2.0
"""A checkpoint whose experts lie in one tensor, as one in which each has tensors of its own."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from jqx.models import (
    STORES,
    Experts,
    ModelSpec,
    apart,
    block_prefix,
    expert_shapes,
    is_fused,
    kinds,
    pieces,
)
from jqx.models.apart import Piece

from .checkpoints import Checkpoint, TensorInfo
from .checkpoints.layout import nbytes


@dataclass(frozen=True, eq=False)
class UnfusedCheckpoint(Checkpoint):
    """`base` with other names; `own`: tensor of one expert -> its experts, and where it lies."""

    base: Checkpoint | None = None
    own: Mapping[str, tuple[Experts, Piece]] = field(default_factory=dict)

    def read(self, name: str) -> np.ndarray:
        """The tensor `name`: [n, k] of a weight, [n] of a bias."""
        assert self.base is not None
        if name not in self.own:
            return self.base.read(name)
        row, (tensor, e, part, rows) = self.own[name]
        store = STORES[row.store]
        if store.flat:
            found = store.one(self.base.read(tensor), row.number, e, part)
        else:
            found = store.one([self.base.read_member(tensor, e)], row.number, 0, part)
        return np.ascontiguousarray(found[rows])

    def release(self, name: str) -> None:
        """Drop the resident pages of what `name` lies in."""
        assert self.base is not None
        self.base.release(self.own[name][1].tensor if name in self.own else name)

    def check_numbers(self) -> None:
        """As that of `base`."""
        assert self.base is not None
        self.base.check_numbers()


def unfused(checkpoint: Checkpoint, spec: ModelSpec) -> tuple[Checkpoint, ModelSpec]:
    """A view of `checkpoint` and the `spec` of it in which no experts are fused."""
    if not any(is_fused(kind) for kind in kinds(spec)):
        return checkpoint, spec
    separate = apart(spec)
    own = dict(_own(spec, separate))
    fused = {
        f"{block_prefix(spec, i)}.{name}"
        for i, kind in enumerate(kinds(spec))
        for name in (expert_shapes(spec, kind) if is_fused(kind) else ())
    }
    infos = {n: info for n, info in checkpoint.tensors.items() if n not in fused}
    for name, (_, piece, shape) in own.items():
        infos[name] = _info(checkpoint.tensors[piece.tensor], name, shape)
    view = UnfusedCheckpoint(
        checkpoint.path,
        checkpoint.config,
        infos,
        checkpoint.files,
        checkpoint.mapped,
        checkpoint.notes,
        source=checkpoint.source,
        base=checkpoint,
        own={name: (row, piece) for name, (row, piece, _) in own.items()},
    )
    return view, separate


def _own(
    spec: ModelSpec, separate: ModelSpec
) -> Iterator[tuple[str, tuple[Experts, Piece, tuple[int, ...]]]]:
    for i, kind in enumerate(kinds(spec)):
        row, prefix = kind.mlp, block_prefix(spec, i)
        if not isinstance(row, Experts) or row.store == "separate":
            continue
        for name, piece, shape in pieces(row, spec.names, separate.names, spec.hidden):
            at = piece._replace(tensor=f"{prefix}.{piece.tensor}")
            yield f"{prefix}.{name}", (row, at, shape)


def _info(whole: TensorInfo, name: str, shape: tuple[int, ...]) -> TensorInfo:
    size = nbytes(whole.dtype, shape)
    return replace(whole, name=name, shape=shape, end=whole.start + size)
