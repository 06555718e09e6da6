# SPDX-License-Identifier: Apache-2.0
"""A destination that cannot be used and a disk that fills are said in one line with exit code 2.
Nothing that was there is lost.
"""

import errno
import os
import subprocess
import sys
from pathlib import Path

import command
import pytest
from command import refused, snapshot
from source import FP8, JQX, MODEL, untouched

# --- the destination


def test_a_destination_that_is_taken(here: Path):
    (here / "out").mkdir()
    (here / "out" / "precious").write_text("data")
    untouched(here, "quantize", MODEL, "out", *FP8, saying=("out", "not empty", "Remove it"))
    (here / "file").write_text("data")
    untouched(here, "quantize", MODEL, "file", *FP8, saying=("file", "not a directory"))


def test_a_destination_in_the_way_of_the_model(here: Path):
    untouched(here, "quantize", MODEL, MODEL, *FP8, saying=(MODEL, "the model itself"))
    untouched(here, "quantize", MODEL, f"{MODEL}/out", *FP8, saying=(MODEL, "inside the model"))
    untouched(here, "quantize", MODEL, ".", *FP8, saying="contains the model")


def test_a_destination_that_cannot_be_made(here: Path):
    (here / "file").write_text("data")
    untouched(here, "quantize", MODEL, "file/out", *FP8, saying=("file/out", "cannot be made"))


def test_a_destination_that_another_process_writes(here: Path):
    hold = "from jqx_interop.checkpoints import Workspace; Workspace('out'); "
    hold += "print(1, flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "1\n"
        untouched(
            here, "quantize", MODEL, "out", *FP8, saying=("out", "being written", str(other.pid))
        )
        other.communicate("\n")
    assert command.jqx("quantize", MODEL, "out", *FP8).code == 0


# --- a full disk


def full(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_no_room_at_all(here: Path, monkeypatch):
    monkeypatch.setattr(os, "posix_fallocate", full)
    saying = ("out.jqx-partial", "no room", "bytes", "No space left")
    untouched(here, "quantize", MODEL, "out", *FP8, saying=saying)


def test_no_room_for_hidden_states(here: Path, monkeypatch):
    reserve = os.posix_fallocate

    def small(descriptor: int, start: int, size: int) -> None:
        hidden = os.readlink(f"/proc/self/fd/{descriptor}").endswith(".bin")
        full() if hidden else reserve(descriptor, start, size)

    monkeypatch.setattr(os, "posix_fallocate", small)
    saying = ("out.jqx-partial", "No space left", "the same command")
    untouched(here, "quantize", MODEL, "out", *FP8, "--max-memory", "1KiB", saying=saying)


@pytest.mark.parametrize("given", [("--qformat", "mxfp8"), FP8], ids=["data-free", "calibrated"])
def test_a_disk_that_fills_half_way(here: Path, monkeypatch, given: tuple[str, ...]):
    write, left = os.pwrite, [12]

    def fills(descriptor: int, data: bytes, start: int) -> int:
        left[0] -= 1
        return write(descriptor, data, start) if left[0] >= 0 else full() or 0

    monkeypatch.setattr(os, "pwrite", fills)
    saying = ("out.jqx-partial", "No space left", "the same command")
    refused("quantize", MODEL, "out", *given, saying=saying)
    assert not (here / "out").exists()
    assert (here / "out.jqx-partial").exists()
    monkeypatch.undo()
    monkeypatch.chdir(here)
    assert command.jqx("quantize", MODEL, "out", *given).code == 0
    assert command.jqx("quantize", MODEL, "whole", *given).code == 0
    assert snapshot(here / "out") == snapshot(here / "whole")


def test_a_limit_on_the_size_of_files(here: Path):
    before = snapshot(here)
    done = subprocess.run(
        [
            "bash",
            "-c",
            'ulimit -f 100; "$@"',
            "_",
            *JQX,
            "quantize",
            MODEL,
            "out",
            "--qformat",
            "mxfp8",
        ],
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "no room for the checkpoint" in done.stderr
    assert snapshot(here) == before
