# SPDX-License-Identifier: Apache-2.0
"""A few logits of a tiny random model of every family by transformers:
`python tests/golden/make_families.py` writes families.npz beside this file.

Made with torch 2.13.0 (CPU) and transformers 5.14.1. Weights are drawn by the names they have in
checkpoints, so both sides can make them. The configurations turn on what is odd in a family.
"""

import zlib
from pathlib import Path

import numpy as np

BATCH, LENGTH, VOCAB = 2, 24, 40
PLACES = (2, 9, 17, 23)
"""The positions whose logits are kept."""

FIXTURE = Path(__file__).with_name("families.npz")

SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
_GPT = {
    "vocab_size": VOCAB,
    "n_embd": 32,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 32,
    "layer_norm_epsilon": 1e-3,
}
_YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "beta_fast": 4.0,
    "beta_slow": 0.5,
    "original_max_position_embeddings": 8,
}
_FALCON = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "layer_norm_epsilon": 1e-3,
}
_LONG = {
    "type": "longrope",
    "short_factor": [1.0, 1.1, 1.3, 1.9],
    "long_factor": [1.0, 2.0, 5.0, 11.0],
}
_WINDOWED = {"num_hidden_layers": 6, "sliding_window": 5, "head_dim": 12}

CASES: dict[str, dict] = {
    "llama_yarn": SMALL | {"model_type": "llama", "rope_theta": 100.0, "rope_scaling": _YARN},
    "llama_yarn_mscale": SMALL
    | {
        "model_type": "llama",
        "rope_parameters": _YARN
        | {"rope_theta": 100.0, "mscale": 0.7, "mscale_all_dim": 0.4, "truncate": False},
    },
    "granite": SMALL
    | {
        "model_type": "granite",
        "attention_bias": True,
        "mlp_bias": True,
        "attention_multiplier": 0.3,
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.4,
        "logits_scaling": 5.0,
    },
    "smollm3": SMALL
    | {
        "model_type": "smollm3",
        "num_hidden_layers": 4,
        "tie_word_embeddings": True,
        "attention_bias": True,
        "rope_theta": 50.0,
        "pad_token_id": 0,
    },
    "smollm3_listed": SMALL
    | {
        "model_type": "smollm3",
        "no_rope_layers": [0, 1],
        "use_sliding_window": True,
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention"],
        "mlp_bias": True,
        "pad_token_id": 0,
    },
    "gemma2": SMALL
    | _WINDOWED
    | {
        "model_type": "gemma2",
        "tie_word_embeddings": True,
        "attention_bias": True,
        "query_pre_attn_scalar": 20,
        "attn_logit_softcapping": 1.5,
        "final_logit_softcapping": 2.0,
    },
    "gemma3": SMALL
    | _WINDOWED
    | {
        "model_type": "gemma3_text",
        "tie_word_embeddings": True,
        "query_pre_attn_scalar": 20,
        "rope_theta": 300.0,
        "rope_local_base_freq": 20.0,
        "rope_scaling": {"rope_type": "linear", "factor": 3.0},
    },
    "gemma3_nested": SMALL
    | _WINDOWED
    | {
        "model_type": "gemma3_text",
        "num_hidden_layers": 2,
        "layer_types": ["full_attention", "sliding_attention"],
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "rope_theta": 300.0, "factor": 2.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 20.0},
        },
    },
    "gpt2": _GPT | {"model_type": "gpt2"},
    "gpt2_scaled_by_layer": _GPT
    | {
        "model_type": "gpt2",
        "n_inner": 40,
        "scale_attn_by_inverse_layer_idx": True,
        "activation_function": "gelu",
        "tie_word_embeddings": False,
    },
    "gptj": _GPT | {"model_type": "gptj", "rotary_dim": 4, "n_inner": 40},
    "gpt_neox": SMALL
    | {"model_type": "gpt_neox", "rotary_pct": 0.5, "rotary_emb_base": 100, "layer_norm_eps": 1e-3},
    "gpt_neox_serial": SMALL
    | {
        "model_type": "gpt_neox",
        "use_parallel_residual": False,
        "attention_bias": False,
        "hidden_act": "gelu_fast",
        "tie_word_embeddings": True,
    },
    "opt": SMALL | {"model_type": "opt", "ffn_dim": 40, "tie_word_embeddings": True},
    "opt_post": SMALL
    | {
        "model_type": "opt",
        "ffn_dim": 40,
        "do_layer_norm_before": False,
        "word_embed_proj_dim": 20,
        "enable_bias": False,
        "tie_word_embeddings": False,
    },
    "bloom": {"model_type": "bloom", "vocab_size": VOCAB, "hidden_size": 32}
    | {"n_layer": 2, "n_head": 4, "layer_norm_epsilon": 1e-3},
    "bloom_6_heads": {"model_type": "bloom", "vocab_size": VOCAB, "hidden_size": 24}
    | {"n_layer": 2, "n_head": 6, "apply_residual_connection_post_layernorm": True},
    "mpt": {"model_type": "mpt", "vocab_size": VOCAB, "d_model": 32, "n_layers": 2}
    | {"n_heads": 4, "max_seq_len": 48, "attn_config": {"clip_qkv": 0.8}},
    "mpt_6_heads": {"model_type": "mpt", "vocab_size": VOCAB, "d_model": 24, "n_layers": 2}
    | {"n_heads": 6, "max_seq_len": 48, "attn_config": {"softmax_scale": 0.3}},
    "falcon_7b": _FALCON | {"model_type": "falcon", "rope_theta": 50.0},
    "falcon_40b": _FALCON
    | {
        "model_type": "falcon",
        "new_decoder_architecture": True,
        "num_kv_heads": 2,
        "bias": True,
        "ffn_hidden_size": 56,
    },
    "falcon_11b": _FALCON
    | {
        "model_type": "falcon",
        "new_decoder_architecture": True,
        "num_kv_heads": 2,
        "num_ln_in_parallel_attn": 1,
        "tie_word_embeddings": False,
    },
    "falcon_alibi": _FALCON
    | {
        "model_type": "falcon",
        "hidden_size": 48,
        "num_attention_heads": 12,  # half of whose slopes are no bfloat16 numbers
        "alibi": True,
        "multi_query": False,
        "parallel_attn": False,
        "bias": True,
    },
    "falcon_multi_query_alibi": _FALCON
    | {"model_type": "falcon", "alibi": True, "activation": "gelu_new"},
    "phi": SMALL | {"model_type": "phi", "partial_rotary_factor": 0.5},
    "phi_qk_norm": SMALL
    | {"model_type": "phi", "qk_layernorm": True, "layer_norm_eps": 1e-3, "rope_theta": 40.0},
    "phi3": SMALL
    | {
        "model_type": "phi3",
        "partial_rotary_factor": 0.5,
        "sliding_window": 7,
        "pad_token_id": 0,
    },
    "phi3_long": SMALL
    | {
        "model_type": "phi3",
        "original_max_position_embeddings": 16,
        "rope_scaling": _LONG,
        "pad_token_id": 0,
        "tie_word_embeddings": True,
    },
    "phi3_short": SMALL
    | {
        "model_type": "phi3",
        "original_max_position_embeddings": 32,
        "rope_scaling": _LONG,
        "pad_token_id": 0,
    },
    "nemotron": SMALL
    | {
        "model_type": "nemotron",
        "head_dim": 12,
        "attention_bias": True,
        "mlp_bias": True,
        "norm_eps": 1e-3,
        "rope_theta": 40.0,
    },
    "glm": SMALL | {"model_type": "glm", "head_dim": 16, "rope_theta": 40.0, "pad_token_id": 0},
    "glm4": SMALL | {"model_type": "glm4", "head_dim": 16, "rope_theta": 40.0, "pad_token_id": 0},
    "exaone4": SMALL
    | {
        "model_type": "exaone4",
        "num_hidden_layers": 4,
        "sliding_window": 5,
        "sliding_window_pattern": 4,
    },
    "exaone4_full": SMALL
    | {
        "model_type": "exaone4",
        "sliding_window": None,
        "layer_types": ["full_attention"] * 2,
        "tie_word_embeddings": True,
    },
    "olmo2": SMALL | {"model_type": "olmo2", "attention_bias": True, "rms_norm_eps": 1e-2},
    "cohere": SMALL
    | {"model_type": "cohere", "logit_scale": 0.3, "tie_word_embeddings": True, "pad_token_id": 0},
    "cohere_qk_norm": SMALL
    | {
        "model_type": "cohere",
        "use_qk_norm": True,
        "attention_bias": True,
        "rope_theta": 40.0,
        "layer_norm_eps": 1e-3,
        "pad_token_id": 0,
        "tie_word_embeddings": True,
    },
    "cohere2": SMALL
    | {
        "model_type": "cohere2",
        "num_hidden_layers": 4,
        "sliding_window": 5,
        "logit_scale": 0.3,
        "head_dim": 16,
        "pad_token_id": 0,
        "tie_word_embeddings": True,
    },
    "stablelm": SMALL | {"model_type": "stablelm", "use_qkv_bias": True},
    "stablelm_parallel": SMALL
    | {
        "model_type": "stablelm",
        "use_parallel_residual": True,
        "qk_layernorm": True,
        "partial_rotary_factor": 0.5,
        "rope_theta": 40.0,
    },
    "starcoder2": SMALL | {"model_type": "starcoder2", "sliding_window": 6, "norm_epsilon": 1e-3},
    "starcoder2_unbiased": SMALL
    | {"model_type": "starcoder2", "use_bias": False, "tie_word_embeddings": True},
}
"""Name -> config.json, beside those of make_models.py."""

_IMPLEMENTATION = {"falcon": "sdpa"}
"""model_type -> the attention that is right: the other one adds alibi twice."""

_IN_FILES = {"gpt_neox": ("lm_head.", "embed_out.")}
"""model_type -> what names begin with in memory, and in files."""


def weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The float32 tensor called `name` in checkpoints."""
    drawn = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape, np.float32)
    gain = name.endswith(".weight") and (len(shape) == 1 or "norm." in name)
    std = 0.2 if len(shape) == 1 or gain else 1.5 / np.sqrt(shape[-1])
    return (float(gain) + std * drawn).astype(np.float32)


def token_ids() -> np.ndarray:
    return np.random.default_rng(0).integers(0, VOCAB, (BATCH, LENGTH))


def saved_config(config: dict) -> str:
    """The config.json that transformers writes for `config`."""
    from transformers import AutoConfig

    return AutoConfig.for_model(**config).to_json_string()


def peer_model(config: dict):
    """The transformers model of `config` with the drawn weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    kind = config["model_type"]
    given = AutoConfig.for_model(**config)
    how = _IMPLEMENTATION.get(kind, "eager")
    model = AutoModelForCausalLM.from_config(
        given, dtype=torch.float32, attn_implementation=how
    ).eval()
    here, there = _IN_FILES.get(kind, ("", ""))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            known = there + name.removeprefix(here) if here and name.startswith(here) else name
            parameter.copy_(torch.from_numpy(weight(known, tuple(parameter.shape))))
    return model


def peer_logits(config: dict) -> np.ndarray:
    """Float32 logits by transformers, [batch, length, vocab]."""
    import torch

    with torch.no_grad():
        return peer_model(config)(torch.from_numpy(token_ids())).logits.float().numpy()


def main() -> None:
    arrays = {case: peer_logits(config)[:, PLACES] for case, config in CASES.items()}
    arrays |= {f"{case}|config": np.array(saved_config(c)) for case, c in CASES.items()}
    np.savez_compressed(FIXTURE, **arrays)
    print(FIXTURE, FIXTURE.stat().st_size)


if __name__ == "__main__":
    main()
