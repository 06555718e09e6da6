# SPDX-License-Identifier: Apache-2.0
"""`jqx compare`."""

from typing import Annotated

import typer

from .console import out, print_json, print_table


def compare(
    a: Annotated[str, typer.Argument(metavar="A", help="A checkpoint.")],
    b: Annotated[str, typer.Argument(metavar="B", help="Another one.")],
    everything: Annotated[bool, typer.Option("--all", help="List equal tensors too.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the comparison as JSON.")] = False,
) -> None:
    """Compare two checkpoints tensor by tensor. Exit code 1 if they differ."""
    from jqx_interop.compare import compare_checkpoints

    found = compare_checkpoints(a, b)
    if as_json:
        print_json(found.to_json())
        raise typer.Exit(0 if found.equal else 1)
    rows = [
        row for row in (*found.tensors, *found.descriptions) if everything or row.verdict != "equal"
    ]
    if rows:
        cells = [
            (
                row.name,
                row.verdict,
                row.detail,
                f"{row.different:,} of {row.values:,}" if row.values else "",
                "" if row.largest is None or not row.different else f"{row.largest:.3g}",
            )
            for row in rows
        ]
        print_table(
            "", ("name", "verdict", "stored as", "values that differ", "largest difference"), cells
        )
    same = sum(row.verdict == "equal" for row in found.tensors)
    out.print(f"{same} of {len(found.tensors)} tensors are equal", markup=False)
    raise typer.Exit(0 if found.equal else 1)
