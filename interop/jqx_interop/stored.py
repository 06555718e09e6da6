# SPDX-License-Identifier: Apache-2.0
"""Checkpoints to run: plain ones, and quantized ones in a layout of TARGETS, whose weights stay as
they are stored.

`open_model` looks at descriptions and headers alone; `read_params` and `read_block` read numbers.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.typing import DTypeLike

from jqx.config import Choice
from jqx.errors import InputError
from jqx.models import (
    ModelSpec,
    leaf_shapes,
    linear_shapes,
    param_shapes,
)
from jqx.tensors import QTensor
from jqx.tensors.paths import unflatten
from jqx.tensors.stacks import stack_all

from .architecture import optional_tensors, own_head, spec_for
from .checkpoints import (
    DTYPES,
    Checkpoint,
    check_tensors,
    model_dtype,
    one_line,
    open_checkpoint,
    read_beside,
    refuse,
)
from .inventory import FLOATS, KEPT
from .notes import SCALARS, exact_notes
from .orientation import matrix, straight, turned
from .sources import as_floats
from .stored_checks import KvTensor, bad_numbers, kv_tensors, stored_problems
from .targets import TARGETS, Said, Target, layout_of
from .unfused import stored_apart

ALIGNMENT = 64  # bytes; XLA's CPU backend shares host memory at multiples of it


@dataclass(frozen=True, kw_only=True)
class Source:
    """A checkpoint that can be run.

    `spec` says how keys and values are cached too; `choices` holds the formats of the quantized
    linears in module order, none for plain checkpoints; `dtype` is the model's own; `target` the
    layout of quantized ones.
    """

    checkpoint: Checkpoint
    spec: ModelSpec
    choices: Mapping[str, Choice]
    dtype: np.dtype
    target: Target = TARGETS["modelopt"]

    @cached_property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Name and shape of every parameter, in module order."""
        return param_shapes(self.spec)

    @cached_property
    def leaves(self) -> Mapping[str, tuple[int, ...]]:
        """The same as parameters are in memory: tensors of each expert as stacks."""
        return leaf_shapes(self.spec)


def open_model(model: str | Path) -> Source:
    """Open the checkpoint `model`, a directory or Hub id, and check everything but the numbers.

    Raises InputError for what cannot be read: see `open_checkpoint`; unknown families; quantization
    of another method or algorithm; tensors that are missing, of another shape or dtype, or unknown.
    """
    checkpoint = as_floats(stored_apart(open_checkpoint(model)), run=True)
    try:
        plain = {k: v for k, v in checkpoint.config.items() if k != "quantization_config"}
        spec = spec_for(plain, checkpoint.tensors)
        spec, choices, target, dtype = _read(checkpoint, spec)
    except InputError as error:
        where, message = str(checkpoint.path), str(error)
        told = message if where in message else f"{where}: {message}"
        raise InputError(one_line(told)) from error
    spec = own_head(checkpoint, spec)
    return Source(checkpoint=checkpoint, spec=spec, choices=choices, dtype=dtype, target=target)


def read_params(
    source: Source, names: Iterable[str], cast: DTypeLike | None = None
) -> dict[str, Any]:
    """The nested tree of the parameters `names`, which are those of `param_shapes(source.spec)`.

    The weight of a quantized linear is a QTensor, tensors of each expert are a stack; what belongs
    to cached keys and values comes with its projection. Plain tensors are in the model's dtype,
    plain matrices in `cast` if given. Pages of the files are released as soon as they are copied.

    Raises one InputError for all scales that are no scales: NaN, infinite, not positive.
    """
    leaves = read_leaves(source, names, cast)
    stack_all(leaves, source.leaves)
    return unflatten(leaves)


def read_leaves(
    source: Source, names: Iterable[str], cast: DTypeLike | None = None
) -> dict[str, Any]:
    """The same by name, those of each expert apart."""
    leaves: dict[str, Any] = {}
    problems: list[str] = []
    beside: dict[str, list[KvTensor]] = {}
    for tensor in kv_tensors(source.spec, source.dtype):
        beside.setdefault(tensor.owner, []).append(tensor)
    for name in names:
        path, _, leaf = name.rpartition(".")
        if leaf == "weight" and path in source.choices:
            arrays = stored_arrays(source, path)
            problems += [*_problems(path, arrays), *_strange_bias(source, path)]
            q = gathered(source, path, arrays)
            leaves[name] = turned(source.spec, path, jax.tree.map(copied, q))
            for part in source.target.leaves:
                if (stored := f"{path}.{part}") in source.checkpoint.tensors:
                    source.checkpoint.release(stored)
        else:
            leaves[name] = plain(source, name, cast)
        for tensor in beside.get(path, ()) if leaf == "weight" else ():
            stored = tensor.stored(source.target).name
            leaves[tensor.name] = _checked(source, stored, problems)
    if problems:
        refuse(source.checkpoint.path, problems, "The checkpoint is damaged.")
    return leaves


def _read(
    checkpoint: Checkpoint, spec: ModelSpec
) -> tuple[ModelSpec, Mapping[str, Choice], Target, np.dtype]:
    """`spec` with the format of its cache, the formats of its quantized linears, checked against
    the headers, their layout, and the dtype of the model.
    """
    inline = checkpoint.config.get("quantization_config")
    files = partial(read_beside, checkpoint.path)
    layout, file = layout_of(inline, files, checkpoint.tensors)
    target, optional = TARGETS[layout], optional_tensors(spec)
    stored = {name: info.shape for name, info in checkpoint.tensors.items()}
    said = Said(inline=inline, file=file, linears=linear_shapes(spec), stored=stored)
    meant = target.read(said) if checkpoint.source is None else None
    dtype = DTYPES[_float_dtype(checkpoint)]
    if meant is None:
        check_tensors(checkpoint, param_shapes(spec), optional)
        return spec, {}, target, dtype
    spec = replace(spec, kv_cache=meant.kv)
    found = stored_problems(checkpoint, spec, meant.choices, dtype, target, optional)
    if problems := [*meant.problems, *found]:
        refuse(
            checkpoint.path, problems, "The descriptions and the weights do not belong together."
        )
    return spec, meant.choices, target, dtype


def gathered(source: Source, path: str, arrays: Mapping[str, np.ndarray]) -> QTensor:
    """The QTensor [n, k] of the quantized linear `path` from its stored arrays. Raises InputError
    naming it for what has no QTensor.
    """
    shape = matrix(source.spec, path, source.shapes[f"{path}.weight"])
    try:
        return source.target.gathered(arrays, source.choices[path], shape, source.dtype)
    except InputError as error:
        raise InputError(f"{source.checkpoint.path}: {path}: {error}") from error


def stored_arrays(
    source: Source, path: str, leaves: Iterable[str] | None = None
) -> dict[str, np.ndarray]:
    """The stored arrays of a quantized linear by leaf name, all of its layout that are there or
    some; and what a note says of scales of another layout.
    """
    have = source.checkpoint.tensors
    wanted = source.target.leaves if leaves is None else leaves
    found = {
        leaf: source.checkpoint.read(name) for leaf in wanted if (name := f"{path}.{leaf}") in have
    }
    exact = exact_notes(source.checkpoint)
    if "weight" in found:
        found["weight"] = straight(source.spec, path, found["weight"])
    noted = {leaf: exact[f"{path}.{leaf}"] for leaf in SCALARS if f"{path}.{leaf}" in exact}
    return {**found, **noted}


def _problems(path: str, arrays: Mapping[str, np.ndarray]) -> list[str]:
    """What is wrong with the numbers of a quantized linear."""
    found = (bad_numbers(f"{path}.{leaf}", array) for leaf, array in arrays.items())
    return [problem for problem in found if problem]


def _strange_bias(source: Source, path: str) -> list[str]:
    """What is wrong with a bias that the model does not have: it must be zeros."""
    name = f"{path}.bias"
    strange = source.target.nothing([name], source.shapes)
    if not strange or name not in source.checkpoint.tensors:
        return []
    biased = np.any(source.checkpoint.read(name).astype(np.float32) != 0)
    return [f"{name} is not zero, and the model has no such bias"] if biased else []


def plain(
    source: Source,
    name: str,
    cast: DTypeLike | None = None,
    part: Callable[[np.ndarray], np.ndarray] | None = None,
) -> jax.Array:
    """A tensor that is not quantized, or a part of it, in the model's dtype; a matrix in `cast` if
    given.
    """
    array = source.checkpoint.read(name)
    array = array if part is None else part(array)
    array = copied(array if name.endswith(KEPT) else array.astype(source.dtype, copy=False))
    source.checkpoint.release(name)
    wide = cast is not None and array.ndim > 1
    return jax.block_until_ready(array.astype(cast)) if wide else array


def _checked(source: Source, name: str, problems: list[str]) -> jax.Array:
    """A scale, float32 [], or a bias of cached keys or values."""
    array = source.checkpoint.read(name)
    if problem := bad_numbers(name, array):
        problems.append(problem)
    return copied(array.astype(np.float32).reshape(()) if name.endswith("_scale") else array)


def copied(array: np.ndarray) -> jax.Array:
    """A mapped array on the device, complete, so that its pages can go.

    JAX shares memory at addresses that suit it; what it would share is copied first, or a file that
    changes later would change parameters.
    """
    shared = array.ctypes.data % ALIGNMENT == 0
    return jax.block_until_ready(jax.device_put(array.copy() if shared else array))


def _float_dtype(checkpoint: Checkpoint) -> str:
    if (key := model_dtype(checkpoint)) not in FLOATS:
        raise InputError(f"a model in {key}; those in {', '.join(sorted(FLOATS))} can be run")
    return key
