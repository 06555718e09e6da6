# SPDX-License-Identifier: Apache-2.0
"""A checkpoint whose experts lie in one tensor, as one in which each has tensors of its own."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from jqx.errors import InputError
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

from .architecture import spec_for, together_for
from .checkpoints import Checkpoint, TensorInfo
from .checkpoints.layout import nbytes
from .sources import without_description
from .sources.fused import FUSED


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
        if not self.tensors[name].shape:  # a scale of all experts
            return self.base.read(tensor)
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
    view = _view(checkpoint, infos, {name: (row, piece) for name, (row, piece, _) in own.items()})
    return view, separate


SCALES = ("_weight_scale", "_weight_scale_2", "_input_scale")
"""What ModelOpt puts behind the name of a tensor of experts for its scales."""

Pieces = dict[str, tuple[Experts, Piece, TensorInfo]]
"""Tensor of one expert -> where it lies; the info has the shape of the piece, and the name of what
it is a piece of.
"""


def stored_pieces(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> Pieces:
    """The tensors of all experts that lie in one, quantized or not, of a checkpoint with these
    headers; none for families whose experts do not, and where shapes are not theirs.
    """
    try:
        spec = together_for(without_description(config), tensors)
    except InputError:  # an architecture that is not defined here
        return {}
    found: Pieces = {}
    for name, (row, piece, shape) in _own(spec, apart(spec)):
        whole = tensors.get(piece.tensor)
        if whole is None:
            continue
        turned = piece.part[0] in STORES[row.store].turned and piece.part[1] == "weight"
        k = whole.shape[1 if turned else -1] if len(whole.shape) == 3 else shape[-1]
        found[name] = (row, piece, replace(whole, shape=(shape[0], *[k] * (len(shape) - 1))))
        path, _, leaf = name.rpartition(".")
        for ending in SCALES if leaf == "weight" else ():
            scale = tensors.get(piece.tensor + ending)
            if scale is None or len(scale.shape) not in (0, 3):
                continue
            size = () if not scale.shape else (shape[0], scale.shape[1 if turned else -1])
            at = piece._replace(tensor=scale.name)
            found[f"{path}.{ending[1:]}"] = (row, at, replace(scale, shape=size))
    return found


def apart_tensors(tensors: Mapping[str, TensorInfo], pieces: Pieces) -> dict[str, TensorInfo]:
    """`tensors` with those of each expert in the place of what they are pieces of."""
    fused = {piece.tensor for _, piece, _ in pieces.values()}
    plain = {name: info for name, info in tensors.items() if name not in fused}
    return plain | {name: info for name, (_, _, info) in pieces.items()}


def stored_apart(checkpoint: Checkpoint) -> Checkpoint:
    """A view of a checkpoint whose experts are quantized in one tensor, or are apart in some blocks
    only, in which each has tensors of its own; `checkpoint` itself if they are neither.
    """
    if not (pieces := stored_pieces(checkpoint.config, checkpoint.tensors)):
        return checkpoint
    quantized = any(name.endswith(FUSED) for name in checkpoint.tensors)
    if not quantized and _together(checkpoint):
        return checkpoint
    infos = {
        name: _info(info, name, info.shape)
        for name, info in apart_tensors(checkpoint.tensors, pieces).items()
    }
    return _view(checkpoint, infos, {name: (row, at) for name, (row, at, _) in pieces.items()})


def _together(checkpoint: Checkpoint) -> bool:
    """Whether no expert has tensors of its own. Only for an architecture that is defined."""
    spec = spec_for(without_description(checkpoint.config), checkpoint.tensors)
    return any(is_fused(kind) for kind in spec.blocks)


def _view(
    checkpoint: Checkpoint,
    infos: Mapping[str, TensorInfo],
    own: Mapping[str, tuple[Experts, Piece]],
) -> Checkpoint:
    return UnfusedCheckpoint(
        checkpoint.path,
        checkpoint.config,
        infos,
        checkpoint.files,
        checkpoint.mapped,
        checkpoint.notes,
        source=checkpoint.source,
        base=checkpoint,
        own=own,
    )


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
