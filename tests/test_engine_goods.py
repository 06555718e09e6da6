# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that look odd, and that engines load: they answer so."""

from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import pytest
from checkpoints import write
from damage import arrays, change
from planted import DOWN
from planted_said import grouped, left_out, twice
from served import HF_QUANT, awq, configured, duplicate, gptq, make_all, saying

from jqx_interop.engines import verify
from jqx_interop.engines.accepts import find_accept
from jqx_interop.engines.known import read_known


def loads(verdicts):
    return {v.engine: v.loads for v in verdicts}


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> dict[str, Path]:
    return make_all(tmp_path_factory.mktemp("served"))


@pytest.mark.parametrize("names", [["visual"], ["block_sparse_moe.gate"], [], None])
def test_a_head_of_awq_need_not_be_listed(tmp_path, names):
    found = verify(awq(tmp_path / "model", modules_to_not_convert=names), ["vllm"])
    assert found.good
    assert found.verdicts[0].loads


def test_what_is_plain_in_awq_without_a_list_is_left_alone_by_vllm(good, tmp_path):
    folder = duplicate(good["awq"], tmp_path)
    left_out(folder, DOWN, (64, 128))
    assert loads(verify(folder).verdicts) == {
        **{"vllm": True, "sglang": None, "trtllm": False},
        **{"tpu-vllm": None, "transformers": None},
    }


def test_towers_of_images_need_not_be_listed(good, tmp_path):
    folder = duplicate(good["moe"], tmp_path)
    tower = "vision_tower.encoder.layers.0.self_attn.q_proj.weight"
    write(folder, arrays(folder) | {tower: np.ones((8, 8), np.float16)})
    found = verify(folder, ["vllm"])
    assert found.good
    told = {problem.rule: problem.text for problem in found.warnings}
    assert "vision_tower" in told["unlisted"]


def test_faults_that_engines_load_are_told_and_keep_none_from_loading(good, tmp_path):
    for base, damage, rule in (
        ("nvfp4", saying(ignore=["lm_head"]), "descriptions-agree"),
        ("ct-int4", grouped(targets=["Linear", "model.layers.9.mlp.up_proj"]), "described"),
        ("ct-int4", saying(format="foo"), "format-name"),
        ("sharded", twice, "duplicate"),
    ):
        folder = duplicate(good[base], tmp_path / rule)
        damage(folder)
        found = verify(folder, ["vllm"])
        assert [fault.rule for fault in found.faults] == [rule]
        assert found.verdicts[0].loads
    folder = duplicate(good["nvfp4"], tmp_path)
    change(f"{DOWN}.input_scale", None)(folder)
    answers = loads(verify(folder, ["vllm", "trtllm"]).verdicts)
    assert answers == {"vllm": False, "trtllm": True}


def test_what_a_known_model_may_have_beside_its_parameters(good, tmp_path):
    zeros = {f"{DOWN}.bias": np.zeros(64, np.float16)}
    buffers = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(16, np.float32)}
    for base, more in (("nvfp4", buffers), ("qwen-moe", buffers), ("gptq", zeros)):
        folder = duplicate(good[base], tmp_path / base)
        write(folder, arrays(folder) | more)
        assert not verify(folder, ["vllm"]).faults


def test_zero_biases_of_gptq_are_dropped(tmp_path):
    folder = gptq(tmp_path / "model")
    found = arrays(folder)
    for i in range(2):
        found[f"model.layers.{i}.post_attention_layernorm.weight"] = np.ones(64, np.float16)
    found |= {"model.norm.weight": np.ones(64, np.float16)}
    sizes = {"vocab_size": 96, "num_attention_heads": 2, "num_hidden_layers": 2}
    sizes |= {"hidden_size": 64, "intermediate_size": 128, "model_type": "llama"}
    configured(**sizes)(folder)
    for value, faults in ((0, []), (1, ["unknown-tensor"])):
        write(folder, found | {f"{DOWN}.bias": np.full(64, value, np.float16)})
        assert [fault.rule for fault in verify(folder, ["vllm"]).faults] == faults


def test_layers_that_predict_further_tokens():
    sizes = dict.fromkeys(("hidden_size", "intermediate_size", "vocab_size"), 64)
    sizes |= dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "kv_lora_rank"), 8)
    sizes |= {"v_head_dim": 8, "moe_intermediate_size": 32, "n_routed_experts": 2}
    sizes |= {"num_attention_heads": 2, "num_hidden_layers": 3, "model_type": "deepseek_v3"}
    sizes |= {"num_experts_per_tok": 1, "n_group": 1, "topk_group": 1}
    known = read_known(sizes, ())
    assert "model.layers.2.mlp.gate.e_score_correction_bias" in known.parameters
    assert any(fnmatch("model.layers.3.eh_proj.weight", glob) for glob in known.optional)
    assert not any(fnmatch("model.layers.33.eh_proj.weight", glob) for glob in known.optional)
    assert not read_known(sizes, ["model.layers.0.mlp.experts.gate_up_proj"]).parameters


def test_a_description_that_says_nothing_is_told_once(good, tmp_path):
    for base, damage in (
        ("ct-nvfp4", saying(config_groups={})),
        ("mixed", lambda f: (saying(quantized_layers={})(f), (f / HF_QUANT).unlink())),
    ):
        folder = duplicate(good[base], tmp_path / base)
        damage(folder)
        found = verify(folder)
        assert {fault.rule for fault in found.faults} == {"description"}
        texts = [p.text for verdict in found.verdicts for p in verdict.problems]
        assert not any("a mixture of :" in text for text in texts)


def test_names_of_tensors_reach_no_terminal_as_they_are(good, tmp_path):
    folder = duplicate(good["nvfp4"], tmp_path)
    write(folder, arrays(folder) | {"model.x\x1b[31m\n.bias": np.ones(3, np.float16)})
    texts = [fault.text for fault in verify(folder, ["vllm"]).faults]
    assert texts == ["model.x\\x1b[31m\\n.bias is no tensor of the model"]


def test_what_is_not_known_of_a_scheme_that_an_engine_refuses_by_name():
    assert find_accept("vllm", "modelopt", "FOO").loads is False
    assert find_accept("sglang", "gptq", "W3A16").loads is None
