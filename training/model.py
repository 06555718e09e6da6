# SPDX-License-Identifier: Apache-2.0
"""The architecture of the bundled model. Every width is a multiple of 128, so every format
applies.
"""

import dataclasses
from typing import Any

from jqx.models import COMPUTES, Compute, ModelSpec
from jqx_interop.families import spec_from_config

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 3072,
    "max_position_embeddings": 256,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-05,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "initializer_range": 0.02,
    "dtype": "bfloat16",
}
"""Its config.json."""

SPEC: ModelSpec = spec_from_config(CONFIG)
ARITHMETIC: Compute = dataclasses.replace(COMPUTES["float32", "cpu"], attention="batched")
"""Batched attention has the cheaper gradient."""
