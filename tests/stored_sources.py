# SPDX-License-Identifier: Apache-2.0
"""A small model as quantized sources, and as the floats that they stand for."""

from pathlib import Path

import foreign
import numpy as np
import small_model
from foreign import FP8_BLOCKS

from jqx_interop.checkpoints import open_checkpoint
from jqx_interop.sources import as_floats

MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
STORED = {
    "fp8": (foreign.stored_as_fp8, FP8_BLOCKS, "FP8, 128x128 blocks"),
    "mxfp4": (foreign.stored_as_mxfp4, MXFP4, "MXFP4"),
}


def floats(path: Path) -> foreign.Arrays:
    """Every tensor of a checkpoint, decoded."""
    checkpoint = as_floats(open_checkpoint(path))
    return {name: np.array(checkpoint.read(name)) for name in checkpoint.tensors}


def make(folder: Path) -> Path:
    """A model in every kind of source, "fp8" and "mxfp4", what each decodes to in "fp8-floats" and
    "mxfp4-floats", and as it was in "model".
    """
    root = small_model.write(folder)
    plain = {n: np.array(a) for n, a in floats(root / "model").items()}
    plain["model.layers.0.self_attn.k_proj.weight"] *= 8  # what shares a scale is not alike
    for name, (stored, said, _) in STORED.items():
        config = {**small_model.CONFIG, "quantization_config": said}
        foreign.put(root / name, config, stored(plain))
        foreign.put(root / f"{name}-floats", small_model.CONFIG, floats(root / name))
    return root


def content(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {f.name: f.read_bytes() for f in sorted(folder.iterdir())}
