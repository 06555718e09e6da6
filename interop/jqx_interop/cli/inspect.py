# SPDX-License-Identifier: Apache-2.0
"""`jqx inspect`."""

from typing import TYPE_CHECKING, Annotated

import typer

from jqx.errors import InputError

from .console import MODEL, Bars, out, print_json, print_table, size
from .engines import complete_engines, show_verification

if TYPE_CHECKING:
    from jqx_interop.inspect import Inspection


def inspect(
    model: Annotated[str, typer.Argument(help=MODEL)],
    engine: Annotated[
        list[str] | None,
        typer.Option(
            help="Say whether this engine loads it, and what is wrong with it: vllm, sglang, "
            "trtllm, tpu-vllm, transformers, or all. May be given several times.",
            autocompletion=complete_engines,
        ),
    ] = None,
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Say what a checkpoint is: family, sizes, dtypes, and how it is quantized if it is.

    With --engine it says instead which engines load it, on which chips, and why not. The exit code
    is 0 if all that were asked about load it and it has no fault of its own, 1 if not, and 2 if
    there is no checkpoint or no such engine.
    """
    if engine and tensors:
        raise InputError("--tensors lists what --engine does not look at: give one of them")
    if engine:
        _verify(model, engine, as_json)
        return
    from jqx_interop.inspect import inspect_checkpoint

    found = inspect_checkpoint(model)
    if as_json:
        print_json(found.to_json())
    else:
        _show(found, tensors)


def _verify(model: str, engines: list[str], as_json: bool) -> None:
    from jqx_interop.engines import verify

    with Bars() as bars:
        found = verify(model, engines, progress=bars)
    if as_json:
        print_json(found.to_json())
    else:
        show_verification(found)
    if not found.good:
        raise typer.Exit(1)


def _show(found: "Inspection", tensors: bool) -> None:
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
