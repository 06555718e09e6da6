# SPDX-License-Identifier: Apache-2.0
"""The Llama lineage: pre-norm decoders with separate q, k, v, rotary positions and a gated MLP."""

from dataclasses import replace
from types import MappingProxyType

from .family import Family

LLAMA = Family(model_type="llama", mlp_bias="mlp_bias", folds_rows=True)

MISTRAL = replace(
    LLAMA,
    model_type="mistral",
    qkv_bias=False,
    out_bias=False,
    mlp_bias=False,
    windows="every_layer",
    folds_rows=False,
    defaults=MappingProxyType({"sliding_window": 4096, "max_position_embeddings": 131072}),
)

QWEN2 = replace(
    LLAMA,
    model_type="qwen2",
    qkv_bias=True,
    out_bias=False,
    mlp_bias=False,
    windows="from_max_window_layers",
    folds_rows=False,
    defaults=MappingProxyType({"sliding_window": 4096, "max_position_embeddings": 32768}),
)

QWEN3 = replace(
    QWEN2,
    model_type="qwen3",
    qk_norm=True,
    folds_rows=True,
    qkv_bias="attention_bias",
    out_bias="attention_bias",
    defaults=MappingProxyType({**QWEN2.defaults, "head_dim": 128}),
)

# Early files say "gelu" although the weights were trained with the tanh form.
GEMMA = replace(
    LLAMA,
    model_type="gemma",
    norm="rms_plus_one",
    mlp_bias=False,
    embedding_scale="sqrt_hidden",
    folds_rows=False,
    keys=MappingProxyType({"hidden_act": ("hidden_activation", "hidden_act")}),
    activations=MappingProxyType({"gelu": "gelu_pytorch_tanh"}),
    defaults=MappingProxyType(
        {
            "hidden_act": "gelu_pytorch_tanh",
            "head_dim": 256,
            "tie_word_embeddings": True,
            "max_position_embeddings": 8192,
        }
    ),
)

ROWS = (LLAMA, MISTRAL, QWEN2, QWEN3, GEMMA)
