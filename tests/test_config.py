# SPDX-License-Identifier: Apache-2.0
"""Rules: what they say about a path, as JSON, with other block sizes; and algorithms in JSON."""

import dataclasses
import fnmatch
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jqx import KEEP, InputError, QuantConfig, Rule
from jqx.config import (
    INPUT_FORMATS,
    KV_FORMATS,
    ON,
    Algorithm,
    Choice,
    base_format,
    from_json,
    resolve,
    to_json,
    with_block,
)
from jqx.formats import find_format
from jqx.globs import covers
from jqx.selection import config_of
from jqx.steps import check_steps, parameters, with_option

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


def test_on_takes_back_none():
    rules = (Rule(weight="fp8"), Rule(path_glob="*mlp*", weight="nvfp4"), Rule(weight=None))
    back = Rule(path_glob="*up_proj*", weight=ON)
    assert resolve(config(*rules, back), UP, "linear") == Choice(weight="nvfp4")
    assert resolve(config(*rules, back), HEAD, "linear") == Choice()
    assert resolve(config(*rules[:2], Rule(weight=ON)), UP, "linear") == Choice(weight="nvfp4")
    assert resolve(config(Rule(weight=ON)), UP, "linear") == Choice()


def test_the_module_itself_and_not_what_is_in_it():
    exact = Rule(path_glob="=*.mlp", weight="fp8")
    assert resolve(config(exact), "model.mlp.weight", "linear") == Choice(weight="fp8")
    assert resolve(config(exact), "model.mlp.up_proj.weight", "linear") == Choice()
    attention = config(Rule(path_glob="=*.self_attn", kv="fp8"))
    assert resolve(attention, "layers.0.self_attn", "attention") == Choice(kv="fp8")
    assert resolve(attention, "layers.0.self_attn.inner", "attention") == Choice()
    assert covers("=*/self_attn", "layers.self_attn")
    assert covers("=*/self_attn", "layers.self_attn.weight")
    assert not covers("=*/self_attn", "layers.self_attn.q_proj.weight")


def test_a_weight_is_stored_as_its_inputs_ask_for():
    both = config(Rule(weight="nvfp4_b32", input="fp8"), Rule(path_glob="*mlp*", input=None))
    assert resolve(both, HEAD, "linear") == Choice(weight="nvfp4_b32_fp8", input="fp8")
    assert resolve(both, UP, "linear") == Choice(weight="nvfp4_b32")


FIELDS = {
    "weight": st.sampled_from([None, ON, "fp8", "int4_b64", "nvfp4"]),
    "input": st.sampled_from([None, ON, *INPUT_FORMATS]),
    "output": st.sampled_from([None, ON, *INPUT_FORMATS]),
    "kv": st.sampled_from([None, ON, *KV_FORMATS]),
}
GLOBS = ["*", "*mlp*", "*.up_proj.*", "lm_head*", "*.[0-3].*", "nothing"]
KINDS = [None, "linear", "embedding", "attention"]
RULES = st.lists(
    st.tuples(
        st.sampled_from(GLOBS), st.sampled_from(KINDS), st.fixed_dictionaries({}, optional=FIELDS)
    ),
    max_size=5,
)
Drawn = list[tuple[str, str | None, dict[str, Any]]]


def built(drawn: Drawn, algorithm: Any = "max") -> QuantConfig:
    rules = tuple(
        Rule(path_glob=glob, kind=kind, optional=glob == "nothing", **fields)
        for glob, kind, fields in drawn
    )
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
        names = [None, *(value for value in said if isinstance(value, str))]
        expected[field] = names[-1] if said and said[-1] is not None else None
    got = dataclasses.asdict(resolve(found, path, kind))
    assert {field: got[field] for field in FIELDS} == expected


# --- JSON


NAMES = st.sampled_from(["max", "awq_lite", "gptq", "no_such"])
VALUES = st.one_of(st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(), st.none())
STEPS = st.tuples(
    NAMES,
    st.dictionaries(
        st.sampled_from(["alpha", "lowrank", "skip"]), VALUES | st.lists(VALUES).map(tuple)
    ),
)
ALGORITHM = st.one_of(st.none(), NAMES, STEPS, st.lists(STEPS))


@given(drawn=RULES, algorithm=ALGORITHM)
def test_json_comes_back_as_it_was(drawn: Drawn, algorithm: Any):
    if isinstance(algorithm, list):
        algorithm = tuple(Algorithm.of(method, **params) for method, params in algorithm)
    elif isinstance(algorithm, tuple):
        algorithm = Algorithm.of(algorithm[0], **algorithm[1])
    found = built(drawn, algorithm)
    assert from_json(json.loads(json.dumps(to_json(found)))) == found


def test_an_algorithm_in_json():
    lite = Algorithm.of("awq_lite", alpha_step=0.1)
    said = {"method": "awq_lite", "alpha_step": 0.1}
    for algorithm, plain, steps in (
        ("max", "max", (Algorithm("max"),)),
        (None, None, ()),
        (lite, said, (lite,)),
        ((lite, Algorithm("max")), [said, {"method": "max"}], (lite, Algorithm("max"))),
    ):
        found = QuantConfig(rules=(), algorithm=algorithm)
        assert to_json(found)["algorithm"] == plain
        assert from_json({"rules": [], "algorithm": plain}) == found
        assert found.steps == steps
    assert from_json({"rules": [], "algorithm": ["max"]}).steps == (Algorithm("max"),)


def test_what_is_kept_is_not_written():
    said = to_json(config(Rule(path_glob="*mlp*", weight=None, kv=ON, optional=True)))
    row = {"path_glob": "*mlp*", "weight": None, "kv": True, "optional": True}
    assert said == {"rules": [row], "algorithm": "max"}


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
        ({"rules": [{"path_glob": True}]}, ("path_glob", "True")),
        ({"rules": [{"weight": False}]}, ("weight", "False")),
        ({"rules": [{"kind": True}]}, ("kind", "True")),
        ({"rules": [{"optional": "yes"}]}, ("optional", "'yes'")),
        ({"rules": [], "algorithm": 8}, ("algorithm", "8", "quotes", "method")),
        ({"rules": [], "algorithm": {"alpha": 1}}, ("algorithm", "alpha", "method")),
        ({"rules": [], "algorithm": [None]}, ("algorithm", "None", "method")),
        ({"rules": [], "algorithm": {"method": "max", "a": {}}}, ("max", "'a'", "{}")),
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


# --- steps


@pytest.mark.parametrize(
    ("algorithm", "phrases"),
    [
        ("maximum", ("'maximum'", "max")),
        (Algorithm.of("awq_lite", alpha=1), ("'alpha'", "alpha_step")),
        (Algorithm.of("awq_lite", alpha_step="1e-1"), ("alpha_step", "'1e-1'", "number")),
        (Algorithm.of("awq_lite", alpha_step=True), ("alpha_step", "True", "number")),
        (Algorithm.of("awq_lite", alpha_step=2.0), ("alpha_step", "2")),
        (Algorithm.of("gptq", block_size=0.5), ("block_size", "0.5", "whole number")),
        (Algorithm.of("mse", fp8_scale_sweep=1), ("fp8_scale_sweep", "1", "true or false")),
        (Algorithm.of("gptq", scales=1), ("scales", "1", "name")),
        (Algorithm.of("max", block=1), ("max", "block")),
        ((Algorithm("max"), Algorithm("awq_lit")), ("'awq_lit'", "awq_lite")),
    ],
    ids=str,
)
def test_steps_that_are_none_are_named(algorithm: Any, phrases: tuple[str, ...]):
    given = QuantConfig(rules=(Rule(weight="fp8"),), algorithm=algorithm)
    for check in (check_steps, config_of, lambda config: config_of(to_json(config))):
        with pytest.raises(InputError) as caught:
            check(given)
        for phrase in phrases:
            assert phrase in str(caught.value)


def test_steps_that_are_right_pass():
    lite = Algorithm.of("awq_lite", alpha_step=1)  # a whole number is a number
    given = QuantConfig(rules=(Rule(weight="fp8"),), algorithm=(lite, Algorithm("max")))
    assert config_of(to_json(given)) == config_of(given) == check_steps(given) == given
    assert type(dict(check_steps(given).steps[0].params)["alpha_step"]) is float
    assert parameters("awq_lite") == {"alpha_step": float}


LITE, MSE = Algorithm("awq_lite"), Algorithm.of("mse", step_size=0.2)


@pytest.mark.parametrize(
    ("algorithm", "key", "text", "expected"),
    [
        ("smoothquant", "alpha", "0.5", Algorithm.of("smoothquant", alpha=0.5)),
        (LITE, "alpha_step", "1", Algorithm.of("awq_lite", alpha_step=1.0)),
        (LITE, "awq_lite.alpha_step", "0.5", Algorithm.of("awq_lite", alpha_step=0.5)),
        (MSE, "fp8_scale_sweep", "True", Algorithm.of("mse", step_size=0.2, fp8_scale_sweep=True)),
        (MSE, "step_size", "0.2", MSE),
        ("gptq", "block_size", "64", Algorithm.of("gptq", block_size=64)),
        ("gptq", "scales", "mse", Algorithm.of("gptq", scales="mse")),
        ((LITE, MSE), "step_size", "0.5", (LITE, Algorithm.of("mse", step_size=0.5))),
        ((MSE, LITE), "mse.step_size", "1e-1", (Algorithm.of("mse", step_size=0.1), LITE)),
    ],
    ids=str,
)
def test_an_option_changes_every_step_that_has_it(
    algorithm: Any, key: str, text: str, expected: Any
):
    given = QuantConfig(rules=(Rule(weight="int4"),), algorithm=algorithm)
    assert with_option(given, key, text) == dataclasses.replace(given, algorithm=expected)
    for step in with_option(given, key, text).steps:
        types = parameters(step.method)
        assert all(type(value) is types[name] for name, value in step.params)


@pytest.mark.parametrize(
    ("algorithm", "key", "text", "phrases"),
    [
        ("awq_lite", "alpha_stp", "1", ("'alpha_stp'", "alpha_step")),
        ("awq_lite", "blok", "1", ("'blok'", "block")),
        ("awq_lite", "mse.alpha_step", "1", ("'mse.alpha_step'", "alpha_step")),
        ((LITE, MSE), "mse.alpha_step", "1", ("mse.alpha_step", "awq_lite.alpha_step")),
        (None, "alpha_step", "1", ("'alpha_step'", "block")),
        ("awq_lite", "alpha_step", "much", ("alpha_step=much", "a number")),
        ("gptq", "block_size", "1.5", ("block_size=1.5", "a whole number")),
        ("mse", "fp8_scale_sweep", "yes", ("fp8_scale_sweep=yes", "true or false")),
        ("mse", "block", "-1", ("block=-1", "positive")),
    ],
    ids=str,
)
def test_an_option_that_is_none_is_named(
    algorithm: Any, key: str, text: str, phrases: tuple[str, ...]
):
    given = QuantConfig(rules=(Rule(weight="int4"),), algorithm=algorithm)
    with pytest.raises(InputError) as caught:
        with_option(given, key, text)
    assert "\n" not in str(caught.value)
    for phrase in phrases:
        assert phrase in str(caught.value)


def test_the_option_block_is_that_of_the_weights():
    given = QuantConfig(rules=(Rule(weight="int4"),), algorithm="awq_lite")
    assert with_option(given, "block", "64") == with_block(given, 64)
