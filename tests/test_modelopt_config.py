# SPDX-License-Identifier: Apache-2.0
"""ModelOpt's dictionaries: those it names are our recipes; any other becomes what its quantizers
become.

`simulate` is what ModelOpt does, slowly: quantizers by name, changed entry by entry.
"""

import copy
import fnmatch
import json
from typing import Any

import pytest
from golden.make_modelopt_configs import configs
from hypothesis import given
from hypothesis import strategies as st

import jqx
from jqx import InputError, QuantConfig
from jqx.config import Choice, resolve
from jqx.globs import without_ending
from jqx.modelopt_config import from_modelopt, update_quant_cfg_with_kv_cache_quant
from jqx.recipes import CONSTANTS, KV_ALIASES, constant, with_kv
from jqx.selection import config_of

STORED = configs()
BLOCK, MOE, MAMBA = "model.layers.0", "model.layers.1.block_sparse_moe", "backbone.layers.2.mixer"
LINEARS = (
    *(f"{BLOCK}.self_attn.{letter}_proj" for letter in "qkvo"),
    *(f"{BLOCK}.mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj", "gate")),
    *(f"{BLOCK}.mlp.experts.7.{name}_proj" for name in ("gate", "up", "down")),
    f"{BLOCK}.mlp.shared_expert_gate",
    *(f"{MOE}.experts.3.w{n}" for n in (1, 2, 3)),
    f"{MOE}.gate",
    *(f"{MAMBA}.{name}" for name in ("in_proj", "out_proj", "up_proj", "down_proj", "conv1d")),
    f"{MAMBA}.fc1_latent_proj",
    f"{MAMBA}.experts.0.up_proj",
    "model.layers.3.linear_attn.in_proj_a",
    "visual.blocks.0.mlp.fc1",
    "multi_modal_projector.linear",
    "mtp.fc",
    "proj_out.0",
    "lm_head",
    "output",
    "model.router",
)
EMBEDDINGS, ATTENTIONS = ("model.embed_tokens", "lm_head"), (f"{BLOCK}.self_attn", "visual.attn")
PATHS = (
    *((path, "linear") for path in LINEARS),
    *((path, "embedding") for path in EMBEDDINGS),
    *((path, "attention") for path in ATTENTIONS),
)
FP8, NVFP4 = {"num_bits": (4, 3), "axis": None}, {"num_bits": (2, 1)}
NVFP4 = {**NVFP4, "block_sizes": {-1: 16, "type": "dynamic", "scale_bits": (4, 3)}}
OFF = {"quantizer_name": "*", "enable": False}


def said(config: QuantConfig, path: str, kind: str) -> Choice:
    """What is chosen, without what there is none of in modules of this kind."""
    found = resolve(config, path if kind == "attention" else f"{path}.weight", kind)
    if kind == "attention":
        return Choice(kv=found.kv)
    return Choice(weight=found.weight, input=found.input, output=found.output)


def translated(*entries: dict[str, Any], algorithm: Any = "max") -> QuantConfig:
    return from_modelopt({"quant_cfg": list(entries), "algorithm": algorithm})


# --- those with names


@pytest.mark.parametrize("name", sorted(CONSTANTS))
def test_a_dictionary_of_modelopt_is_the_recipe_of_its_name(name: str):
    found, row = from_modelopt(STORED[name]), CONSTANTS[name]
    steps = [(step.method, dict(step.params)) for step in row.steps]
    assert [(step.method, dict(step.params)) for step in found.steps] == steps
    left_in = name == "NVFP4_FP8_MHA_CONFIG"  # the one that leaves nothing out
    for path, kind in PATHS:
        if left_in and (kind == "embedding" or said(row, path, kind) == Choice()):
            continue
        assert said(found, path, kind) == said(row, path, kind), (path, kind)


def test_every_dictionary_of_modelopt_has_a_recipe():
    casts = {"fp8_cast", "nvfp4_cast"}
    assert set(STORED) - casts == {*CONSTANTS, *KV_ALIASES, "NVFP4_KV_ROTATE_CFG"}


def test_the_one_that_leaves_nothing_out():
    found = from_modelopt(STORED["NVFP4_FP8_MHA_CONFIG"])
    assert said(found, "lm_head", "linear") == Choice(weight="nvfp4", input="nvfp4")
    assert said(found, "model.embed_tokens", "embedding") == Choice(weight="nvfp4")


@pytest.mark.parametrize(
    ("name", "kv"), [*KV_ALIASES.items(), ("fp8_cast", "fp8_cast"), ("nvfp4_cast", "nvfp4_cast")]
)
def test_keys_and_values_are_appended(name: str, kv: str):
    before = copy.deepcopy(STORED["NVFP4_DEFAULT_CFG"])
    for entries in (STORED[name], STORED[name]["quant_cfg"]):
        both = update_quant_cfg_with_kv_cache_quant(STORED["NVFP4_DEFAULT_CFG"], entries)
        assert both["algorithm"] == "max"
        expected = with_kv(CONSTANTS["NVFP4_DEFAULT_CFG"], kv)
        for path, kind in PATHS:
            assert said(from_modelopt(both), path, kind) == said(expected, path, kind)
    assert before == STORED["NVFP4_DEFAULT_CFG"]
    alone = from_modelopt(STORED[name])
    assert said(alone, "lm_head", "linear") == Choice(weight="int8", input="int8")
    assert said(alone, "model.embed_tokens", "embedding") == Choice(weight="int8_tensor")
    assert said(alone, ATTENTIONS[0], "attention") == Choice(kv=kv)
    only = from_modelopt(update_quant_cfg_with_kv_cache_quant({}, STORED[name]))
    assert said(only, "lm_head", "linear") == Choice()
    assert said(only, ATTENTIONS[0], "attention") == Choice(kv=kv)


def test_rotations_are_refused():
    with pytest.raises(InputError, match="q_bmm_quantizer.*rotations.*Hadamard.*NVFP4_KV_CFG"):
        from_modelopt(STORED["NVFP4_KV_ROTATE_CFG"])
    calm = {"quantizer_name": "*weight_quantizer", "cfg": {**FP8, "rotate": {"enable": False}}}
    assert said(translated(OFF, calm), "a", "linear") == Choice(weight="fp8")


def test_the_constants_are_attributes():
    from jqx import FP8_DEFAULT_CFG, FP8_KV_CFG

    assert FP8_DEFAULT_CFG is jqx.RECIPES["fp8"].config
    assert said(FP8_KV_CFG, ATTENTIONS[0], "attention") == Choice(kv="fp8")
    assert said(FP8_KV_CFG, "lm_head", "linear") == Choice()
    for name in (*CONSTANTS, *KV_ALIASES):
        assert name in dir(jqx)
        assert isinstance(getattr(jqx, name), QuantConfig)
    assert with_kv(jqx.RECIPES["nvfp4_fp8_mha"].config, "fp8") == jqx.NVFP4_FP8_MHA_CONFIG
    with pytest.raises(AttributeError, match="rotations"):
        constant("NVFP4_KV_ROTATE_CFG")
    assert not hasattr(jqx, "NVFP5_DEFAULT_CFG")


def test_a_function_takes_a_dictionary():
    assert config_of(STORED["FP8_DEFAULT_CFG"]) == from_modelopt(STORED["FP8_DEFAULT_CFG"])
    with pytest.raises(InputError, match="'maximum'; did you mean max"):
        config_of({**STORED["FP8_DEFAULT_CFG"], "algorithm": "maximum"})


# --- globs


NAMES = st.text(alphabet="ab.", max_size=4)
TOKENS = ["a", "b", ".", "*", "?", "[ab]", "[!a]", "**"]
GLOBS = st.lists(st.sampled_from(TOKENS), max_size=6).map("".join)


@given(glob=GLOBS, ending=st.text(alphabet="ab.", max_size=4), name=NAMES)
def test_a_glob_without_its_ending(glob: str, ending: str, name: str):
    left = without_ending(glob, ending)
    assert any(fnmatch.fnmatchcase(name, each) for each in left) == fnmatch.fnmatchcase(
        name + ending, glob
    )
    assert len(set(left)) == len(left)
    assert not any(f"{each}*" in left for each in left)  # which would match as well


# --- any other


ATTRIBUTES = {
    "fp8": FP8,
    "nvfp4": NVFP4,
    "nvfp4_b32": {**NVFP4, "block_sizes": {**NVFP4["block_sizes"], -1: 32}},
    "int8": {"num_bits": 8, "axis": 0},
    "int8_tensor": {"num_bits": 8},
    "int4_b64": {"num_bits": 4, "block_sizes": {-1: 64}},
    "int4_fp8": [{"num_bits": 4, "block_sizes": {-1: 128, "type": "static"}}, FP8],
    "fp8_cast": {**FP8, "use_constant_amax": True},
}
AS_INPUT = {"fp8": "fp8", "nvfp4": "nvfp4", "int8_tensor": "int8"}
AS_KV = {"fp8": "fp8", "nvfp4": "nvfp4", "fp8_cast": "fp8_cast"}
OF_WEIGHTS = [name for name in ATTRIBUTES if name != "fp8_cast"]

WHERE = (
    "*",
    "*mlp*",
    "*.up_proj.",
    "*up_proj.*",
    "model.*",
    "lm_head*",
    "*.[01].*",
    "*.mlp.",
    "?m_*",
)
MIDDLES = (
    "*mlp*",
    "*lm_head*",
    "*.up_proj.*",
    "*.mlp.*",
    "*embed*",
    "*self_attn.*",
    "*",
)
MODULES = {
    "model.layers.0.mlp": "linear",
    "model.layers.0.mlp.up_proj": "linear",
    "model.layers.1.mlp.up_proj.inner": "linear",
    "lm_head": "linear",
    "up_proj": "linear",
    "model.embed_tokens": "embedding",
    "model.mlp.embed": "embedding",
    "model.layers.0.self_attn": "attention",
    "model.layers.1.self_attn.inner": "attention",
}


@st.composite
def entry(draw) -> dict[str, Any]:
    """An entry; those with attributes name the quantizers they are for."""
    if draw(st.booleans()):
        glob = draw(st.sampled_from((*MIDDLES, "*quantizer", "*weight_quantizer", "*[kv]_bmm_*")))
        found: dict[str, Any] = {"quantizer_name": glob, "enable": draw(st.booleans())}
    else:
        name, formats = draw(
            st.sampled_from(
                (
                    ("weight_quantizer", OF_WEIGHTS),
                    ("input_quantizer", list(AS_INPUT)),
                    ("*input_quantizer", list(AS_INPUT)),
                    ("output_quantizer", list(AS_INPUT)),
                    ("[kv]_bmm_quantizer", list(AS_KV)),
                    ("?_bmm_quantizer", list(AS_KV)),
                )
            )
        )
        cfg = copy.deepcopy(ATTRIBUTES[draw(st.sampled_from(formats))])
        found = {"quantizer_name": draw(st.sampled_from(WHERE)) + name, "cfg": cfg}
        if draw(st.booleans()):
            found["enable"] = draw(st.booleans())
    if draw(st.integers(0, 4)) == 0:
        parents = ["nn.Linear", "nn.Embedding", "nn.BatchNorm1d"]
        found["parent_class"] = draw(st.sampled_from(parents))
    return found


CLASSES = {"nn.Linear": "linear", "nn.Embedding": "embedding"}
QUANTIZERS = {
    "linear": ("weight", "input", "output"),
    "embedding": ("weight", "input", "output"),
    "attention": ("k_bmm", "v_bmm"),
}


def simulate(entries: list[dict[str, Any]]) -> dict[str, Choice]:
    """What ModelOpt's quantizers are after `entries`, by module."""
    state = {}
    for module, kind in MODULES.items():
        for name in QUANTIZERS[kind]:
            first = "int8" if (name, kind) == ("weight", "linear") else "int8_tensor"
            state[module, name] = [ATTRIBUTES[first], name != "output"]
            if kind == "attention":  # the INT8 they begin with is not stored here
                state[module, name] = [None, True]
    for each in entries:
        wanted = each.get("parent_class")
        for (module, name), held in state.items():
            full = f"{module}.{name}_quantizer"
            if wanted and CLASSES.get(wanted) != MODULES[module]:
                continue
            if fnmatch.fnmatchcase(full, each["quantizer_name"]):
                if "cfg" in each:
                    held[0] = each["cfg"]
                held[1] = each.get("enable", True)
    return {module: told(module, state) for module in MODULES}


def told(module: str, state: dict[tuple[str, str], list[Any]]) -> Choice:
    kind, names = MODULES[module], {}
    for name in QUANTIZERS[kind]:
        attributes, on = state[module, name]
        found = [key for key, value in ATTRIBUTES.items() if value == attributes]
        names[name] = found[0] if on and found else None
    if kind == "attention":
        assert names["k_bmm"] == names["v_bmm"]
        return Choice(kv=names["k_bmm"])
    inputs = None if kind == "embedding" else AS_INPUT.get(names["input"])
    weight = names["weight"]
    if (weight, inputs) == ("nvfp4_b32", "fp8"):
        weight = "nvfp4_b32_fp8"
    return Choice(weight=weight, input=inputs, output=AS_INPUT.get(names["output"]))


@given(entries=st.lists(entry(), max_size=6), off=st.booleans())
def test_any_entries_become_what_the_quantizers_become(entries: list[dict[str, Any]], off: bool):
    given = [OFF, *entries] if off else entries
    found, text = translated(*given), json.loads(json.dumps(given))
    expected = simulate(given)
    for module, kind in MODULES.items():
        assert said(found, module, kind) == expected[module], module
    assert translated(*text) == found  # JSON makes text of keys and lists of tuples


def test_everything_is_int8_until_an_entry_says_otherwise():
    found = translated({"quantizer_name": "*weight_quantizer", "cfg": FP8})
    assert said(found, "lm_head", "linear") == Choice(weight="fp8", input="int8")
    assert said(found, "model.embed_tokens", "embedding") == Choice(weight="fp8")
    found = translated()
    assert said(found, "lm_head", "linear") == Choice(weight="int8", input="int8")
    assert said(found, "model.embed_tokens", "embedding") == Choice(weight="int8_tensor")


def test_on_brings_back_what_was_off():
    weights = {"quantizer_name": "*weight_quantizer", "cfg": FP8}
    up = {"quantizer_name": "*up_proj*", "enable": True}
    found = translated(weights, OFF, up)
    assert said(found, "a.up_proj", "linear") == Choice(weight="fp8", input="int8", output="int8")
    assert said(found, "a.down_proj", "linear") == Choice()
    later = {"quantizer_name": "*up_proj*weight_quantizer", "cfg": NVFP4, "enable": False}
    found = translated(weights, later, OFF, up)
    assert said(found, "a.up_proj", "linear").weight == "nvfp4"


def test_rules_read_like_the_entries():
    found = translated(OFF, {"quantizer_name": "*mlp*weight_quantizer", "cfg": FP8})
    assert [rule.path_glob for rule in found.rules] == ["*mlp*"]
    found = translated(
        {"quantizer_name": "*weight_quantizer", "cfg": FP8},
        {"quantizer_name": "*.up_proj.weight_quantizer", "cfg": NVFP4},
        {"quantizer_name": "*mlp.gate.*", "enable": False},
    )
    assert [rule.path_glob for rule in found.rules[-3:-1]] == ["=*.up_proj", "*mlp.gate.*"]
    assert all(rule.optional for rule in found.rules)
