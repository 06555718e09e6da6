# SPDX-License-Identifier: Apache-2.0
"""A model to spoil, in the current directory (the fixture `here`), and commands that then change
nothing.
"""

import json
import sys
from pathlib import Path

import exports
import numpy as np
from command import refused, snapshot

MODEL, WEIGHTS, INDEX = "source", "model.safetensors", "model.safetensors.index.json"
FP8 = ("--qformat", "fp8", "--calib", "ids.npy")
JQX = (sys.executable, "-c", "from jqx_interop.cli import main; main()")
DOWN = "model.layers.1.mlp.down_proj"


def save(folder: Path, tensors: dict[str, np.ndarray]) -> None:
    exports.save_file(tensors, folder / WEIGHTS, {"format": "pt"})


def edit(folder: Path, **changes: object) -> None:
    """Change keys of config.json."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def untouched(here: Path, *words: object, saying: tuple[str, ...] | str) -> str:
    """`words` are refused in one line, and no file appears, changes or goes."""
    before = snapshot(here)
    line = refused(*words, saying=saying)
    assert snapshot(here) == before
    return line
