# SPDX-License-Identifier: Apache-2.0
"""save: a model in memory becomes a checkpoint, quantized where its tree holds QTensors.

What `load` read is written with the same bytes: tensors in the order, and with the descriptions,
that `ptq` gives them.
"""

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jqx.config import Choice
from jqx.errors import nearest
from jqx.models import ModelSpec, linear_shapes, param_shapes
from jqx.tensors import QTensor

from .checkpoints import (
    ShardWriter,
    TensorOut,
    Workspace,
    dtype_name,
    open_checkpoint,
    plan_shards,
    small_files,
    told,
)
from .describe import describe
from .fusing import fused_again, scales_of
from .inventory import (
    KEPT,
    OWN_POSITIONS,
    SCALED_EMBEDDINGS,
    carried_tensors,
    matrices,
    projections,
)
from .model import Model
from .orientation import laid, laid_outputs
from .saving_checks import Content, beside_codes, content_of
from .stored_checks import KvTensor, kv_tensors
from .targets import TARGETS, Target, companions


def save(
    model: Model,
    out: str | Path,
    target: str = "modelopt",
    *,
    max_shard_size: int | str = "10GB",
    round_scales: bool = False,
) -> Path:
    """Write `model` to the directory `out`, which appears complete or not at all; returns it.

    Parameters are written in their own dtype, QTensors as the layout `target` stores them; the
    tokenizer and other small files come from `model.path`, and so do tensors of other models that
    lie beside the parameters there. `round_scales`: scales may be rounded
    where the layout stores them in float16. Raises InputError if `out` exists and is
    no empty directory, or if the tree is not one that the layout can hold.
    """
    if target not in TARGETS:
        raise nearest(target, TARGETS, "target")
    content = content_of(model.spec, model.params, TARGETS[target], round_scales)
    source = None if model.path is None else open_checkpoint(model.path)
    names = [] if source is None else carried_tensors(source, model.spec)
    beside = {name: source.read(name) for name in names} if source else {}
    fusion = fused_again(
        model.config,
        model.spec,
        content.choices,
        TARGETS[target],
        lambda path: scales_of(content.leaves[f"{path}.weight"]),
    )
    outputs = (
        *fusion.outputs(_outputs(model.spec, content, target)),
        *(TensorOut(name, dtype_name(a.dtype), a.shape) for name, a in beside.items()),
    )
    plans = plan_shards(outputs, max_shard_size)
    small = () if source is None else small_files(source)
    with Workspace(out, model.path) as space, told(space.directory):
        space.begin({"save": [plan.file for plan in plans]})
        with ShardWriter(space.files, plans) as writer:
            for name, array in _arrays(model, content, target):
                fusion.write(writer, name, array)
            for name, array in beside.items():
                writer.write(name, array)
            writer.finish()
        for file in small:
            shutil.copyfile(file, space.files / file.name)
        others = [] if source is None else list(matrices(source, names))
        _write_descriptions(space.files, model, content, (target, others))
        return space.publish()


def _outputs(spec: ModelSpec, content: Content, target: str) -> Iterator[TensorOut]:
    """Every tensor that will be written, in module order."""
    shapes, row = param_shapes(spec), TARGETS[target]
    linears: dict[str, list[TensorOut]] = {}
    for path, choice in content.choices.items():
        q = content.leaves[f"{path}.weight"]
        given = (choice, q.shape, content.dtype, q.input_scale is not None)
        codes = laid_outputs(spec, path, row.outputs(path, *given))
        linears[path] = codes + beside_codes(path, q, content.dtype)
    cached, dtype = kv_tensors(spec, content.dtype), dtype_name(content.dtype)
    kept = {
        name: dtype_name(np.dtype(leaf.dtype))
        for name, leaf in content.leaves.items()
        if name.endswith(KEPT)
    }
    return in_module_order(
        shapes,
        linears,
        cached,
        row,
        lambda name: TensorOut(name, kept.get(name, dtype), shapes[name]),
    )


def in_module_order(
    names: Iterable[str],
    linears: Mapping[str, list[TensorOut]],
    cached: Iterable[KvTensor],
    row: Target,
    plain: Callable[[str], TensorOut],
) -> Iterator[TensorOut]:
    """The tensors of the parameters `names`: of quantized linears, by path, the codes first, in the
    place of their weights, with those of `cached` keys and values in the layout `row`; of others
    what `plain` gives.
    """
    groups = {path: beside for path, (_, *beside) in linears.items()}
    for tensor in cached:
        groups.setdefault(tensor.path.rpartition(".")[0], []).append(tensor.stored(row))
    after = companions(names := list(names), groups)
    for name in names:
        path = name.removesuffix(".weight")
        yield linears[path][0] if path != name and path in linears else plain(name)
        yield from after.get(name, ())


def _arrays(model: Model, content: Content, target: str) -> Iterator[tuple[str, np.ndarray]]:
    """Every array by its name."""
    row = TARGETS[target]
    cached = {tensor.name: tensor for tensor in kv_tensors(model.spec, content.dtype)}
    for name, leaf in content.leaves.items():
        if isinstance(leaf, QTensor):
            path = name.removesuffix(".weight")
            for part, array in laid(model.spec, path, row.named(path, leaf)).items():
                yield part, np.asarray(array)
        elif name in cached:
            stored = cached[name].stored(row)
            yield stored.name, np.asarray(leaf).reshape(stored.shape)
        else:
            yield name, np.asarray(leaf)


def _write_descriptions(
    folder: Path, model: Model, content: Content, target: tuple[str, list[str]]
) -> None:
    """`target`: the layout, and linears of other models in the same files."""
    config = {k: v for k, v in model.config.items() if k != "quantization_config"}
    key = next((key for key in ("dtype", "torch_dtype") if key in config), "dtype")
    if str(config.get(key)).removeprefix("torch.") != content.dtype.name:
        config[key] = content.dtype.name
    if content.choices:
        rest = [*unquantized(model.spec, model.config, content.choices), *target[1]]
        described = (content.choices, rest, model.spec.kv_cache)
        describe(folder, config, described, target[0])
    else:  # as transformers writes it
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def unquantized(
    spec: ModelSpec, config: Mapping[str, Any], choices: Mapping[str, Choice]
) -> list[str]:
    """Every module that could have been quantized and is not."""
    modules = [path for path in linear_shapes(spec) if path not in choices]
    if config.get("model_type") not in SCALED_EMBEDDINGS:
        modules.append(spec.names.embed)
        modules += [spec.names.positions] if _has_quantizer(spec) else []
        modules += projections(spec)
    return [*modules, spec.names.head] if spec.tied else modules


def _has_quantizer(spec: ModelSpec) -> bool:
    """Whether there is a table of learned positions that ModelOpt would list."""
    return spec.positions is not None and not OWN_POSITIONS.search(spec.names.positions)
