# SPDX-License-Identifier: Apache-2.0
"""The files of mixtures of experts that the reference tool exports, calibrated on the same token
ids: codes, scales of weights and descriptions are equal, scales of inputs nearly.
"""

import json
from pathlib import Path

import exports
import numpy as np
import pytest
from command import jqx
from golden import make_families
from golden import make_mixture_exports as golden
from safetensors.numpy import save_file

NEAR = 2**-6
"""Two steps of bfloat16, in which the reference tool computes."""

NAMED_OTHERWISE = {"phimoe": ("block_sparse_moe.router", "block_sparse_moe.gate")}
"""Case -> what the reference tool calls routers in its lists, and what their tensors are called."""


@pytest.fixture(scope="module")
def recorded():
    with np.load(golden.FIXTURE) as arrays:
        return dict(arrays)


@pytest.mark.parametrize("recipe", golden.CONFIGS)
@pytest.mark.parametrize("case", golden.CASES)
def test_files_are_those_of_the_reference_tool(case, recipe, recorded, tmp_path: Path):
    config, shapes = golden.unpacked(recorded[f"{case}|base"])
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(config)
    save_file(golden.drawn(shapes), tmp_path / "model" / "model.safetensors", {"format": "pt"})
    np.save(tmp_path / "ids.npy", make_families.token_ids()[None])
    given = ("--qformat", recipe, "--calib", tmp_path / "ids.npy", "--compute", "bf16")
    done = jqx("quantize", tmp_path / "model", tmp_path / "out", *given)
    assert done.code == 0, done.err
    tensors, scales, inline, described = golden.unpacked(recorded[f"{case}|{recipe}"])
    found = exports.calibrated(tmp_path / "out")
    assert {n: d for n, d in exports.digests(tmp_path / "out").items() if n not in found} == tensors
    assert found.keys() == scales.keys()
    for name, value in scales.items():
        np.testing.assert_allclose(found[name], value, rtol=NEAR, err_msg=name)
    its, own = NAMED_OTHERWISE.get(case, ("-", "-"))
    wanted = json.loads(described.replace(its, own))
    assert json.loads((tmp_path / "out" / "hf_quant_config.json").read_text()) == wanted
    wanted = json.loads(inline.replace(its, own))["quantization_config"]
    got = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert got == wanted
