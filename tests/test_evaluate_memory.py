# SPDX-License-Identifier: Apache-2.0
"""A model is evaluated one block at a time: more blocks need no more memory."""

import json
import subprocess
import sys
from pathlib import Path

import exports
import ml_dtypes
import numpy as np
import pytest

import jqx_interop as ji

CONFIG = exports.MODELS["llama"] | {"hidden_size": 512, "intermediate_size": 4096}
PROGRAM = """
import json, resource, sys
import jqx_interop as ji
found = ji.evaluate(sys.argv[1], text=sys.argv[2], settings=ji.EvalSettings(window=32))
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps([peak * (1 if sys.platform == "darwin" else 1024), found.tokens]))
"""


def write_model(folder: Path, layers: int) -> Path:
    """A model with so many equal blocks of 15 MB, which make up nearly all of it."""
    config = CONFIG | {"num_hidden_layers": layers}
    rng = np.random.default_rng(0)
    drawn: dict[tuple[int, ...], np.ndarray] = {}
    tensors = {}
    for name, shape in exports.shapes(config).items():
        if shape not in drawn:
            values = rng.standard_normal(shape) * 0.02 if len(shape) > 1 else np.ones(shape)
            drawn[shape] = values.astype(ml_dtypes.bfloat16)
        tensors[name] = drawn[shape]
    folder.mkdir()
    exports.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def peak(model: Path, ids: Path) -> int:
    """The most memory in bytes that a process took which evaluated `model`."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(model), str(ids)],
        capture_output=True,
        text=True,
        check=True,
    )
    memory, tokens = json.loads(done.stdout)
    assert tokens == 199
    return memory


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [None, "int8_wo"])
def test_blocks_are_in_memory_one_at_a_time(tmp_path: Path, recipe: str | None):
    np.save(tmp_path / "ids.npy", np.arange(200) % 128)
    peaks, sizes = [], []
    for layers in (8, 40):  # fewer do not fill what the allocator keeps
        model = write_model(tmp_path / str(layers), layers)
        if recipe is not None:
            out = tmp_path / f"{layers}-{recipe}"
            ji.ptq(model, out, recipe)
            model = out
        sizes.append((model / "model.safetensors").stat().st_size)
        peaks.append(peak(model, tmp_path / "ids.npy"))
    assert sizes[1] - sizes[0] > 200 << 20
    assert peaks[1] - peaks[0] < (sizes[1] - sizes[0]) / 4
