# SPDX-License-Identifier: Apache-2.0
"""Where a report may go, and runs with one that were killed."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from command import jqx, refused, snapshot
from reports import AWQ, FILES, told
from source import MODEL

from jqx_interop.checkpoints import Workspace

# --- folders in the way


@pytest.mark.parametrize(
    ("folder", "saying"),
    {
        "full": "full exists",
        "ids.npy": "ids.npy exists",
        "dangling": "dangling exists",
        "ids.npy/report": "ids.npy/report",
        ".": ". exists",
        "out": "neither in the other",
        "out/report": "neither in the other",
        "out.jqx-partial/report": "neither in the other",
        f"{MODEL}/report": "inside the model directory",
    }.items(),
    ids=lambda value: value if "/" not in value else None,
)
def test_a_folder_that_cannot_be_is_refused_before_anything(here: Path, folder: str, saying: str):
    (here / "full").mkdir()
    (here / "full" / "file").write_text("")
    (here / "dangling").symlink_to("nowhere")
    before = snapshot(here)
    words = ("--qformat", "mxfp8", "--calib", "ids.npy", "--report", folder)
    refused("quantize", MODEL, "out", *words, saying=saying)
    assert snapshot(here) == before


def test_out_inside_the_report_is_refused(here: Path):
    words = ("--qformat", "mxfp8", "--calib", "ids.npy", "--report", "all")
    refused("quantize", MODEL, "all/out", *words, saying="neither in the other")
    assert not (here / "all").exists()


def test_an_empty_folder_is_taken(here: Path):
    (here / "report").mkdir()
    words = ("--qformat", "mxfp8", "--calib", "ids.npy", "--report", "report")
    assert jqx("quantize", MODEL, "out", *words).code == 0
    assert set(snapshot(here / "report")) == FILES


def test_a_folder_filled_meanwhile_loses_nothing(here: Path, monkeypatch):
    publish = Workspace.publish

    def fills(self: Workspace) -> Path:
        (here / "report").mkdir()
        (here / "report" / "file").write_text("")
        return publish(self)

    monkeypatch.setattr(Workspace, "publish", fills)
    words = ("--qformat", "mxfp8", "--calib", "ids.npy", "--report", "report")
    line = refused("quantize", MODEL, "out", *words, saying=("report.jqx-report-partial",))
    assert "The checkpoint is complete" in line
    assert set(snapshot(here / "report.jqx-report-partial")) == FILES
    assert (here / "out" / "config.json").exists()


# --- runs that were killed

KILLED = """
import os, signal, sys
import jqx_interop.pipeline as pipeline
from jqx_interop.checkpoints import Workspace
owner = {"record": Workspace, "publish": Workspace, "stage_report": pipeline}[sys.argv[1]]
work, left = getattr(owner, sys.argv[1]), int(sys.argv[2])
def killed(*args):
    global left
    left -= 1
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return work(*args)
setattr(owner, sys.argv[1], killed)
sys.argv = ["jqx", *sys.argv[3:]]
from jqx_interop.cli import main
main()
"""
RUNS = {
    "calibrated": ("--recipe", "awq.yaml", "--calib", "ids.npy"),
    "recorded": ("--qformat", "nvfp4", "--activations", "acts.safetensors"),
}


def same(one: Path, other: Path) -> bool:
    """Whether two reports say the same, but for times and the names of what was written."""
    rows = [told(folder) for folder in (one, other)]
    for row in rows:
        assert row["seconds"] > 0
        row |= {"seconds": 0, "out": "", "report": ""}
    pictures = [(folder / "errors.png").read_bytes() for folder in (one, other)]
    return rows[0] == rows[1] and pictures[0] == pictures[1]


@pytest.mark.parametrize(
    ("step", "count", "run"),
    [("record", 2, "calibrated"), ("publish", 0, "calibrated"), ("stage_report", 0, "recorded")],
)
def test_a_killed_run_goes_on_to_the_same_report(here: Path, step: str, count: int, run: str):
    (here / "awq.yaml").write_text(AWQ)
    words = (*RUNS[run], "--report")
    command = [sys.executable, "-c", KILLED, step, str(count), "quantize", MODEL, "out", *words]
    done = subprocess.run([*command, "report"], env=os.environ, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (here / "out").exists()
    assert not (here / "report").exists()
    lines = (here / "out.jqx-partial" / "journal.jsonl").read_text().splitlines()
    units = [json.loads(line)["record"] for line in lines][1:]
    assert len(units) >= 2
    assert any(unit["facts"] for unit in units)
    assert jqx("quantize", MODEL, "out", *words, "report").code == 0
    assert jqx("quantize", MODEL, "whole", *words, "of-whole").code == 0
    assert snapshot(here / "out") == snapshot(here / "whole")
    assert same(here / "report", here / "of-whole")
    assert not list(here.glob("*-partial"))


def test_a_run_without_a_report_does_not_go_on_with_one(here: Path):
    words = ("quantize", MODEL, "out", "--qformat", "fp8", "--calib", "ids.npy")
    command = [sys.executable, "-c", KILLED, "record", "2", *words]
    assert subprocess.run(command, capture_output=True).returncode == -signal.SIGKILL
    refused(*words, "--report", "report", saying=("report was False, now True", "--restart"))
    assert jqx(*words, "--report", "report", "--restart").code == 0
    assert len(told(here / "report")["linears"]) == 14
