# SPDX-License-Identifier: Apache-2.0
"""Recipes: their names, as files and as commands tell them, and what options change in them."""

import dataclasses
import json
from pathlib import Path

import pytest
import yaml
from command import jqx as run
from command import refused
from hypothesis import given
from hypothesis import strategies as st

import jqx
from jqx import RECIPES, InputError, QuantConfig, Rule
from jqx.config import KV_FORMATS, ON, Algorithm, Choice, resolve
from jqx.recipes import KV_ALIASES, find_kv, find_recipe, with_kv
from jqx.selection import config_of
from jqx.steps import check_steps
from jqx_interop.choices import apply_options
from jqx_interop.cli.quantize import complete_formats
from jqx_interop.recipe_files import read_recipe, recipe_data, write_recipe
from jqx_interop.settings import Settings
from jqx_interop.tables import recipe_rows, recipe_yaml

UP, HEAD = "model.layers.3.mlp.up_proj.weight", "lm_head.weight"
ROWS = pytest.mark.parametrize("row", RECIPES.values(), ids=RECIPES.keys())

PRESETS = """
fp8 fp8_2d_blockwise_weight_only fp8_per_channel_per_token int4_awq int4_blockwise_weight_only int8
int8_smoothquant int8_weight_only mamba_moe_fp8_aggressive mamba_moe_fp8_conservative
mamba_moe_nvfp4_aggressive mamba_moe_nvfp4_conservative mxfp4 mxfp4_mlp_weight_only mxfp6 mxfp8
mxint8 nvfp4 nvfp4_awq_clip nvfp4_awq_full nvfp4_awq_lite nvfp4_experts_only nvfp4_mlp_only
nvfp4_omlp_only nvfp4_four_over_six nvfp4_fp8_mha nvfp4_mlp_weight_only nvfp4_svdquant
nvfp4_w4a4_weight_local_hessian nvfp4_w4a4_weight_mse_fp8_sweep w4a16_nvfp4 w4a8_awq_beta
w4a8_mxfp4_fp8 w4a8_nvfp4_fp8
"""
OLDER = """
int8_sq int8_wo int4_wo w4a8_awq nvfp4_awq fp8_pb_wo fp8_pc_pt
"""


# --- names


def test_every_name_of_a_recipe_finds_it_and_no_other():
    names = [name for row in RECIPES.values() for name in (row.name, *row.aliases)]
    assert len(names) == len(set(names))
    for row in RECIPES.values():
        assert all(find_recipe(name) is row for name in (row.name, *row.aliases))


@pytest.mark.parametrize("name", [*PRESETS.split(), *OLDER.split()])
def test_presets_and_older_names_are_there(name: str):
    assert name in (find_recipe(name).name, *find_recipe(name).aliases)
    assert name in complete_formats(name[:-1])


def test_an_unknown_recipe_names_the_nearest():
    with pytest.raises(InputError, match="unknown format 'nvfp5'; did you mean .*nvfp4"):
        find_recipe("nvfp5")


@ROWS
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
    experts = ("model.layers.0.mlp.experts.0.up_proj.weight", "linear")
    assert resolve(row.config, *experts).weight is not None


def test_the_recipe_of_the_deepseek_script():
    """It turns attention off, its output on again, and heads off."""
    row = find_recipe("nvfp4_deepseek")
    attention = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
    inside = [f"self_attn.{name}" for name in attention]
    inside += [f"mlp.{at}.up_proj" for at in ("experts.7", "shared_experts")]
    inside += ["mlp.up_proj", "mlp.gate", "self_attn.indexer.wq_b"]
    chosen = {p: resolve(row.config, f"model.layers.9.{p}.weight", "linear") for p in inside}
    quantized = {
        path for path, choice in chosen.items() if choice.weight == choice.input == "nvfp4"
    }
    assert quantized == {"self_attn.o_proj", *(p for p in inside if p.endswith("up_proj"))}
    assert row.kv_cache == "fp8_cast"


@ROWS
def test_the_algorithm_of_a_recipe_is_one(row: jqx.Recipe):
    assert check_steps(row.config) == row.config
    assert config_of(row.name) == row.whole
    assert row.summary


def test_formats_of_the_recipes():
    """Those that no dictionary of ModelOpt covers, and their steps."""
    for name, weight, inputs, steps in (
        ("int4_gptq", "int4", None, "gptq"),
        ("int4_wmse", "int4", None, "wmse"),
        ("nvfp4_gptq", "nvfp4", "nvfp4", "gptq"),
        ("nvfp4_wmse", "nvfp4", "nvfp4", "wmse"),
    ):
        config = RECIPES[name].config
        assert resolve(config, UP, "linear") == Choice(weight=weight, input=inputs)
        assert config.steps == (Algorithm(steps),)


def test_keys_and_values_have_names_too():
    assert find_kv("none") is None
    for name in KV_FORMATS:
        assert find_kv(name) == name
    for alias, name in KV_ALIASES.items():
        assert find_kv(alias) == name
    with pytest.raises(InputError, match="'fp8_afine'; did you mean fp8_affine"):
        find_kv("fp8_afine")
    for name in ("nvfp4_rotate", "NVFP4_KV_ROTATE_CFG"):
        with pytest.raises(InputError, match=f"{name}: rotations .* not done here"):
            find_kv(name)
    said = with_kv(RECIPES["fp8"].config, "nvfp4")
    assert resolve(said, "model.layers.0.self_attn", "attention") == Choice(kv="nvfp4")
    assert resolve(said, UP, "linear") == resolve(RECIPES["fp8"].config, UP, "linear")


# --- files


@ROWS
def test_a_recipe_as_yaml_reads_back(row: jqx.Recipe, tmp_path: Path):
    (tmp_path / "r.yaml").write_text(recipe_yaml(row.name), encoding="utf-8")
    (tmp_path / "r.json").write_text(json.dumps(recipe_data(row)), encoding="utf-8")
    assert write_recipe(row) == recipe_yaml(row.name)
    for name in ("r.yaml", "r.json"):
        assert read_recipe(tmp_path / name) == dataclasses.replace(row, aliases=(), summary="")


WORDS = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), min_size=1)
RULES = st.fixed_dictionaries(
    {"path_glob": WORDS},
    optional={
        "weight": st.sampled_from(["fp8", "int4_b32", None, ON]),
        "input": st.sampled_from(["fp8", None, ON]),
        "kind": st.sampled_from(["linear", "embedding"]),
        "optional": st.just(True),
    },
)
STEPS = st.one_of(
    st.sampled_from([None, "max", "gptq"]),
    st.floats(0.01, 1).map(lambda step: ("awq_lite", {"alpha_step": step})),
    st.floats(0.01, 9).map(lambda step: [("max", {}), ("mse", {"step_size": step})]),
)


@given(
    name=WORDS,
    kv=st.sampled_from([None, *KV_FORMATS]),
    rules=st.lists(RULES, max_size=4),
    steps=STEPS,
)
def test_any_recipe_reads_back(tmp_path_factory, name, kv, rules, steps):
    if isinstance(steps, list):
        steps = tuple(Algorithm.of(method, **params) for method, params in steps)
    elif isinstance(steps, tuple):
        steps = Algorithm.of(steps[0], **steps[1])
    config = QuantConfig(rules=tuple(Rule(**rule) for rule in rules), algorithm=steps)
    recipe = jqx.Recipe(name=name, kv_cache=kv, config=config)
    file = tmp_path_factory.mktemp("recipes") / "r.yaml"
    file.write_text(write_recipe(recipe), encoding="utf-8")
    assert read_recipe(file) == recipe


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


def test_a_recipe_file_extends_a_file(tmp_path: Path):
    (tmp_path / "in").mkdir()
    base, mine = tmp_path / "base.json", tmp_path / "in" / "mine.yml"
    base.write_text('{"extends": "int4_awq", "kv_cache": "fp8", "rules": [{"weight": "int4_b64"}]}')
    mine.write_text("extends: ../base.json\nrules:\n  - {path_glob: '*mlp*', weight: true}\n")
    found = read_recipe(mine)
    rules = (Rule(weight="int4_b64"), Rule(path_glob="*mlp*", weight=ON))
    assert found.config.rules == (*RECIPES["int4_awq"].config.rules, *rules)
    assert found.config.algorithm == RECIPES["int4_awq"].config.algorithm
    assert (found.name, found.kv_cache) == ("mine", "fp8")
    mine.write_text("extends: ../base.json\nkv_cache: none\nalgorithm: [smoothquant, max]\n")
    assert read_recipe(mine).kv_cache is None
    assert read_recipe(mine).config.steps == (Algorithm("smoothquant"), Algorithm("max"))
    mine.write_text("extends: ../base.json\nkv_cache: NVFP4_KV_CFG\n")
    assert read_recipe(mine).kv_cache == "nvfp4"


MODELOPT = """
quant_cfg:
  - {quantizer_name: '*', enable: false}
  - {quantizer_name: '*weight_quantizer', cfg: {num_bits: e4m3, axis: 0}}
  - {quantizer_name: '*[kv]_bmm_quantizer', cfg: {num_bits: [4, 3]}}
  - {quantizer_name: '*lm_head*', enable: false}
algorithm: {method: mse, step_size: 0.5, debug: true}
effective_bits: 8.0
"""


def test_a_file_holds_a_dictionary_of_modelopt(tmp_path: Path):
    file = tmp_path / "theirs.yaml"
    file.write_text(MODELOPT)
    found = read_recipe(file)
    assert (found.name, found.kv_cache) == ("theirs", "fp8")
    assert resolve(found.config, UP, "linear") == Choice(weight="fp8_channel")
    assert resolve(found.config, HEAD, "linear") == Choice()
    assert found.config.algorithm == Algorithm.of("mse", step_size=0.5)
    file.write_text(MODELOPT + "name: mine\nkv_cache: nvfp4\n")
    assert (read_recipe(file).name, read_recipe(file).kv_cache) == ("mine", "nvfp4")
    (tmp_path / "more.yaml").write_text("extends: theirs.yaml\nrules: [{input: fp8}]\n")
    extended = read_recipe(tmp_path / "more.yaml")
    assert resolve(extended.config, UP, "linear") == Choice(weight="fp8_channel", input="fp8")
    (tmp_path / "back.yaml").write_text(write_recipe(found))
    assert read_recipe(tmp_path / "back.yaml") == found


@pytest.mark.parametrize(
    ("text", "phrases"),
    [
        ("rules: [", ("not YAML",)),
        ("- fp8", ("no mapping", "extends")),
        ("rulez: []", ("'rulez'", "rules")),
        ("quant_cfg: []\nrules: []", ("'rules'",)),
        ("quant_cfg: []\nextends: fp8", ("'extends'",)),
        ("quant_cfg: [{quantizer_name: '*', cfg: {num_bit: 8}}]", ("'*'", "'num_bit'", "num_bits")),
        ("extends: fp9", ("'fp9'", "fp8")),
        ("extends: 8", ("extends", "8", "quotes")),
        ("extends: no.yaml", ("no.yaml", "no such recipe file")),
        ("extends: r.yaml", ("r.yaml", "extends itself")),
        ("extends: fp8\nkv_cache: fp9", ("'fp9'", "fp8")),
        ("extends: fp8\nname: 8", ("name", "8", "quotes")),
        ("extends: fp8\nalgorithm: maximum", ("'maximum'", "max")),
        ("extends: fp8\nalgorithm: {method: awq_lite, alpha: 1}", ("'alpha'", "alpha_step")),
        ("extends: fp8\nalgorithm: {method: awq_lite, alpha_step: 9}", ("alpha_step", "9")),
        ("extends: fp8\nalgorithm: {method: awq_lite, alpha_step: 1e-1}", ("'1e-1'", "number")),
    ],
)
def test_what_is_wrong_in_a_file_is_named(text: str, phrases: tuple[str, ...], tmp_path: Path):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(InputError) as caught:
        read_recipe(tmp_path / "r.yaml")
    assert str(caught.value).startswith(f"{tmp_path / 'r.yaml'}")
    assert "\n" not in str(caught.value)
    for phrase in phrases:
        assert phrase in str(caught.value)


def test_files_that_extend_each_other_are_refused(tmp_path: Path):
    (tmp_path / "a.yaml").write_text("extends: b.yaml")
    (tmp_path / "b.yaml").write_text("extends: a.yaml")
    with pytest.raises(InputError, match=r"a\.yaml extends itself, by way of a\.yaml, b\.yaml"):
        read_recipe(tmp_path / "a.yaml")
    (tmp_path / "c.json").write_text("{'extends': 'fp8'}")
    with pytest.raises(InputError, match=r"c\.json is not JSON"):
        read_recipe(tmp_path / "c.json")


# --- commands


def test_the_table_has_every_recipe():
    rows = {row["recipe"]: row for row in recipe_rows()}
    assert list(rows) == list(RECIPES)
    assert rows["int4_awq"]["algorithm"] == "awq_lite"
    assert rows["int4_awq"]["needs data"] == "yes"
    assert rows["mxfp8"]["algorithm"] == "none"
    assert rows["int8_weight_only"]["needs data"] == ""
    assert "INT4_AWQ_CFG" in rows["int4_awq"]["also known as"]


@pytest.mark.parametrize("name", ["nvfp4_fp8_mha", "INT4_AWQ_CFG", "w4a8_awq"])
def test_a_recipe_is_shown_as_a_file_has_it(name: str, tmp_path: Path):
    row = find_recipe(name)
    for file, options in (("r.yaml", ()), ("r.json", ("--json",))):
        code, out, err = run("recipes", name, *options)
        assert (code, err) == (0, "")
        (tmp_path / file).write_text(out, encoding="utf-8")
        assert read_recipe(tmp_path / file) == dataclasses.replace(row, aliases=(), summary="")


def test_a_recipe_that_is_none_is_one_line():
    refused("recipes", "nvfp4_awqlit", saying=("'nvfp4_awqlit'", "nvfp4_awq_lite"))
    refused("recipes", "nvfp4_awqlit", "--json", saying="nvfp4_awq_lite")


# --- options


AWQ = RECIPES["int4_awq"].config


@pytest.mark.parametrize(
    ("algorithm", "options", "expected"),
    [
        (None, (), AWQ.algorithm),
        ("gptq", (), "gptq"),
        ("gptq", (("perc_damp", "0.5"),), Algorithm.of("gptq", perc_damp=0.5)),
        (None, (("alpha_step", "0.05"),), Algorithm.of("awq_lite", alpha_step=0.05)),
        ("svdquant", (("lowrank", "64"),), Algorithm.of("svdquant", lowrank=64)),
    ],
)
def test_options_change_the_algorithm(algorithm, options, expected):
    settings = Settings(algorithm=algorithm, options=(*options, ("block", "64")))
    found = apply_options(AWQ, settings)
    assert found.algorithm == expected
    assert resolve(found, UP, "linear") == Choice(weight="int4_b64")


@pytest.mark.parametrize(
    ("settings", "phrases"),
    [
        (Settings(algorithm="awq_lit"), ("'awq_lit'", "awq_lite")),
        (Settings(options=(("alpha_stp", "1"),)), ("'alpha_stp'", "--set", "alpha_step")),
        (Settings(options=(("alpha_step", "2"),)), ("alpha_step", "2")),
        (Settings(options=(("alpha_step", "x"),)), ("alpha_step=x", "a number")),
        (Settings(algorithm="max", options=(("alpha_step", "1"),)), ("'alpha_step'", "block")),
    ],
)
def test_options_that_are_none_are_named(settings: Settings, phrases: tuple[str, ...]):
    with pytest.raises(InputError) as caught:
        apply_options(AWQ, settings)
    for phrase in phrases:
        assert phrase in str(caught.value)
