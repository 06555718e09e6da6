# SPDX-License-Identifier: Apache-2.0
"""Run by test_resume.py: a whole quantization, killed by SIGKILL at its durable steps in turn.

    python killed_quantize.py FOLDER STEPS SETTINGS     FOLDER/model is the source

Every run is a forked child of this process, which has imported everything and started nothing. One
JSON line per kill says what was left, and how the same command went afterwards. STEPS are the names
of steps or how they begin, such as "after record,before".
"""

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

import jqx_interop.pipeline as pipeline
from jqx.errors import InputError
from jqx_interop.checkpoints import ShardWriter, Workspace
from jqx_interop.hidden import HiddenStates
from jqx_interop.runner import Runner
from jqx_interop.units import Finisher

STEPS = (
    *((Workspace, name) for name in ("_clear", "record", "publish", "_remove")),
    *((ShardWriter, name) for name in ("_create", "sync")),
    *((HiddenStates, "turn"), (pipeline, "write_descriptions"), (os, "rename")),
)
"""Killed before and after each call of these."""


def watched(number: int | None) -> list[str]:
    """Patch all steps; the one with this number kills. Returns what was called, as it grows."""
    seen: list[str] = []

    def step(name: str) -> None:
        seen.append(name)
        if len(seen) - 1 == number:
            print(name, file=sys.stderr, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)

    def around(name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            step(f"before {name}")
            result = work(*args, **options)
            step(f"after {name}")
            return result

        return call

    for owner, name in STEPS:
        setattr(owner, name, around(name, getattr(owner, name)))
    return seen


def quantize(root: Path, out: str, settings: dict[str, Any], number: int | None) -> dict[str, Any]:
    """One run; says which units it worked on, which blocks it ran, and every step it took."""
    seen = watched(number)
    units = noted(Finisher, "submit")
    blocks = noted(Runner, "_run_block")
    pipeline.ptq(root / "model", root / out, **settings)
    return {"units": units, "blocks": blocks, "steps": seen}


def noted(owner: type, name: str) -> list[int]:
    """The first argument of every call of a method, as they come."""
    found, method = [], getattr(owner, name)

    def call(self: Any, number: int, *args: Any) -> Any:
        found.append(number)
        return method(self, number, *args)

    setattr(owner, name, call)
    return found


def child(work: Callable[[], dict[str, Any]]) -> tuple[str, dict[str, Any]]:
    """Run `work` in a forked process: how it ended, and what it returned."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        code = 1
        try:
            os.write(writer, json.dumps(work()).encode())
            code = 0
        except InputError as error:
            os.write(writer, json.dumps({"refused": str(error)}).encode())
            code = 2
        finally:
            os._exit(code)
    os.close(writer)
    with open(reader, "rb") as file:
        said = file.read()
    status = os.waitpid(pid, 0)[1]
    if os.WIFSIGNALED(status):
        return "killed", {}
    return {0: "published", 2: "refused"}.get(os.WEXITSTATUS(status), "failed"), json.loads(
        said or "{}"
    )


def content(folder: Path) -> dict[str, bytes] | None:
    return {f.name: f.read_bytes() for f in folder.iterdir()} if folder.exists() else None


def one_kill(
    root: Path, number: int, settings: dict[str, Any], expected: dict[str, bytes]
) -> dict[str, Any]:
    """The row of one kill; OUT and all that belongs to it is removed afterwards."""
    ended, _ = child(lambda: quantize(root, "out", settings, number))
    partial, out = root / "out.jqx-partial", content(root / "out")
    journal = partial / "journal.jsonl"
    lines = journal.read_text().splitlines() if journal.exists() else []
    recorded = [r["unit"] for r in (json.loads(line)["record"] for line in lines) if "unit" in r]
    then, said = child(lambda: quantize(root, "out", settings, None))
    row = {
        "ended": ended,
        "left": "nothing" if out is None else "everything" if out == expected else "a part",
        "recorded": recorded,
        "then": then,
        "said": said.get("refused", ""),
        "units": said.get("units", []),
        "blocks": said.get("blocks", []),
        "equal": content(root / "out") == expected,
        "beside": sorted(f.name for f in root.iterdir()),
    }
    for folder in ("out", "out.jqx-partial"):
        shutil.rmtree(root / folder, ignore_errors=True)
    return row


def main() -> None:
    root, chosen, settings = Path(sys.argv[1]), sys.argv[2].split(","), json.loads(sys.argv[3])
    for name, value in (
        ("jax_compilation_cache_dir", str(root.parent / "compiled")),
        ("jax_persistent_cache_min_compile_time_secs", 0),
        ("jax_persistent_cache_min_entry_size_bytes", -1),
    ):
        jax.config.update(name, value)
    _, whole = child(lambda: quantize(root, "out", settings, None))
    expected = content(root / "out")
    assert expected is not None
    shutil.rmtree(root / "out")
    print(json.dumps(whole))
    for number, name in enumerate(whole["steps"]):
        if name.startswith(tuple(chosen)):
            row = one_kill(root, number, settings, expected)
            print(json.dumps({"killed": name, **row}), flush=True)


if __name__ == "__main__":
    main()
