# SPDX-License-Identifier: Apache-2.0
"""Decoders whose norms lie elsewhere or are of another kind: OLMo 2 and EXAONE 4 behind attention
and MLP, Cohere and StableLM with layer norms, StarCoder 2 with those and a plain MLP.
"""

from dataclasses import replace

from jqx.models import Attention, BlockKind, ModelSpec, Names

from .common import without_rope
from .family import Family, frozen
from .reader import Reader
from .rope import rotated

OLMO2 = Family(
    model_type="olmo2",
    title="OLMo 2",
    defaults=frozen(rms_norm_eps=1e-5),
    norm="rms_once",
    layout="post",
    qk_norm="all",
)


def _full_without_rope(read: Reader, kind: BlockKind, i: int) -> BlockKind:
    """Layers that see everything do not rotate, where others have a window."""
    row = kind.attention
    assert isinstance(row, Attention)
    whole = row.window is None and read("sliding_window") is not None
    return without_rope(kind) if whole else kind


EXAONE4 = Family(
    model_type="exaone4",
    title="EXAONE 4",
    defaults=frozen(rms_norm_eps=1e-5, sliding_window=4096, sliding_window_pattern=4),
    layout="post",
    qkv_bias=False,
    out_bias=False,
    qk_norm="head",
    windows="by_pattern",
    of_layer=_full_without_rope,
)


def _scaled_logits(read: Reader, spec: ModelSpec) -> ModelSpec:
    return replace(spec, logit_scale=float(read("logit_scale", 0.0625)))


COHERE = Family(
    model_type="cohere",
    title="Command R, R+; Aya",
    keys=frozen(rms_norm_eps=("layer_norm_eps",)),
    defaults=frozen(
        rms_norm_eps=1e-5,
        rope_theta=500000.0,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    ),
    norm="layer",
    layout="parallel",
    qk_norm=lambda read: "heads" if read("use_qk_norm") else None,
    rope_pairs="neighbours",
    of_model=_scaled_logits,
)

COHERE2 = replace(
    COHERE,
    model_type="cohere2",
    title="Command R7B, A",
    defaults=frozen(
        **{**COHERE.defaults, "rope_theta": 10000.0},
        sliding_window=4096,
        sliding_window_pattern=4,
    ),
    qk_norm=None,
    windows="by_pattern",
    of_layer=_full_without_rope,
)

STABLELM = Family(
    model_type="stablelm",
    title="StableLM",
    keys=frozen(rms_norm_eps=("layer_norm_eps", "norm_eps")),
    defaults=frozen(rms_norm_eps=1e-5, max_position_embeddings=4096, partial_rotary_factor=0.25),
    names=Names(q_norm="self_attn.q_layernorm", k_norm="self_attn.k_layernorm"),
    norm="layer",
    norm_bias=True,
    layout=lambda read: "parallel" if read("use_parallel_residual") else "pre",
    qkv_bias="use_qkv_bias",
    out_bias=False,
    qk_norm=lambda read: "each" if read("qk_layernorm") else None,
    rotates=rotated,
)

STARCODER2 = Family(
    model_type="starcoder2",
    title="StarCoder2",
    keys=frozen(rms_norm_eps=("norm_epsilon",)),
    defaults=frozen(
        hidden_act="gelu_pytorch_tanh",
        rms_norm_eps=1e-5,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        use_bias=True,
        initializer_range=0.018042,
    ),
    names=Names(up="mlp.c_fc", down="mlp.c_proj"),
    norm="layer",
    norm_bias=True,
    qkv_bias="use_bias",
    out_bias="use_bias",
    windows="every_layer",
    mlp="plain",
    mlp_bias="use_bias",
)

ROWS = (OLMO2, EXAONE4, COHERE, COHERE2, STABLELM, STARCODER2)
