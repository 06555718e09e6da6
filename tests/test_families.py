# SPDX-License-Identifier: Apache-2.0
"""Reading config.json: both layouts, defaults, and refusals that name what is wrong."""

import copy

import pytest
from tiny_families import CONFIGS, ONE_EACH

from jqx import InputError
from jqx.models import Rope
from jqx_interop.families import FAMILIES, spec_from_config

BASE = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def read(**changes):
    return spec_from_config(BASE | changes)


def attention(**changes):
    return read(**changes).blocks[0].attention


def windows(**changes):
    return [kind.attention.window for kind in read(**changes).blocks]


def test_defaults_of_a_bare_config():
    spec = read()
    row = spec.blocks[0].attention
    assert (row.kv_heads, row.head_dim, row.window, row.scale) == (4, 8, None, 8**-0.5)
    assert row.rope == Rope(theta=10000.0)
    assert (spec.tied, spec.final_norm.eps, spec.blocks[0].mlp.activation) == (False, 1e-6, "silu")
    assert len(set(spec.blocks)) == 1
    assert hash(spec) == hash(read())


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"rope_theta": 5e5}, {"rope_type": "default", "rope_theta": 5e5}),
        ({"rope_theta": 5e5, "rope_scaling": None}, {"rope_theta": 5e5}),
        (
            {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2}},
            {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5},
        ),
        (
            {"rope_scaling": {"type": "dynamic", "rope_type": "dynamic", "factor": 2.0}},
            {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
        ),
        (
            {
                "rope_scaling": LLAMA3
                | {"rope_type": "llama3", "original_max_position_embeddings": 99}
            },
            LLAMA3 | {"rope_type": "llama3", "original_max_position_embeddings": 99},
        ),
    ],
)
def test_both_layouts_of_rotary_parameters_mean_the_same(old, new):
    assert attention(**old).rope == attention(rope_parameters=new).rope


def test_scalings_know_the_length_they_were_trained_for():
    llama3 = LLAMA3 | {"rope_type": "llama3"}
    assert attention(rope_scaling=llama3, max_position_embeddings=77).rope.trained_length == 77
    given = llama3 | {"original_max_position_embeddings": 55}
    assert attention(rope_scaling=given, max_position_embeddings=77).rope.trained_length == 55
    dynamic = {"rope_type": "dynamic", "factor": 2.0}
    assert attention(rope_parameters=dynamic).rope.trained_length == 2048


def test_windows_follow_each_lineage():
    assert windows(model_type="mistral") == [4096] * 3
    assert windows(model_type="mistral", sliding_window=None) == [None] * 3
    qwen = {"model_type": "qwen2", "sliding_window": 5, "max_window_layers": 2}
    assert windows(**qwen) == [None] * 3
    assert windows(**qwen, use_sliding_window=True) == [None, None, 5]
    types = ["sliding_attention", "full_attention", "sliding_attention"]
    assert windows(**qwen, use_sliding_window=True, layer_types=types) == [5, None, 5]
    assert windows(layer_types=["full_attention"] * 3) == [None] * 3


def test_biases_and_norms_follow_each_lineage():
    def flags(**changes):
        kind = read(**changes).blocks[0]
        return kind.attention.qkv_bias, kind.attention.out_bias, kind.mlp.bias

    assert flags() == (False, False, False)
    assert flags(attention_bias=True, mlp_bias=True) == (True, True, True)
    assert flags(model_type="qwen2") == (True, False, False)
    assert flags(model_type="qwen3", attention_bias=True) == (True, True, False)
    assert flags(model_type="mistral") == (False, False, False)
    assert attention(model_type="qwen3").qk_norm is not None
    assert attention(model_type="qwen3").head_dim == 128
    assert attention(model_type="qwen3", head_dim=None).head_dim == 8


def test_gemma_is_tied_scaled_and_uses_the_gelu_it_was_trained_with():
    def gelu(**changes):
        return read(model_type="gemma", **changes).blocks[0].mlp.activation

    spec = read(model_type="gemma")
    assert (spec.tied, spec.final_norm.kind, spec.embedding_scale) == (
        True,
        "rms_plus_one",
        32**0.5,
    )
    assert gelu() == gelu(hidden_act="gelu") == "gelu_pytorch_tanh"
    assert gelu(hidden_act="gelu", hidden_activation="silu") == "silu"
    assert gelu(hidden_act="silu", hidden_activation=None) == "silu"
    assert read(hidden_act="gelu").blocks[0].mlp.activation == "gelu"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"model_type": "lama"},
            ["unknown model_type 'lama'", "nearest: llama", "known: arctic, "],
        ),
        ({"model_type": "zzz"}, ["unknown model_type 'zzz'; known: "]),
        ({"model_type": None}, ["no model_type"]),
        ({"hidden_size": None, "vocab_size": None}, ["lacks vocab_size, hidden_size"]),
        ({"hidden_size": "32"}, ["hidden_size = '32'"]),
        ({"num_attention_heads": 0}, ["num_attention_heads = 0"]),
        ({"num_key_value_heads": 3}, ["num_attention_heads = 4", "num_key_value_heads = 3"]),
        ({"hidden_size": 33}, ["hidden_size = 33", "head_dim"]),
        ({"hidden_act": "mish"}, ["'mish'", "silu"]),
        ({"rope_scaling": {"type": "ntk", "factor": 4.0}}, ["rope_type 'ntk'", "llama3"]),
        ({"rope_parameters": {"rope_type": "linear"}}, ["linear", "lacks factor"]),
        ({"rope_parameters": {"rope_theta": 1e4, "beta_fast": 32}}, ["beta_fast = 32"]),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, ["0.5"]),
        ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor = 0.5"]),
        ({"quantization_config": {"quant_method": "fp8"}}, ["quantization_config", "fp8"]),
        ({"attn_logit_softcapping": 50.0}, ["attn_logit_softcapping = 50.0"]),
        ({"sliding_window": 4}, ["sliding_window = 4", "'llama'"]),
        ({"layer_types": ["sliding_attention"] * 3}, ["layer_types"]),
        ({"model_type": "qwen2", "attention_bias": True}, ["attention_bias = True", "'qwen2'"]),
        ({"model_type": "qwen2", "layer_types": ["full_attention"]}, ["1 entries for 3 layers"]),
        ({"model_type": "qwen3", "layer_types": ["linear_attention"] * 3}, ["linear_attention"]),
        ({"model_type": "qwen2", "layer_types": ["sliding_attention"] * 3}, ["use_sliding_window"]),
        (
            {"model_type": "gemma", "use_bidirectional_attention": True},
            ["use_bidirectional_attention"],
        ),
    ],
)
def test_what_is_not_understood_is_refused_by_name(changes, words):
    with pytest.raises(InputError) as raised:
        read(**changes)
    message = str(raised.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


@pytest.mark.parametrize("model_type", list(FAMILIES))
def test_keys_that_change_nothing_are_let_through(model_type):
    bookkeeping = {
        "torch_dtype": "bfloat16",
        "attention_dropout": 0.0,
        "quantization_config": None,
        "rope_scaling": None,
        "pretraining_tp": 1,
    }
    config = CONFIGS[ONE_EACH[model_type]]
    assert spec_from_config(bookkeeping | config) == spec_from_config(config)


DEEPSEEK = ("deepseek_v2", "deepseek_v3", "kimi_k2")
UNREAD = {
    "attn_logit_softcapping": 50.0,
    "attention_multiplier": 0.5,
    "residual_multiplier": 0.5,
    "clip_qkv": 8.0,
    "qk_layernorm": True,
    "use_parallel_residual": True,
    "block_configs": [{}],
    "n_routed_experts": 8,
    "kv_lora_rank": 16,
    "add_cross_attention": True,
    "prefix_lm": True,
    "attention_chunk_size": 8,
    "quantization_config": {"quant_method": "fp8"},
}


READ = {
    "gemma2": {"attn_logit_softcapping"},
    "gemma3_text": {"attn_logit_softcapping"},
    "granite": {"attention_multiplier", "residual_multiplier"},
    "gpt_neox": {"use_parallel_residual"},
    "stablelm": {"use_parallel_residual", "qk_layernorm"},
    "phi": {"qk_layernorm"},
    "nemotron-nas": {"block_configs"},
    "olmoe": {"clip_qkv"},
    "granitemoe": {"attention_multiplier", "residual_multiplier"},
    **dict.fromkeys(DEEPSEEK, {"n_routed_experts", "kv_lora_rank"}),
    **dict.fromkeys(("llama4_text", "llama4"), {"attention_chunk_size"}),
}


def changed(case, changes):
    """The config of a case, changed where it says something of text."""
    config = CONFIGS[case]
    if "text_config" not in config or "quantization_config" in changes:
        return {**config, **changes}
    return {**config, "text_config": {**config["text_config"], **changes}}


@pytest.mark.parametrize("key", UNREAD)
@pytest.mark.parametrize("model_type", list(FAMILIES))
def test_what_other_families_have_is_refused_by_name(model_type, key):
    if key not in READ.get(model_type, ()):
        with pytest.raises(InputError, match=key):
            spec_from_config(changed(ONE_EACH[model_type], {key: UNREAD[key]}))


@pytest.mark.parametrize(
    ("case", "changes", "words"),
    [
        ("mpt", {"attn_config": {"alibi": False}}, ["alibi = False", "attn_config"]),
        ("mpt", {"attn_config": {"qk_ln": True}}, ["qk_ln = True"]),
        ("chatglm", {"rmsnorm": False}, ["rmsnorm = False", "'chatglm'"]),
        ("chatglm", {"ffn_hidden_size": None}, ["lacks ffn_hidden_size"]),
        ("gptj", {"rotary_dim": 5}, ["rotary"]),
        ("phi", {"partial_rotary_factor": 3.0}, ["partial_rotary_factor 3.0"]),
        ("smollm3", {"no_rope_layers": [1, 0]}, ["no_rope_layers has 2 entries for 4 layers"]),
        ("cohere2", {"layer_types": ["chunked_attention"] * 4}, ["chunked_attention"]),
        ("nemotron_nas", {"block_configs": [{}]}, ["block_configs is no list of 6 layers"]),
        ("phi3small", {"blocksparse_homo_head_pattern": True}, ["blocksparse_homo_head_pattern"]),
        ("phi3", {"rope_scaling": {"type": "longrope"}}, ["lacks short_factor, long_factor"]),
        ("phi3_long", {"partial_rotary_factor": 0.5}, ["4 numbers short_factor for 2 pairs"]),
        ("opt", {"layer_norm_elementwise_affine": False}, ["layer_norm_elementwise_affine"]),
        ("mixtral", {"num_experts_per_tok": 6}, ["'mixtral'", "6 experts of 5"]),
        ("mixtral", {"num_local_experts": 0}, ["num_local_experts = 0"]),
        ("mixtral", {"num_local_experts": 10**9}, ["1000000000 experts", "no model has more"]),
        ("mixtral", {"n_shared_experts": 2}, ["n_shared_experts = 2", "'mixtral'", "0"]),
        ("mixtral", {"norm_topk_prob": True}, ["norm_topk_prob = True", "'mixtral'"]),
        ("qwen3_moe", {"moe_intermediate_size": None}, ["lacks moe_intermediate_size"]),
        ("qwen3_moe", {"mlp_only_layers": 3}, ["mlp_only_layers 3, not a list of layers"]),
        ("qwen3_moe", {"decoder_sparse_step": 0}, ["decoder_sparse_step = 0"]),
        ("qwen3_moe", {"shared_expert_intermediate_size": 8}, ["shared_expert_intermediate_size"]),
        ("qwen2_moe", {"layer_types": None}, ["use_sliding_window", "without layer_types"]),
        ("qwen2_moe", {"shared_expert_intermediate_size": "x"}, ["= 'x'"]),
        ("phimoe", {"num_experts_per_tok": 3}, ["num_experts_per_tok = 3", "supported: 2"]),
        ("deepseek_v2", {"norm_topk_prob": True}, ["norm_topk_prob = True", "False"]),
        ("deepseek_v2", {"scoring_func": "sigmoid"}, ["scoring_func = 'sigmoid'", "softmax"]),
        ("deepseek_v3", {"scoring_func": "softmax"}, ["scoring_func = 'softmax'", "sigmoid"]),
        ("deepseek_v3", {"topk_method": "greedy"}, ["topk_method = 'greedy'", "noaux_tc"]),
        ("deepseek_v3", {"n_group": 3}, ["8 experts in 3 groups"]),
        ("deepseek_v3", {"topk_group": 1}, ["3 experts from 1 of 4 groups of 2"]),
        ("deepseek_v3", {"kv_lora_rank": None}, ["lacks kv_lora_rank"]),
        ("llama4_text", {"attention_chunk_size": 0}, ["attention_chunk_size 0, no positive"]),
        ("llama4_text", {"no_rope_layers": [1, 0]}, ["no_rope_layers has 2 entries for 4 layers"]),
        ("llama4", {"text_config": None}, ["'llama4' has no object text_config"]),
        ("dbrx", {"ffn_config": {"ffn_act_fn": {"name": "gelu"}}}, ["ffn_act_fn", "silu"]),
        ("dbrx", {"ffn_config": {"moe_top_k": 9}}, ["9 experts of 4"]),
        ("dbrx", {"attn_config": {"kv_n_heads": 0}}, ["attn_config kv_n_heads = 0"]),
        ("arctic", {"use_residual": False}, ["parallel_attn_mlp_res = True", "both or none"]),
    ],
)
def test_what_a_family_does_not_have_is_refused_by_name(case, changes, words):
    with pytest.raises(InputError) as raised:
        spec_from_config({**CONFIGS[case], **changes})
    assert all(word in str(raised.value) for word in words), str(raised.value)


def test_a_window_that_a_layer_of_nemotron_nas_asks_for_is_refused():
    blocks = copy.deepcopy(CONFIGS["nemotron_nas"]["block_configs"])
    blocks[3]["attention"]["window_length"] = 4
    with pytest.raises(InputError, match=r"block_configs\[3\].attention sets window_length = 4"):
        spec_from_config({**CONFIGS["nemotron_nas"], "block_configs": blocks})
