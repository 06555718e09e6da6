# SPDX-License-Identifier: Apache-2.0
"""`jqx calibrate`: statistics once, for many recipes."""

from pathlib import Path
from typing import Annotated

import typer

from .console import COMPUTE, MODEL, Bars, complete_compute, out, print_json, size
from .quantize import DATA, HOW, complete_formats, complete_kv


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
    calib: Annotated[
        str | None,
        typer.Option(
            help="A .txt, .jsonl, .parquet or .npy file (default: a bundled text).",
            rich_help_panel=DATA,
        ),
    ] = None,
    calib_size: Annotated[int, typer.Option(help="Sequences.", rich_help_panel=DATA)] = 512,
    calib_seq: Annotated[
        int, typer.Option(help="Tokens in a sequence, at most the model's.", rich_help_panel=DATA)
    ] = 512,
    activations: Annotated[
        Path | None,
        typer.Option(
            help="Recorded inputs of linears (safetensors): no model is run.", rich_help_panel=DATA
        ),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change the recipes: block=64."),
    ] = None,
    batch_size: Annotated[
        int, typer.Option(help="Sequences at a time; 0 chooses.", rich_help_panel=HOW)
    ] = 0,
    max_memory: Annotated[
        str, typer.Option(help="Hidden states larger than this go to disk.", rich_help_panel=HOW)
    ] = "4GiB",
    compute: Annotated[
        str,
        typer.Option(help=COMPUTE, rich_help_panel=HOW, autocompletion=complete_compute),
    ] = "auto",
    restart: Annotated[
        bool, typer.Option("--restart", help="Throw an unfinished run away.", rich_help_panel=HOW)
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Run the checkpoint MODEL once and keep what recipes need of it in STATS, for `jqx quantize
    --stats STATS`.

    For all recipes second moments are kept: as many numbers a linear as its inputs squared.
    """
    from jqx_interop.calibrate import calibrate as collect
    from jqx_interop.recipe_files import read_recipe
    from jqx_interop.settings import Settings

    from .quantize import _pair

    settings = Settings(
        kv_cache=kv_cache,
        calib=calib,
        activations=activations,
        calib_size=calib_size,
        calib_seq=calib_seq,
        batch_size=batch_size,
        max_memory=max_memory,
        compute=compute,
        options=tuple(_pair(text) for text in set_ or ()),
        restart=restart,
    )
    recipes = (*(qformat or ()), *(read_recipe(file) for file in recipe or ()))
    with Bars() as bars:
        facts = collect(model, destination, recipes, settings, bars)
    if as_json:
        print_json(facts)
    else:
        told = f"{destination}: {size(facts['bytes'])}, {facts['tokens']:,} tokens"
        out.print(told, markup=False)
