# SPDX-License-Identifier: Apache-2.0
"""The files of every family that the reference tool exports, byte for byte, from the largest
magnitudes of inputs that it met.
"""

import json
from pathlib import Path

import exports
import ml_dtypes
import numpy as np
import pytest
from command import jqx
from golden import make_family_exports as golden
from safetensors.numpy import save_file

NAMED_OTHERWISE = {"gpt_neox": ("lm_head", "embed_out")}
"""Case -> the name of the head in memory, which the reference tool lists, and in files."""


@pytest.fixture(scope="module")
def recorded():
    with np.load(golden.FIXTURE) as arrays:
        return dict(arrays)


def write(folder: Path, case: str, recorded: dict[str, np.ndarray]) -> None:
    """The checkpoint "model", and "acts.safetensors": a token that has the largest magnitudes."""
    config, shapes = golden.unpacked(recorded[f"{case}|base"])
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text(config)
    tensors = golden.drawn({name: tuple(shape) for name, shape in shapes.items()})
    save_file(tensors, folder / "model" / "model.safetensors", {"format": "pt"})
    start = f"{case}|input|"
    inputs = {
        f"{name}|0": bits.view(ml_dtypes.bfloat16).reshape(1, 1, -1)
        for key, bits in recorded.items()
        if key.startswith(start)
        for name in key.removeprefix(start).split(",")
    }
    save_file(inputs, folder / "acts.safetensors")


@pytest.mark.parametrize("recipe", golden.CONFIGS)
@pytest.mark.parametrize("case", golden.CASES)
def test_files_are_those_of_the_reference_tool(case, recipe, recorded, tmp_path: Path):
    write(tmp_path, case, recorded)
    out, acts = tmp_path / "out", tmp_path / "acts.safetensors"
    done = jqx("quantize", tmp_path / "model", out, "--qformat", recipe, "--activations", acts)
    assert done.code == 0, done.err
    tensors, config, described = golden.unpacked(recorded[f"{case}|{recipe}"])
    assert exports.digests(out) == tensors
    memory, files = NAMED_OTHERWISE.get(case, ("", ""))
    wanted = json.loads(described.replace(f'"{memory}"', f'"{files}"') if memory else described)
    lists = wanted["quantization"]["exclude_modules"]
    lists.sort()
    assert json.loads((out / "hf_quant_config.json").read_text()) == wanted
    inline = json.loads((out / "config.json").read_text())["quantization_config"]
    assert inline == json.loads(config)["quantization_config"] | {"ignore": lists}
