# SPDX-License-Identifier: Apache-2.0
"""Runs that are killed: the journal, the workspace, and OUT that is complete or absent."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jqx.errors import InputError
from jqx_interop.checkpoints import Journal, Workspace

# --- the journal


def filled(path: Path, count: int = 3) -> list[dict]:
    journal = Journal(path)
    for i in range(count):
        journal.append({"block": i, "names": [f"w{i}", "é\n"], "loss": 0.1 * i})
    journal.close()
    return journal.records


def reloaded(path: Path) -> list[dict]:
    journal = Journal(path)
    journal.close()
    return journal.records


def test_records_come_back_and_lines_are_json_with_a_checksum(tmp_path: Path):
    records = filled(tmp_path / "j")
    assert reloaded(tmp_path / "j") == records
    assert [r["block"] for r in records] == [0, 1, 2]
    assert records[2]["loss"] == 0.2
    for line in (tmp_path / "j").read_text().splitlines():
        assert set(json.loads(line)) == {"crc32", "record"}


def test_a_journal_cut_anywhere_keeps_the_whole_lines(tmp_path: Path):
    records = filled(tmp_path / "j")
    whole = (tmp_path / "j").read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    for cut in range(len(whole) + 1):
        (tmp_path / "cut").write_bytes(whole[:cut])
        kept = sum(end <= cut for end in ends)
        journal = Journal(tmp_path / "cut")
        assert journal.records == records[:kept]
        journal.append({"block": 9})
        journal.close()
        assert reloaded(tmp_path / "cut") == [*records[:kept], {"block": 9}]


@given(position=st.integers(0, 10_000), bit=st.integers(0, 7))
def test_loading_stops_at_the_first_changed_line(tmp_path_factory, position: int, bit: int):
    path = tmp_path_factory.mktemp("journal") / "j"
    records = filled(path)
    raw = bytearray(path.read_bytes())
    position %= len(raw)
    line = raw[:position].count(b"\n")
    raw[position] ^= 1 << bit
    path.write_bytes(raw)
    assert reloaded(path) == records[:line]


def test_what_is_not_json_is_not_recorded(tmp_path: Path):
    journal = Journal(tmp_path / "j")
    with pytest.raises(ValueError, match="not JSON compliant"):
        journal.append({"loss": float("nan")})
    journal.close()
    assert reloaded(tmp_path / "j") == []


# --- the workspace


def refused(out: Path, *phrases: str, model: Path | None = None) -> None:
    with pytest.raises(InputError) as caught:
        Workspace(out, model)
    assert "\n" not in str(caught.value)
    for phrase in phrases:
        assert phrase in str(caught.value)


def test_nothing_appears_before_it_is_published(tmp_path: Path):
    out = tmp_path / "made" / "on the way" / "out"
    with Workspace(out) as space:
        assert space.begin({"format": "fp8"}) == []
        (space.files / "a").write_text("x")
        assert not out.exists()
        assert space.publish() == out
    assert [f.name for f in out.iterdir()] == ["a"]
    assert [f.name for f in out.parent.iterdir()] == ["out"]


def test_an_empty_directory_may_be_there(tmp_path: Path):
    (tmp_path / "out").mkdir()
    with Workspace(tmp_path / "out") as space:
        space.begin({})
        (space.files / "a").write_text("x")
        space.publish()
    assert (tmp_path / "out" / "a").read_text() == "x"


def test_work_goes_on_where_it_was(tmp_path: Path):
    out = tmp_path / "out"
    with Workspace(out) as space:
        space.begin({"shape": (1, 2)})
        (space.files / "a").write_text("x")
        space.record({"block": 0})
    with Workspace(out) as space:
        assert space.begin({"shape": (1, 2)}) == [{"block": 0}]
        assert (space.files / "a").read_text() == "x"
        space.record({"block": 1})
    with Workspace(out) as space:
        assert space.begin({"shape": [1, 2]}) == [{"block": 0}, {"block": 1}]


def test_another_run_is_refused_by_the_name_of_what_differs(tmp_path: Path):
    with Workspace(tmp_path / "out") as space:
        space.begin({"format": "fp8", "model": "1234", "old": 1})
        (space.files / "a").write_text("x")
        space.record({"block": 0})
    with Workspace(tmp_path / "out") as space:
        with pytest.raises(InputError) as caught:
            space.begin({"format": "nvfp4", "model": "1234", "new": 2})
        for phrase in (
            "format was 'fp8', now 'nvfp4'",
            "old was 1, now None",
            "new was None, now 2",
            "--restart",
        ):
            assert phrase in str(caught.value)
        assert "model was" not in str(caught.value)
    with Workspace(tmp_path / "out") as space:
        assert (space.files / "a").exists()
        assert space.begin({"format": "nvfp4"}, restart=True) == []
        assert not list(space.files.iterdir())
        space.record({"block": 0})
    with Workspace(tmp_path / "out") as space:
        assert space.begin({"format": "nvfp4"}) == [{"block": 0}]


def test_work_without_a_record_leaves_nothing(tmp_path: Path):
    def fails() -> None:
        with Workspace(tmp_path / "out") as space:
            space.begin({})
            (space.files / "big").write_text("x")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fails()
    assert not list(tmp_path.iterdir())
    with Workspace(tmp_path / "out"):
        pass
    assert not list(tmp_path.iterdir())


def test_files_without_a_good_fingerprint_are_thrown_away(tmp_path: Path):
    with Workspace(tmp_path / "out") as space:
        space.begin({"format": "fp8"})
        (space.files / "a").write_text("x")
        space.record({"block": 0})
        journal = space.directory / "journal.jsonl"
    journal.write_bytes(b"{" + journal.read_bytes())
    with Workspace(tmp_path / "out") as space:
        assert space.begin({"format": "fp8"}) == []
        assert not list(space.files.iterdir())


def test_a_run_killed_before_its_first_record_starts_over(tmp_path: Path):
    first = Workspace(tmp_path / "out")
    first.begin({"format": "fp8"})
    (first.files / "a").write_text("x")
    os.close(first._lock)  # what a kill does
    for fingerprint in ({"format": "fp8"}, {"format": "nvfp4"}):
        space = Workspace(tmp_path / "out")
        assert space.begin(fingerprint) == []
        assert not list(space.files.iterdir())
        (space.files / "a").write_text("x")
        os.close(space._lock)


def test_an_occupied_destination(tmp_path: Path):
    (tmp_path / "file").write_text("")
    refused(tmp_path / "file", "exists and is not a directory")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").write_text("")
    refused(tmp_path / "full", "exists and is not empty")
    refused(Path("/proc"), "is a mount point")
    assert sorted(f.name for f in tmp_path.iterdir()) == ["file", "full"]


def test_a_destination_that_cannot_be_made(tmp_path: Path, monkeypatch):
    (tmp_path / "file").write_text("")
    refused(tmp_path / "file" / "out", "cannot be made", "Not a directory")

    def denied(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", denied)
    refused(tmp_path / "out", "cannot be made (Permission denied)")


def test_the_model_is_out_of_reach(tmp_path: Path):
    model = tmp_path / "model"
    model.mkdir()
    (tmp_path / "link").symlink_to(model)
    refused(model, "is the model itself", model=model)
    refused(tmp_path / "link", "is the model itself", model=model)
    refused(model / "sub" / "out", "is inside the model directory", model=tmp_path / "link")
    refused(tmp_path, "contains the model directory", model=model)
    with Workspace(tmp_path / "model2", model):
        pass


def test_a_destination_taken_meanwhile_keeps_the_work(tmp_path: Path):
    with Workspace(tmp_path / "out") as space:
        space.begin({})
        (space.files / "a").write_text("x")
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "b").write_text("other")
        with pytest.raises(InputError, match="The result is in"):
            space.publish()
    assert (space.files / "a").read_text() == "x"
    assert (tmp_path / "out" / "b").read_text() == "other"


def test_one_process_at_a_time(tmp_path: Path):
    script = (
        "import sys, time; from jqx_interop.checkpoints import Workspace\n"
        "space = Workspace(sys.argv[1]); space.begin({}); space.record({'block': 0})\n"
        "print('ready', flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "out")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        refused(tmp_path / "out", f"is being written by process {process.pid}")
        process.kill()
    with Workspace(tmp_path / "out") as space:
        assert space.begin({}) == [{"block": 0}]
        refused(tmp_path / "out", f"is being written by process {os.getpid()}")


# --- kill -9

DRIVER = Path(__file__).with_name("killed_run.py")


@pytest.fixture(scope="module")
def kills(tmp_path_factory) -> list[dict]:
    """One row for each system call of a run: what a SIGKILL there left, and how it went on."""
    command = [sys.executable, "-W", "ignore", str(DRIVER), str(tmp_path_factory.mktemp("kills"))]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_a_kill_at_any_moment_leaves_all_or_nothing(kills: list[dict]):
    assert len(kills) > 50
    assert {row["killed"] for row in kills} >= {
        *("mkdir", "open", "pwrite", "posix_fallocate", "fdatasync", "write", "fsync"),
        *("rename", "unlink", "rmdir"),
    }
    assert {row["left"] for row in kills} == {"nothing", "everything"}
    renames = [row["left"] for row in kills if row["killed"] == "rename"]
    assert renames == ["nothing"]


def test_after_a_kill_the_same_command_ends_with_the_same_bytes(kills: list[dict]):
    for row in kills:
        assert row["then"] == ("refused" if row["left"] == "everything" else "published"), row
        assert row["equal"], row
        assert row["beside"] == ["out"], row


def test_after_a_kill_finished_work_is_not_repeated(kills: list[dict]):
    for row in kills:
        if row["left"] == "nothing":
            assert row["recorded"] + row["written"] == 3, row
    assert {row["recorded"] for row in kills} == {0, 1, 2, 3}


def test_tensors_are_on_the_disk_before_the_journal_says_so(kills: list[dict]):
    calls = [row["killed"] for row in kills]
    calls = calls[calls.index("fdatasync") :]  # headers are written before
    blocks = "".join({"pwrite": "w", "fdatasync": "s", "write": "j"}.get(c, "") for c in calls)
    assert blocks.startswith("ss" + "wsj" * 3)
    rename = calls.index("rename")
    assert calls[rename - 2 : rename] == ["fsync", "close"]
    assert calls[rename + 2] == "fsync"
