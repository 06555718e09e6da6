# SPDX-License-Identifier: Apache-2.0
"""`jqx export`: a quantized checkpoint in another layout."""

from pathlib import Path
from typing import Annotated

import typer

from .console import MODEL, Bars, out, print_json, size
from .engines import look_at, tell_engines, verdicts_json


def complete_targets(incomplete: str) -> list[str]:
    """The names `--target` takes that begin like `incomplete`."""
    from jqx_interop.targets import TARGETS

    return [name for name in TARGETS if name.startswith(incomplete)]


def export(
    model: Annotated[str, typer.Argument(metavar="QUANTIZED", help=MODEL)],
    destination: Annotated[
        Path,
        typer.Argument(metavar="OUT", help="A new directory. It appears when it is complete."),
    ],
    target: Annotated[
        str,
        typer.Option(help="The layout: see `jqx targets`.", autocompletion=complete_targets),
    ],
    max_shard_size: Annotated[str, typer.Option(help="Largest file.")] = "10GB",
    round_scales: Annotated[
        bool,
        typer.Option(
            "--round-scales", help="Round scales where the layout stores them in float16."
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Write the quantized checkpoint QUANTIZED in another layout to OUT.

    Codes and scales stay what they are: nothing is quantized again, and back again it has the bytes
    it began with.
    """
    from jqx_interop.exporting import export as convert

    with Bars() as bars:
        done = convert(
            model,
            destination,
            target,
            max_shard_size=max_shard_size,
            round_scales=round_scales,
            progress=bars,
        )
        verdicts = look_at(destination, bars)
    if as_json:
        print_json(done.to_json() | {"engines": verdicts_json(verdicts)})
    else:
        told = f"{done.linears} linears from {done.source} to {done.target}, {size(done.bytes)}"
        out.print(f"{destination}: {told}", markup=False)
        tell_engines(verdicts)
