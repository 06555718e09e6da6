# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint contains: the right tensors, one dtype, other files, an identity."""

import hashlib
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path

from jqx.errors import InputError

from .layout import raw_header
from .problems import one_line, refuse
from .read import INDEX, Checkpoint

MODEL_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32", "float64": "F64"}

# Weights in any container, files that a quantized export writes anew, and code.
NOT_COPIED = (
    *("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.pt", "*.pth"),
    *("*.ckpt", "*.h5", "*.msgpack", "*.gguf", "*.ggml", "*.onnx", "*.onnx_data", "*.pkl"),
    *("*.pickle", "*.npz", "*.tflite", "*.ot", "*.mlmodel"),
    *(
        "config.json",
        "hf_quant_config.json",
        "quantize_config.json",
        "quant_config.json",
        "*.py",
        "*.pyc",
        "*.so",
        ".*",
    ),
)


def check_tensors(
    checkpoint: Checkpoint,
    expected: Mapping[str, tuple[int, ...]],
    optional: Iterable[str] = (),
) -> None:
    """Compare the tensors with what the architecture needs: name -> shape.

    `optional` are glob patterns of names that may be absent, or present though not expected; one
    that is both expected and present must still have its shape. Raises one InputError that lists
    missing, wrongly shaped and unknown tensors.
    """
    optional = tuple(optional)

    def required(names: Iterable[str]) -> list[str]:
        return [n for n in names if not any(fnmatchcase(n, pattern) for pattern in optional)]

    have = checkpoint.tensors
    problems = [f"tensor {n} is missing" for n in required(expected) if n not in have]
    problems += [
        f"tensor {name} has shape {have[name].shape}, the configuration asks for {tuple(shape)}"
        for name, shape in expected.items()
        if name in have and have[name].shape != tuple(shape)
    ]
    problems += [
        f"tensor {n} is not part of the model" for n in required(have) if n not in expected
    ]
    if problems:
        refuse(checkpoint.path, problems, "config.json and the weights do not belong together.")


def model_dtype(checkpoint: Checkpoint) -> str:
    """The dtype the model computes in, as a key of DTYPES such as "BF16".

    It is "dtype" or "torch_dtype" of the configuration; without either, the dtype of the largest
    tensor stored as plain floats. InputError for a name that is no such dtype, or if all tensors
    are codes.
    """
    config = checkpoint.config
    for key in ("dtype", "torch_dtype"):
        name = config.get(key)
        if name is None:
            continue
        dtype = MODEL_DTYPES.get(str(name).removeprefix("torch."))
        if dtype is None:
            known = ", ".join(MODEL_DTYPES)
            problem = f'config.json has "{key}": {name!r}, known are {known}.'
            raise InputError(one_line(f"{checkpoint.path}: {problem}"))
        return dtype
    plain = [t for t in checkpoint.tensors.values() if t.dtype in MODEL_DTYPES.values()]
    if not plain:
        problem = 'config.json has no "dtype" and no tensor is stored as plain floats.'
        raise InputError(one_line(f"{checkpoint.path}: {problem}"))
    return max(plain, key=lambda t: t.nbytes).dtype


def small_files(checkpoint: Checkpoint) -> tuple[Path, ...]:
    """Files of the source that an export carries along as they are, by name.

    Tokenizer, generation settings, chat templates, licences and texts: everything but weights in
    any container, the index, config.json, descriptions of quantization, code, hidden files and
    folders.
    """
    return tuple(
        file
        for file in sorted(checkpoint.path.iterdir())
        if file.is_file() and not any(fnmatchcase(file.name, p) for p in NOT_COPIED)
    )


def digest(checkpoint: Checkpoint) -> str:
    """A cheap identity of the model, in hexadecimal.

    It is the sha256 of config.json, the index, and per weight file its name, size, modification
    time and header. Weights are not read, so it costs milliseconds for any size; a copy with new
    modification times counts as another model.
    """
    parts: list[bytes] = []
    for name in ("config.json", INDEX):
        file = checkpoint.path / name
        parts += [name.encode(), file.read_bytes() if file.exists() else b""]
    for file in checkpoint.files:
        stat = file.stat()
        facts = f"{file.name} {stat.st_size} {stat.st_mtime_ns}"
        parts += [facts.encode(), raw_header(file)]
    total = hashlib.sha256()
    for part in parts:
        total.update(len(part).to_bytes(8, "little") + part)
    return total.hexdigest()
