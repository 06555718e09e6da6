# SPDX-License-Identifier: Apache-2.0
"""`jqx rotate`: outliers spread over channels before anything is quantized."""

from pathlib import Path
from typing import Annotated

import typer

from .console import MODEL, Bars, out, print_json, size


def rotate(
    model: Annotated[str, typer.Argument(help=MODEL)],
    destination: Annotated[
        Path,
        typer.Argument(metavar="OUT", help="A new directory. It appears when it is complete."),
    ],
    seed: Annotated[int, typer.Option(help="Draws the signs of the rotation.")] = 0,
    max_shard_size: Annotated[str, typer.Option(help="Largest file.")] = "10GB",
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Write the checkpoint MODEL in another basis to OUT: the same model, with outliers spread
    evenly by Hadamard matrices, for `jqx quantize` with any recipe.

    Gains of norms go into the weights after them; nothing is left to do when the model runs.
    """
    from jqx_interop import rotate as turn

    with Bars() as bars:
        facts = turn(model, destination, seed, max_shard_size=max_shard_size, progress=bars)
    if as_json:
        print_json(facts)
    else:
        told = f"{destination}: {size(facts['bytes'])}, {facts['channels']} channels rotated"
        out.print(told, markup=False)
