# SPDX-License-Identifier: Apache-2.0
"""Logits of tiny random models by transformers: `python tests/golden/make_models.py` writes
models.npz beside this file.

Made with torch 2.13.0 (CPU) and transformers 5.14.1. Weights are drawn by name, so both sides can
make them.
"""

import zlib
from pathlib import Path

import ml_dtypes
import numpy as np

BATCH, LENGTH, VOCAB = 2, 24, 40
FIXTURE = Path(__file__).with_name("models.npz")

_SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8,
}

CASES = {
    "llama_biases": _SMALL
    | {
        "model_type": "llama",
        "head_dim": 16,
        "attention_bias": True,
        "mlp_bias": True,
        "rms_norm_eps": 1e-2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
    },
    "llama_llama3_old_layout": _SMALL
    | {
        "model_type": "llama",
        "num_key_value_heads": 1,
        "head_dim": 12,
        "rope_theta": 50.0,
        "rope_scaling": _LLAMA3,
    },
    "llama_linear_tied": _SMALL
    | {
        "model_type": "llama",
        "num_key_value_heads": 4,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0},
    },
    "llama_dynamic_old_layout": _SMALL
    | {
        "model_type": "llama",
        "max_position_embeddings": 10,
        "rope_theta": 100.0,
        "rope_scaling": {"type": "dynamic", "factor": 2.0},
    },
    "llama_12_layers": _SMALL | {"model_type": "llama", "hidden_size": 16, "num_hidden_layers": 12},
    "mistral_window": _SMALL | {"model_type": "mistral", "head_dim": 6, "sliding_window": 5},
    "mistral_full": _SMALL | {"model_type": "mistral", "sliding_window": None},
    "qwen2_window_from_1": _SMALL
    | {
        "model_type": "qwen2",
        "tie_word_embeddings": True,
        "use_sliding_window": True,
        "sliding_window": 6,
        "max_window_layers": 1,
    },
    "qwen2_window_off": _SMALL | {"model_type": "qwen2", "sliding_window": 6},
    "qwen3_layer_types": _SMALL
    | {
        "model_type": "qwen3",
        "head_dim": 14,
        "attention_bias": True,
        "use_sliding_window": True,
        "sliding_window": 4,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "gemma": _SMALL
    | {
        "model_type": "gemma",
        "hidden_size": 24,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "tie_word_embeddings": True,
        "hidden_act": "gelu_pytorch_tanh",
    },
}
PADDING = (7, 0)  # left padding of the two rows in the padded run of every case


def weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The float32 tensor called `name`: values of bfloat16, so that both precisions run the same
    model.
    """
    drawn = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape, np.float32)
    centre = 1.0 if len(shape) == 1 and name.endswith("norm.weight") else 0.0
    std = 0.2 if len(shape) == 1 else 1.5 / np.sqrt(shape[-1])
    # rounded twice, as releases of ml_dtypes before 0.7 round numbers of float64
    return (centre + std * drawn).astype(np.float32).astype(ml_dtypes.bfloat16).astype(np.float32)


def token_ids() -> np.ndarray:
    return np.random.default_rng(0).integers(0, VOCAB, (BATCH, LENGTH))


def padding_mask() -> np.ndarray:
    return np.arange(LENGTH)[None] >= np.array(PADDING)[:, None]


def peer_model(config: dict, dtype: str):
    """The transformers model of `config` with the drawn weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    # Not `.to(bfloat16)`, which would round the rotary frequencies as no loaded checkpoint does.
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(**config), dtype=getattr(torch, dtype)
    ).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(weight(name, tuple(parameter.shape))))
    return model


def peer_logits(config: dict, dtype: str, padded: bool = False) -> np.ndarray:
    """Float32 logits by transformers; padded rows count positions from their first token."""
    import torch

    more = {}
    if padded:
        mask = padding_mask()
        positions = np.where(mask, mask.cumsum(1) - 1, 1)
        more = {"attention_mask": torch.from_numpy(mask.astype(np.int64))}
        more["position_ids"] = torch.from_numpy(positions)
    with torch.no_grad():
        logits = peer_model(config, dtype)(torch.from_numpy(token_ids()), **more).logits
    return logits.float().numpy()


def main() -> None:
    arrays = {}
    for case, config in CASES.items():
        arrays[f"{case}|float32"] = peer_logits(config, "float32")
        bf16 = peer_logits(config, "bfloat16").astype(ml_dtypes.bfloat16)
        arrays[f"{case}|bfloat16"] = bf16.view(np.uint16)
        names = peer_model(config, "float32").state_dict()
        arrays[f"{case}|names"] = np.array(list(names))
    padded = peer_logits(CASES["qwen2_window_from_1"], "float32", padded=True)
    arrays["qwen2_window_from_1|padded"] = padded
    np.savez_compressed(FIXTURE, **arrays)
    print(FIXTURE, FIXTURE.stat().st_size)


if __name__ == "__main__":
    main()
