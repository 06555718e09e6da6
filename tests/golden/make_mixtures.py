# SPDX-License-Identifier: Apache-2.0
"""A few logits of a tiny random model of every family with experts by transformers:
`python tests/golden/make_mixtures.py` writes mixtures.npz beside this file.

Made with torch 2.13.0 (CPU) and transformers 5.14.1. Weights are drawn by the names they have in
checkpoints: transformers says them where it saves a model, and reads the model made of them. The
configurations turn on what is odd in a family.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from golden import make_families  # noqa: E402
from golden.make_families import PLACES, SMALL, token_ids  # noqa: E402

FIXTURE = Path(__file__).with_name("mixtures.npz")

_YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "beta_fast": 4.0,
    "beta_slow": 0.5,
    "original_max_position_embeddings": 8,
}
_LONG = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.1, 1.3, 1.9],
    "long_factor": [1.0, 2.0, 5.0, 11.0],
    "short_mscale": 1.2,
    "long_mscale": 1.4,
    "rope_theta": 10000.0,
}
_DEEPSEEK = SMALL | {
    "num_hidden_layers": 3,
    "num_key_value_heads": 4,
    "q_lora_rank": 20,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 10,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.7,
    "rope_theta": 100.0,
}
_LLAMA4 = SMALL | {
    "num_hidden_layers": 4,
    "head_dim": 12,
    "intermediate_size": 24,
    "intermediate_size_mlp": 48,
    "num_local_experts": 4,
    "num_experts_per_tok": 1,
    "attention_chunk_size": 7,
    "floor_scale": 5,
    "attn_scale": 0.4,
    "rms_norm_eps": 1e-3,
    "rope_theta": 50.0,
}
_GPT_OSS = SMALL | {
    "model_type": "gpt_oss",
    "head_dim": 12,
    "num_local_experts": 5,
    "num_experts_per_tok": 3,
    "sliding_window": 5,
}
_QWEN = SMALL | {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 24}

CASES: dict[str, dict] = {
    "mixtral": SMALL
    | {
        "model_type": "mixtral",
        "num_local_experts": 5,
        "num_experts_per_tok": 2,
        "rope_theta": 100.0,
        "router_jitter_noise": 0.3,
    },
    "mixtral_window": SMALL
    | {
        "model_type": "mixtral",
        "num_local_experts": 4,
        "num_experts_per_tok": 1,
        "sliding_window": 5,
        "head_dim": 12,
        "tie_word_embeddings": True,
    },
    "qwen3_moe": _QWEN
    | {
        "model_type": "qwen3_moe",
        "num_hidden_layers": 4,
        "head_dim": 12,
        "norm_topk_prob": True,
        "decoder_sparse_step": 2,
        "attention_bias": True,
    },
    "qwen3_moe_listed": _QWEN
    | {
        "model_type": "qwen3_moe",
        "num_hidden_layers": 3,
        "mlp_only_layers": [1],
        "tie_word_embeddings": True,
    },
    "qwen2_moe": _QWEN
    | {
        "model_type": "qwen2_moe",
        "num_hidden_layers": 3,
        "shared_expert_intermediate_size": 20,
        "mlp_only_layers": [0],
        "use_sliding_window": True,
        "sliding_window": 5,
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
    },
    "qwen2_moe_normed": _QWEN
    | {
        "model_type": "qwen2_moe",
        "shared_expert_intermediate_size": 40,
        "norm_topk_prob": True,
        "qkv_bias": False,
        "tie_word_embeddings": True,
    },
    "olmoe": SMALL
    | {
        "model_type": "olmoe",
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "clip_qkv": 0.8,
        "rms_norm_eps": 1e-3,
        "rope_theta": 50.0,
    },
    "olmoe_normed": SMALL
    | {
        "model_type": "olmoe",
        "num_experts": 4,
        "num_experts_per_tok": 3,
        "norm_topk_prob": True,
        "attention_bias": True,
    },
    "granitemoe": SMALL
    | {
        "model_type": "granitemoe",
        "num_local_experts": 5,
        "num_experts_per_tok": 2,
        "attention_multiplier": 0.3,
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.4,
        "logits_scaling": 5.0,
        "tie_word_embeddings": True,
    },
    "phimoe": SMALL
    | {
        "model_type": "phimoe",
        "num_local_experts": 5,
        "num_experts_per_tok": 2,
        "attention_bias": True,
        "lm_head_bias": True,
        "router_jitter_noise": 0.3,
        "rms_norm_eps": 1e-3,
        "rope_scaling": _LONG | {"original_max_position_embeddings": 16},
    },
    "phimoe_short": SMALL
    | {
        "model_type": "phimoe",
        "num_local_experts": 3,
        "num_experts_per_tok": 2,
        "sliding_window": 7,
        "rope_scaling": _LONG | {"original_max_position_embeddings": 32},
    },
    "deepseek_v2": _DEEPSEEK
    | {
        "model_type": "deepseek_v2",
        "topk_method": "group_limited_greedy",
        "n_group": 4,
        "topk_group": 2,
        "rms_norm_eps": 1e-3,
    },
    "deepseek_v2_lite": _DEEPSEEK | {"model_type": "deepseek_v2", "q_lora_rank": None},
    "deepseek_v3": _DEEPSEEK
    | {
        "model_type": "deepseek_v3",
        "n_group": 4,
        "topk_group": 2,
        "attention_bias": True,
        "num_nextn_predict_layers": 1,
        "rope_scaling": _YARN | {"mscale": 1.0, "mscale_all_dim": 0.7},
    },
    "deepseek_v3_halves": _DEEPSEEK
    | {
        "model_type": "deepseek_v3",
        "n_group": 1,
        "topk_group": 1,
        "q_lora_rank": None,
        "norm_topk_prob": False,
        "rope_interleave": False,
        "num_nextn_predict_layers": 0,
        "tie_word_embeddings": True,
    },
    "llama4_text": _LLAMA4
    | {
        "model_type": "llama4_text",
        "interleave_moe_layer_step": 2,
        "attention_bias": True,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8,
        },
    },
    "llama4_text_listed": _LLAMA4
    | {
        "model_type": "llama4_text",
        "num_experts_per_tok": 2,
        "moe_layers": [0, 1, 2],
        "no_rope_layers": [1, 0, 1, 0],
        "use_qk_norm": False,
        "attn_temperature_tuning": False,
    },
    "llama4": {
        "model_type": "llama4",
        "text_config": _LLAMA4 | {"model_type": "llama4_text"},
        "vision_config": {
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 8,
            "patch_size": 4,
            "projector_input_dim": 16,
            "projector_output_dim": 16,
            "vision_output_dim": 16,
        },
    },
    "gpt_oss": _GPT_OSS | {"rope_scaling": _YARN | {"truncate": False}, "num_hidden_layers": 3},
    "gpt_oss_listed": _GPT_OSS
    | {
        "layer_types": ["full_attention", "sliding_attention"],
        "attention_bias": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
        "tie_word_embeddings": True,
    },
}
"""Name -> config.json, beside those of make_families.py."""


def weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The float32 tensor called `name` in checkpoints. Corrections are small: all experts are
    chosen by some tokens.
    """
    if name.endswith("e_score_correction_bias"):
        return 0.1 * make_families.weight(name, shape)
    return make_families.weight(name.replace("norm_attn_norm.attn", "attn"), shape)


def _class_of(config: dict):
    """The transformers class of a model of `config`."""
    from transformers import AutoConfig, AutoModelForCausalLM, Llama4ForConditionalGeneration

    if config["model_type"] == "llama4":
        return Llama4ForConditionalGeneration
    return AutoModelForCausalLM._model_mapping[type(AutoConfig.for_model(**config))]


def save_drawn(config: dict, folder: Path) -> None:
    """The checkpoint of `config` in `folder`, with the names that transformers writes."""
    import torch
    from transformers import AutoConfig

    given = AutoConfig.for_model(**config)
    _class_of(config)._from_config(given, dtype=torch.float32).save_pretrained(folder)
    file = folder / "model.safetensors"
    shapes = {name: array.shape for name, array in load_file(file).items()}
    save_file({n: weight(n, s) for n, s in shapes.items()}, file, {"format": "pt"})


def peer_logits(config: dict) -> np.ndarray:
    """Float32 logits by transformers, [batch, length, vocab]."""
    import torch

    with tempfile.TemporaryDirectory() as folder:
        save_drawn(config, Path(folder))
        model, told = _class_of(config).from_pretrained(
            folder,
            dtype=torch.float32,
            attn_implementation="eager",
            experts_implementation="eager",
            output_loading_info=True,
        )
    wrong = {key: found for key, found in told.items() if found and key != "conversion_errors"}
    assert not wrong, wrong
    with torch.no_grad():
        return model.eval()(torch.from_numpy(token_ids())).logits.float().numpy()


def saved_config(config: dict) -> str:
    """The config.json that transformers writes for `config`."""
    return make_families.saved_config(config)


def main() -> None:
    arrays = {case: peer_logits(config)[:, PLACES] for case, config in CASES.items()}
    arrays |= {f"{case}|config": np.array(saved_config(c)) for case, c in CASES.items()}
    np.savez_compressed(FIXTURE, **arrays)
    print(FIXTURE, FIXTURE.stat().st_size)


if __name__ == "__main__":
    main()
