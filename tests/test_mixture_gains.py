# SPDX-License-Identifier: Apache-2.0
"""Algorithms lose less than rounding to nearest in the experts of every family, by the errors of
outputs on the calibration data.

Models are random. Their inputs have a few loud channels, as those of real models have, from gains
of norms that are made eight times as large: without outliers AWQ would have nothing to gain.
"""

import json
from pathlib import Path

import family_checkpoints
import numpy as np
import pytest
from command import jqx
from safetensors.numpy import load_file, save_file
from tiny_families import MIXTURES, ONE_EACH

INT4, NVFP4 = ("int4", "--set", "block=32"), ("nvfp4",)
SEARCHES = {
    "int4_awq": (INT4, ("int4_awq", "--set", "block=32")),
    "nvfp4_awq": (NVFP4, ("nvfp4_awq",)),
    "int4_gptq": (INT4, (*INT4, "--algorithm", "gptq")),
    "nvfp4_gptq": (NVFP4, ("nvfp4_gptq",)),
}


def loud(folder: Path) -> Path:
    """The model in `folder` with some channels of the outputs of its norms louder."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for name, array in tensors.items():
        if "norm" in name and name.endswith("weight") and array.ndim == 1:
            tensors[name] = array.copy()
            tensors[name][3::29] *= 8
    save_file(tensors, file, {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def errors(tmp_path_factory):
    """(model_type, options) -> the mean error of outputs of its experts, found once."""
    sources: dict[str, Path] = {}
    found: dict[tuple[str, tuple[str, ...]], float] = {}

    def get(kind: str, options: tuple[str, ...]) -> float:
        if kind not in sources:
            folder = tmp_path_factory.mktemp(kind)
            sources[kind] = loud(family_checkpoints.write(folder / "model", ONE_EACH[kind]))
        if (kind, options) not in found:
            out = tmp_path_factory.mktemp("out")
            given = ("--calib", sources[kind].parent / "ids.npy", "--report", out / "report")
            done = jqx("quantize", sources[kind], out / "out", "--qformat", *options, *given)
            assert done.code == 0, done.err
            found[kind, options] = mean_of(out / "report")
        return found[kind, options]

    return get


def mean_of(report: Path) -> float:
    """The mean over linears of experts."""
    (file,) = report.glob("*.json")
    rows = json.loads(file.read_text())["linears"]
    return float(np.mean([r["output_error"] for r in rows if ".experts." in r["path"]]))


@pytest.mark.slow
@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("kind", MIXTURES)
def test_less_is_lost_than_by_rounding_to_nearest(errors, kind: str, search: str):
    plain, searched = (errors(kind, options) for options in SEARCHES[search])
    print(f"{kind} {search}: {searched / plain:.3f} of {plain:.5f}")
    assert searched < plain
