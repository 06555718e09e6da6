# SPDX-License-Identifier: Apache-2.0
"""A run killed at any moment goes on with the same command, and ends with the same bytes."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import exports
import pytest
from command import jqx, refused, snapshot

from jqx_interop.checkpoints import Workspace

DRIVER = Path(__file__).with_name("killed_quantize.py")


def kills(root: Path, model: str, steps: str, settings: dict[str, Any]) -> tuple[dict, list[dict]]:
    """What an undisturbed run does, and a row for each kill."""
    exports.write_base(root / "run" / "model", model)
    done = subprocess.run(
        [sys.executable, str(DRIVER), str(root / "run"), steps, json.dumps(settings)],
        stdout=subprocess.PIPE,
        text=True,
    )
    (root / "run" / "model-ids.npy").unlink()
    assert done.returncode == 0
    whole, *rows = (json.loads(line) for line in done.stdout.splitlines())
    return whole, rows


def check(whole: dict, rows: list[dict]) -> None:
    """What holds for every kill."""
    units = whole["units"]
    assert rows
    assert {row["ended"] for row in rows} == {"killed"}
    for row in rows:
        assert row["equal"]
        assert set(row["beside"]) <= {"model", "model-ids.npy", "out"}
        assert row["left"] in ("nothing", "everything")
        if row["left"] == "nothing":
            assert row["then"] == "published"
            assert sorted(row["recorded"] + row["units"]) == units
        else:
            assert row["then"] == "refused"
            assert "not empty" in row["said"]


def calibrated(root: Path, **more: Any) -> dict[str, Any]:
    """Settings whose result depends on every batch and its order."""
    given = {
        "recipe": "nvfp4",
        "kv_cache": "nvfp4_affine",
        "calib": str(root / "run" / "model-ids.npy"),
    }
    return {**given, **more}


def test_killed_at_every_step_without_data(tmp_path: Path):
    whole, rows = kills(tmp_path, "wide", "before", {"recipe": "mxfp8"})
    check(whole, rows)
    before = [step for step in whole["steps"] if step.startswith("before")]
    assert [row["killed"] for row in rows] == before
    assert len(before) == len(whole["steps"]) / 2
    assert {row["left"] for row in rows} == {"nothing", "everything"}
    assert {len(row["recorded"]) for row in rows} == {0, 1, 2, 3, 4}


STEPS = {"4GiB": "after record", 1: "before turn,before record"}


@pytest.mark.parametrize("memory", STEPS, ids=["in memory", "spilled"])
def test_killed_while_calibrating(tmp_path: Path, memory: int | str):
    whole, rows = kills(tmp_path, "llama", STEPS[memory], calibrated(tmp_path, max_memory=memory))
    check(whole, rows)
    check_blocks(whole, rows, memory)


def check_blocks(whole: dict, rows: list[dict], memory: int | str) -> None:
    """States that were spilled are taken up again; those that were in memory come from running all
    blocks again.
    """
    assert whole["blocks"] == [0, 1]
    assert 2 in {len(row["recorded"]) for row in rows}
    first = (
        {0: 0, 1: 0, 2: 1} if memory == 1 else {0: 0, 1: 0, 2: 0}
    )  # after embedding and one block
    for row in rows:
        if row["then"] == "published":
            kept = len(row["recorded"])
            assert row["blocks"] == ([0, 1][first[kept] :] if kept in first else [])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "more"),
    [
        ("llama", {}),
        ("llama", {"max_memory": 1}),
        ("llama", {"max_memory": 1, "batch_size": 1, "max_shard_size": "60KB"}),
        ("llama", {"kv_cache": "none", "recipe": "fp8"}),
        ("qwen2", {"max_memory": 1, "kv_cache": "fp8"}),
    ],
    ids=str,
)
def test_killed_at_every_step(tmp_path: Path, model: str, more: dict[str, Any]):
    check(*kills(tmp_path, model, "before,after", calibrated(tmp_path, **more)))


# --- unfinished work and other commands


@pytest.fixture
def unfinished(tmp_path: Path, monkeypatch) -> Path:
    """The current directory, where `jqx quantize model out --qformat mxfp8` has done two units."""
    exports.write_base(tmp_path / "model", "wide")
    record, left = Workspace.record, [2]

    def stops(self: Workspace, what: dict[str, Any]) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        record(self, what)

    with monkeypatch.context() as patch:
        patch.setattr(Workspace, "record", stops)
        monkeypatch.chdir(tmp_path)
        assert jqx("quantize", "model", "out", "--qformat", "mxfp8").code == 130
    assert not (tmp_path / "out").exists()
    assert len((tmp_path / "out.jqx-partial" / "journal.jsonl").read_text().splitlines()) == 3
    return tmp_path


def test_the_same_command_goes_on(unfinished: Path):
    assert jqx("quantize", "model", "out", "--qformat", "mxfp8").code == 0
    assert jqx("quantize", "model", "whole", "--qformat", "mxfp8").code == 0
    assert snapshot(unfinished / "out") == snapshot(unfinished / "whole")
    assert not (unfinished / "out.jqx-partial").exists()


OTHERS = {
    "recipe": (("--qformat", "mxfp4"), "config"),
    "KV cache": (("--qformat", "mxfp8", "--kv-cache", "fp8_cast"), "config"),
    "files": (
        ("--qformat", "mxfp8", "--max-shard-size", "60KB"),
        "max_shard_size was 10000000000, now 60000",
    ),
}


@pytest.mark.parametrize(("words", "field"), OTHERS.values(), ids=OTHERS.keys())
def test_another_command_is_refused(unfinished: Path, words: tuple[str, ...], field: str):
    before = snapshot(unfinished)
    saying = ("out.jqx-partial", "another run", field, "--restart")
    refused("quantize", "model", "out", *words, saying=saying)
    assert snapshot(unfinished) == before
    assert jqx("quantize", "model", "out", *words, "--restart").code == 0
    assert jqx("quantize", "model", "whole", *words).code == 0
    assert snapshot(unfinished / "out") == snapshot(unfinished / "whole")
    assert not (unfinished / "out.jqx-partial").exists()


def test_another_model_is_refused(unfinished: Path):
    weights = exports.tensors("wide")
    weights["lm_head.weight"][0] = 1
    exports.save_file(weights, unfinished / "model" / "model.safetensors", {"format": "pt"})
    refused(
        "quantize",
        "model",
        "out",
        "--qformat",
        "mxfp8",
        saying=("another run", "model was", "--restart"),
    )
    assert jqx("quantize", "model", "out", "--qformat", "mxfp8", "--restart").code == 0


def test_files_that_were_changed_are_refused(unfinished: Path):
    file = unfinished / "out.jqx-partial" / "files" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    refused(
        "quantize", "model", "out", "--qformat", "mxfp8", saying=("model.safetensors", "--restart")
    )
    assert jqx("quantize", "model", "out", "--qformat", "mxfp8", "--restart").code == 0


def test_restart_with_nothing_to_throw_away(unfinished: Path):
    assert jqx("quantize", "model", "new", "--qformat", "mxfp8", "--restart").code == 0
    assert (unfinished / "out.jqx-partial").exists()
