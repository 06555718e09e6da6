# SPDX-License-Identifier: Apache-2.0
"""What config.json of published mixtures of experts says, as far as it counts, and how many
parameters their authors tell of.
"""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from jqx.models import Attention, Experts, param_shapes
from jqx_interop.families import spec_from_config

_YARN = {"type": "yarn", "beta_fast": 32, "beta_slow": 1, "original_max_position_embeddings": 4096}
_PHI_FACTORS = [1.0 + i / 64 for i in range(64)]
_DEEPSEEK = {
    "hidden_act": "silu", "ep_size": 1, "moe_layer_freq": 1, "seq_aux": True, "pretraining_tp": 1,
    "attention_bias": False, "tie_word_embeddings": False, "rms_norm_eps": 1e-06,
    "aux_loss_alpha": 0.001, "rope_theta": 10000, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
    "v_head_dim": 128, "kv_lora_rank": 512, "initializer_range": 0.02,
}  # fmt: skip
CONFIGS = {
    "DeepSeek-V3": _DEEPSEEK | {
        "model_type": "deepseek_v3", "vocab_size": 129280, "hidden_size": 7168,
        "intermediate_size": 18432, "moe_intermediate_size": 2048, "num_hidden_layers": 61,
        "num_attention_heads": 128, "num_key_value_heads": 128, "n_shared_experts": 1,
        "n_routed_experts": 256, "num_experts_per_tok": 8, "first_k_dense_replace": 3,
        "q_lora_rank": 1536, "n_group": 8, "topk_group": 4, "topk_method": "noaux_tc",
        "scoring_func": "sigmoid", "norm_topk_prob": True, "routed_scaling_factor": 2.5,
        "num_nextn_predict_layers": 1, "max_position_embeddings": 163840,
        "rope_scaling": _YARN | {"factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0},
    },
    "Kimi-K2": _DEEPSEEK | {
        "model_type": "kimi_k2", "vocab_size": 163840, "hidden_size": 7168,
        "intermediate_size": 18432, "moe_intermediate_size": 2048, "num_hidden_layers": 61,
        "num_attention_heads": 64, "num_key_value_heads": 64, "n_shared_experts": 1,
        "n_routed_experts": 384, "num_experts_per_tok": 8, "first_k_dense_replace": 1,
        "q_lora_rank": 1536, "n_group": 1, "topk_group": 1, "topk_method": "noaux_tc",
        "scoring_func": "sigmoid", "norm_topk_prob": True, "routed_scaling_factor": 2.827,
        "num_nextn_predict_layers": 0, "max_position_embeddings": 131072, "rope_theta": 50000.0,
        "rope_scaling": _YARN | {"factor": 32.0, "mscale": 1.0, "mscale_all_dim": 1.0},
    },
    "DeepSeek-V2": _DEEPSEEK | {
        "model_type": "deepseek_v2", "vocab_size": 102400, "hidden_size": 5120,
        "intermediate_size": 12288, "moe_intermediate_size": 1536, "num_hidden_layers": 60,
        "num_attention_heads": 128, "num_key_value_heads": 128, "n_shared_experts": 2,
        "n_routed_experts": 160, "num_experts_per_tok": 6, "first_k_dense_replace": 1,
        "q_lora_rank": 1536, "n_group": 8, "topk_group": 3, "topk_method": "group_limited_greedy",
        "scoring_func": "softmax", "norm_topk_prob": False, "routed_scaling_factor": 16.0,
        "max_position_embeddings": 163840,
        "rope_scaling": _YARN | {"factor": 40, "mscale": 0.707, "mscale_all_dim": 0.707},
    },
    "DeepSeek-V2-Lite": _DEEPSEEK | {
        "model_type": "deepseek_v2", "vocab_size": 102400, "hidden_size": 2048,
        "intermediate_size": 10944, "moe_intermediate_size": 1408, "num_hidden_layers": 27,
        "num_attention_heads": 16, "num_key_value_heads": 16, "n_shared_experts": 2,
        "n_routed_experts": 64, "num_experts_per_tok": 6, "first_k_dense_replace": 1,
        "q_lora_rank": None, "n_group": 1, "topk_group": 1, "topk_method": "greedy",
        "scoring_func": "softmax", "norm_topk_prob": False, "routed_scaling_factor": 1.0,
        "max_position_embeddings": 163840,
        "rope_scaling": _YARN | {"factor": 40, "mscale": 0.707, "mscale_all_dim": 0.707},
    },
    "gpt-oss-20b": {
        "model_type": "gpt_oss", "vocab_size": 201088, "hidden_size": 2880,
        "intermediate_size": 2880, "num_hidden_layers": 24, "num_attention_heads": 64,
        "num_key_value_heads": 8, "head_dim": 64, "num_local_experts": 32, "experts_per_token": 4,
        "num_experts_per_tok": 4, "attention_bias": True, "swiglu_limit": 7.0,
        "sliding_window": 128, "layer_types": ["sliding_attention", "full_attention"] * 12,
        "initial_context_length": 4096, "max_position_embeddings": 131072, "rope_theta": 150000,
        "output_router_logits": False, "router_aux_loss_coef": 0.9, "tie_word_embeddings": False,
        "rope_scaling": _YARN | {"rope_type": "yarn", "factor": 32.0, "truncate": False},
    },
    "Phi-3.5-MoE": {
        "model_type": "phimoe", "vocab_size": 32064, "hidden_size": 4096,
        "intermediate_size": 6400, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "num_local_experts": 16, "num_experts_per_tok": 2,
        "attention_bias": True, "lm_head_bias": True, "hidden_dropout": 0.0,
        "input_jitter_noise": 0.01, "router_jitter_noise": 0.01, "sliding_window": 131072,
        "max_position_embeddings": 131072, "original_max_position_embeddings": 4096,
        "rope_theta": 10000.0, "rms_norm_eps": 1e-05, "tie_word_embeddings": False,
        "rope_scaling": {
            "type": "longrope", "long_factor": _PHI_FACTORS, "short_factor": _PHI_FACTORS,
            "long_mscale": 1.243163121016122, "short_mscale": 1.243163121016122,
            "original_max_position_embeddings": 4096,
        },
    },
    "DBRX": {
        "model_type": "dbrx", "vocab_size": 100352, "d_model": 6144, "n_heads": 48, "n_layers": 40,
        "max_seq_len": 32768, "emb_pdrop": 0.0, "resid_pdrop": 0.0, "tie_word_embeddings": False,
        "attn_config": {"clip_qkv": 8, "kv_n_heads": 8, "model_type": "", "rope_theta": 500000},
        "ffn_config": {
            "ffn_hidden_size": 10752, "model_type": "", "moe_jitter_eps": 0.01,
            "moe_loss_weight": 0.05, "moe_num_experts": 16, "moe_top_k": 4,
        },
    },
    "Llama-4-Scout": {
        "model_type": "llama4", "boi_token_index": 200080, "image_token_index": 200092,
        "vision_config": {"model_type": "llama4_vision_model", "hidden_size": 1408},
        "text_config": {
            "model_type": "llama4_text", "vocab_size": 202048, "hidden_size": 5120,
            "intermediate_size": 8192, "intermediate_size_mlp": 16384, "num_hidden_layers": 48,
            "num_attention_heads": 40, "num_key_value_heads": 8, "head_dim": 128,
            "num_local_experts": 16, "num_experts_per_tok": 1, "interleave_moe_layer_step": 1,
            "attention_bias": False, "attention_chunk_size": 8192, "attn_temperature_tuning": 4,
            "attn_scale": 0.1, "floor_scale": 8192, "for_llm_compressor": False,
            "no_rope_layers": [], "use_qk_norm": True, "rope_theta": 500000.0,
            "max_position_embeddings": 10485760, "rms_norm_eps": 1e-05,
            "router_jitter_noise": 0.0, "tie_word_embeddings": False,
            "rope_scaling": {
                "rope_type": "llama3", "factor": 16.0, "low_freq_factor": 1.0,
                "high_freq_factor": 1.0, "original_max_position_embeddings": 8192,
            },
        },
    },
    "Arctic": {
        "model_type": "arctic", "vocab_size": 32000, "hidden_size": 7168,
        "intermediate_size": 4864, "num_hidden_layers": 35, "num_attention_heads": 56,
        "num_key_value_heads": 8, "num_local_experts": 128, "num_experts_per_tok": 2,
        "moe_layer_frequency": 1, "moe_train_capacity_factor": 1, "moe_eval_capacity_factor": 1,
        "use_residual": True, "parallel_attn_mlp_res": True, "moe_token_dropping": False,
        "max_position_embeddings": 4096, "rope_theta": 10000, "sliding_window": None,
        "tie_word_embeddings": False,
    },
}  # fmt: skip
"""Model -> what its config.json says."""

BILLIONS = {
    "DeepSeek-V3": 671.0, "Kimi-K2": 1026, "DeepSeek-V2": 235.7, "DeepSeek-V2-Lite": 15.71,
    "gpt-oss-20b": 20.91, "Phi-3.5-MoE": 41.87, "DBRX": 131.6, "Llama-4-Scout": 107.8,
    "Arctic": 480,
}  # fmt: skip
"""Parameters, those of layers that predict further tokens and of what sees not counted."""


@pytest.mark.parametrize("name", CONFIGS)
def test_published_models_have_as_many_parameters_as_is_told(name):
    shapes = param_shapes(spec_from_config(CONFIGS[name]))
    count = sum(math.prod(shape) for shape in shapes.values())
    assert count / 1e9 == pytest.approx(BILLIONS[name], rel=4e-3)


@pytest.mark.parametrize("name", CONFIGS)
def test_angles_of_published_models_are_numbers(name):
    from jqx.models import FLOAT32
    from jqx.models.rope import turns

    ropes = {
        (kind.attention.rope, kind.attention.head_dim)
        for kind in spec_from_config(CONFIGS[name]).blocks
        if isinstance(kind.attention, Attention) and kind.attention.rope is not None
    }
    for rope, size in ropes:
        for a in turns(rope, size, jnp.array([[0, 5, 9000]], jnp.int32), FLOAT32):
            assert np.isfinite(np.asarray(a)).all()


def test_scales_of_scores_grow_with_the_context():
    def scale(name):
        return spec_from_config(CONFIGS[name]).blocks[0].attention.scale * 192**0.5

    assert scale("DeepSeek-V3") == pytest.approx(1.8739, rel=1e-4)
    assert scale("DeepSeek-V2") == pytest.approx(1.5896, rel=1e-4)


def test_layers_of_llama_4():
    blocks = spec_from_config(CONFIGS["Llama-4-Scout"]).blocks
    turning = [kind.attention.rope is not None for kind in blocks]
    assert turning == [(i + 1) % 4 != 0 for i in range(48)]
    assert all(
        (k.attention.chunk == 8192) == turns for k, turns in zip(blocks, turning, strict=True)
    )
    assert all(isinstance(kind.mlp, Experts) for kind in blocks)
    assert len(set(blocks)) == 2
