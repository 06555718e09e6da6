# SPDX-License-Identifier: Apache-2.0
"""CASES: what is exported and given to engines, a row for a layout and a recipe."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

import jqx_interop as ji
from jqx.errors import InputError
from jqx_interop.recipe_files import recipe_of

CALIBRATION = {"calib_size": 16, "calib_seq": 128}
"""Enough for scales of inputs that are not those of a few tokens."""

BY_64 = {"block": "64"}
"""Divides the widths of small models."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Case:
    """`recipe`: a name, or what a recipe file holds; `name`: what it is called here if it is not a
    name; `kv`: the format of keys and values; `options`: as for `--set`; `settings`: of `ptq`.
    """

    target: str
    recipe: str | dict[str, Any]
    name: str = ""
    kv: str | None = None
    options: dict[str, str] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """What is exported, in words."""
        first = self.name or str(self.recipe)
        return first + (f", keys and values {self.kv}" if self.kv else "")

    @property
    def key(self) -> str:
        """The layout and what is exported."""
        return f"{self.target}: {self.title}"


TOKENS = {
    "extends": "int8",
    "rules": [{"path_glob": "*", "input": "int8_token", "kind": "linear"}],
}
MIXED = {
    "extends": "nvfp4",
    "rules": [{"path_glob": "*.mlp.*", "weight": "fp8", "input": "fp8", "kind": "linear"}],
}
CT = "compressed-tensors"

CASES = (
    Case(target="modelopt", recipe="fp8"),
    Case(target="modelopt", recipe="fp8", kv="fp8"),
    Case(target="modelopt", recipe="fp8", name="fp8, unified", settings={"unify_fp8": True}),
    Case(target="modelopt", recipe="fp8_per_channel_per_token"),
    Case(target="modelopt", recipe="fp8_2d_blockwise_weight_only"),
    Case(target="modelopt", recipe="nvfp4"),
    Case(target="modelopt", recipe="nvfp4", kv="fp8"),
    Case(target="modelopt", recipe="nvfp4_awq_clip"),
    Case(target="modelopt", recipe="nvfp4_four_over_six"),
    Case(target="modelopt", recipe="nvfp4_mlp_only"),
    Case(target="modelopt", recipe="w4a16_nvfp4"),
    Case(target="modelopt", recipe="w4a16_nvfp4", kv="fp8"),
    Case(target="modelopt", recipe="mxfp8"),
    Case(target="modelopt", recipe=MIXED, name="nvfp4, MLPs fp8"),
    Case(target=CT, recipe="fp8"),
    Case(target=CT, recipe="fp8", kv="fp8"),
    Case(target=CT, recipe="fp8_per_channel_per_token"),
    Case(target=CT, recipe="fp8_2d_blockwise_weight_only"),
    Case(target=CT, recipe="int8"),
    Case(target=CT, recipe=TOKENS, name="int8, inputs by token"),
    Case(target=CT, recipe="int8_weight_only"),
    Case(target=CT, recipe="int4_blockwise_weight_only", options=BY_64),
    Case(target=CT, recipe="int4_blockwise_weight_only", kv="fp8", options=BY_64),
    Case(target=CT, recipe="int4_gptq", options=BY_64),
    Case(target=CT, recipe="int4_wmse", options=BY_64),
    Case(target=CT, recipe="int4_awq", options=BY_64),
    Case(target=CT, recipe="int8_smoothquant"),
    Case(target=CT, recipe="nvfp4"),
    Case(target=CT, recipe="nvfp4", kv="fp8"),
    Case(target=CT, recipe="w4a16_nvfp4"),
    Case(target=CT, recipe="mxfp4"),
    Case(target=CT, recipe="mxfp4_mlp_weight_only"),
    Case(target=CT, recipe="mxfp8"),
    Case(target=CT, recipe=MIXED, name="nvfp4, MLPs fp8"),
    Case(target="awq", recipe="int4_blockwise_weight_only", options=BY_64),
    Case(target="awq", recipe="int4_wmse", options=BY_64),
    Case(target="awq", recipe="int4_awq", options=BY_64),
    Case(target="gptq", recipe="int4_gptq", options=BY_64),
)


def export(case: Case, model: str | Path, folder: Path) -> Path:
    """`model` as `case` says, in a directory of its own in `folder`; nothing is done if it is there
    already.
    """
    out = folder / "".join(c if c.isalnum() or c in "_-" else "-" for c in case.key)
    if out.exists():
        return out
    recipe: Any = case.recipe
    if isinstance(recipe, dict):
        recipe = out.with_name(out.name + ".yaml")
        recipe.write_text(yaml.safe_dump(case.recipe), encoding="utf-8")
    more = CALIBRATION | {"kv_cache": case.kv} | case.settings
    ji.ptq(
        model,
        out,
        recipe_of(recipe),
        target=case.target,
        options=tuple(case.options.items()),
        **more,
    )
    return out


def export_all(
    cases: Iterable[Case], model: str | Path, folder: Path
) -> tuple[dict[Case, Path], dict[Case, str]]:
    """The directories of all cases that `model` can be exported in, and of the others why not."""
    found, refused = {}, {}
    for case in cases:
        try:
            found[case] = export(case, model, folder)
        except InputError as error:
            refused[case] = str(error)
    return found, refused
