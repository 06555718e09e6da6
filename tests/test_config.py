# SPDX-License-Identifier: Apache-2.0
"""Rules: what they say about a path, as JSON, with other block sizes; and the recipes."""

import dataclasses
import fnmatch
import json
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

import jqx
from jqx import KEEP, RECIPES, InputError, QuantConfig, Rule
from jqx.config import (
    INPUT_FORMATS,
    KV_FORMATS,
    Choice,
    base_format,
    from_json,
    resolve,
    to_json,
    with_block,
)
from jqx.formats import find_format
from jqx.recipes import KV_ALIASES, find_kv, find_recipe, with_kv
from jqx_interop.recipe_files import read_recipe
from jqx_interop.tables import recipe_yaml

UP, HEAD = "model.layers.3.mlp.up_proj.weight", "lm_head.weight"


def config(*rules: Rule) -> QuantConfig:
    return QuantConfig(rules=rules)


# --- resolving


def test_the_last_matching_rule_wins_field_by_field():
    rules = (
        Rule(weight="fp8", input="fp8"),
        Rule(path_glob="*mlp*", weight="nvfp4"),
        Rule(path_glob="*up_proj*", input=None),
        Rule(path_glob="*attn*", weight=None, input=None),
    )
    assert resolve(config(*rules), UP, "linear") == Choice(weight="nvfp4", input=None)
    assert resolve(config(*rules), HEAD, "linear") == Choice(weight="fp8", input="fp8")
    assert resolve(config(*rules), "x.attn.q.weight", "linear") == Choice()
    assert resolve(config(*rules[::-1]), UP, "linear") == Choice(weight="fp8", input="fp8")


def test_nothing_is_said_without_a_rule():
    assert resolve(config(), UP, "linear") == Choice()
    assert resolve(config(Rule(path_glob="*MLP*", weight="fp8")), UP, "linear") == Choice()


def test_a_kind_narrows_a_rule():
    rules = config(Rule(weight="fp8", kind="linear"), Rule(kv="fp8", kind="attention"))
    assert resolve(rules, UP, "linear") == Choice(weight="fp8")
    assert resolve(rules, UP, "embedding") == Choice()
    assert resolve(rules, "model.layers.3.self_attn", "attention") == Choice(kv="fp8")


FIELDS = {
    "weight": st.sampled_from([None, "fp8", "int4_b64", "nvfp4"]),
    "input": st.sampled_from([None, *INPUT_FORMATS]),
    "output": st.sampled_from([None, *INPUT_FORMATS]),
    "kv": st.sampled_from([None, *KV_FORMATS]),
}
GLOBS = ["*", "*mlp*", "*.up_proj.*", "lm_head*", "*.[0-3].*", "nothing"]
KINDS = [None, "linear", "embedding", "attention"]
RULES = st.lists(
    st.tuples(
        st.sampled_from(GLOBS), st.sampled_from(KINDS), st.fixed_dictionaries({}, optional=FIELDS)
    ),
    max_size=5,
)
Drawn = list[tuple[str, str | None, dict[str, str | None]]]


def built(drawn: Drawn, algorithm: str | None = "max") -> QuantConfig:
    rules = tuple(Rule(path_glob=glob, kind=kind, **fields) for glob, kind, fields in drawn)
    return QuantConfig(rules=rules, algorithm=algorithm)


@given(drawn=RULES, path=st.sampled_from([UP, HEAD]), kind=st.sampled_from(KINDS[1:]))
def test_each_field_is_that_of_the_last_rule_that_sets_it(drawn: Drawn, path: str, kind: str):
    found = built(drawn)
    expected = {}
    for field in FIELDS:
        said = [
            getattr(rule, field)
            for rule in found.rules
            if fnmatch.fnmatchcase(path, rule.path_glob)
            and rule.kind in (None, kind)
            and getattr(rule, field) is not KEEP
        ]
        expected[field] = said[-1] if said else None
    assert dataclasses.asdict(resolve(found, path, kind)) == expected


# --- JSON


@given(drawn=RULES, algorithm=st.sampled_from([None, "max"]))
def test_json_comes_back_as_it_was(drawn: Drawn, algorithm: str | None):
    found = built(drawn, algorithm)
    assert from_json(json.loads(json.dumps(to_json(found)))) == found


def test_what_is_kept_is_not_written():
    said = to_json(config(Rule(path_glob="*mlp*", weight=None)))
    assert said == {"rules": [{"path_glob": "*mlp*", "weight": None}], "algorithm": "max"}


@pytest.mark.parametrize(
    ("data", "phrases"),
    [
        ({"rulez": []}, ("'rulez'", "rules")),
        ({}, ("rules", "list")),
        ({"rules": "fp8"}, ("rules", "list")),
        ({"rules": ["fp8"]}, ("rules", "list")),
        ({"rules": [{"wieght": "fp8"}]}, ("'wieght'", "weight")),
        ({"rules": [{"weight": "nvfp5"}]}, ("nvfp5", "nvfp4")),
        ({"rules": [{"weight": 8}]}, ("weight", "8", "quotes")),
        ({"rules": [{"input": "fp9"}]}, ("'fp9'", "fp8")),
        ({"rules": [{"output": "fp9"}]}, ("'fp9'", "fp8")),
        ({"rules": [{"kv": "fp8_afine"}]}, ("'fp8_afine'", "fp8_affine")),
        ({"rules": [{"kind": "linaer"}]}, ("'linaer'", "linear")),
        ({"rules": [{"path_glob": None}]}, ("path_glob", "None")),
    ],
    ids=str,
)
def test_what_is_wrong_in_json_is_named(data: dict, phrases: tuple[str, ...]):
    with pytest.raises(InputError) as caught:
        from_json(data)
    assert "\n" not in str(caught.value)
    for phrase in phrases:
        assert phrase in str(caught.value)


# --- blocks


def test_another_block_in_every_format_that_has_one():
    given = config(
        *(Rule(weight=name) for name in ("int4", "nvfp4_b64", "fp8", "fp8_block", "int8")),
        Rule(weight=None),
        Rule(input="fp8"),
    )
    names = [rule.weight for rule in with_block(given, 32).rules]
    assert names == ["int4_b32", "nvfp4_b32", "fp8", "fp8_block", "int8", None, KEEP]
    assert find_format("int4_b32").block == (1, 32)
    assert with_block(given, 32).rules[-1] == Rule(input="fp8")


@pytest.mark.parametrize("name", ["int4", "nvfp4", "mxfp4", "mxfp8", "nvfp4_b32", "nvfp4_b32_fp8"])
def test_the_block_of_the_row_gives_the_row(name: str):
    rows, columns = find_format(name).block
    assert rows == 1
    assert columns is not None
    there = with_block(config(Rule(weight=name)), 8)
    assert there.rules[0].weight == f"{name}_b8"
    assert base_format(f"{name}_b8") == name
    assert with_block(there, columns).rules[0].weight == name


def test_no_block_to_change_is_refused():
    with pytest.raises(InputError, match="block=64: fp8 has no blocks"):
        with_block(config(Rule(weight="fp8", input="fp8")), 64)


# --- recipes


def test_every_name_of_a_recipe_finds_it_and_no_other():
    names = [name for row in RECIPES.values() for name in (row.name, *row.aliases)]
    assert len(names) == len(set(names))
    for row in RECIPES.values():
        assert all(find_recipe(name) is row for name in (row.name, *row.aliases))


def test_an_unknown_recipe_names_the_nearest():
    with pytest.raises(InputError, match="unknown format 'nvfp5'; did you mean .*nvfp4"):
        find_recipe("nvfp5")


@pytest.mark.parametrize("row", RECIPES.values(), ids=RECIPES.keys())
def test_no_recipe_touches_heads_routers_or_embeddings(row: jqx.Recipe):
    paths = (
        "lm_head",
        "model.layers.0.mlp.gate",
        "model.layers.0.block_sparse_moe.gate",
        "output_layer",
    )
    for path in (
        *paths,
        "model.layers.1.mlp.shared_expert_gate",
        "visual.blocks.0.mlp.fc1",
        "x.router",
    ):
        assert resolve(row.config, f"{path}.weight", "linear") == Choice()
    assert resolve(row.config, "model.embed_tokens.weight", "embedding") == Choice()
    assert resolve(row.config, UP, "linear").weight is not None


@pytest.mark.parametrize("row", RECIPES.values(), ids=RECIPES.keys())
def test_a_recipe_as_yaml_reads_back(row: jqx.Recipe, tmp_path: Path):
    (tmp_path / "r.yaml").write_text(recipe_yaml(row.name))
    assert read_recipe(tmp_path / "r.yaml").config == row.config
    assert read_recipe(tmp_path / "r.yaml").name == row.name


def test_a_recipe_file_extends_another(tmp_path: Path):
    file = tmp_path / "mine.yaml"
    file.write_text("extends: FP8_DEFAULT_CFG\nrules:\n  - {path_glob: '*mlp*', weight: null}\n")
    recipe = read_recipe(file)
    assert recipe.name == "mine"
    assert recipe.config.rules == (
        *RECIPES["fp8"].config.rules,
        Rule(path_glob="*mlp*", weight=None),
    )
    assert recipe.config.algorithm == "max"
    file.write_text("extends: mxfp8\n")
    assert read_recipe(file).config == RECIPES["mxfp8"].config
    file.write_text("extends: fp8\nalgorithm: null\nname: other\n")
    assert (read_recipe(file).name, read_recipe(file).config.algorithm) == ("other", None)
    assert yaml.safe_load(file.read_text())["name"] == "other"


def test_keys_and_values_have_names_too():
    assert find_kv("none") is None
    for name in KV_FORMATS:
        assert find_kv(name) == name
    for alias, name in KV_ALIASES.items():
        assert find_kv(alias) == name
    with pytest.raises(InputError, match="'fp8_afine'; did you mean fp8_affine"):
        find_kv("fp8_afine")
    said = with_kv(RECIPES["fp8"].config, "nvfp4")
    assert resolve(said, "model.layers.0.self_attn", "attention") == Choice(kv="nvfp4")
    assert resolve(said, UP, "linear") == resolve(RECIPES["fp8"].config, UP, "linear")
