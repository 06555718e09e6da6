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
    for key in data:
        if key not in KEYS:
            raise nearest(str(key), KEYS, f"key in {path}:")
    rules = data.get("rules") or []
    if not isinstance(rules, list) or not all(isinstance(rule, dict) for rule in rules):
        raise InputError(
            f"{path}: rules is a list of mappings such as {{path_glob: '*mlp*', weight: fp8}}"
        )
    config = from_json({"rules": rules, "algorithm": data.get("algorithm", "max")})
    if "extends" in data:
        base = find_recipe(str(data["extends"])).config
        algorithm = data.get("algorithm", base.algorithm)
        config = QuantConfig(rules=(*base.rules, *config.rules), algorithm=algorithm)
    return Recipe(name=str(data.get("name", path.stem)), config=config)
