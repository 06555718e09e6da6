# SPDX-License-Identifier: Apache-2.0
"""Every shared export of the reference tool, from the command line: equal bytes, or searches that
end with outputs as good as its own.
"""

import json
from pathlib import Path

import exports
import pytest
from outputs import output_errors, read
from parity import ROWS, Row, parity, quantized

import jqx_interop as ji

pytestmark = pytest.mark.slow


def test_every_folder_has_a_row(shared: Path):
    folders = {path.parent.name for path in (shared / "golden").glob("*/golden.json")}
    assert set(ROWS) == {name for name in folders if not name.startswith("mixed_")}


@pytest.mark.parametrize(("name", "row"), ROWS.items(), ids=ROWS)
def test_the_shared_exports(shared: Path, tmp_path: Path, name: str, row: Row):
    golden, out = shared / "golden", tmp_path / "out"
    quantized(golden, row, out)
    for file in ("config.json", "hf_quant_config.json", "generation_config.json"):
        assert (out / file).read_bytes() == (golden / name / file).read_bytes()
    ji.load(out)
    theirs = golden / name / "model.safetensors"
    if not theirs.exists():
        return
    found = parity(golden, name, out)
    if row.factor is None:
        assert found.tensors[0] == []
        assert (out / "model.safetensors").read_bytes() == theirs.read_bytes()
    kinds = ({n: t[:2] for n, t in exports.read_tensors(d).items()} for d in (out, golden / name))
    assert next(kinds) == next(kinds)
    assert len(found.alphas[0]) <= 0.1 * found.alphas[1]
    limit = row.factor or 1.001
    assert [path for path, ratio in found.errors.items() if ratio > limit] == []


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
