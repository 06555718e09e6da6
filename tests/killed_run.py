# SPDX-License-Identifier: Apache-2.0
"""Run by test_journal.py: a small run, killed by SIGKILL at each of its system calls in turn.

Every run is a forked child. One JSON line per kill says what was left, and how the next run of
the same command went.
"""

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from jqx.errors import InputError
from jqx_interop.checkpoints import ShardWriter, TensorOut, Workspace, plan_shards

CALLS = (
    *("open", "close", "write", "pwrite", "fsync", "fdatasync", "ftruncate", "posix_fallocate"),
    *("mkdir", "rename", "unlink", "rmdir"),
)
TENSORS = [TensorOut(f"w{i}", "F32", (4,)) for i in range(3)]
REAL = {name: getattr(os, name) for name in CALLS}


def run(out: Path) -> tuple[int, int]:
    """Write three tensors in two files and a JSON file; how many were there, how many are new."""
    with Workspace(out) as space:
        records = space.begin({"format": "none", "tensors": 3})
        finished = [record["name"] for record in records]
        plans = plan_shards(TENSORS, "40")
        with ShardWriter(space.files, plans, finished if records else None) as writer:
            for i, tensor in enumerate(TENSORS):
                if tensor.name not in finished:
                    writer.write(tensor.name, np.full(4, i + 1, np.float32))
                    writer.sync()
                    space.record({"name": tensor.name})
            writer.finish()
        (space.files / "config.json").write_text("{}")
        space.publish()
    return len(finished), len(TENSORS) - len(finished)


def killed_at(number: int, torn: bool, report: int) -> Callable[[str], Callable[..., object]]:
    """Stand-ins for system calls: the one with this number kills, a torn write half way."""
    names: list[str] = []

    def stand_in(name: str) -> Callable[..., object]:
        def call(*args: Any, **options: Any) -> object:
            names.append(name)
            if len(names) - 1 == number:
                if torn and name in ("write", "pwrite"):
                    data = memoryview(args[1])
                    REAL[name](args[0], data[: len(data) // 2], *args[2:])
                REAL["write"](report, name.encode())
                os.kill(os.getpid(), signal.SIGKILL)
            return REAL[name](*args, **options)

        return call

    return stand_in


def child(work: Callable[[int], object]) -> tuple[int, bytes]:
    """Exit status of a forked process that calls `work(report)`, and what it wrote to `report`."""
    reader, report = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        try:
            REAL["write"](report, json.dumps(work(report)).encode())
            os._exit(0)
        except InputError:
            os._exit(2)
        except BaseException as error:
            REAL["write"](report, repr(error).encode())
            os._exit(1)
    os.close(report)
    with open(reader, "rb") as file:
        said = file.read()
    return os.waitpid(pid, 0)[1], said


def content(folder: Path) -> dict[str, bytes] | None:
    """Name -> bytes of the files of a folder; None if it is not there."""
    return {f.name: f.read_bytes() for f in folder.iterdir()} if folder.exists() else None


def one_kill(root: Path, number: int, torn: bool, expected: dict[str, bytes]) -> dict | None:
    """The row of one kill; None if the run ended before it came to that many calls."""
    out = root / "out"

    def work(report: int) -> object:
        stand_in = killed_at(number, torn, report)
        for name in CALLS:
            setattr(os, name, stand_in(name))
        return run(out)

    status, killed = child(work)
    if not os.WIFSIGNALED(status):
        return None
    found = content(out)
    left = "nothing" if found is None else "everything" if found == expected else "a part"
    status, said = child(lambda _: run(out))
    then = {0: "published", 2 << 8: "refused"}.get(status, said.decode())
    recorded, written = json.loads(said) if status == 0 else (3, 0)
    return {
        "killed": killed.decode(),
        "left": left,
        "then": then,
        "equal": content(out) == expected,
        "beside": sorted(f.name for f in root.iterdir()),
        "recorded": recorded,
        "written": written,
    }


def main() -> None:
    """Print a row for each call, then for each write that is torn."""
    root = Path(sys.argv[1])
    child(lambda _: run(root / "whole" / "out"))
    expected = content(root / "whole" / "out")
    assert expected is not None
    assert len(expected) == 4
    for torn in (False, True):
        number = 0
        while True:
            shutil.rmtree(root / "kill", ignore_errors=True)
            (root / "kill").mkdir()
            row = one_kill(root / "kill", number, torn, expected)
            if row is None:
                break
            if not torn or row["killed"] in ("write", "pwrite"):
                print(json.dumps(row))
            number += 1


if __name__ == "__main__":
    main()
