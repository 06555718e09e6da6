# SPDX-License-Identifier: Apache-2.0
"""Every kernel compiled for devices that are not here, by their own compilers. The extras "gpu" and
"tpu" install these.
"""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
from aot import TARGETS

HERE = Path(__file__).parent
COMPILERS = {"cuda": ("jax_cuda12_plugin", "jax_cuda13_plugin"), "tpu": ("libtpu",)}
EXACT = ("encode nvfp4", "encode int4", "encode mxfp4", "codes fp8 ", "codes int8 ")
"""Kernels that divide; those of powers of two scale instead, but for one division."""

SOFTMAX = "kv_attention"
"""Divides by a sum, which need not be exact; its products of float32 are none of tensor cores."""

PRODUCTS = ("matmul", "grouped_matmul", "hadamard")

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", TARGETS)
def test_everything_compiles(name):
    target = TARGETS[name]
    if not any(map(importlib.util.find_spec, COMPILERS[target.platform])):
        pytest.skip(f"no {' or '.join(COMPILERS[target.platform])} here")
    command = [sys.executable, HERE / "aot.py", name]
    done = subprocess.run(command, capture_output=True, text=True, cwd=HERE)
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(found) > 150
    assert [row for row in found if "error" in row] == []
    call = {"cuda": "__gpu$xla.gpu.triton", "tpu": "tpu_custom_call"}[target.platform]
    assert [row["case"] for row in found if call not in row["calls"]] == []
    if target.platform == "cuda":
        inexact = [row["case"] for row in found if row["approximate"]]
        assert [case for case in inexact if not case.startswith(SOFTMAX)] == []
        divided = [row for row in found if row["case"].startswith(EXACT)]
        assert divided
        assert all(row["exact"] for row in divided), divided
        products = [row for row in found if row["case"].startswith(PRODUCTS)]
        products += [
            row for row in found if row["case"].endswith("bfloat16") and SOFTMAX in row["case"]
        ]
        assert [row["case"] for row in products if not row["tensor_cores"]] == []
