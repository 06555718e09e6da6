# SPDX-License-Identifier: Apache-2.0
"""`jqx kernels`: the table of operations, and which implementation a device takes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from command import jqx
from matmul_cases import B200, H200, TPU

import jqx_kernels
from jqx_interop.kernel_table import OPERATIONS, kernel_rows, kernel_rows_on
from jqx_kernels.dispatch import CPU, Device


def test_every_operation_is_there():
    folder = Path(jqx_kernels.__file__).parent
    assert {api.parent.name for api in folder.glob("*/api.py")} | {"codes"} == {
        op.name for op in OPERATIONS
    }


@pytest.mark.parametrize(
    ("device", "taken"), [(CPU, "xla"), (H200, "triton"), (B200, "triton"), (TPU, "tpu")]
)
def test_what_a_device_takes(device, taken):
    assert {row["here"] for row in kernel_rows_on(device)} == {taken}


def test_no_implementation_where_none_is_exact():
    old = {row["operation"]: row["here"] for row in kernel_rows_on(Device("gpu", "V100", (7, 0)))}
    assert (old["encode"], old["codes"], old["matmul"]) == ("", "", "xla")


def test_the_command():
    code, out, err = jqx("kernels", "--json")
    assert (code, err) == (0, "")
    assert json.loads(out) == [{**row, "here": "xla"} for row in kernel_rows()]
    assert "Kernels on cpu" in jqx("kernels").out


def test_kernels_are_imported_where_they_are_needed():
    """Pallas takes as long to import as everything else."""
    say = "import sys, jqx, jqx_interop.cli.app; print('jax.experimental.pallas' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", say], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
