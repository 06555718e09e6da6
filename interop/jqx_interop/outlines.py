# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint will hold by its config.json alone: names and shapes of tensors, for plans of
models that are not on this disk. They are those of the checkpoints on the Hub.
"""

from pathlib import Path
from typing import Any

from jqx.errors import InputError, nearest
from jqx.models import param_shapes

from .checkpoints import (
    Checkpoint,
    MappedTensors,
    TensorInfo,
    one_line,
    open_checkpoint,
    read_beside,
)
from .checkpoints.checks import MODEL_DTYPES
from .checkpoints.layout import nbytes
from .families import FAMILIES, spec_from_config
from .inventory import KEPT
from .sources import title_of, without_description


def open_outline(model: str | Path) -> Checkpoint:
    """The checkpoint `model`, without numbers where `model` is a config.json, or a directory that
    has one and no weights; else as `open_checkpoint`.

    Weights that a config.json says are quantized count as plain ones of the model's dtype. Raises
    InputError for a model_type that is not defined here.
    """
    path = Path(model)
    file = path / "config.json" if path.is_dir() else path
    if any(file.parent.glob("*.safetensors")) or not file.is_file() or file.suffix != ".json":
        return open_checkpoint(model)
    config = read_beside(file.parent, file.name) or {}
    try:
        return _outlined(file, config)
    except InputError as error:
        raise InputError(one_line(f"{file}: {error}")) from error


def _outlined(file: Path, config: dict[str, Any]) -> Checkpoint:
    plain = without_description(config)
    name = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")
    plain["torch_dtype"] = name.removeprefix("torch.")
    dtype = MODEL_DTYPES.get(plain["torch_dtype"], "BF16")
    tensors, end = {}, 0
    for tensor, shape in _shapes(plain).items():
        own = "F32" if tensor.endswith(KEPT) else dtype
        start, end = end, end + nbytes(own, shape)
        tensors[tensor] = TensorInfo(tensor, own, shape, file, start, end)
    source = title_of(config)
    return Checkpoint(file.parent, plain, tensors, (), MappedTensors(()), source=source)


def _shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    if (kind := config.get("model_type")) not in FAMILIES:
        known = nearest(str(kind), FAMILIES, "model_type")
        raise InputError(f"there are no weights beside it, and by itself it tells little: {known}")
    return param_shapes(spec_from_config(config))
