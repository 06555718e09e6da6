# SPDX-License-Identifier: Apache-2.0
"""Options that several commands have, each said once."""

from collections.abc import Sequence
from typing import Annotated

import typer

from jqx.errors import InputError

from .console import COMPUTE, complete_compute

DATA, HOW = "Calibration data", "How it runs"

Calib = Annotated[
    str | None,
    typer.Option(
        help="A .txt, .jsonl, .parquet or .npy file (default: a bundled text).",
        rich_help_panel=DATA,
    ),
]
CalibSize = Annotated[int, typer.Option(help="Sequences.", rich_help_panel=DATA)]
CalibSeq = Annotated[
    int, typer.Option(help="Tokens in a sequence, at most the model's.", rich_help_panel=DATA)
]
BatchSize = Annotated[
    int, typer.Option(help="Sequences at a time; 0 chooses.", rich_help_panel=HOW)
]
MaxMemory = Annotated[
    str, typer.Option(help="Hidden states larger than this go to disk.", rich_help_panel=HOW)
]
ComputeIn = Annotated[
    str, typer.Option(help=COMPUTE, rich_help_panel=HOW, autocompletion=complete_compute)
]
Restart = Annotated[
    bool, typer.Option("--restart", help="Throw an unfinished run away.", rich_help_panel=HOW)
]
AllExperts = Annotated[
    bool,
    typer.Option(
        "--all-experts",
        help="Statistics of an expert are those of all tokens (default: of those sent to it).",
        rich_help_panel=DATA,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


def pairs(texts: Sequence[str] | None) -> tuple[tuple[str, str], ...]:
    """What `--set key=value` was given, in order. Raises InputError for one without a value."""
    found = []
    for text in texts or ():
        key, sign, value = text.partition("=")
        if not sign:
            raise InputError(
                f"--set {text!r} has no value; write --set key=value, such as --set block=64"
            )
        found.append((key.strip(), value.strip()))
    return tuple(found)
