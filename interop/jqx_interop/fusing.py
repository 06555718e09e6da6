# SPDX-License-Identifier: Apache-2.0
"""Experts that are written in one tensor: those of blocks that are left alone as they lie in the
source, and quantized ones as ModelOpt 0.47 writes Llama 4 and GPT-OSS. Until then each expert has
linears of its own, of which the tensor is made piece by piece.

    experts.0.gate_proj.weight [n, k / 2], ...       experts.gate_up_proj [e, k / 2, 2 n]
    experts.0.gate_proj.weight_scale [n, k / 16]     experts.gate_up_proj_weight_scale
    experts.0.gate_proj.weight_scale_2, input_scale  experts.gate_up_proj_weight_scale_2, ... []
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

import numpy as np

from jqx.config import Choice
from jqx.models import (
    STORES,
    Experts,
    ModelSpec,
    block_prefix,
    is_fused,
    kinds,
    param_shapes,
    pieces,
)
from jqx.models.stores import parts
from jqx.tensors import QTensor

from .architecture import together_for
from .checkpoints import Part, ShardWriter, TensorOut
from .sources import without_description
from .targets import Target, module_and_leaf

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Slab:
    """What a tensor of one expert is of one of all `experts`: the rows `rows`, of `total`, of
    expert `e`, which lies `turned`; `flat`: experts lie one below the other.
    """

    tensor: str
    experts: int
    e: int
    rows: slice
    total: int
    turned: bool
    flat: bool


@dataclass(frozen=True, slots=True)
class Place:
    """Where an array goes: to the tensor `tensor` of shape `shape`, whole if `part` is None, else
    to that part, `turned` or as it is.
    """

    tensor: str
    shape: Shape
    part: Part | None = None
    turned: bool = False
    companion: bool = False


@dataclass(frozen=True, eq=False)
class Fusion:
    """`slabs`: weight or bias of one expert -> where it goes; `linears`: tensor that is quantized
    -> the linears it is made of.
    """

    slabs: Mapping[str, Slab] = field(default_factory=dict)
    linears: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    _lock: Lock = field(default_factory=Lock)
    _found: dict[tuple[str, str], Any] = field(default_factory=dict)

    def members(self, path: str) -> tuple[str, ...]:
        """The linears that share a tensor, and so its scales, with `path`; none if it has its own
        or is not quantized.
        """
        slab = self.slabs.get(f"{path}.weight")
        return () if slab is None else self.linears.get(slab.tensor, ())

    def once(self, path: str, what: str, find: Callable[[tuple[str, ...]], Any]) -> Any:
        """What `find` finds of the linears that share a tensor with `path`, called `what`, which it
        is asked for once; None for a linear that has its own.
        """
        if not (members := self.members(path)):
            return None
        key = (self.slabs[f"{path}.weight"].tensor, what)
        with self._lock:
            if key not in self._found:
                self._found[key] = find(members)
            return self._found[key]

    def place(self, name: str, shape: Shape) -> Place | None:
        """Where the array `name` of one expert goes; None where it is written as it is."""
        path, leaf = module_and_leaf(name)
        slab, ending = self.slabs.get(name), ""
        if slab is None:
            if (slab := self.slabs.get(f"{path}.weight")) is None:
                return None
            ending = f"_{leaf}"
        tensor = slab.tensor + ending
        if not shape:
            return Place(tensor, (), companion=True)
        turned = slab.turned and len(shape) > 1
        member = (*shape[1:], slab.total) if turned else (slab.total, *shape[1:])
        at = (slice(None), slab.rows) if turned else (slab.rows,)
        lead = (slab.experts * member[0],) if slab.flat else (slab.experts, member[0])
        part = Part(slab.e, member, at)
        return Place(tensor, (*lead, *member[1:]), part, turned, companion=bool(ending))

    def outputs(self, tensors: Iterable[TensorOut]) -> Iterator[TensorOut]:
        """`tensors` with one in the place of all its pieces; scales follow the last parameter of
        their module.
        """
        found: dict[str, TensorOut] = {}
        companions: dict[str, TensorOut] = {}
        for tensor in tensors:
            if (place := self.place(tensor.name, tensor.shape)) is not None:
                into = companions if place.companion else found
                into.setdefault(place.tensor, TensorOut(place.tensor, tensor.dtype, place.shape))
                continue
            yield from (*found.values(), *companions.values())
            found, companions = {}, {}
            yield tensor
        yield from (*found.values(), *companions.values())

    def names(self, tensors: Iterable[TensorOut]) -> set[str]:
        """What the tensors of experts `tensors`, and others, are called where they go."""
        placed = ((t.name, self.place(t.name, t.shape)) for t in tensors)
        return {name if place is None else place.tensor for name, place in placed}

    def write(self, writer: ShardWriter, name: str, array: np.ndarray) -> None:
        """Put an array where it goes."""
        place = self.place(name, array.shape)
        if place is None or place.part is None:
            writer.write(name if place is None else place.tensor, array)
        else:
            writer.write_part(place.tensor, place.part, array.T if place.turned else array)


def fusion_of(
    fused: ModelSpec,
    separate: ModelSpec,
    described: tuple[Mapping[str, Choice], Mapping[str, bool]],
    target: Target | None,
    *,
    plain: bool,
) -> Fusion:
    """How experts of `fused` are written that are those of `separate` until then. `described`: the
    formats of linears, and whether those that are there already, whose scales do not change, share
    theirs, so that they stay in one tensor beside others; `target`: the layout in which quantized
    experts share tensors, None for none; `plain`: whether experts that are not quantized do.
    """
    choices, shared = described
    slabs: dict[str, Slab] = {}
    linears: dict[str, list[str]] = {}
    alike = len(set(choices.values())) == 1

    def together(paths: list[str]) -> bool:
        formats = {choices.get(path) for path in paths}
        stay = {shared.get(path) for path in paths}
        if None in formats or len(formats) > 1 or len(stay) > 1 or target is None:
            return False
        return target.fuses(choices[paths[0]]) and (alike if None in stay else stay == {True})

    for i, kind in enumerate(kinds(fused)):
        if not is_fused(kind):
            continue
        row, prefix = kind.mlp, f"{block_prefix(fused, i)}."
        assert isinstance(row, Experts)
        own = dict(_slabs(row, prefix, fused, separate))
        paths = [name.removesuffix(".weight") for name in own if name.endswith(".weight")]
        quantized = [path for path in paths if path in choices]
        turned = all(own[f"{path}.weight"].turned for path in paths)
        if quantized and not (turned and together(paths)):
            continue
        if not quantized and not plain:
            continue
        slabs |= own
        for path in quantized:
            linears.setdefault(own[f"{path}.weight"].tensor, []).append(path)
    return Fusion(slabs, {tensor: tuple(paths) for tensor, paths in linears.items()})


def fused_again(
    config: Mapping[str, Any],
    spec: ModelSpec,
    choices: Mapping[str, Choice],
    target: Target,
    scales: Callable[[str], tuple[Any, ...]],
) -> Fusion:
    """How a quantized model of `config` is written in the layout `target` whose experts are apart
    in `spec`: in one tensor if `scales`, of a linear, are those of all of it. Raises InputError for
    a `config` that is not defined.
    """
    together = together_for(without_description(config), param_shapes(spec))
    found = fusion_of(together, spec, (choices, dict.fromkeys(choices, True)), target, plain=True)
    for members in found.linears.values():
        first = scales(members[0])
        if any(scales(member) != first for member in members):
            return Fusion()
    return found if found.linears else Fusion()


def _slabs(
    row: Experts, prefix: str, fused: ModelSpec, separate: ModelSpec
) -> Iterator[tuple[str, Slab]]:
    """The tensors of all experts of one block, and where they go."""
    store = STORES[row.store]
    totals = {(p.linear, p.leaf): p.shape[0] for p in parts(row, fused.names, fused.hidden)}
    for name, piece, _ in pieces(row, fused.names, separate.names, fused.hidden):
        linear, leaf = piece.part
        yield (
            prefix + name,
            Slab(
                tensor=prefix + piece.tensor,
                experts=row.number,
                e=piece.e,
                rows=piece.rows,
                total=totals[piece.part],
                turned=linear in store.turned and leaf == "weight",
                flat=store.flat,
            ),
        )


def scales_of(q: QTensor) -> tuple[float | None, ...]:
    """The scales of a linear that are one number: of its codes, of its inputs."""
    whole = q.scale if q.scale.size == 1 else q.tensor_scale
    return tuple(
        None if a is None else float(np.asarray(a).reshape(())) for a in (whole, q.input_scale)
    )
