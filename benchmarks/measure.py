# SPDX-License-Identifier: Apache-2.0
"""Whole processes measured from outside: wall time, and peak anonymous and shared memory of the
process tree.
"""

import argparse
import statistics
import subprocess
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

INTERVAL = 0.02


@dataclass(frozen=True, kw_only=True)
class Run:
    """One finished process: seconds from start to exit, and bytes of its largest moment."""

    seconds: float
    peak_bytes: int


def parser(about: str | None) -> argparse.ArgumentParser:
    """The options every comparison has: the model, how many threads, and whether to print JSON."""
    p = argparse.ArgumentParser(
        description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("model", type=Path)
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--json", action="store_true")
    return p


def run(command: Sequence[str | Path]) -> Run:
    """Run `command` to its end. Raises RuntimeError with its last output if it fails."""
    start = time.perf_counter()
    process = subprocess.Popen(
        [str(c) for c in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    peak = [0]
    watcher = threading.Thread(target=_watch, args=(process, peak), daemon=True)
    watcher.start()
    output, _ = process.communicate()
    seconds = time.perf_counter() - start
    watcher.join()
    if process.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{output.decode()[-3000:]}")
    return Run(seconds=seconds, peak_bytes=peak[0])


def _watch(process: subprocess.Popen[bytes], peak: list[int]) -> None:
    while process.poll() is None:
        peak[0] = max(peak[0], sum(_resident(pid) for pid in _tree(process.pid)))
        time.sleep(INTERVAL)


def _tree(pid: int) -> list[int]:
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        children = []
    return [pid, *(p for child in children for p in _tree(int(child)))]


def _resident(pid: int) -> int:
    """Anonymous and shared-memory pages; pages of mapped files belong to the system's cache."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    wanted = [line.split()[1] for line in lines if line.startswith(("RssAnon:", "RssShmem:"))]
    return 1024 * sum(int(size) for size in wanted)


def median(values: Sequence[float]) -> float:
    """The median, for short lists of runs."""
    return statistics.median(values)
