# SPDX-License-Identifier: Apache-2.0
"""Which engine reads what a recipe writes, as rows for people: every target, with recipes that have
equal rows together. The README shows it.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from jqx.algorithms.table import variant_of
from jqx.config import Choice, resolve
from jqx.formats import find_format
from jqx.recipes import RECIPES, Recipe

from .engines import ENGINES, Verdict, engines_for, scheme_name
from .engines.accepts import ACCEPTS
from .targets import TARGETS

PATHS = (
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
    *(f"mlp.experts.0.{name}_proj" for name in ("gate", "up", "down")),
)
"""Linears of a block that stand for all; those of experts where a recipe reaches nothing else."""

CAPABILITY = "compute capability "
REASONS = {
    "block-size": "blocks of another size",
    "needed-tensor": "it asks for AWQ's `pre_quant_scale`",
    "mixture": "the mixture",
}
"""Rule -> why not, where a row is the answer to more than whether the name is known."""


def engine_rows() -> list[dict[str, Any]]:
    """One row a target and group of recipes: what linears are called there, and for every engine
    whether it loads them and on which chips.
    """
    groups: dict[tuple[str, ...], list[str]] = {}
    for cells, recipe in _cells():
        groups.setdefault(cells, []).append(recipe)
    columns = ("target", "stored as", *(engine.title for engine in ENGINES.values()))
    return [
        {
            "recipe": ", ".join(f"`{name}`" for name in recipes),
            **dict(zip(columns, cells, strict=True)),
        }
        for cells, recipes in groups.items()
    ]


def source_rows() -> list[dict[str, Any]]:
    """One row a layout and engine: where what the engine reads of it is known from."""
    found: dict[tuple[str, str], dict[str, None]] = {}
    for row in ACCEPTS.values():
        if row.layout in {target.method for target in TARGETS.values()}:
            found.setdefault((row.layout, ENGINES[row.engine].title), {})[row.source] = None
    return [
        {"layout": f"`{layout}`", "engine": engine, "known from": "; ".join(sources)}
        for (layout, engine), sources in found.items()
    ]


def _cells() -> Iterator[tuple[tuple[str, ...], str]]:
    """The cells of a recipe in a target, and its name; one row where no target has a name."""
    for target in TARGETS:
        for recipe in RECIPES.values():
            choices = _held(recipe, target)
            if choices:
                verdicts = engines_for(choices, target)
                name = scheme_name(recipe_choice(recipe, target), target)
                yield (f"`{target}`", f"`{name}`", *map(_cell, verdicts)), recipe.name
    for recipe in RECIPES.values():
        if not any(_held(recipe, name) for name in TARGETS):
            yield ("none: they run in jqx alone", "", *("no" for _ in ENGINES)), recipe.name


def _held(recipe: Recipe, target: str) -> Mapping[str, Choice]:
    """What a recipe chooses for the linears of a block; empty where the target cannot hold it."""
    choices = _choices(recipe, target)
    return choices if all(TARGETS[target].supports(c) for c in choices.values()) else {}


def _choices(recipe: Recipe, target: str) -> dict[str, Choice]:
    found: dict[str, Choice] = {}
    for path in PATHS:
        if found and ".experts." in path:
            break
        name = f"model.layers.0.{path}"
        choice = resolve(recipe.config, f"{name}.weight", "linear")
        if choice.weight is not None:
            variant = variant_of(recipe.config.steps, find_format(choice.weight))
            if variant != "svd" and not TARGETS[target].smooths:
                variant = None  # factors are folded
            found[name] = Choice(weight=choice.weight, input=choice.input, variant=variant)
    return found


def recipe_choice(recipe: Recipe, target: str = "modelopt") -> Choice:
    """What a recipe says about the linear that stands for it, in a layout: the first of an MLP or
    expert.
    """
    choices = _choices(recipe, target)
    first = (path for path in choices if path.endswith("up_proj"))
    return choices[next(first, next(iter(choices)))]


def _cell(verdict: Verdict) -> str:
    """Yes and where, or no and why if that is not plain."""
    if verdict.loads is None:
        return "not known"
    if not verdict.loads:
        reason = next((REASONS[p.rule] for p in verdict.problems if p.rule in REASONS), "")
        return f"no: {reason}" if reason else "no"
    places = (text for text in verdict.chips.values() if text.startswith(CAPABILITY))
    told = (_short(text) for text in places)
    chips = "; ".join(dict.fromkeys(told))
    return f"yes: {chips}" if chips else "yes"


def _short(chips: str) -> str:
    """Where it runs, without what the text around the table says."""
    return chips.removeprefix(CAPABILITY).removesuffix(", inputs as they are")
