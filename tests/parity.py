# SPDX-License-Identifier: Apache-2.0
"""Exports of the reference tool beside ours: `python tests/parity.py GOLDEN [NAME...]`.

GOLDEN holds a model (base/), its inputs (acts.safetensors, calib_ids.npy) and a directory for every
export. The table says how many stored tensors differ, on how many linears a search chose the same
exponent, and how the errors of outputs compare.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import exports
import numpy as np
from command import jqx
from outputs import output_errors, read


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


class Parity(NamedTuple):
    """What one export shows: tensors whose bytes differ, of how many, linears with another exponent
    of AWQ, of how many, and linear -> its error of outputs over the reference tool's.
    """

    tensors: tuple[list[str], int]
    alphas: tuple[list[str], int]
    errors: dict[str, float]


def quantized(golden: Path, row: Row, out: Path) -> None:
    """Write our export to `out`, its report beside it."""
    data = ("--activations", golden / "acts.safetensors", "--calib", golden / "calib_ids.npy")
    report = ("--report", out.with_name(f"{out.name}-report"))
    done = jqx("quantize", golden / "base", out, "--qformat", *row.options.split(), *data, *report)
    assert done.code == 0, done.err


def parity(golden: Path, name: str, out: Path) -> Parity:
    """What `out` and golden/name have in common; the latter with the file of its weights."""
    said = json.loads((golden / name / "golden.json").read_text("utf-8"))
    report = out.with_name(f"{out.name}-report") / "report.json"
    linears = {row["path"]: row for row in json.loads(report.read_text("utf-8"))["linears"]}
    have, want = exports.digests(out), exports.digests(golden / name)
    other = [key for key in sorted(have | want) if have.get(key) != want.get(key)]
    alphas = {path: row["alpha"] for path, row in said.get("choices", {}).items() if row["alpha"]}
    moved = [path for path in alphas if not np.isclose(linears[path]["alpha"], alphas[path])]
    errors = output_errors(read(golden / "base"), read(out), read(golden))
    theirs = {path: error for path, error in said["output_error"].items() if error is not None}
    return Parity(
        (other, len(want)),
        (moved, len(alphas)),
        {path: errors[path] / error for path, error in theirs.items()},
    )


def _line(golden: Path, name: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        quantized(golden, ROWS[name], Path(folder) / "out")
        (other, tensors), (moved, alphas), errors = parity(golden, name, Path(folder) / "out")
    chosen = f"{alphas - len(moved)} of {alphas}" if alphas else ""
    ratios = f"{np.mean([*errors.values()]):.4f} | {max(errors.values()):.4f}" if errors else " | "
    return f"| {name} | {len(other)} of {tensors} | {chosen} | {ratios} |"


def main(golden: Path, *names: str) -> None:
    """Print the table."""
    print("| export | tensors that differ | same exponent | mean error ratio | worst |")
    print("|---|---|---|---|---|")
    found = [name for name in ROWS if (golden / name / "model.safetensors").exists()]
    for name in names or found:
        print(_line(golden, name), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
