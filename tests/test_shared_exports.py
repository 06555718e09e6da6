# SPDX-License-Identifier: Apache-2.0
"""Every shared export of the reference tool, from the command line: equal bytes, or searches that
end with outputs as good as its own.
"""

import json
from pathlib import Path
from typing import NamedTuple

import exports
import pytest
from command import jqx
from outputs import output_errors, read

import jqx_interop as ji

pytestmark = pytest.mark.slow


class Row(NamedTuple):
    """The options that make one export, and how near the reference tool's outputs have to be:
    `factor` times its errors; None where all bytes are equal.
    """

    options: str
    factor: float | None = None


ROWS = {
    "fp8": Row("fp8"),
    "fp8_kvfp8": Row("fp8 --kv-cache fp8"),
    "fp8_kvfp8_affine": Row("fp8 --kv-cache fp8_affine"),
    "fp8_kvfp8_cast": Row("fp8 --kv-cache fp8_cast"),
    "fp8_mse": Row("fp8 --algorithm mse"),
    "fp8_pb_wo": Row("fp8_pb_wo"),
    "fp8_pc_pt": Row("fp8_pc_pt"),
    "int4_awq": Row("int4_awq"),
    "int4_awq_clip": Row("int4_awq --algorithm awq_clip", 1.001),
    "int4_awq_full": Row("int4_awq --algorithm awq_full", 1.001),
    "int4_gptq": Row("int4 --algorithm gptq", 1.01),
    "int4_wo": Row("int4"),
    "int8": Row("int8"),
    "int8_mse": Row("int8 --algorithm mse"),
    "int8_sq": Row("int8_sq"),
    "int8_sq_a05": Row("int8_sq --set alpha=0.5"),
    "int8_wo": Row("int8_wo"),
    "mxfp4": Row("mxfp4"),
    "mxfp4_mlp_wo": Row("mxfp4_mlp_wo"),
    "mxfp8": Row("mxfp8"),
    "nvfp4": Row("nvfp4"),
    "nvfp4_4o6": Row("nvfp4_4o6"),
    "nvfp4_awq": Row("nvfp4_awq"),
    "nvfp4_awq_clip": Row("nvfp4_awq_clip"),
    # clipping and svdquant meet inputs of the scaled model, which were not recorded
    "nvfp4_awq_full": Row("nvfp4_awq_full", 1.001),
    "nvfp4_svdquant": Row("nvfp4_svdquant", 1.001),
    "nvfp4_headroom": Row("nvfp4 --algorithm nvfp4_act_headroom", 1.01),
    "nvfp4_kvfp8": Row("nvfp4 --kv-cache fp8"),
    "nvfp4_kvnvfp4": Row("nvfp4 --kv-cache nvfp4"),
    "nvfp4_kvnvfp4_affine": Row("nvfp4 --kv-cache nvfp4_affine"),
    "nvfp4_local_hessian": Row("nvfp4_local_hessian", 1.01),
    "nvfp4_mlp_only": Row("nvfp4_mlp_only"),
    "nvfp4_mlp_wo": Row("nvfp4_mlp_wo"),
    "nvfp4_mse_sweep": Row("nvfp4_mse"),
    "nvfp4_omlp_only": Row("nvfp4_omlp_only"),
    "w4a16_nvfp4": Row("w4a16_nvfp4"),
    "w4a8_awq": Row("w4a8_awq"),
    "w4a8_mxfp4_fp8": Row("w4a8_mxfp4_fp8"),
    "w4a8_nvfp4_fp8": Row("w4a8_nvfp4_fp8"),
}
"""Folder -> how it is made."""


def test_every_folder_has_a_row(shared: Path):
    folders = {path.parent.name for path in (shared / "golden").glob("*/golden.json")}
    assert set(ROWS) == {name for name in folders if not name.startswith("mixed_")}


@pytest.mark.parametrize(("name", "row"), ROWS.items(), ids=ROWS)
def test_the_shared_exports(shared: Path, tmp_path: Path, name: str, row: Row):
    golden, out = shared / "golden", tmp_path / "out"
    data = ("--activations", golden / "acts.safetensors", "--calib", golden / "calib_ids.npy")
    done = jqx("quantize", golden / "base", out, "--qformat", *row.options.split(), *data)
    assert done.code == 0, done.err
    for file in ("config.json", "hf_quant_config.json", "generation_config.json"):
        assert (out / file).read_bytes() == (golden / name / file).read_bytes()
    ji.load(out)
    theirs = golden / name / "model.safetensors"
    if not theirs.exists():
        return
    mine = out / "model.safetensors"
    if row.factor is None:
        have, want = exports.digests(out), exports.digests(golden / name)
        assert {k for k in want if have.get(k) != want[k]} == set()
        assert mine.read_bytes() == theirs.read_bytes()
        return
    kinds = ({n: t[:2] for n, t in exports.read_tensors(d).items()} for d in (out, golden / name))
    assert next(kinds) == next(kinds)
    said = json.loads((golden / name / "golden.json").read_text())["output_error"]
    for path, error in output_errors(read(golden / "base"), read(out), read(golden)).items():
        if said[path] is not None:
            assert error <= row.factor * said[path], path


MEASURED = ["int4_awq", "int4_gptq", "nvfp4_awq", "nvfp4_svdquant", "int8_sq"]


@pytest.mark.parametrize("name", MEASURED)
def test_errors_of_outputs_are_those_of_the_reference_tool(shared: Path, name: str):
    """The measure itself."""
    golden = shared / "golden"
    said = json.loads((golden / name / "golden.json").read_text())["output_error"]
    for path, error in output_errors(
        read(golden / "base"), read(golden / name), read(golden)
    ).items():
        if said[path] is not None:
            assert error == pytest.approx(said[path], rel=1e-3), path
