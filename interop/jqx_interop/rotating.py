# SPDX-License-Identifier: Apache-2.0
"""rotate: a checkpoint of the same model whose outliers are spread over channels, for any recipe.

See `jqx.algorithms.rotate` for what is multiplied with what. Nothing is left to do while the model
runs. Engines load the result as they load the original, but for one thing: a tied head becomes a
tensor of its own, for which vLLM has no place in Gemma.
"""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jqx.algorithms.hadamard import rotation
from jqx.algorithms.rotate import Role, axes_of, effective_gain, rotate_leaf, stream_width
from jqx.errors import InputError
from jqx.models import (
    GAIN_OFFSETS,
    LAYOUTS,
    ROOT_MEAN_SQUARES,
    Attention,
    BlockKind,
    Mlp,
    ModelSpec,
    block_prefix,
    kinds,
    norm_readers,
    param_shapes,
    value_reader,
)

from .architecture import optional_tensors, own_head, spec_for
from .checkpoints import (
    Checkpoint,
    ShardWriter,
    TensorOut,
    Workspace,
    check_tensors,
    open_checkpoint,
    plan_shards,
    small_files,
    told,
)
from .progress import Progress, Silent
from .sources import as_floats
from .weights import checked_amax

CHUNK = 1 << 24
"""Values turned in one call."""


def rotate(
    model: str | Path,
    out: str | Path,
    seed: int = 0,
    *,
    max_shard_size: int | str = "10GB",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write the checkpoint `model`, rotated, to the directory `out`, which appears complete or not
    at all; returns what was done. Tensors are read and written one at a time, in their dtypes.

    `seed` draws the signs. Raises InputError for an architecture that is not defined here, for one
    whose norms are no root mean squares, and for a checkpoint that is quantized or damaged.
    """
    if not 0 <= seed < 2**32 - 1:
        raise InputError(f"seed is {seed}: take a number from 0 to {2**32 - 2}")
    progress = progress or Silent()
    checkpoint = as_floats(open_checkpoint(model))
    given = _spec(checkpoint)
    spec = replace(given, tied=False)
    roles, shapes = roles_of(spec), param_shapes(spec)
    width = stream_width(shapes, roles)
    assert width is not None
    sources = {name: name for name in shapes}
    if given.tied:
        sources[f"{spec.names.head}.weight"] = f"{spec.names.embed}.weight"
    infos = {name: checkpoint.tensors[source] for name, source in sources.items()}
    plans = plan_shards(
        (TensorOut(name, info.dtype, tuple(info.shape)) for name, info in infos.items()),
        max_shard_size,
    )
    with Workspace(out, checkpoint.path) as space, told(space.directory):
        space.begin({"rotate": seed, "files": [plan.file for plan in plans]})
        progress.phase("rotating", sum(info.nbytes for info in infos.values()))
        with ShardWriter(space.files, plans) as writer:
            for name, array in _rotated(checkpoint, spec, sources, seed):
                writer.write(name, array)
                progress.advance(infos[name].nbytes)
            writer.finish()
        for file in small_files(checkpoint):
            shutil.copyfile(file, space.files / file.name)
        config = {**checkpoint.config, "tie_word_embeddings": False}
        text = json.dumps(config, indent=2, ensure_ascii=False)
        (space.files / "config.json").write_text(text + "\n", encoding="utf-8")
        space.publish()
    return {
        "out": str(out),
        "bytes": sum(plan.size for plan in plans),
        "channels": width,
        "head_dim": sorted(_head_dims(spec)),
        "seed": seed,
        "head": "its own" if given.tied else "as before",
    }


def roles_of(spec: ModelSpec) -> dict[str, Role]:
    """What every parameter of an untied decoder has to do with the residual stream; those of a
    block that have nothing to do with it are left out.

    Raises InputError for norms that subtract a mean or add a bias.
    """
    names = spec.names
    _refuse_bound(spec)
    found = {f"{names.embed}.weight": Role("embedding")}
    for i, kind in enumerate(kinds(spec)):
        found |= _block_roles(spec, kind, block_prefix(spec, i))
    last = f"{names.final_norm}.weight"
    found |= {last: Role("norm"), f"{names.head}.weight": Role("reads", last)}
    shapes = param_shapes(spec)
    return {name: role for name, role in found.items() if name in shapes}


def _head_dims(spec: ModelSpec) -> set[int]:
    rows = (kind.attention for kind in kinds(spec))
    return {row.head_dim for row in rows if isinstance(row, Attention)}


def _refuse_bound(spec: ModelSpec) -> None:
    """Raise InputError for what is not the same in another basis."""
    if spec.final_norm is None or spec.positions or spec.embed_norm or spec.embed_width:
        raise InputError(
            "embeddings that are more than one table are not the same in another basis"
        )
    norms = (spec.final_norm, *(kind.norm for kind in kinds(spec)))
    for kind in (norm.kind for norm in norms if norm.kind not in ROOT_MEAN_SQUARES):
        raise InputError(f"norms of kind {kind} are not the same in another basis")
    for kind in kinds(spec):
        row = LAYOUTS[kind.layout]
        if not row.before or row.after or kind.normed_residual:
            raise InputError(
                f"blocks of layout {kind.layout} have norms that no linear reads: they are not the "
                "same in another basis"
            )
        latent = isinstance(kind.attention, Attention) and kind.attention.latent is not None
        whole = isinstance(kind.attention, Attention | None) and isinstance(kind.mlp, Mlp | None)
        whole = whole and not latent
        if kind.transposed or spec.unit_head or not whole:
            raise InputError(f"a rotation of models of family {spec.family} is not defined here")


def _block_roles(spec: ModelSpec, kind: BlockKind, prefix: str) -> dict[str, Role]:
    names, roles = spec.names, {}
    for norm, readers in norm_readers(spec, kind).items():
        gain = f"{prefix}.{norm}.weight"
        roles[f"{norm}.weight"] = Role("norm")
        roles |= {f"{name}.weight": Role("reads", gain) for name in readers}
    for name in (names.out, names.down):
        roles |= {f"{name}.weight": Role("writes"), f"{name}.bias": Role("writes_bias")}
    if (found := value_reader(spec, kind)) is not None:
        reader, maker, (_, _, size) = found
        gain = roles[f"{maker}.weight"].norm
        roles[f"{maker}.weight"] = Role("values", gain, size)
        roles[f"{maker}.bias"] = Role("values_bias", head_dim=size)
        roles[f"{reader}.weight"] = Role("writes_values", head_dim=size)
    return {f"{prefix}.{name}": role for name, role in roles.items()}


def _spec(checkpoint: Checkpoint) -> ModelSpec:
    try:
        spec = spec_for(checkpoint.config, checkpoint.tensors)
    except InputError as error:
        raise InputError(f"{checkpoint.path}: {error}") from error
    check_tensors(checkpoint, param_shapes(spec), optional_tensors(spec))
    return own_head(checkpoint, spec)


def _rotated(
    checkpoint: Checkpoint, spec: ModelSpec, sources: dict[str, str], seed: int
) -> Iterator[tuple[str, np.ndarray]]:
    """The named arrays of the rotated model."""
    roles = roles_of(spec)
    turns = {0: None} | {size: rotation(size, seed + 1) for size in _head_dims(spec)}
    stream = rotation(spec.hidden, seed)
    assert spec.final_norm is not None
    plus_one = bool(GAIN_OFFSETS[spec.final_norm.kind])
    for name, source in sources.items():
        array, role = checkpoint.read(source), roles.get(name)
        checked_amax(array, source)
        if role is None:
            yield name, array
        elif role.kind == "norm":
            yield name, np.full_like(array, 1 - plus_one)
        else:
            read = None if role.norm is None else jnp.asarray(checkpoint.read(role.norm))
            gain = None if read is None else effective_gain(read, plus_one)
            yield name, _turned(array, role, gain, (stream, turns[role.head_dim]))
        checkpoint.release(source)


def _turned(array: np.ndarray, role: Role, gain: Any, turns: Any) -> np.ndarray:
    """One array with its role, in slices across the axis that is not the stream."""
    stream, heads = axes_of(role.kind)
    turn = partial(_turn, gain=gain, turns=turns, kind=role.kind)
    if array.ndim < 2 or stream is None:
        return np.asarray(turn(array))
    axis = 0 if stream == -1 else 1
    whole = role.head_dim if heads else 1
    step = max(CHUNK // array.shape[1 - axis] // whole, 1) * whole
    cuts = range(step, array.shape[axis], step)
    return np.concatenate([turn(part) for part in np.split(array, cuts, axis)], axis)


@partial(jax.jit, static_argnames=("kind",))
def _turn(array: jax.Array, *, kind: str, gain: Any, turns: Any) -> jax.Array:
    return rotate_leaf(array, kind, gain, turns)
