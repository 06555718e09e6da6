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
    assert [path.name for path in NOTEBOOKS] == ["01_quantize_and_export.ipynb"]


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
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(FOLDER)}}).execute()
    results = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert any("image/png" in output.get("data", {}) for output in results), "the plot is missing"
    printed = "".join(output.get("text", "") for output in results)
    kl = dict(re.findall(r"^(\w+) .*KL divergence (\d\.\d+)", printed, re.MULTILINE))
    assert float(kl["fp8"]) < float(kl["int4_blockwise_weight_only"]) < float(kl["nvfp4"]) < 1
    assert "saving and loading: True" in printed
    before, after = re.findall(r"^KL ([\d.]+) -> ([\d.]+)$", printed, re.MULTILINE)[0]
    assert float(after) < float(before)
