# SPDX-License-Identifier: Apache-2.0
"""Recipes in YAML or JSON files: an existing recipe and rules that change it.

    extends: nvfp4                  a name, or another file beside this one
    algorithm: {method: awq_lite, alpha_step: 0.05}
    kv_cache: fp8
    rules:
      - {path_glob: "*.mlp.down_proj.*", weight: fp8, input: fp8}

Without `extends` the rules stand alone. A file with `quant_cfg` holds a dictionary of ModelOpt.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from jqx.config import FIELDS, KEEP, QuantConfig, from_json, only, to_json
from jqx.errors import InputError
from jqx.modelopt_config import KEYS as MODELOPT_KEYS
from jqx.modelopt_config import from_modelopt
from jqx.recipes import Recipe, find_kv, find_recipe
from jqx.selection import config_of
from jqx.steps import check_steps

OWN = ("name", "kv_cache")
KEYS = (*OWN, "extends", "rules", "algorithm")
SUFFIXES = (".yaml", ".yml", ".json")


def read_recipe(path: str | Path) -> Recipe:
    """The recipe in the file `path`. Raises InputError naming what is wrong in it."""
    return _read(Path(path), ())


def recipe_of(given: Any) -> Recipe:
    """The recipe with this name, or in this file (a path, or text that ends like one), or of this
    configuration. Raises InputError for what is none of them.
    """
    if isinstance(given, Recipe):
        return given
    if isinstance(given, Path) or (isinstance(given, str) and given.endswith(SUFFIXES)):
        return read_recipe(given)
    if isinstance(given, str):
        return find_recipe(given)
    return _without_kv(Recipe(name="of this configuration", config=config_of(given)))


def write_recipe(recipe: Recipe) -> str:
    """`recipe` as YAML that `read_recipe` reads back, without other names and summary."""
    return yaml.safe_dump(recipe_data(recipe), sort_keys=False, width=1000, allow_unicode=True)


def recipe_data(recipe: Recipe) -> dict[str, Any]:
    """`recipe` as plain values, without other names and summary."""
    own = {key: getattr(recipe, key) for key in OWN if getattr(recipe, key)}
    return {**own, **to_json(recipe.config)}


def _read(path: Path, outer: tuple[Path, ...]) -> Recipe:
    """The recipe in a file that those in `outer` extend."""
    if not path.is_file():
        raise InputError(f"{path}: no such recipe file")
    if path.resolve() in outer:
        raise InputError(f"{path} extends itself, by way of {', '.join(p.name for p in outer)}")
    try:
        text = path.read_text(encoding="utf-8")
        data: Any = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:
        kind = "JSON" if path.suffix == ".json" else "YAML"
        raise InputError(f"{path} is not {kind}: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict):
        raise InputError(f"{path} holds no mapping; its keys are {', '.join(KEYS)}")
    try:
        only(data, (*OWN, *MODELOPT_KEYS) if "quant_cfg" in data else KEYS, "key")
        recipe = _recipe(data, path, (*outer, path.resolve()))
        return replace(recipe, config=check_steps(recipe.config))
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def _recipe(data: Mapping[str, Any], path: Path, files: tuple[Path, ...]) -> Recipe:
    """The recipe that a mapping stands for: its rules after those of the recipe it extends."""
    if "quant_cfg" in data:
        config = from_modelopt({key: data[key] for key in MODELOPT_KEYS if key in data})
        found = _without_kv(Recipe(name=path.stem, config=config))
    else:
        given = {"rules": data.get("rules") or []}
        base = _base(data["extends"], path, files) if "extends" in data else None
        before = base.config if base else QuantConfig(rules=())
        algorithm = {"algorithm": data["algorithm"]} if "algorithm" in data else {}
        own = from_json({**given, **algorithm})
        config = QuantConfig(
            rules=(*before.rules, *own.rules),
            algorithm=own.algorithm if algorithm else before.algorithm,
        )
        found = Recipe(name=path.stem, config=config, kv_cache=base.kv_cache if base else None)
    for key in OWN:
        if not isinstance(data.get(key), str | None):
            raise InputError(f"{key}: {data[key]!r} is no name; write it in quotes")
    if "kv_cache" in data:
        found = replace(found, kv_cache=find_kv(data["kv_cache"] or "none"))
    return replace(found, name=data.get("name") or path.stem)


def _base(given: Any, path: Path, files: tuple[Path, ...]) -> Recipe:
    """The recipe that is extended: a file where it is named like one."""
    if not isinstance(given, str):
        raise InputError(f"extends: {given!r} is no name; write it in quotes")
    if given.endswith(SUFFIXES):
        return _read(path.parent / given, files)
    return find_recipe(given)


def _without_kv(recipe: Recipe) -> Recipe:
    """The recipe with the format of all keys and values beside its rules, where there is one and
    what comes after only leaves parts of the model out.
    """
    said = [rule for rule in recipe.config.rules if rule.kv not in (KEEP, None)]
    if not said or said[-1].path_glob != "*" or not isinstance(said[-1].kv, str):
        return recipe
    rules = (replace(rule, kv=KEEP) for rule in recipe.config.rules)
    kept = tuple(rule for rule in rules if any(getattr(rule, f) is not KEEP for f in FIELDS))
    return replace(recipe, config=replace(recipe.config, rules=kept), kv_cache=said[-1].kv)
