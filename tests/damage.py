# SPDX-License-Identifier: Apache-2.0
"""Small quantized checkpoints, ways to damage them, and the line with which they are refused."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import exports
import numpy as np
import pytest
from checkpoints import write
from exports import Export
from stored_trees import model_of

import jqx_interop as ji
from jqx.errors import InputError
from jqx_interop.checkpoints import DTYPES
from jqx_interop.stored import open_model

NVFP4 = Export(model="llama", recipe="nvfp4", kv="nvfp4_affine")
MIXED = Export(model="llama", recipe="mixed")
MXFP8 = Export(model="llama", recipe="mxfp8")
INT4 = Export(model="llama", recipe="int4_blockwise_weight_only")
DOWN = "model.layers.1.mlp.down_proj"
KEYS = "model.layers.0.self_attn.k_proj"


def save_all(root: Path) -> Path:
    """The checkpoints of the rows above, each in a directory of its key."""
    for row in (NVFP4, MIXED, MXFP8, INT4):
        ji.save(model_of(row), root / row.key)
    return root


def refused(folder: Path, saying: tuple[str, ...], *, opened: bool) -> None:
    """Every phrase is in the one line; what headers tell is told without reading numbers."""
    phrases = "".join(f"(?=[^\n]*{re.escape(phrase)})" for phrase in (str(folder), *saying))
    for look in (ji.load, open_model) if opened else (ji.load,):
        with pytest.raises(InputError, match=rf"\A{phrases}[^\n]*\Z"):
            look(folder)


def described(folder: Path, **changes: object) -> None:
    """Change both descriptions alike; None takes a key out."""
    for name, part in (
        ("config.json", "quantization_config"),
        ("hf_quant_config.json", "quantization"),
    ):
        said = json.loads((folder / name).read_text())
        for key, value in changes.items():
            said[part].pop(key, None)
            if value is not None:
                said[part][key] = value
        (folder / name).write_text(json.dumps(said))


def inline(folder: Path, value: object) -> None:
    """Put `value` in place of the quantization_config of config.json."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": value}))


def arrays(folder: Path) -> dict[str, np.ndarray]:
    found = exports.read_tensors(folder).items()
    return {n: np.frombuffer(raw, DTYPES[d]).reshape(shape) for n, (d, shape, raw) in found}


def change(name: str, how: Callable[[np.ndarray], np.ndarray] | None):
    """Change one tensor; None takes it out."""

    def damage(folder: Path) -> None:
        found = arrays(folder)
        array = found.pop(name)
        write(folder, found if how is None else found | {name: how(array)})

    return damage


def add(name: str, array: np.ndarray):
    return lambda folder: write(folder, arrays(folder) | {name: array})


def number(at: int, value: object):
    """One number of an array replaced; codes and small floats by their bits."""

    def how(array: np.ndarray) -> np.ndarray:
        array = array.copy()
        flat = array.reshape(-1)
        flat = flat.view(np.uint8) if isinstance(value, int) else flat
        flat[at] = value
        return array

    return how
