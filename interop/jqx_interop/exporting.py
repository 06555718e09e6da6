# SPDX-License-Identifier: Apache-2.0
"""export: a quantized checkpoint becomes one in another layout, its codes and scales as they are.

One linear is in memory at a time. What a layout stores by its reciprocal may not come back to the
last bit; a note in the metadata of the first file then keeps it, so that a checkpoint that goes
back has the bytes it began with.
"""

import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jqx.errors import InputError, nearest

from .checkpoints import ShardWriter, TensorOut, Workspace, plan_shards, refuse, small_files, told
from .describe import describe
from .fusing import fused_again, scales_of
from .inventory import carried_tensors, matrices
from .notes import NOTE, SCALARS, exact_notes
from .orientation import laid, laid_outputs, matrix
from .progress import Progress, Silent
from .saving import in_module_order, unquantized
from .stored import Source, gathered, open_model, stored_arrays
from .stored_checks import kv_tensors
from .targets import RECIPROCALS, SMALL, TARGETS, Target, holds, inexact_scales


@dataclass(frozen=True, kw_only=True, slots=True)
class Exported:
    """What was written: the two layouts, linears in the new one, bytes of tensors, notes."""

    source: str
    target: str
    linears: int
    bytes: int
    notes: int

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def export(
    model: str | Path,
    out: str | Path,
    target: str,
    *,
    max_shard_size: int | str = "10GB",
    round_scales: bool = False,
    progress: Progress | None = None,
) -> Exported:
    """Write the quantized checkpoint `model` to the directory `out` in the layout `target`, a row
    of TARGETS; it appears complete or not at all. Nothing is quantized again. `round_scales`:
    scales may be rounded where the layout stores them in float16.

    Raises InputError if `model` is not quantized, or holds what the layout has no place for, and if
    `out` exists and is no empty directory.
    """
    if target not in TARGETS:
        raise nearest(target, TARGETS, "target")
    source, row, progress = open_model(model), TARGETS[target], progress or Silent()
    _check(source, row, round_scales)
    notes = _notes(source, row)
    fusion = fused_again(
        source.checkpoint.config,
        source.spec,
        source.choices,
        row,
        lambda path: scales_of(gathered(source, path, stored_arrays(source, path))),
    )
    outputs = list(fusion.outputs(_outputs(source, row)))
    plans = plan_shards(outputs, max_shard_size, {f"{NOTE}{k}": v for k, v in notes.items()})
    with Workspace(out, source.checkpoint.path) as space, told(space.directory):
        space.begin({"export": [plan.file for plan in plans]})
        progress.phase("writing", sum(t.nbytes for t in source.checkpoint.tensors.values()))
        with ShardWriter(space.files, plans) as writer:
            for name, array in _arrays(source, row, progress):
                fusion.write(writer, name, array)
            writer.finish()
        for file in small_files(source.checkpoint):
            shutil.copyfile(file, space.files / file.name)
        config = source.checkpoint.config
        others = matrices(source.checkpoint, carried_tensors(source.checkpoint, source.spec))
        rest = [*unquantized(source.spec, config, source.choices), *others]
        describe(space.files, config, (source.choices, rest, source.spec.kv_cache), target)
        space.publish()
    size = sum(tensor.nbytes for tensor in outputs)
    return Exported(
        source=source.target.name,
        target=target,
        linears=len(source.choices),
        bytes=size,
        notes=len(notes),
    )


def _check(source: Source, row: Target, round_scales: bool) -> None:
    """Raises InputError for what the layout has no name or no place for."""
    where, choices = source.checkpoint.path, source.choices
    if source.checkpoint.source is not None:
        raise InputError(
            f"{where} is {source.checkpoint.source}, which other layouts do not hold as it is: "
            f"jqx quantize --target {row.name} quantizes it anew"
        )
    if not choices:
        raise InputError(f"{where} is not quantized: jqx quantize --target {row.name} does that")
    shapes, held = source.shapes, source.checkpoint.tensors
    problems = [
        f"{path}: {lacking}"
        for path, choice in choices.items()
        if (lacking := row.lacks(choice, shapes[f"{path}.weight"]))
    ]
    factor = "pre_quant_scale"
    problems += [
        f"{path} has a {factor}, for which {row.name} has no place"
        for path in choices
        if not row.smooths and f"{path}.{factor}" in held
    ]
    if apart := row.apart(choices):
        problems.append(apart)
    if (kv := source.spec.kv_cache) is not None and kv not in row.kv_formats:
        problems.append(f"keys and values are in {kv}, which {row.name} does not hold")
    if problems := problems or list(_unheld(source, row)):
        refuse(where, problems, "Quantize the original with --target, by a recipe that it holds.")
    if not round_scales and (inexact := [*_inexact(source, row)]):
        told = f"{row.name} stores scales in float16, which does not hold those of"
        refuse(where, [f"{told} {path}" for path in inexact], "Pass --round-scales to round them.")


def _unheld(source: Source, row: Target) -> Iterator[str]:
    """Linears with numbers for which the other layout has no place."""
    leaves = (*SMALL, source.target.scale) if _halves(source, row) else SMALL
    for path in source.choices:
        arrays = stored_arrays(source, path, leaves)
        if source.target.shifted(arrays):
            yield f"{path} has zero points, for which {row.name} has no place here"
        if (problem := source.target.unread(arrays)) is not None:
            yield f"{path}: {problem}"
        scale = arrays.get(source.target.scale, np.zeros(0, np.float32))
        largest = np.max(np.abs(scale.astype(np.float32)), initial=0)
        if largest > np.finfo(np.float16).max:
            yield f"{path} has the scale {largest:.6g}, and {row.name} holds none above 65504"


def _halves(source: Source, row: Target) -> bool:
    """Whether scales would have to become float16."""
    return row.half_scales and not source.target.half_scales


def _inexact(source: Source, row: Target) -> Iterator[str]:
    """Linears with scales that float16 does not hold, where they would have to be in it."""
    leaf = source.target.scale
    for path in source.choices if _halves(source, row) else ():
        if not holds(stored_arrays(source, path, (leaf,))[leaf]):
            yield path


def _notes(source: Source, row: Target) -> dict[str, str]:
    """Scales of the source, by name, that would not come back from the other layout."""
    if source.target is row:
        kept = exact_notes(source.checkpoint)
        return {name: float(value).hex() for name, value in kept.items()}
    mine = "weight_scale_2" in source.target.leaves
    of = RECIPROCALS if mine else {there: here for here, there in RECIPROCALS.items()}
    found = {}
    for path, choice in source.choices.items():
        arrays = stored_arrays(source, path, SCALARS)
        for leaf, scale in inexact_scales(choice, arrays, of).items():
            found[f"{path}.{leaf}"] = float(scale).hex()
    return found


def _outputs(source: Source, row: Target) -> Iterator[TensorOut]:
    """Every tensor that will be written: parameters in module order, then others as they lie."""
    have, shapes = source.checkpoint.tensors, source.shapes
    linears: dict[str, list[TensorOut]] = {}
    for path, choice in source.choices.items():
        static = any(f"{path}.{leaf}" in have for leaf in ("input_scale", "input_global_scale"))
        shape = matrix(source.spec, path, shapes[f"{path}.weight"])
        found = row.outputs(path, choice, shape, source.dtype, static)
        linears[path] = laid_outputs(source.spec, path, found)
    cached = list(kv_tensors(source.spec, source.dtype))
    yield from in_module_order(shapes, linears, cached, row, lambda name: _as_it_is(source, name))
    known = {*shapes, *(tensor.stored(source.target).name for tensor in cached)}
    known |= {f"{path}.{leaf}" for path in source.choices for leaf in source.target.leaves}
    known |= source.target.nothing(have, shapes)
    yield from (_as_it_is(source, name) for name in have if name not in known)


def _as_it_is(source: Source, name: str) -> TensorOut:
    info = source.checkpoint.tensors[name]
    return TensorOut(name, info.dtype, tuple(info.shape))


def _arrays(source: Source, row: Target, progress: Progress) -> Iterator[tuple[str, np.ndarray]]:
    """Every array by its new name."""
    checkpoint = source.checkpoint
    exact, left = exact_notes(checkpoint), set(checkpoint.tensors)
    for path in source.choices:
        q = gathered(source, path, stored_arrays(source, path))
        for name, array in laid(source.spec, path, row.named(path, q)).items():
            yield name, np.asarray(exact.get(name, array)).reshape(np.shape(array))
        names = [name for leaf in source.target.leaves if (name := f"{path}.{leaf}") in left]
        _done(source, names, progress)
        left -= set(names)
    for tensor in kv_tensors(source.spec, source.dtype):
        old, new = tensor.stored(source.target), tensor.stored(row)
        array = checkpoint.read(old.name)
        scale = tensor.leaf.endswith("_scale")  # which others store in the model's dtype
        yield new.name, (array.astype(np.float32) if scale else array).reshape(new.shape)
        left.discard(old.name)
    for name in sorted(left - source.target.nothing(checkpoint.tensors, source.shapes)):
        yield name, checkpoint.read(name)
        _done(source, [name], progress)


def _done(source: Source, names: list[str], progress: Progress) -> None:
    for name in names:
        source.checkpoint.release(name)
        progress.advance(source.checkpoint.tensors[name].nbytes)
