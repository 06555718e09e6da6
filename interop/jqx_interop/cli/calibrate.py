# SPDX-License-Identifier: Apache-2.0
"""`jqx calibrate`: statistics once, for many recipes."""

from pathlib import Path
from typing import Annotated

import typer

from .console import MODEL, Bars, out, print_json, size
from .options import (
    DATA,
    AllExperts,
    AsJson,
    BatchSize,
    Calib,
    CalibSeq,
    CalibSize,
    ComputeIn,
    MaxMemory,
    Restart,
    pairs,
)
from .quantize import complete_formats, complete_kv


def calibrate(  # noqa: PLR0913  a command's options are its parameters
    model: Annotated[str, typer.Argument(help=MODEL)],
    destination: Annotated[
        Path,
        typer.Argument(metavar="STATS", help="A new directory. It appears when it is complete."),
    ],
    qformat: Annotated[
        list[str] | None,
        typer.Option(
            help="A recipe it is for; may be repeated. Default: all, but for histograms.",
            autocompletion=complete_formats,
        ),
    ] = None,
    recipe: Annotated[
        list[Path] | None,
        typer.Option(help="A recipe file (YAML) it is for; may be repeated."),
    ] = None,
    kv_cache: Annotated[
        str, typer.Option(help="Format of keys and values.", autocompletion=complete_kv)
    ] = "fp8",
    calib: Calib = None,
    calib_size: CalibSize = 512,
    calib_seq: CalibSeq = 512,
    activations: Annotated[
        Path | None,
        typer.Option(
            help="Recorded inputs of linears (safetensors): no model is run, but for experts that "
            "were not recorded, on --calib.",
            rich_help_panel=DATA,
        ),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change the recipes: block=64."),
    ] = None,
    batch_size: BatchSize = 0,
    max_memory: MaxMemory = "4GiB",
    compute: ComputeIn = "auto",
    all_experts: AllExperts = False,
    restart: Restart = False,
    as_json: AsJson = False,
) -> None:
    """Run the checkpoint MODEL once and keep what recipes need of it in STATS, for `jqx quantize
    --stats STATS`.

    For all recipes second moments are kept: as many numbers a linear as its inputs squared.
    """
    from jqx_interop.calibrate import calibrate as collect
    from jqx_interop.recipe_files import read_recipe
    from jqx_interop.settings import Settings

    settings = Settings(
        kv_cache=kv_cache,
        calib=calib,
        activations=activations,
        calib_size=calib_size,
        calib_seq=calib_seq,
        batch_size=batch_size,
        max_memory=max_memory,
        compute=compute,
        options=pairs(set_),
        restart=restart,
        all_experts=all_experts,
    )
    recipes = (*(qformat or ()), *(read_recipe(file) for file in recipe or ()))
    with Bars() as bars:
        facts = collect(model, destination, recipes, settings, bars)
    if as_json:
        print_json(facts)
    else:
        told = f"{destination}: {size(facts['bytes'])}, {facts['tokens']:,} tokens"
        out.print(told, markup=False)
