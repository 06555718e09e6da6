# SPDX-License-Identifier: Apache-2.0
"""Phi: the first generations in parallel blocks, Phi-3 and 4 like Llama with fused linears, and
Phi-3-small, whose attention sees blocks.
"""

from dataclasses import replace

from jqx.models import Attention, BlockKind, Mlp, ModelSpec, Names, Sparse

from .family import Family, frozen
from .reader import Reader
from .rope import rotated

PHI = Family(
    model_type="phi",
    title="Phi-1, Phi-1.5, Phi-2",
    keys=frozen(rms_norm_eps=("layer_norm_eps",)),
    defaults=frozen(hidden_act="gelu_new", rms_norm_eps=1e-5, partial_rotary_factor=0.5),
    names=Names(
        final_norm="model.final_layernorm",
        out="self_attn.dense",
        q_norm="self_attn.q_layernorm",
        k_norm="self_attn.k_layernorm",
        up="mlp.fc1",
        down="mlp.fc2",
    ),
    norm="layer",
    norm_bias=True,
    layout="parallel",
    qkv_bias=True,
    out_bias=True,
    qk_norm=lambda read: "head" if read("qk_layernorm") else None,
    qk_norm_bias=True,
    rotates=rotated,
    mlp="plain",
    mlp_bias=True,
    head_bias=True,
)

# Early files of long contexts call their scaling by other names.
PHI3 = Family(
    model_type="phi3",
    title="Phi-3 mini and medium, Phi-3.5, Phi-4",
    defaults=frozen(
        rms_norm_eps=1e-5,
        max_position_embeddings=4096,
        original_max_position_embeddings=4096,
    ),
    qkv="stacked",
    qkv_bias=False,
    out_bias=False,
    rope_types=frozen(su="longrope", yarn="longrope"),
    rotates=rotated,
    windows="every_layer",
    mlp="fused_gated",
)

_UNUSED = (100256, 100258, 100259, 100260, 100264, 100265, *range(100267, 100352))


def _small_attention(read: Reader, row: Attention) -> Attention:
    scaled = read("mup_use_scaling", True)
    factor = read("mup_attn_multiplier", 1.0)
    return replace(row, scale=factor / row.head_dim if scaled else row.scale)


def _small_mlp(read: Reader, row: Mlp) -> Mlp:
    limit = read("gegelu_limit", 20.0)
    return replace(row, limit=None if limit is None else float(limit))


def _small_layer(read: Reader, kind: BlockKind, i: int) -> BlockKind:
    """All layers but every n-th see blocks."""
    sparse = Sparse(
        block=read("blocksparse_block_size", 64),
        near=read("blocksparse_num_local_blocks", 16),
        stride=read("blocksparse_vert_stride", 8),
    )
    assert isinstance(kind.attention, Attention)
    if (i + 1) % read("dense_attention_every_n_layers", 2) == 0:
        return kind
    return replace(kind, attention=replace(kind.attention, sparse=sparse))


def _small_model(read: Reader, spec: ModelSpec) -> ModelSpec:
    width = read("mup_width_multiplier", 8.0)
    unused = read("dummy_token_indices", _UNUSED)
    return replace(
        spec,
        embedding_scale=read("mup_embedding_multiplier", 10.0) or None,
        rounded_scale=False,
        logit_scale=1.0 / width if width else None,
        unused=tuple(token for token in unused if token < spec.vocab),
    )


PHI3_SMALL = Family(
    model_type="phi3small",
    title="Phi-3-small",
    keys=frozen(
        intermediate_size=("ff_intermediate_size", "intermediate_size"),
        rms_norm_eps=("layer_norm_epsilon",),
        rope_theta=("rope_embedding_base", "rope_theta"),
    ),
    defaults=frozen(
        hidden_act="gegelu",
        rms_norm_eps=1e-5,
        rope_theta=1000000.0,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    ),
    names=Names(
        final_norm="model.final_layernorm",
        qkv="self_attn.query_key_value",
        out="self_attn.dense",
        gate_up="mlp.up_proj",
        buffers=("*.rotary_emb.*",),
    ),
    norm="layer",
    norm_bias=True,
    qkv="grouped",
    qkv_bias=True,
    out_bias=True,
    rope_types=frozen(su="longrope"),
    mlp="gegelu",
    mlp_bias=True,
    activations=frozen(gegelu="quick_gelu"),
    of_attention=_small_attention,
    of_mlp=_small_mlp,
    of_layer=_small_layer,
    of_model=_small_model,
)

ROWS = (PHI, PHI3, PHI3_SMALL)
