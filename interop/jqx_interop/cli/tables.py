# SPDX-License-Identifier: Apache-2.0
"""`jqx formats`, `recipes`, `families`, `targets`, `sources`, `kernels`: the rows of tables."""

from typing import Annotated, Any

import typer

from .console import print_json, print_table
from .quantize import complete_formats

AsJson = Annotated[bool, typer.Option("--json", help="Print the rows as JSON.")]


def formats(as_json: AsJson = False) -> None:
    """List the number formats."""
    from jqx_interop.tables import format_rows

    _show("Formats", format_rows(), as_json)


def recipes(
    name: Annotated[
        str | None,
        typer.Argument(
            help="Show this recipe as --recipe reads it.", autocompletion=complete_formats
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List the recipes that --qformat takes, or show one."""
    from jqx.recipes import find_recipe
    from jqx_interop.recipe_files import recipe_data
    from jqx_interop.tables import recipe_rows, recipe_yaml

    if name is None:
        _show("Recipes", recipe_rows(), as_json)
    elif as_json:
        print_json(recipe_data(find_recipe(name)))
    else:
        print(recipe_yaml(name), end="")


def families(as_json: AsJson = False) -> None:
    """List the model families that are defined."""
    from jqx_interop.tables import family_rows

    _show("Families", family_rows(), as_json)


def targets(as_json: AsJson = False) -> None:
    """List the layouts a checkpoint can be written in."""
    from jqx_interop.tables import target_rows

    _show("Targets", target_rows(), as_json)


def sources(as_json: AsJson = False) -> None:
    """List how quantized checkpoints are stored that can be quantized again."""
    from jqx_interop.tables import stored_rows

    _show("Sources", stored_rows(), as_json)


def kernels(as_json: AsJson = False) -> None:
    """List the operations that have kernels, and which implementation this device takes."""
    from jqx_interop.kernel_table import kernel_rows_on
    from jqx_kernels.dispatch import current_device

    device = current_device()
    _show(f"Kernels on {device.kind}", list(kernel_rows_on(device)), as_json)


def _show(title: str, rows: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        print_json(rows)
    else:
        print_table(title, tuple(rows[0]), [tuple(row.values()) for row in rows])
