# SPDX-License-Identifier: Apache-2.0
"""Recipes in YAML files: an existing recipe and rules that change it.

    extends: nvfp4
    rules:
      - {path_glob: "*.mlp.down_proj.*", weight: fp8, input: fp8}

Without `extends` the rules stand alone.
"""

from pathlib import Path
from typing import Any

import yaml

from jqx.config import QuantConfig, from_json
from jqx.errors import InputError, nearest
from jqx.recipes import Recipe, find_recipe

KEYS = ("name", "extends", "rules", "algorithm")


def read_recipe(path: str | Path) -> Recipe:
    """The recipe in the file `path`. Raises InputError naming what is wrong in it."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such recipe file")
    try:
        data: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict):
        raise InputError(f"{path} holds no mapping; its keys are {', '.join(KEYS)}")
    try:
        config = _config(data)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    return Recipe(name=str(data.get("name", path.stem)), config=config)


def _config(data: dict[str, Any]) -> QuantConfig:
    """The rules of a file after those of the recipe it extends."""
    for key in data:
        if key not in KEYS:
            raise nearest(str(key), KEYS, "key")
    config = from_json(
        {"rules": data.get("rules") or [], "algorithm": data.get("algorithm", "max")}
    )
    if "extends" not in data:
        return config
    base = find_recipe(str(data["extends"])).config
    algorithm = data.get("algorithm", base.algorithm)
    return QuantConfig(rules=(*base.rules, *config.rules), algorithm=algorithm)
