# SPDX-License-Identifier: Apache-2.0
"""The Llama lineage: pre-norm decoders with separate q, k, v, rotary positions and a gated MLP."""

from dataclasses import replace

from jqx.models import Attention, BlockKind, ModelSpec

from .common import without_rope
from .family import Family, frozen
from .reader import Reader

LLAMA = Family(
    model_type="llama",
    title="Llama 2, 3, 3.1, 3.2, 3.3; CodeLlama",
    mlp_bias="mlp_bias",
    folds_rows=True,
)

MISTRAL = replace(
    LLAMA,
    model_type="mistral",
    title="Mistral 7B, Nemo, Small; Codestral",
    qkv_bias=False,
    out_bias=False,
    mlp_bias=False,
    windows="every_layer",
    folds_rows=False,
    defaults=frozen(sliding_window=4096, max_position_embeddings=131072),
)

QWEN2 = replace(
    LLAMA,
    model_type="qwen2",
    title="Qwen2, Qwen2.5, QwQ",
    qkv_bias=True,
    out_bias=False,
    mlp_bias=False,
    windows="from_max_window_layers",
    folds_rows=False,
    defaults=frozen(sliding_window=4096, max_position_embeddings=32768),
)

QWEN3 = replace(
    QWEN2,
    model_type="qwen3",
    title="Qwen3 (dense)",
    qk_norm="head",
    folds_rows=True,
    qkv_bias="attention_bias",
    out_bias="attention_bias",
    defaults=frozen(**QWEN2.defaults, head_dim=128),
)


def _granite_attention(read: Reader, row: Attention) -> Attention:
    return replace(row, scale=float(read("attention_multiplier", 1.0)))


def _granite_layer(read: Reader, kind: BlockKind, i: int) -> BlockKind:
    return replace(kind, residual_scale=float(read("residual_multiplier", 1.0)))


def _granite_model(read: Reader, spec: ModelSpec) -> ModelSpec:
    return replace(
        spec,
        embedding_scale=float(read("embedding_multiplier", 1.0)),
        rounded_scale=False,
        logit_scale=1.0 / read("logits_scaling", 1.0),
    )


GRANITE = replace(
    LLAMA,
    model_type="granite",
    title="Granite 3",
    of_attention=_granite_attention,
    of_layer=_granite_layer,
    of_model=_granite_model,
    folds_rows=False,
)


def _smollm3_layer(read: Reader, kind: BlockKind, i: int) -> BlockKind:
    """A 0 in the list says that the layer does not rotate, for all that it is called."""
    rotates = read.layers("no_rope_layers", (0, 1))
    every = read("no_rope_layer_interval", 4)
    kept = (i + 1) % every != 0 if rotates is None else rotates[i]
    return kind if kept else without_rope(kind)


SMOLLM3 = replace(
    LLAMA,
    model_type="smollm3",
    title="SmolLM3",
    windows="where_used",
    of_layer=_smollm3_layer,
    folds_rows=False,
    defaults=frozen(rope_theta=2000000.0, tie_word_embeddings=True, max_position_embeddings=32768),
)

ROWS = (LLAMA, MISTRAL, QWEN2, QWEN3, GRANITE, SMOLLM3)
