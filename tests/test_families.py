# SPDX-License-Identifier: Apache-2.0
"""Reading config.json: both layouts, defaults, and refusals that name what is wrong."""

import pytest

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
        ({"model_type": "lama"}, ["unknown model_type 'lama'", "nearest: llama", "known: gemma, "]),
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
        "architectures": ["X"],
        "torch_dtype": "bfloat16",
        "attention_dropout": 0.0,
        "quantization_config": None,
        "rope_scaling": None,
        "pretraining_tp": 1,
    }
    assert read(model_type=model_type, **bookkeeping) == read(model_type=model_type)
