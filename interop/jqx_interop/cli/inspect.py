# SPDX-License-Identifier: Apache-2.0
"""`jqx inspect`."""

from typing import Annotated

import typer

from .console import MODEL, out, print_json, print_table, size


def inspect(
    model: Annotated[str, typer.Argument(help=MODEL)],
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Say what a checkpoint is: family, sizes, dtypes, and how it is quantized if it is."""
    from jqx_interop.inspect import inspect_checkpoint

    found = inspect_checkpoint(model)
    if as_json:
        print_json(found.to_json())
        return
    print_table(
        found.path,
        ("", ""),
        [(key, value) for key, value in found.facts.items() if value is not None],
    )
    rows = [(d.dtype, d.tensors, f"{d.parameters:,}", size(d.bytes)) for d in found.dtypes]
    print_table("Stored as", ("dtype", "tensors", "values", "size"), rows)
    if tensors:
        print_table(
            "Tensors",
            ("name", "dtype", "shape"),
            [(t.name, t.dtype, list(t.shape)) for t in found.tensors],
        )
    if found.quantization:
        out.print(
            f"ignored by the quantization: {', '.join(found.quantization['ignore']) or 'nothing'}",
            markup=False,
        )
