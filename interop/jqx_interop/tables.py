# SPDX-License-Identifier: Apache-2.0
"""The rows of the code's tables as plain rows for people: what the commands print and the README
shows.
"""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from jqx.algorithms import ALGORITHMS
from jqx.config import VARIANTS, Keep
from jqx.formats import FORMATS, Format
from jqx.recipes import RECIPES, Recipe, find_recipe

from .choices import calibrated
from .families import FAMILIES
from .recipe_files import write_recipe
from .sources import SOURCES
from .targets import TARGETS

Rows = list[dict[str, Any]]


def format_rows() -> Rows:
    """One row a format."""
    return [
        {
            "format": row.name,
            "element": row.element.name,
            "values per scale": _block(row),
            "scale": row.scale.name,
            "tensor scale": f"amax / {row.tensor_bound:g}" if row.tensor_bound else "",
            "bits": f"{row.bits:g}",
        }
        for row in FORMATS.values()
    ]


def recipe_rows() -> Rows:
    """One row a recipe."""
    return [
        {
            "recipe": row.name,
            "weights": _fields(row, "weight"),
            "inputs": _fields(row, "input") or "as they are",
            "algorithm": ", ".join(step.method for step in row.config.steps) or "none",
            "needs data": "yes" if calibrated(row.config) else "",
            "what": row.summary,
            "also known as": ", ".join(row.aliases),
        }
        for row in RECIPES.values()
    ]


def algorithm_rows() -> Rows:
    """One row an algorithm."""
    return [
        {
            "algorithm": row.name,
            "what": row.about,
            "parameters": ", ".join(f"{f.name}={f.default}" for f in fields(row.params)),
            "leaves beside codes": VARIANTS.get(row.variant or "", ""),
        }
        for row in ALGORITHMS.values()
    ]


PROVED = ("fp8", "nvfp4", "int8_sq", "int4_awq", "w4a8_awq")
"""Recipes by which a tiny model of every family is quantized, stored and read again in a test."""


def family_rows() -> Rows:
    """One row a model_type."""
    from .engines.serves import served_by

    return [
        {
            "models": row.title,
            "model_type": row.model_type,
            "tested formats": ", ".join(PROVED),
            "has a model in": served_by(row.model_type),
        }
        for row in FAMILIES.values()
    ]


def target_rows() -> Rows:
    """One row a layout."""
    return [{"target": row.name, "read by": row.readers} for row in TARGETS.values()]


def stored_rows() -> Rows:
    """One row a layout of quantized weights that is read as a source."""
    return [
        {
            "source": row.name,
            "quant_method": ", ".join(row.methods),
            "tensors of a weight": row.tensors,
            "decoded": row.means,
        }
        for row in SOURCES.values()
    ]


def recipe_yaml(name: str) -> str:
    """The recipe that answers to `name` as YAML, as `--recipe` reads it. Raises InputError."""
    return write_recipe(find_recipe(name))


def markdown(rows: Rows) -> str:
    """Rows as a Markdown table."""
    head = list(rows[0])
    lines = [head, ["---"] * len(head), *([str(cell) for cell in row.values()] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _block(row: Format) -> str:
    if row.block == (None, None):
        return "the tensor"
    if row.block == (1, None):
        return "a row"
    return " x ".join(str(size) for size in row.block if size != 1)


def _fields(recipe: Recipe, field: str) -> str:
    values: Sequence[Any] = [getattr(rule, field) for rule in recipe.config.rules]
    return ", ".join(dict.fromkeys(v for v in values if v is not None and not isinstance(v, Keep)))
