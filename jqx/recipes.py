# SPDX-License-Identifier: Apache-2.0
"""RECIPES: the named configurations. A recipe is what `--qformat` names."""

from .config import KV_FORMATS, QuantConfig
from .errors import InputError, nearest
from .modelopt_formats import NO_ROTATION
from .recipe_rows import NEVER_QUANTIZED as NEVER_QUANTIZED
from .recipe_rows import RECIPES as RECIPES
from .recipe_rows import Recipe as Recipe
from .recipe_rows import with_kv as with_kv

CONSTANTS = {
    alias: recipe.whole
    for recipe in RECIPES.values()
    for alias in recipe.aliases
    if alias.endswith(("_CFG", "_CONFIG"))
}
"""ModelOpt's constants -> configurations."""

KV_ALIASES = {
    "FP8_KV_CFG": "fp8",
    "FP8_AFFINE_KV_CFG": "fp8_affine",
    "NVFP4_KV_CFG": "nvfp4",
    "NVFP4_AFFINE_KV_CFG": "nvfp4_affine",
}
KV_REFUSED: dict[str, str] = dict.fromkeys(("NVFP4_KV_ROTATE_CFG", "nvfp4_rotate"), NO_ROTATION)
"""Names of KV cache formats that are known and not done, and why."""


def constant(name: str) -> QuantConfig:
    """The configuration that ModelOpt's constant `name` stands for; that of a KV cache says nothing
    of weights: its rules go after those of another. Raises AttributeError for other names.
    """
    if name in KV_ALIASES:
        return with_kv(QuantConfig(rules=()), KV_ALIASES[name])
    if name not in CONSTANTS:
        raise AttributeError(KV_REFUSED.get(name, f"module 'jqx' has no attribute {name!r}"))
    return CONSTANTS[name]


def find_recipe(name: str) -> Recipe:
    """The recipe that answers to `name`: its own name, ModelOpt's constant or an earlier short
    name.

    Raises InputError with the nearest names.
    """
    names = {alias: row for row in RECIPES.values() for alias in (row.name, *row.aliases)}
    if name not in names:
        raise nearest(name, names, "format")
    return names[name]


def find_kv(name: str) -> str | None:
    """The KV cache format called `name`; "none" is None.

    Raises InputError with the nearest names.
    """
    if name in KV_REFUSED:
        raise InputError(f"{name}: {KV_REFUSED[name]}")
    name = KV_ALIASES.get(name, name)
    if name != "none" and name not in KV_FORMATS:
        raise nearest(name, ("none", *KV_FORMATS), "KV cache format")
    return None if name == "none" else name
