# SPDX-License-Identifier: Apache-2.0
"""What the commands print: results on standard output, everything else on standard error."""

import json
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)

MODEL = "A directory with config.json and safetensors, a Hub id, or the word bundled."
"""What a checkpoint is named by, in --help."""

COMPUTE = "auto, float32 or bf16."
"""What --compute takes, in --help."""

WIDEST = 1000
"""Columns of a line that nobody's terminal has to fit."""

SIZES = ((1024**4, "TiB"), (1024**3, "GiB"), (1024**2, "MiB"), (1024, "KiB"))


class Bars:
    """A `Progress` on standard error with the time left, one bar a phase; silent where that is no
    terminal.
    """

    def __init__(self) -> None:
        """Nothing is shown before the context is entered."""
        self._quiet = not err.is_terminal
        self._task: TaskID | None = None
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=err,
            disable=self._quiet,
        )

    def __enter__(self) -> "Bars":
        """Show the bars."""
        if not self._quiet:
            self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Leave the bars as they are."""
        if not self._quiet:
            self._bars.stop()

    def phase(self, title: str, total: float | int) -> None:
        """Close the last bar and open another."""
        if self._task is not None:
            self._bars.update(self._task, completed=self._bars.tasks[-1].total)
        self._task = self._bars.add_task(title, total=total)

    def advance(self, amount: float | int) -> None:
        """Move the present bar."""
        if self._task is not None:
            self._bars.advance(self._task, amount)

    def note(self, text: str) -> None:
        """Print one line above the bars."""
        if not self._quiet:
            err.print(text, markup=False)


def print_json(data: Any) -> None:
    """`data` as JSON on standard output."""
    print(json.dumps(data, indent=2))


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """A table on standard output; names are folded to fit a terminal, whole in a file or pipe."""
    table = Table()
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(Text(str(cell)) for cell in row))
    console = out if out.is_terminal else Console(highlight=False, width=WIDEST)
    if title:
        console.print(title, markup=False, style="italic")
    console.print(table)


def size(count: float | int) -> str:
    """Bytes for people: 1.5 GiB."""
    for unit, name in SIZES:
        if count >= unit:
            return f"{count / unit:.1f} {name}"
    return f"{count:.0f} B"


def duration(seconds: float) -> str:
    """Seconds for people: 2 min 5 s."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = int(seconds // 60)
    return (
        f"{minutes} min {seconds - 60 * minutes:.0f} s"
        if minutes < 90
        else f"{seconds / 3600:.1f} h"
    )


def complete_compute(incomplete: str) -> list[str]:
    """The names `--compute` takes that begin like `incomplete`."""
    from jqx_interop.device import COMPUTE_NAMES

    return [name for name in COMPUTE_NAMES if name.startswith(incomplete)]
