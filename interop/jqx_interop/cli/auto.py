# SPDX-License-Identifier: Apache-2.0
"""`jqx auto`: mixed precision under a budget."""

from pathlib import Path
from typing import Annotated

import typer

from jqx.errors import InputError

from .console import MODEL, Bars, err, out, print_json, print_table, size
from .engines import look_at, tell_engines, verdicts_json
from .export import complete_targets
from .options import AsJson, BatchSize, Calib, CalibSeq, CalibSize, ComputeIn, Restart
from .quantize import complete_formats, complete_kv

CHOICE = "The choice"


def complete_counts(incomplete: str) -> list[str]:
    """The names `--count` takes that begin like `incomplete`."""
    from jqx_interop.auto import COUNTINGS

    return [name for name in COUNTINGS if name.startswith(incomplete)]


def auto(  # noqa: PLR0913  a command's options are its parameters
    model: Annotated[str, typer.Argument(help=MODEL)],
    destination: Annotated[
        Path,
        typer.Argument(metavar="OUT", help="A new directory. It appears when it is complete."),
    ],
    bits: Annotated[
        float, typer.Option(help="Bits a weight, at most.", rich_help_panel=CHOICE)
    ] = 4.8,
    formats: Annotated[
        str,
        typer.Option(
            help="Recipes that linears may take, with commas between: see `jqx recipes`; to stay "
            "as it is, every linear may.",
            autocompletion=complete_formats,
            rich_help_panel=CHOICE,
        ),
    ] = "nvfp4,fp8",
    count: Annotated[
        str,
        typer.Option(
            help="How bits are counted: as ModelOpt does, heads and what is left out at 16; or of "
            "quantizable linears alone, with scales.",
            autocompletion=complete_counts,
            rich_help_panel=CHOICE,
        ),
    ] = "modelopt",
    scores: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Where statistics and scores are kept, and taken from (default: OUT-scores).",
            rich_help_panel=CHOICE,
        ),
    ] = None,
    kv_cache: Annotated[
        str, typer.Option(help="Format of keys and values.", autocompletion=complete_kv)
    ] = "none",
    target: Annotated[
        str, typer.Option(help="The layout: see `jqx targets`.", autocompletion=complete_targets)
    ] = "modelopt",
    calib: Calib = None,
    calib_size: CalibSize = 128,
    calib_seq: CalibSeq = 512,
    batch_size: BatchSize = 0,
    compute: ComputeIn = "auto",
    restart: Restart = False,
    as_json: AsJson = False,
) -> None:
    """Give every linear of MODEL the format that it loses least with, within so many bits.

    Gradients of the loss say what a linear's rounding costs; the best choice of all is found
    exactly. Statistics and scores are kept, so that another --bits takes seconds.
    """
    from jqx_interop.auto import Asked, auto_quantize
    from jqx_interop.settings import Settings

    names = [name.strip() for name in formats.split(",") if name.strip()]
    if not names:
        raise InputError("--formats names none: give recipes, such as --formats nvfp4,fp8")
    settings = Settings(
        kv_cache=kv_cache,
        calib=calib,
        calib_size=calib_size,
        calib_seq=calib_seq,
        batch_size=batch_size,
        compute=compute,
        target=target,
        restart=restart,
    )
    kept = scores or destination.with_name(destination.name + "-scores")
    with Bars() as bars:
        asked = Asked(formats=tuple(names), bits=bits, count=count, scores=kept)
        chosen, report = auto_quantize(model, destination, asked, settings, progress=bars)
        verdicts = look_at(destination, bars)
    if as_json:
        print_json(
            report.to_json() | {"auto": chosen.to_json(), "engines": verdicts_json(verdicts)}
        )
        return
    rows = [(name, str(n)) for name, n in chosen.counts.items()]
    print_table(f"{bits:g} bits a weight", ("format", "linears"), rows)
    told = ", ".join(f"{value:.2f} as {name} counts" for name, value in chosen.bits.items())
    out.print(f"{destination}: {told}; {size(report.output_bytes)}", markup=False)
    err.print(f"statistics and scores: {kept}", markup=False)
    tell_engines(verdicts)
