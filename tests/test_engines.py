# SPDX-License-Identifier: Apache-2.0
"""Which engines load what: the verdicts on exports of the reference tool, formats alone against
whole checkpoints, lists as each engine reads them, and descriptions that make no sense.
"""

import json
from pathlib import Path

import exports
import numpy as np
import pytest
from checkpoints import write
from damage import arrays
from exports import Export
from hypothesis import given, settings
from hypothesis import strategies as st
from served import CONFIG, HF_QUANT, INDEX, awq, duplicate, gptq, inline, make_all, moe, saved
from stored_trees import ROWS, model_of

import jqx_interop as ji
from jqx.config import Choice
from jqx.errors import InputError
from jqx.recipes import RECIPES
from jqx_interop.engine_table import recipe_choice
from jqx_interop.engines import ENGINES, engines_for, verify
from jqx_interop.engines.accepts import ACCEPTS, find_accept
from jqx_interop.engines.descriptions import read_said
from jqx_interop.engines.matching import matcher
from jqx_interop.engines.schemes import SCHEMES
from jqx_interop.stored import open_model


def loads(verdicts):
    return {v.engine: v.loads for v in verdicts}


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> dict[str, Path]:
    return make_all(tmp_path_factory.mktemp("served"))


# --- exports of the reference tool


NVFP4 = {
    *("nvfp4", "nvfp4_4o6", "nvfp4_awq_clip", "nvfp4_headroom", "nvfp4_kvfp8", "nvfp4_kvnvfp4"),
    *("nvfp4_local_hessian", "nvfp4_mlp_only", "nvfp4_mse_sweep", "nvfp4_omlp_only"),
    *("w4a16_nvfp4", "mixed_fp8_nvfp4"),
}
FP8 = {"fp8", "fp8_kvfp8", "fp8_kvfp8_cast", "fp8_mse"}
NONE = {
    *("int4_wo", "int4_awq_clip", "int4_gptq", "int8", "int8_mse", "int8_sq", "int8_sq_a05"),
    *("mxfp4", "mxfp4_mlp_wo", "nvfp4_svdquant", "nvfp4_mlp_wo", "fp8_kvfp8_affine"),
    "nvfp4_kvnvfp4_affine",
}
LOADED = {
    "vllm": {*FP8, *NVFP4, "fp8_pb_wo", "fp8_pc_pt", "mxfp8"},
    "sglang": {*FP8, *NVFP4, "nvfp4_awq", "nvfp4_awq_full"},
    "transformers": set(),
}
"""Engine -> what it loads of the shared exports; TensorRT-LLM loads all but `NONE`."""


def test_verdicts_on_the_shared_exports(shared):
    folders = sorted(p.parent for p in (shared / "golden").glob("*/golden.json"))
    assert len(folders) == 41
    LOADED["trtllm"] = {folder.name for folder in folders} - NONE
    for folder in folders:
        found = verify(folder)
        assert {fault.rule for fault in found.faults} <= {"tokenizer"}  # none was exported
        assert not found.warnings
        for verdict in found.verdicts:
            if verdict.engine in LOADED:
                assert verdict.loads == (folder.name in LOADED[verdict.engine]), verdict.line


def test_unequal_fp8_scales_are_told(shared):
    found = verify(shared / "golden" / "fp8", ["vllm", "sglang", "trtllm"])
    for verdict in found.verdicts:
        told = [p.text for p in verdict.warnings if p.rule == "fused-scales"]
        assert "gate_proj.weight_scale" in told[0] or "q_proj.weight_scale" in told[0]
        assert "rounded again with the largest" in told[0]


# --- formats alone, and whole checkpoints


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.key)
@pytest.mark.parametrize("target", ["modelopt", "compressed-tensors"])
def test_formats_alone_tell_what_the_checkpoint_will(tmp_path, row, target):
    if row.model != "llama":
        pytest.skip("other sizes of the same formats")
    folder = ji.save(model_of(row), tmp_path / "mo")
    if target != "modelopt":
        try:
            ji.export(folder, tmp_path / "ct", target)
        except InputError:
            pytest.skip("the layout cannot hold it")
        folder = tmp_path / "ct"
    source = open_model(folder)
    planned = engines_for(source.choices, target, source.spec.kv_cache)
    found = verify(folder)
    assert loads(planned) == loads(found.verdicts)
    assert {f.rule for f in found.faults} == {"tokenizer"}
    for before, after in zip(planned, found.verdicts, strict=True):
        if before.loads:
            assert before.chips == after.chips


def test_a_factor_of_inputs_satisfies_who_asks_for_it():
    for recipe, answer in (("int4_awq", True), ("int4_blockwise_weight_only", False)):
        choices = {"model.layers.0.mlp.down_proj": recipe_choice(RECIPES[recipe])}
        planned = loads(engines_for(choices, "modelopt"))
        assert planned["trtllm"] is answer
        assert planned["vllm"] is False


def test_what_has_no_row_is_not_known():
    row = find_accept("tpu-vllm", "modelopt", "W2A2")
    assert row.loads is None
    assert "was not read" in row.note


def test_every_scheme_has_a_row_for_every_engine():
    assert {(engine, *scheme) for engine in ENGINES for scheme in SCHEMES} <= set(ACCEPTS)


def test_every_row_says_where_it_is_from_and_every_no_says_why():
    for row in ACCEPTS.values():
        assert row.source
        assert row.loads is True or row.note
        assert row.native is None or row.least is None or row.native >= row.least


# --- checkpoints of others


def test_experts_are_counted_apart(good):
    for name in ("moe", "mixtral"):
        found = verify(good[name], ["vllm"])
        shares = {row.kind: row.share for row in found.coverage}
        assert shares["experts"] == shares["attention"] == 1
        assert shares["head"] == shares["embedding"] == 0
        assert sum(r.parameters for r in found.coverage[:-1]) == found.coverage[-1].parameters


def test_experts_in_a_scheme_that_only_linears_have():
    choice = Choice(weight="fp8_channel", input="fp8_token")
    dense, expert = ("model.layers.0.mlp.up_proj", "model.layers.0.mlp.experts.0.up_proj")
    answers = [loads(engines_for({path: choice}, "modelopt")) for path in (dense, expert)]
    assert [found["vllm"] for found in answers] == [True, False]
    assert [found["trtllm"] for found in answers] == [True, None]
    verdict = engines_for({expert: choice}, "modelopt", engines=["trtllm"])[0]
    assert "not known: FP8_PER_CHANNEL_PER_TOKEN in experts" in verdict.line


@pytest.mark.parametrize("make", [awq, gptq])
def test_integers_of_other_packages(tmp_path, make):
    found = verify(make(tmp_path / "model"))
    assert found.good is False  # TensorRT-LLM reads neither
    assert not found.faults
    answers = loads(found.verdicts)
    assert answers["vllm"] and answers["sglang"] and answers["transformers"]  # noqa: PT018
    assert not answers["trtllm"]
    assert found.schemes == {"W4A16": 14}


def test_what_is_not_quantized_loads_everywhere(tmp_path):
    folder = exports.write_base(tmp_path / "llama", "llama")
    (folder / "tokenizer.json").write_text("{}")
    found = verify(folder)
    assert found.good
    assert found.layout == "unquantized"
    assert found.coverage[-1].quantized == 0


def test_a_method_of_which_nothing_is_known(tmp_path):
    folder = exports.write_base(tmp_path / "llama", "llama")
    config = json.loads((folder / CONFIG).read_text())
    config["quantization_config"] = {"quant_method": "hqq", "bits": 4}
    (folder / CONFIG).write_text(json.dumps(config))
    found = verify(folder, ["vllm"])
    assert found.verdicts[0].loads is None
    assert "hqq" in found.verdicts[0].problems[0].text


def test_stacked_experts_that_are_quantized_are_not_judged(tmp_path):
    folder = moe(tmp_path / "moe")
    stack = np.ones((4, 8, 8), np.int8)
    write(folder, arrays(folder) | {"model.layers.0.mlp.experts.gate_up_proj": stack})
    verdict = verify(folder, ["vllm"]).verdicts[0]
    assert "stacked-experts" in {p.rule for p in verdict.problems}


def test_a_tied_head_must_be_listed(tmp_path):
    ji.save(model_of(Export(model="qwen2", recipe="w4a16_nvfp4")), tmp_path / "model")
    assert verify(tmp_path / "model", ["vllm"]).verdicts[0].loads
    for name, part, key in (
        (CONFIG, "quantization_config", "ignore"),
        (HF_QUANT, "quantization", "exclude_modules"),
    ):
        said = json.loads((tmp_path / "model" / name).read_text())
        said[part][key].remove("lm_head")
        (tmp_path / "model" / name).write_text(json.dumps(said))
    verdict = verify(tmp_path / "model", ["vllm"]).verdicts[0]
    assert {p.rule for p in verdict.problems} == {"tied-head"}


def test_a_mixture_without_nvfp4_is_another_method_to_sglang(shared):
    found = verify(shared / "golden" / "mixed_fp8_w4a8", ["sglang"])
    assert "mixture" in {p.rule for p in found.verdicts[0].problems}


@pytest.mark.parametrize("name", ["FP8", "INT8", "NVFP4_AFFINE"])
def test_names_of_the_cache(tmp_path, name):
    folder = saved(tmp_path / "model", "nvfp4")
    inline(folder, lambda found: found.update(kv_cache_scheme=name))
    file = json.loads((folder / HF_QUANT).read_text())
    file["quantization"]["kv_cache_quant_algo"] = name
    (folder / HF_QUANT).write_text(json.dumps(file))
    answers = loads(verify(folder).verdicts)
    assert answers["vllm"] is (name == "FP8")
    assert answers["trtllm"] is (name != "NVFP4_AFFINE")


def test_a_name_that_is_no_module_is_told(good, tmp_path):
    folder = duplicate(good["ct-nvfp4"], tmp_path)
    inline(folder, lambda found: found["ignore"].append("model.layers.7.mlp.up_proj"))
    found = verify(folder, ["vllm"])
    assert found.good
    assert [p.rule for p in found.warnings] == ["ignored-module"]


# --- lists of modules


QKV = tuple(f"model.layers.1.self_attn.{name}_proj" for name in "qkv")
FUSED = "model.layers.1.self_attn.qkv_proj"
LISTS = (
    ("modelopt", None, ["model.layers.1*"], True),
    ("modelopt", None, ["model.layers.10*"], False),
    ("modelopt", "trtllm", [QKV[0]], True),
    ("modelopt", "vllm", [QKV[0]], None),
    ("modelopt", "vllm", list(QKV), True),
    ("modelopt", "vllm", ["layers.1"], True),
    ("modelopt", "vllm", ["model.layers.1.self_attn*"], True),
    ("modelopt", "vllm", ["model.layers.1.self_attn.q_proj*"], False),
    ("modelopt", "sglang", ["model.layers.1.self_attn*"], True),
    ("modelopt", "sglang", ["self_attn"], True),
    ("modelopt", "sglang", ["attn"], False),
    ("modelopt", "sglang", [QKV[0]], None),
    ("compressed-tensors", "vllm", ["re:.*self_attn.*"], True),
    ("compressed-tensors", "vllm", ["re:.*q_proj"], None),
    ("compressed-tensors", "vllm", ["self_attn.q_proj"], False),
    ("compressed-tensors", "sglang", [f"self_attn.{name}_proj" for name in "qkv"], True),
    ("compressed-tensors", None, ["model.layers.1"], True),
    ("compressed-tensors", "vllm", ["model.layers.1"], False),
    ("awq", "vllm", ["self_attn"], True),
    ("gptq", "vllm", ["self_attn"], False),
    ("modelopt", "vllm", [], False),
    ("compressed-tensors", "vllm", ["re:("], False),
)


@pytest.mark.parametrize(("layout", "engine", "names", "ignored"), LISTS, ids=str)
def test_lists_are_read_as_each_engine_does(layout, engine, names, ignored):
    assert matcher(layout, engine, names)(FUSED, QKV) is ignored


def test_layer_10_is_not_layer_1_but_to_vllm():
    name = "model.layers.10.mlp.down_proj"
    assert matcher("modelopt", "vllm", ["model.layers.1"])(name, (name,))
    assert not matcher("modelopt", "sglang", ["model.layers.1"])(name, (name,))
    assert not matcher("modelopt", None, ["model.layers.1*"])("model.layers.2", ("model.layers.2",))


# --- what makes no sense


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=6,
)


def places(value, at=()):
    """Every place in a JSON value."""
    yield at
    items = dict(enumerate(value)) if isinstance(value, list) else value
    for key, inner in items.items() if isinstance(items, dict) else ():
        yield from places(inner, (*at, key))


def replaced(value, at, new):
    if not at:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[at[0]] = replaced(value[at[0]], at[1:], new)
    return copy


@pytest.mark.parametrize("name", ["mixed", "ct-nvfp4", "awq", "gptq", "fp8"])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_no_description_makes_it_fail(good, name, data):
    folder = good[name]
    names = [n for n in (CONFIG, HF_QUANT) if (folder / n).exists()]
    file = folder / data.draw(st.sampled_from(names))
    before = file.read_text()
    content = json.loads(before)
    at = data.draw(st.sampled_from([p for p in places(content) if p]))
    try:
        file.write_text(json.dumps(replaced(content, at, data.draw(JSON))))
        json.dumps(verify(folder).to_json())
    finally:
        file.write_text(before)


@settings(max_examples=200, deadline=None)
@given(JSON, JSON)
def test_nothing_said_makes_it_fail(inline, file):
    said = read_said(inline, file)
    assert said.grouper()("model.layers.0.mlp.up_proj") is None or said.groups or said.layers


@settings(max_examples=60, deadline=None)
@given(JSON)
def test_no_index_makes_it_fail(good, value):
    file = good["sharded"] / INDEX
    before = file.read_text()
    try:
        file.write_text(json.dumps({"weight_map": value}))
        verify(good["sharded"], ["vllm"])
        file.write_text(json.dumps(value))
        verify(good["sharded"], ["vllm"])
    finally:
        file.write_text(before)


def test_what_is_no_checkpoint(tmp_path):
    for folder in (tmp_path, tmp_path / "none", tmp_path / "a file"):
        (tmp_path / "a file").write_text("")
        with pytest.raises(InputError):
            verify(folder)
    with pytest.raises(InputError, match="unknown engine 'vlm'; did you mean vllm"):
        verify(tmp_path, ["vlm"])
