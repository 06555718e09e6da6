# SPDX-License-Identifier: Apache-2.0
"""A quantized checkpoint as one of floats: weights are decoded one by one, when they are read."""

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from jqx.errors import InputError
from jqx.models import ModelSpec, param_shapes
from jqx.tensors import QTensor
from jqx_interop.architecture import spec_for
from jqx_interop.checkpoints import (
    DTYPES,
    Checkpoint,
    TensorInfo,
    dtype_name,
    model_dtype,
    one_line,
    read_beside,
    refuse,
)
from jqx_interop.inventory import FLOATS
from jqx_interop.notes import exact_notes
from jqx_interop.targets import TARGETS, layout_of

from .table import SourceLayout, find_source
from .weight import Given, Shape, Weight, bad_scales

SCALES = ("scale", "outer", "weight_scale", "weight_scale_2", "weight_global_scale", "scales")
"""Parts of weights that must be numbers."""

BESIDE = (
    *("input_scale", "activation_scale", "input_zero_point", "input_global_scale"),
    *("k_scale", "v_scale", "q_scale", "kv_scale", "k_bias", "v_bias", "output_scale"),
)
"""Leaves that are of activations or of the cache."""

WAY_OUT = "The descriptions and the weights do not belong together."


@dataclass(frozen=True, eq=False)
class DecodedCheckpoint(Checkpoint):
    """`weights`: those that are decoded, by the names and with the shapes that plain ones have."""

    weights: Mapping[str, Weight] = field(default_factory=dict)
    dtype: np.dtype = DTYPES["BF16"]

    def read(self, name: str) -> np.ndarray:
        """The tensor `name`, decoded to the dtype of the model if it is quantized. Raises
        InputError for scales that are no numbers.
        """
        if (weight := self.weights.get(name)) is None:
            return super().read(name)
        return self._floats(weight, self._arrays(weight))

    def read_member(self, name: str, index: int) -> np.ndarray:
        """One expert of the tensor `name`, without decoding the others."""
        weight = self.weights.get(name)
        if weight is None or not weight.stacked:
            return self.read(name)[index]
        arrays = self._arrays(weight)
        mine = {leaf: arrays[leaf][index : index + 1] for leaf in weight.stacked}
        return self._floats(weight, {**arrays, **mine})[0]

    def stored(self, name: str) -> QTensor:
        """The codes and scales of the linear weight `name` as they are, [n, k]. Raises InputError
        for one that has none.
        """
        weight = self.weights[name]
        assert weight.stored is not None  # asked for by those that look at `choice`
        return weight.stored(self._arrays(weight))

    def stored_member(self, name: str, index: int, rows: slice) -> QTensor | None:
        """Rows of the codes and scales of one expert of the tensor `name` as they are, [n, k]; None
        where it holds no experts with codes. Nothing is copied.
        """
        weight = self.weights.get(name)
        if weight is None or weight.stored is None or not weight.stacked:
            return None
        arrays = self._arrays(weight)
        q = weight.stored(arrays | {leaf: arrays[leaf][index] for leaf in weight.stacked})
        scale = q.scale[rows] if q.scale.ndim else q.scale
        return q.replace(codes=q.codes[rows], scale=scale)

    def release(self, name: str) -> None:
        """Drop the resident pages of `name`, or of all its parts."""
        weight = self.weights.get(name)
        for part in weight.parts.values() if weight else (name,):
            super().release(part)

    def check_numbers(self) -> None:
        """Raise one InputError for all scales that are NaN or infinite. Reads scales alone."""
        problems = [p for weight in self.weights.values() for p in self._bad(weight)]
        if problems:
            refuse(self.path, problems, "The checkpoint is damaged.")

    def _arrays(self, weight: Weight) -> dict[str, np.ndarray]:
        return {leaf: self.mapped.read(name) for leaf, name in weight.parts.items()}

    def _bad(self, weight: Weight) -> Iterator[str]:
        for leaf, name in weight.parts.items():
            if leaf in SCALES:
                if problem := bad_scales(name, self.mapped.read(name)):
                    yield problem
                super().release(name)

    def _floats(self, weight: Weight, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
        bad = (bad_scales(weight.parts[leaf], a) for leaf, a in arrays.items() if leaf in SCALES)
        if problems := [problem for problem in bad if problem]:
            refuse(self.path, problems, "The checkpoint is damaged.")
        found = weight.floats(arrays, self.dtype)
        found.flags.writeable = False
        return found


def as_floats(checkpoint: Checkpoint, *, run: bool = False) -> Checkpoint:
    """`checkpoint` itself if it is not quantized, else a view of it in which nothing is.

    `run`: it is to be run, so that what QTensors hold stays as it is. Headers and
    descriptions are checked, no weight is read. Raises one InputError for all that is wrong: a
    method that is not read, scales that are missing or have another shape.
    """
    if isinstance(checkpoint, DecodedCheckpoint):
        return checkpoint
    try:
        found = _source_of(checkpoint)
        if found is None or (run and found[0].runs(found[1])):
            return checkpoint
        return _decoded(checkpoint, *found)
    except InputError as error:
        where, told = str(checkpoint.path), str(error)
        raise InputError(one_line(told if where in told else f"{where}: {told}")) from error


def title_of(config: Mapping[str, Any]) -> str | None:
    """What a quantized checkpoint is called, by its config.json alone; None for a plain one."""
    said = description(config)
    given = Given(said=said or {}, file=None, tensors={}, read=_unread, dtype=DTYPES["BF16"])
    row = None if said is None else find_source(given, _method(said))
    return None if row is None else row.title(given)


def description(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The quantization_config of a config.json, its own or that of its text model."""
    text = config.get("text_config")
    inner = text.get("quantization_config") if isinstance(text, Mapping) else None
    found = config.get("quantization_config") or inner
    return found if found is None or isinstance(found, dict) else {"quant_method": repr(found)}


def without_description(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json of a model that is not quantized."""
    plain = {k: v for k, v in config.items() if k != "quantization_config"}
    if isinstance(text := plain.get("text_config"), dict):
        plain["text_config"] = {k: v for k, v in text.items() if k != "quantization_config"}
    return plain


def _unread(name: str) -> np.ndarray:
    raise AssertionError(f"{name} is read from a config.json")


def _method(said: Mapping[str, Any]) -> str:
    if method := said.get("quant_method") or ("modelopt" if "quant_algo" in said else None):
        return str(method)
    raise InputError("its quantization_config names no quant_method")


def _source_of(checkpoint: Checkpoint) -> tuple[SourceLayout, Given] | None:
    """The row of a checkpoint and what it says; None for a plain one."""
    said = description(checkpoint.config)
    layout, file = layout_of(said, partial(read_beside, checkpoint.path), checkpoint.tensors)
    method = _method(said) if said is not None else None
    if said is None and file is not None:  # the layout's own file says it alone
        method = layout.partition("-")[0]
    given = Given(
        said=said or {},
        file=file,
        tensors=checkpoint.tensors,
        read=checkpoint.read,
        dtype=DTYPES["BF16"],
    )
    if (row := find_source(given, method)) is None:
        if given.has(".qweight"):
            raise InputError("it has qweights, and nothing says of which method")
        return None
    return row, given


def _decoded(checkpoint: Checkpoint, row: SourceLayout, given: Given) -> DecodedCheckpoint:
    config = without_description(checkpoint.config)
    key = model_dtype(replace(checkpoint, config=config))
    dtype = DTYPES[key if key in FLOATS else "F32"]
    spec = _spec(config, checkpoint)
    full = replace(given, dtype=dtype, spec=spec, notes=exact_notes(checkpoint))
    found = list(row.weights(full))
    weights = [weight for weight in found if isinstance(weight, Weight)]
    problems = [problem for problem in found if isinstance(problem, str)]
    dropped, biased = _dropped(checkpoint, row, spec)
    problems += biased
    if not found:
        problems.append(f"its description says {row.title(given)}, and no weight is quantized")
    if problems:
        refuse(checkpoint.path, problems, WAY_OUT)
    return DecodedCheckpoint(
        checkpoint.path,
        config,
        _infos(checkpoint, weights, dtype, dropped),
        checkpoint.files,
        checkpoint.mapped,
        checkpoint.notes,
        source=row.title(given),
        weights={weight.name: weight for weight in weights},
        dtype=dtype,
    )


def _dropped(
    checkpoint: Checkpoint, row: SourceLayout, spec: ModelSpec | None
) -> tuple[set[str], list[str]]:
    """Tensors that add nothing to a plain model: of activations, of the cache, and biases of zeros
    that it has not; and what is wrong with those.
    """
    known: Mapping[str, Shape] = param_shapes(spec) if spec is not None else {}
    names = checkpoint.tensors
    dropped = {n for n in names if n.rpartition(".")[2] in BESIDE and n not in known}
    if row.target is None or spec is None:
        return dropped, []
    zeros = TARGETS[row.target].nothing(names, known)
    problems = [
        f"{name} is not zero, and the model has no such bias"
        for name in sorted(zeros)
        if np.any(checkpoint.read(name).astype(np.float32) != 0)
    ]
    return dropped | zeros, problems


def _spec(config: Mapping[str, Any], checkpoint: Checkpoint) -> ModelSpec | None:
    try:
        return spec_for(config, checkpoint.tensors)
    except InputError:  # an architecture that is not defined here, and need not be
        return None


def _infos(
    checkpoint: Checkpoint, weights: Iterable[Weight], dtype: np.dtype, dropped: Collection[str]
) -> dict[str, TensorInfo]:
    """Headers of the plain tensors, each in the place of its codes."""
    first = {next(iter(weight.parts.values())): weight for weight in weights}
    taken = {part for weight in first.values() for part in weight.parts.values()}
    infos = {}
    for name, info in checkpoint.tensors.items():
        if (weight := first.get(name)) is not None:
            infos[weight.name] = _info(info, weight, dtype)
        elif name not in taken and name not in dropped:
            infos[name] = info
    return infos


def _info(info: TensorInfo, weight: Weight, dtype: np.dtype) -> TensorInfo:
    size = int(np.prod(weight.shape, dtype=np.int64)) * dtype.itemsize
    return TensorInfo(
        weight.name, dtype_name(dtype), weight.shape, info.file, info.start, info.start + size
    )
