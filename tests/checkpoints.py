# SPDX-License-Identifier: Apache-2.0
"""Small checkpoints to write, read and damage."""

from pathlib import Path

import numpy as np
import pytest

from jqx.errors import InputError
from jqx_interop.checkpoints import (
    DTYPES,
    ShardWriter,
    TensorOut,
    dtype_name,
    open_checkpoint,
    plan_shards,
)

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def arrays(seed: int = 0) -> dict[str, np.ndarray]:
    """One array of every dtype, names and dtypes in no order, with empty and scalar shapes."""
    rng = np.random.default_rng(seed)
    result = {}
    for i, dtype in enumerate(rng.permutation(list(DTYPES))):
        shape = [(3, 5), (), (0, 4), (7,)][i % 4]
        raw = rng.integers(0, 2 if dtype == "BOOL" else 256, (*shape, DTYPES[dtype].itemsize))
        result[f"t{rng.integers(1000)}.{i}"] = raw.astype(np.uint8).view(DTYPES[dtype])[..., 0]
    return result


def outs(tensors: dict[str, np.ndarray]) -> list[TensorOut]:
    return [TensorOut(n, dtype_name(a.dtype), a.shape) for n, a in tensors.items()]


def write(path: Path, tensors: dict[str, np.ndarray], max_shard_size: str = "10GB") -> None:
    path.mkdir(exist_ok=True)
    with ShardWriter(path, plan_shards(outs(tensors), max_shard_size)) as writer:
        for name, array in reversed(tensors.items()):
            writer.write(name, array)
        writer.finish()


def two_shards(path: Path) -> Path:
    """A small model directory of two shards."""
    rng = np.random.default_rng(1)
    write(path, {f"w{i}": rng.random((8, 8), np.float32) for i in range(4)}, "512")
    (path / "config.json").write_text('{"model_type": "llama", "torch_dtype": "bfloat16"}')
    return path


def refused(path: Path | str, *phrases: str) -> str:
    """The one line with which `path` is refused; it has all the phrases."""
    with pytest.raises(InputError) as caught:
        open_checkpoint(path)
    message = str(caught.value)
    assert "\n" not in message
    for phrase in (str(path), *phrases):
        assert phrase in message
    return message


def entry(dtype="F32", shape=(2,), offsets=(0, 8)) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def raw_file(header: bytes, data: bytes = bytes(8)) -> bytes:
    return len(header).to_bytes(8, "little") + header + data
