# SPDX-License-Identifier: Apache-2.0
"""The notebooks run from top to bottom, and are kept without outputs."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).resolve().parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


def read(path):
    return nbformat.read(path, as_version=4)


def test_there_are_notebooks():
    assert {path.name for path in NOTEBOOKS} == CHECKS.keys()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_is_valid_begins_with_words_and_keeps_no_outputs(path):
    notebook = read(path)
    nbformat.validate(notebook)
    assert notebook.cells[0].cell_type == "markdown"
    assert notebook.cells[0].source.startswith("# ")
    for cell in notebook.cells:
        assert cell.source.strip()
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None
        assert "/home/" not in cell.source
        assert "/tmp/" not in cell.source


@pytest.mark.filterwarnings("default")  # those of the messaging between kernel and client
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs(path):
    notebook = read(path)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(FOLDER)}}).execute()
    results = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert any("image/png" in output.get("data", {}) for output in results), "the plot is missing"
    CHECKS[path.name]("".join(output.get("text", "") for output in results))


def check_export(printed):
    kl = dict(re.findall(r"^(\w+) .*KL divergence (\d\.\d+)", printed, re.MULTILINE))
    assert float(kl["fp8"]) < float(kl["int4_blockwise_weight_only"]) < float(kl["nvfp4"]) < 1
    assert "saving and loading: True" in printed
    before, after = re.findall(r"^KL ([\d.]+) -> ([\d.]+)$", printed, re.MULTILINE)[0]
    assert float(after) < float(before)


def check_any_model(printed):
    """Training and quantizing do what the text around the cells says."""
    losses = dict(re.findall(r"^(\w+) +held-out loss ([\d.]+)$", printed, re.MULTILINE))
    loss = {name: float(value) for name, value in losses.items()}
    assert loss["float32"] < 2.6
    assert loss["int8"] < loss["float32"] + 0.01
    assert loss["float32"] < loss["mxfp4"] < loss["float32"] + 0.1
    before, after = re.findall(r"loss in four bits: ([\d.]+) -> ([\d.]+)", printed)[0]
    exact, rounded, tuned = re.findall(
        r"without rounding ([\d.]+), then rounded ([\d.]+); trained with it ([\d.]+)", printed
    )[0]
    assert float(exact) < float(tuned) < float(rounded) < float(before)
    assert tuned == after
    assert float(re.findall(r"^stored: ([\d.]+)", printed, re.MULTILINE)[0]) == pytest.approx(
        float(after), abs=2e-4
    )
    right = dict(re.findall(r"^(\w+) +([\d.]+)% right$", printed, re.MULTILINE))
    assert float(right["float32"]) > 98
    assert all(abs(float(right[name]) - float(right["float32"])) < 1 for name in ("fp8", "int8"))
    assert "Conv_0.kernel (3, 3, 1, 16) has 9 inputs" in printed


def check_kernels(printed):
    """Errors fall with bits, and every implementation means the same."""
    errors = dict(re.findall(r"^(\w+) +[\d.]+ bits +error ([\d.]+)$", printed, re.MULTILINE))
    error = {name: float(value) for name, value in errors.items()}
    assert error["int8"] < error["fp8"] < error["nvfp4"] < error["nf4"] < error["int4"]
    assert re.search(r"^triton +triton: needs a CUDA GPU", printed, re.MULTILINE)
    assert re.search(r"^reference +runs here$", printed, re.MULTILINE)
    away = re.findall(r"^product +\w+ +largest difference ([\d.]+)$", printed, re.MULTILINE)
    assert len(away) == 3
    assert all(float(value) < 2**-7 for value in away)
    assert len(re.findall(r"^encoding +\w+ +equal: True$", printed, re.MULTILINE)) == 2
    assert len(re.findall(r"^\w+ +[\d.]+ ms$", printed, re.MULTILINE)) == 4
    assert "bytes instead of 2,097,152" in printed


def check_auto(printed):
    """More bits lose less, and the choice loses less than another of its size."""
    kl = dict(re.findall(r"^(\w+) .*KL divergence ([\d.]+) nats", printed, re.MULTILINE))
    assert float(kl["six"]) < float(kl["five"]) < float(kl["other"])
    assert float(re.findall(r"^([\d.]+) bits a weight", printed, re.MULTILINE)[0]) <= 5
    chosen = dict(re.findall(r"^(first|last|layers\.\w+) +(\w+)$", printed, re.MULTILINE))
    assert set(chosen) == {"first", "last", "layers.up", "layers.down"}
    assert len(set(chosen.values())) > 1
    assert float(re.findall(r"relative error ([\d.]+)", printed)[0]) < 0.5


CHECKS = {
    "01_quantize_and_export.ipynb": check_export,
    "02_any_jax_model.ipynb": check_any_model,
    "03_kernels.ipynb": check_kernels,
    "04_auto_quantize.ipynb": check_auto,
}
