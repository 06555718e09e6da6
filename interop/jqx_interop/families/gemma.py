# SPDX-License-Identifier: Apache-2.0
"""The Gemma lineage: norms that multiply by weight + 1, embeddings scaled by their width; from the
second generation on norms after attention and MLP too, and windows.
"""

from dataclasses import replace

from jqx.models import Attention, BlockKind, ModelSpec, Names, Rope

from .common import embedding_by_width, scale_by_scalar
from .family import Family, frozen
from .reader import Reader
from .rope import rope_from_config

# Early files say "gelu" although the weights were trained with the tanh form.
GEMMA = Family(
    model_type="gemma",
    title="Gemma",
    norm="rms_plus_one",
    of_model=embedding_by_width,
    keys=frozen(hidden_act=("hidden_activation", "hidden_act")),
    activations=frozen(gelu="gelu_pytorch_tanh"),
    defaults=frozen(
        hidden_act="gelu_pytorch_tanh",
        head_dim=256,
        tie_word_embeddings=True,
        max_position_embeddings=8192,
    ),
)


def _capped(read: Reader, row: Attention) -> Attention:
    return replace(scale_by_scalar(read, row), cap=read("attn_logit_softcapping"))


def _capped_model(read: Reader, spec: ModelSpec) -> ModelSpec:
    return replace(embedding_by_width(read, spec), logit_cap=read("final_logit_softcapping"))


GEMMA2 = replace(
    GEMMA,
    model_type="gemma2",
    title="Gemma 2",
    layout="sandwich",
    names=Names(mlp_norm="pre_feedforward_layernorm"),
    windows="by_pattern",
    activations=frozen(),
    of_attention=_capped,
    of_model=_capped_model,
    defaults=frozen(
        **GEMMA.defaults,
        sliding_window=4096,
        sliding_window_pattern=2,
        query_pre_attn_scalar=256,
        attn_logit_softcapping=50.0,
        final_logit_softcapping=30.0,
    ),
)


def _local_rope(read: Reader, kind: BlockKind, i: int) -> BlockKind:
    """Layers with a window turn by other frequencies, which are never scaled."""
    row = kind.attention
    assert isinstance(row, Attention)
    if row.window is None:
        return kind
    nested = read.config.get("rope_parameters") or {}
    old = Rope(theta=float(read("rope_local_base_freq", 10000.0)))
    new = rope_from_config(read, "sliding_attention") if "sliding_attention" in nested else old
    return replace(kind, attention=replace(row, rope=new))


GEMMA3 = replace(
    GEMMA2,
    model_type="gemma3_text",
    title="Gemma 3 (text)",
    qk_norm="head",
    of_layer=_local_rope,
    keys=frozen(
        **GEMMA2.keys,
        sliding_window_pattern=("sliding_window_pattern", "_sliding_window_pattern"),
    ),
    defaults=frozen(
        **{**GEMMA.defaults, "max_position_embeddings": 131072},
        rope_theta=1000000.0,
        sliding_window=4096,
        sliding_window_pattern=6,
        query_pre_attn_scalar=256,
    ),
)

ROWS = (GEMMA, GEMMA2, GEMMA3)
